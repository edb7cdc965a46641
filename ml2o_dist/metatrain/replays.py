"""The queue of rollouts to replay, and the process that replays them: started, found dead, replaced."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from ml2o_dist.config import FaultSettings, LearnerSettings
from ml2o_dist.metatrain.capacity import check_labels
from ml2o_dist.metatrain.dispatch import Task
from ml2o_dist.metatrain.episode import EpisodeResult
from ml2o_dist.metatrain.worker import Replayer
from ml2o_dist.metatrain.worker_loss import LOST, reason
from ml2o_dist.metatrain.workers import POLL_S, actor_options
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.stopping import Stopped


@dataclass(frozen=True, eq=False)
class Replay:
    """A rollout in the replayer's queue, and its result so far."""

    task: Task
    result: EpisodeResult


class Replays:
    """Replays rollouts one after the other, in the order in which they came.

    The rollouts themselves go from the worker to the replayer through Ray's object store; the driver has references
    only.

    Attributes:
        under_way: replays in flight, by the reference of their answer.
    """

    def __init__(self, settings: LearnerSettings, faults: FaultSettings) -> None:
        """Start the replayer without waiting for it; raise UserError if no node has the labels it asks for."""
        check_labels(settings.resources.labels, "learner.resources.labels")
        self._settings, self._faults = settings, faults
        self._answered_at = time.monotonic()
        self.under_way: dict[Any, Replay] = {}
        self._actor = self._start()

    @property
    def full(self) -> bool:
        """Whether the queue is full, so that no more rollouts may begin."""
        return len(self.under_way) >= self._settings.rollouts

    def has(self, task: Task) -> bool:
        """Tell whether a rollout of `task` (from its backup task) is already in flight."""
        return any(replay.task is task for replay in self.under_way.values())

    def add(self, task: Task, result: EpisodeResult, rollout: Any) -> None:
        """Send a task's `rollout` (a reference) to the replayer."""
        if not self.under_way:
            self._answered_at = time.monotonic()
        answer = self._actor.replay.remote(task.batch.weights, task.item.spec, rollout)
        self.under_way[answer] = Replay(task, result)

    def take(self, answer: Any) -> Replay:
        """Remove and return the replay that `answer` belongs to, and note that the replayer is alive."""
        self._answered_at = time.monotonic()
        return self.under_way.pop(answer)

    def overdue(self) -> bool:
        """Tell whether the replayer has work but has not answered for `faults.first_deadline_s`."""
        return bool(self.under_way) and time.monotonic() - self._answered_at > self._faults.first_deadline_s

    def restart(self) -> list[Replay]:
        """End the replayer and start another one; return the replays in flight, which are lost."""
        ray.kill(self._actor)
        lost = list(self.under_way.values())
        self.under_way.clear()
        self._actor = self._start()
        return lost

    def give_up(self) -> None:
        """Cancel and drop the replays in flight."""
        for answer in self.under_way:
            ray.cancel(answer, force=False)
        self.under_way.clear()

    def close(self) -> None:
        """End the replayer."""
        self.under_way.clear()
        ray.kill(self._actor)

    def await_start(self, timeout_s: float, stop_requested: Callable[[], bool]) -> None:
        """Wait until the replayer is up.

        Raises:
            UserError: it does not come up in time, or it died.
            Stopped: a stop was requested meanwhile.
        """
        up, limit, needs = self._actor.where.remote(), time.monotonic() + timeout_s, self._settings.resources
        while not ray.wait([up], timeout=POLL_S)[0]:
            if stop_requested():
                raise Stopped
            if time.monotonic() > limit:
                raise UserError(
                    f"the process that replays (backward=learner) could not be placed in {timeout_s:g} s: it needs "
                    f"{needs.num_cpus:g} CPU and {needs.num_gpus:g} GPU (learner.resources)"
                )
        try:
            ray.get(up)
        except LOST as error:
            raise UserError(
                f"the process that replays (backward=learner) died at its start: {reason(error)}"
            ) from error

    def _start(self) -> Any:
        needs = self._settings.resources
        device = "cuda" if needs.num_gpus > 0 else "cpu"
        return ray.remote(Replayer).options(**actor_options(needs)).remote(device)
