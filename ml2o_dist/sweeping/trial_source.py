"""The source of Ray Tune's trials: first the resumed trials of an earlier process, then newly drawn ones."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.search_algorithm import SearchAlgorithm

from ml2o_dist.runtime.ray_internals import ray_internal
from ml2o_dist.sweeping.settings import Distribution, SweepSettings
from ml2o_dist.sweeping.space import as_sampled
from ml2o_dist.sweeping.trial import SCORE, TIME

_DRAWN = re.compile(r".*_(\d{5,12})")


@dataclass(frozen=True)
class Earlier:
    """A trial that an earlier process has begun.

    Attributes:
        values: values of the search space by key that it resumes with.
        ended: whether it has finished or its scheduler has stopped it; such a trial does not run again.
        scores: the reported scores by meta-step.
        checkpoint: the folder that it resumes from; None if it restarts from the beginning or has ended.
        meta_step: the meta-step of `checkpoint`.
        newest: the number of its newest checkpoint, whether it resumes from that or not; -1 if it has none.
    """

    id: str
    values: Mapping[str, Any]
    ended: bool
    scores: Mapping[int, float]
    checkpoint: Path | None
    meta_step: int
    newest: int

    @property
    def drawn(self) -> int:
        """Its index among the drawn trials, from 0."""
        return drawn_number(self.id)


def drawn_number(id: str) -> int:
    """Return the index, from 0, of the drawn trial with this id; -1 if the id does not contain it."""
    found = _DRAWN.fullmatch(id)
    return int(found[1]) if found else -1


class TrialSource(SearchAlgorithm):  # type: ignore[misc]  # Ray is not followed
    """Gives Tune each trial once, `max_concurrent` at a time.

    Random search and grids draw all trials from the seed, in the same order in every process; those not on record are
    run. Optuna is told all scores on record and asked for the remaining trials.
    """

    def __init__(self, settings: SweepSettings, earlier: Sequence[Earlier] = ()) -> None:
        self._settings = settings
        # Trials that have ended or wait for an exchange take no pending slot, so they are given to Tune first.
        self._earlier = sorted(earlier, key=lambda each: not each.ended and each.checkpoint is None)
        self._known = {each.drawn for each in earlier}
        self._drawn = BasicVariantGenerator(random_state=settings.seed)
        self._carriers = BasicVariantGenerator(random_state=settings.seed)
        self._given: list[Trial] = []
        self._asking: OptunaSuggestions | None = None
        if settings.search == "optuna":
            self._known = set(range(len(earlier)))
            self._asking = OptunaSuggestions(settings, earlier)

    @property
    def total_samples(self) -> int:
        return int(self._drawn.total_samples)

    def add_configurations(self, experiments: Any) -> None:
        self._drawn.add_configurations(experiments)
        self._carriers.add_configurations(experiments)

    def next_trial(self) -> Trial | None:
        """Return a trial that has not been given yet; None if there is none (now)."""
        live = [trial for trial in self._given if not trial.is_finished()]
        if self._settings.max_concurrent and len(live) >= self._settings.max_concurrent:
            return None
        trial = self._again(self._earlier.pop(0)) if self._earlier else self._new()
        if trial is not None:
            self._given.append(trial)
        return trial

    def is_finished(self) -> bool:
        return not self._earlier and self._drawn.is_finished()

    def set_finished(self) -> None:
        self._earlier.clear()
        self._drawn.set_finished()

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        if self._asking is not None:
            trial = next(trial for trial in self._given if trial.trial_id == trial_id)
            score = None if error else (result or {}).get(SCORE)
            self._asking.tell(trial_id, trial.config, score)

    def _new(self) -> Trial | None:
        while (trial := self._drawn.next_trial()) is not None:
            number = drawn_number(trial.trial_id)
            if number in self._known:
                continue
            if self._asking is not None:
                _set_values(trial, self._asking.ask(trial.trial_id, number))
            return trial
        return None

    def _again(self, earlier: Earlier) -> Trial:
        """Return a trial with the name and the progress of the earlier one."""
        trial = self._carriers.next_trial()
        trial.trial_id = trial.custom_trial_name = trial.custom_dirname = earlier.id
        space = self._settings.space
        _set_values(trial, {key: as_sampled(space[key], value) for key, value in earlier.values.items()})
        with ray_internal("ray.tune.experiment.Trial"):
            trial.relative_logdir = trial.storage.trial_dir_name = earlier.id
            trial.storage.current_checkpoint_index = earlier.newest
        if earlier.ended:
            trial.set_status(Trial.TERMINATED)
        elif earlier.checkpoint is not None:
            metrics = {TIME: earlier.meta_step, SCORE: earlier.scores.get(earlier.meta_step, math.inf)}
            checkpoint = tune.Checkpoint.from_directory(earlier.checkpoint)
            with ray_internal("ray.train._internal.session._TrainingResult"):
                from ray.train._internal.session import _TrainingResult

                found = _TrainingResult(checkpoint, {**metrics, "training_iteration": len(earlier.scores)})
                trial.run_metadata.checkpoint_manager.register_checkpoint(found)
        return trial


def _set_values(trial: Trial, sampled: Mapping[str, Any]) -> None:
    trial.set_config(dict(sampled))
    trial.evaluated_params = dict(sampled)


class OptunaSuggestions:
    """Optuna's tree-structured Parzen estimator, asked one trial at a time.

    A suggestion depends only on the seed, the trial's number and the scores so far; a kill loses none of these.
    """

    def __init__(self, settings: SweepSettings, earlier: Sequence[Earlier]) -> None:
        self._settings = settings
        self._told = [each for each in earlier if each.ended]
        self._asked: dict[str, Any] = {}
        self._study: Any = None

    def ask(self, id: str, number: int) -> dict[str, Any]:
        """Return sampled values by key for a trial."""
        import optuna

        study = self._begun()
        seed = np.random.SeedSequence([self._settings.seed, number]).generate_state(1)[0]
        study.sampler = optuna.samplers.TPESampler(seed=int(seed))
        self._asked[id] = study.ask(self._distributions())
        return dict(self._asked[id].params)

    def tell(self, id: str, sampled: Mapping[str, Any], score: float | None) -> None:
        """Tell Optuna the score of a trial that has ended; None if the trial failed or has no score."""
        import optuna

        study = self._begun()
        known = score is not None and math.isfinite(score)
        state = optuna.trial.TrialState.COMPLETE if known else optuna.trial.TrialState.FAIL
        if id in self._asked:
            study.tell(self._asked.pop(id), score if known else None, state=state)
            return
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=score if known else None,
                params=dict(sampled),
                distributions=self._distributions(),
            )
        )

    def _begun(self) -> Any:
        if self._study is None:
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self._study = optuna.create_study(direction="minimize")
            space = self._settings.space
            for each in self._told:
                sampled = {key: as_sampled(space[key], value) for key, value in each.values.items()}
                self.tell(each.id, sampled, each.scores[max(each.scores)] if each.scores else None)
        return self._study

    def _distributions(self) -> dict[str, Any]:
        return {key: _distribution(each) for key, each in self._settings.space.items()}


def _distribution(each: Distribution) -> Any:
    import optuna

    if each.interval is None:
        return optuna.distributions.CategoricalDistribution([as_sampled(each, value) for value in each.values])
    low, high = each.interval
    if each.whole:
        return optuna.distributions.IntDistribution(int(low), int(high), log=each.logarithmic)
    return optuna.distributions.FloatDistribution(low, high, log=each.logarithmic)
