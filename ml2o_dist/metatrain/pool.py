"""A set of rollout workers that survives the death of any of them: a key whose worker died runs again elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from ml2o_dist.config import ResourceSettings
from ml2o_dist.errors import UserError
from ml2o_dist.metatrain.episode import EpisodeResult, Weights
from ml2o_dist.metatrain.schedule import WorkItem
from ml2o_dist.metatrain.worker import RolloutWorker

LOST = (RayActorError, ObjectLostError, OwnerDiedError, WorkerCrashedError, OutOfMemoryError, NodeDiedError)
"""What Ray raises when a result died with its worker or node."""

POLL_S = 0.2
"""How often the driver looks whether it was asked to stop."""

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The run was asked to stop; nothing of the meta-step under way was used."""


class PoolError(Exception):
    """The pool cannot go on; the run ends with a checkpoint."""


class WorkerPool:
    """`workers` Ray actors, each with one item in flight, longest items first.

    Results come back in the order of the items whoever computed them. A worker that died is replaced, within the
    budget of `resources.max_restarts`, and its item runs again.
    """

    def __init__(
        self, workers: int, resources: ResourceSettings, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        self._resources = resources
        self._stop_requested = stop_requested
        self._cost: dict[str, float] = {}
        self.restarts = 0
        _check_capacity(workers, resources)
        self._actors = [_start(resources) for _ in range(workers)]
        self._starting: dict[Any, Any] = {}
        self._start_limit = 0.0
        try:
            self._await_start()
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> int:
        """How many workers are up."""
        return len(self._actors) - len(self._starting)

    def pids(self) -> list[int]:
        """Return the workers' process ids."""
        return list(ray.get([actor.pid.remote() for actor in self._actors]))

    def run(self, items: Sequence[WorkItem], weights: Weights) -> list[EpisodeResult]:
        """Run all items under `weights`; return their results in the order given.

        Raises:
            Stopped: a stop was requested meanwhile.
            UserError: an episode found its settings or data wrong.
            PoolError: an episode failed otherwise, or more workers died than the budget allows.
        """
        reference = ray.put(weights)
        waiting = sorted(range(len(items)), key=lambda i: self._expected(items[i]))
        idle = [actor for actor in self._actors if actor not in self._starting.values()]
        in_flight: dict[Any, tuple[int, Any]] = {}
        results: dict[int, EpisodeResult] = {}
        try:
            while len(results) < len(items):
                while waiting and idle:
                    index, actor = waiting.pop(), idle.pop()
                    in_flight[actor.run.remote(reference, items[index].spec)] = (index, actor)
                ready, _ = ray.wait([*in_flight, *self._starting], num_returns=1, timeout=POLL_S)
                if self._stop_requested():
                    raise Stopped
                if not in_flight and not idle:
                    self._check_starting()
                for future in ready:
                    if future in self._starting:
                        idle += self._started(future)
                        continue
                    index, actor = in_flight.pop(future)
                    try:
                        results[index] = ray.get(future)
                        self._learn_cost(items[index], results[index])
                        idle.append(actor)
                    except RayTaskError as error:
                        if isinstance(error.cause, UserError):
                            raise UserError(str(error.cause)) from None
                        item = items[index]
                        raise PoolError(f"{item.key} ({item.spec.problem}) failed: {error.cause!r}") from error
                    except LOST as error:
                        log.warning("a worker died in %s; it runs again elsewhere", items[index].key)
                        waiting.append(index)
                        self._replace(actor, error)
        finally:
            for future in in_flight:
                ray.cancel(future, force=False)
        return [results[i] for i in range(len(items))]

    def close(self) -> None:
        """End all workers."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _await_start(self) -> None:
        pending = {actor.pid.remote(): actor for actor in self._actors}
        limit = time.monotonic() + self._resources.start_timeout_s
        while pending:
            if self._stop_requested():
                raise Stopped
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=POLL_S)
            for future in ready:
                try:
                    ray.get(future)
                except LOST as error:
                    raise UserError(f"a worker died while it started: {_first_line(error)}") from error
                del pending[future]
            if pending and not ready and time.monotonic() > limit:
                free, total = ray.available_resources(), len(self._actors)
                raise UserError(
                    f"only {total - len(pending)} of workers={total} could be placed in resources.start_timeout_s="
                    f"{self._resources.start_timeout_s:g}: each needs {_need(self._resources)}, the cluster has "
                    f"{free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU free; ask for fewer workers"
                )

    def _replace(self, actor: Any, cause: Exception) -> None:
        """Start a worker in place of `actor`; it is given work once it answers."""
        self.restarts += 1
        if self.restarts > self._resources.max_restarts:
            raise PoolError(
                f"{self.restarts} workers died, resources.max_restarts={self._resources.max_restarts}; the last: "
                f"{_first_line(cause)}"
            ) from cause
        ray.kill(actor)
        fresh = _start(self._resources)
        self._actors[self._actors.index(actor)] = fresh
        self._starting[fresh.pid.remote()] = fresh
        self._start_limit = time.monotonic() + self._resources.start_timeout_s

    def _started(self, future: Any) -> list[Any]:
        """Return the replacement behind `future` in a list; an empty one where it died too and was replaced again."""
        actor = self._starting.pop(future)
        try:
            ray.get(future)
        except LOST as error:
            self._replace(actor, error)
            return []
        return [actor]

    def _check_starting(self) -> None:
        if time.monotonic() > self._start_limit:
            raise PoolError(
                f"no worker is left, and no replacement could be placed in resources.start_timeout_s="
                f"{self._resources.start_timeout_s:g}"
            )

    def _expected(self, item: WorkItem) -> float:
        """Expected seconds; an unknown problem counts as long, so that it starts early."""
        return self._cost.get(str(item.spec.problem), float("inf"))

    def _learn_cost(self, item: WorkItem, result: EpisodeResult) -> None:
        self._cost[str(item.spec.problem)] = result.seconds / result.inner_steps


def _start(resources: ResourceSettings) -> Any:
    return (
        ray.remote(RolloutWorker)
        .options(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        .remote()
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _need(resources: ResourceSettings) -> str:
    return f"{resources.num_cpus:g} CPU" + (f" and {resources.num_gpus:g} GPU" if resources.num_gpus else "")


def _check_capacity(workers: int, resources: ResourceSettings) -> None:
    total = ray.cluster_resources()
    for kind, each in (("CPU", resources.num_cpus), ("GPU", resources.num_gpus)):
        have = total.get(kind, 0.0)
        if workers * each > have:
            raise UserError(
                f"workers={workers} needs {workers * each:g} {kind} ({each:g} each), the cluster has {have:g}: "
                f"{workers * each - have:g} missing; lower workers or resources.num_{kind.lower()}s, or add nodes"
            )
