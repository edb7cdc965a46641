"""Population-based training in lockstep that a kill does not change: every exchange can be repeated identically."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from ml2o_dist.runtime.ray_internals import check_has

Recorded = Mapping[str, Mapping[int, float]]
"""Scores by meta-step that trials reported to earlier processes, by trial id."""

OnCopy = Callable[[str, str, int, Mapping[str, Any]], None]
"""Called with the id of a trial, the id of the trial whose checkpoint it gets, the meta-step, the sampled values."""


class LockstepPbt(PopulationBasedTraining):  # type: ignore[misc]  # Ray is not followed
    """All trials wait for each other every `interval` meta-steps; then the worst resume from the best's checkpoints.

    Tune's own class does so with `synch=True`, but it does not save the trials' positions, so that they run out of step
    after a kill, and it waits without end for a trial that has failed. Here:

    - a trial's position is the meta-step of its newest checkpoint; a trial at the exchange waits for the others;
    - the random draws of an exchange depend only on the seed, the meta-step and the trial's number, and its scores are
      those on record: an exchange that no trial has resumed from is repeated, with the same outcome;
    - a trial that has failed is waited for no more.
    """

    def __init__(self, recorded: Recorded, seed: int, on_copy: OnCopy, **settings: Any) -> None:
        """Create the scheduler; `on_copy` is called for each copy before it takes effect, `settings` are Tune's."""
        check_has(PopulationBasedTraining, "_checkpoint_or_exploit", "_exploit", "_quantiles", "_save_trial_state")
        super().__init__(synch=True, log_config=False, **settings)
        self._recorded, self._seed, self._on_copy = recorded, seed, on_copy
        self._in_step = False

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a new trial, or one that resumes from a checkpoint; a retried trial is already known."""
        if trial in self._trial_state:
            return
        super().on_trial_add(tune_controller, trial)
        if trial.latest_checkpoint_result and not trial.is_finished():
            trial.set_status(Trial.PAUSED)  # `choose_trial_to_run` decides when it resumes

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Let the trial run to the next exchange and wait for the others there."""
        if result[self._time_attr] < self._next_perturbation_sync:
            return str(TrialScheduler.CONTINUE)
        self._save_trial_state(self._trial_state[trial], result[self._time_attr], result, trial)
        self._exchange_if_all_wait(tune_controller)
        return str(TrialScheduler.NOOP if trial.status == Trial.PAUSED else TrialScheduler.PAUSE)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Return a trial that has not reached the next exchange; None if there is none."""
        if not self._in_step:
            self._in_step = True
            self._bring_into_step(_unfinished(tune_controller))
        self._exchange_if_all_wait(tune_controller)  # in case the last awaited trial failed
        return super().choose_trial_to_run(tune_controller)

    def _bring_into_step(self, trials: list[Any]) -> None:
        """Determine the positions of a resumed sweep's trials, and which exchange is next."""
        results = {each: each.latest_checkpoint_result.metrics for each in trials if each.latest_checkpoint_result}
        steps = {each: results[each][self._time_attr] if each in results else 0 for each in trials}
        if not results:
            return
        last = max(steps.values()) // self._perturbation_interval * self._perturbation_interval
        # If no trial, ended or not, is beyond that exchange, it has had no effect yet: it is made (again).
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
        """Copy a checkpoint and report the copy."""
        super()._exploit(tune_controller, trial, trial_to_clone)
        self._on_copy(trial.trial_id, trial_to_clone.trial_id, self._next_perturbation_sync, trial.config)


def _number(trial: Any) -> str:
    """Return the part of the trial's id that is the same in every sweep with the same seed."""
    return str(trial.trial_id).rpartition("_")[2]


def _unfinished(tune_controller: Any) -> list[Any]:
    return [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
