"""How trials are drawn, stopped early and exchanged: a sweep's settings as objects of Ray Tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.sweeping.population import LockstepPbt, OnCopy, Recorded
from ml2o_dist.sweeping.settings import Distribution, SweepSettings
from ml2o_dist.sweeping.space import as_sampled
from ml2o_dist.sweeping.trial import SCORE, TIME
from ml2o_dist.sweeping.trial_source import Earlier, TrialSource


def tune_config(settings: SweepSettings, earlier: Sequence[Earlier], on_copy: OnCopy) -> Any:
    """Return Tune's configuration for a sweep, which resumes the trials of an `earlier` process if there are any.

    Population-based training calls `on_copy` when a trial resumes from another trial's checkpoint.

    Raises:
        UserError: search=optuna, which is not installed.
    """
    check_search(settings)
    np.random.seed(settings.seed % 2**32)  # ASHA draws its brackets with it
    return tune.TuneConfig(
        metric=SCORE,
        mode="min",
        num_samples=1 if settings.search == "grid" else settings.count,
        search_alg=TrialSource(settings, earlier),
        scheduler=_scheduler(settings, {each.id: each.scores for each in earlier}, on_copy),
        trial_name_creator=_name,
        trial_dirname_creator=_name,
    )


def param_space(settings: SweepSettings) -> dict[str, Any]:
    """Return the search space in Tune's form, by dotted key."""
    if settings.search == "grid":
        return {
            key: tune.grid_search([as_sampled(each, value) for value in each.values])
            for key, each in settings.space.items()
        }
    return {key: _domain(each) for key, each in settings.space.items()}


def check_search(settings: SweepSettings) -> None:
    """Raise UserError if the search library is not installed."""
    if settings.search == "optuna":
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise UserError(
                "search=optuna needs optuna: pip install 'ml2o-dist[sweep]', from a checkout pip install -e '.[sweep]'"
            ) from None


def _scheduler(settings: SweepSettings, recorded: Recorded, on_copy: OnCopy) -> Any:
    every = settings.meta_train.validation.every
    if settings.scheduler == "asha":
        return asha(settings, recorded)
    if settings.scheduler == "pbt":
        return LockstepPbt(
            recorded,
            settings.seed,
            on_copy,
            time_attr=TIME,
            perturbation_interval=settings.pbt.interval or every,
            hyperparam_mutations={
                key: [as_sampled(each, value) for value in each.values] if each.interval is None else _domain(each)
                for key, each in settings.space.items()
            },
            quantile_fraction=settings.pbt.quantile,
            resample_probability=settings.pbt.resample,
            custom_explore_fn=partial(_inside, settings.space),
        )
    return FIFOScheduler()


def asha(settings: SweepSettings, recorded: Recorded) -> RememberingAsha:
    """Return the scheduler of scheduler=asha, which knows the `recorded` scores of trials before they are added.

    Tune tells it the name of the score with `set_search_properties`.
    """
    return RememberingAsha(
        recorded,
        time_attr=TIME,
        max_t=longest(settings),
        grace_period=settings.asha.grace or settings.meta_train.validation.every,
        reduction_factor=settings.asha.reduction,
    )


def result(meta_step: int, score: float) -> dict[str, Any]:
    """Return the part of a trial's report that schedulers use."""
    return {TIME: meta_step, SCORE: score}


def longest(settings: SweepSettings) -> int:
    """Return the most meta-steps that a trial may have."""
    swept = settings.space.get("meta_steps")
    return max(swept.values) if swept else settings.meta_train.meta_steps


class RememberingAsha(ASHAScheduler):  # type: ignore[misc]  # Ray is not followed
    """ASHA that, in a resumed sweep, knows the earlier reports of its trials."""

    def __init__(self, recorded: Recorded, **settings: Any) -> None:
        super().__init__(**settings)
        self._recorded = recorded

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Enter the trial's earlier reports into their rungs again; the decisions on them are already carried out."""
        super().on_trial_add(tune_controller, trial)
        for step, score in self._recorded.get(trial.trial_id, {}).items():
            self.on_trial_result(tune_controller, trial, result(step, score))


def _inside(space: Mapping[str, Distribution], sampled: dict[str, Any]) -> dict[str, Any]:
    """Bring values that PBT has changed by a factor back into their intervals."""
    for key, each in space.items():
        if each.interval is not None:
            low, high = each.interval
            sampled[key] = min(max(sampled[key], low), high)
            if each.whole:
                sampled[key] = round(sampled[key])
    return sampled


def _domain(each: Distribution) -> Any:
    if each.interval is None:
        return tune.choice([as_sampled(each, value) for value in each.values])
    low, high = each.interval
    draw = getattr(tune, each.kind)
    return draw(int(low), int(high) + 1) if each.whole else draw(low, high)


def _name(trial: Any) -> str:
    return str(trial.trial_id)
