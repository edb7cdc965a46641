"""Population-based training in lockstep that a kill does not change: every exchange can be made again, the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from ml2o_dist.runtime.ray_internals import check_has

Recorded = Mapping[str, Mapping[int, float]]
"""What trials have reported before the process that goes on, by their id: scores by meta-step."""

OnCopy = Callable[[str, str, int, Mapping[str, Any]], None]
"""Takes the ids of a trial and of the one whose checkpoint it is given, the meta-step, and the sampled values."""


class LockstepPbt(PopulationBasedTraining):  # type: ignore[misc]  # Ray is not followed
    """All trials wait for each other every `interval` meta-steps; then the worst go on from the best ones' checkpoints.

    Tune's own class does so with `synch=True`, but saves nothing of where its trials are, so that after a kill they
    run out of step, and waits without end for a trial that has failed. Here:

    - where a trial is, is what its newest checkpoint says; one that has reached the exchange waits for the others;
    - what is drawn at an exchange depends on the seed, the meta-step and the trial's number alone, and its scores are
      those on record: one that no trial has gone on from is made again, with the same outcome;
    - a trial that has failed is waited for no more.
    """

    def __init__(self, recorded: Recorded, seed: int, on_copy: OnCopy, **settings: Any) -> None:
        """`on_copy` is told of each copy before anything follows from it; `settings` are Tune's."""
        check_has(PopulationBasedTraining, "_checkpoint_or_exploit", "_exploit", "_quantiles", "_save_trial_state")
        super().__init__(synch=True, log_config=False, **settings)
        self._recorded, self._seed, self._on_copy = recorded, seed, on_copy
        self._in_step = False

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take a new trial, or one that goes on from a checkpoint; one that is tried again is known."""
        if trial in self._trial_state:
            return
        super().on_trial_add(tune_controller, trial)
        if trial.latest_checkpoint_result and not trial.is_finished():
            trial.set_status(Trial.PAUSED)  # `choose_trial_to_run` says when it goes on

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Let the trial go on to the next exchange, and there wait for the others."""
        if result[self._time_attr] < self._next_perturbation_sync:
            return str(TrialScheduler.CONTINUE)
        self._save_trial_state(self._trial_state[trial], result[self._time_attr], result, trial)
        self._exchange_if_all_wait(tune_controller)
        return str(TrialScheduler.NOOP if trial.status == Trial.PAUSED else TrialScheduler.PAUSE)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Return a trial that has not reached the next exchange; None where there is none."""
        if not self._in_step:
            self._in_step = True
            self._bring_into_step(_unfinished(tune_controller))
        self._exchange_if_all_wait(tune_controller)  # here: if the last one that was waited for has failed
        return super().choose_trial_to_run(tune_controller)

    def _bring_into_step(self, trials: list[Any]) -> None:
        """Find out where the trials of a sweep that is gone on with are, and which exchange is the next."""
        results = {each: each.latest_checkpoint_result.metrics for each in trials if each.latest_checkpoint_result}
        steps = {each: results[each][self._time_attr] if each in results else 0 for each in trials}
        if not results:
            return
        last = max(steps.values()) // self._perturbation_interval * self._perturbation_interval
        # Where no trial, ended or not, is beyond it, nothing has followed from that exchange: it is made (again).
        done = max([*steps.values(), *(step for scores in self._recorded.values() for step in scores)]) > last
        self._next_perturbation_sync = max(last + self._perturbation_interval * done, self._perturbation_interval)
        for trial, step in steps.items():
            state = self._trial_state[trial]
            state.last_train_time = step
            if step >= self._next_perturbation_sync:
                score = self._recorded.get(trial.trial_id, {}).get(step, results[trial][self._metric])
                state.last_score, state.last_result = self._metric_op * score, results[trial]

    def _exchange_if_all_wait(self, tune_controller: Any) -> None:
        trials = _unfinished(tune_controller)
        due = self._next_perturbation_sync
        if not trials or any(self._trial_state[each].last_train_time < due for each in trials):
            return
        lower, upper = self._quantiles()
        upper = sorted(upper, key=_number)
        between = [each for each in trials if each not in lower and each not in upper]
        for trial in [*upper, *between, *lower]:  # checkpoints are asked for before they are copied
            random.seed(f"{self._seed} {due} {_number(trial)}")
            np.random.seed(random.getrandbits(32))
            self._checkpoint_or_exploit(trial, tune_controller, upper, lower)
        self._next_perturbation_sync += self._perturbation_interval

    def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
        """Copy, and say so."""
        super()._exploit(tune_controller, trial, trial_to_clone)
        self._on_copy(trial.trial_id, trial_to_clone.trial_id, self._next_perturbation_sync, trial.config)


def _number(trial: Any) -> str:
    """Return the part of an id that is the same in every sweep of a seed."""
    return str(trial.trial_id).rpartition("_")[2]


def _unfinished(tune_controller: Any) -> list[Any]:
    return [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
