"""A set of rollout workers that survives the death, hanging or failing of any of them: the key runs again elsewhere."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from ml2o_dist.config import FaultSettings, ResourceSettings
from ml2o_dist.errors import UserError
from ml2o_dist.metatrain.capacity import check_capacity, cluster_total, free_room
from ml2o_dist.metatrain.costs import Costs
from ml2o_dist.metatrain.episode import EpisodeResult, Weights, failed_episode
from ml2o_dist.metatrain.schedule import WorkItem
from ml2o_dist.metatrain.worker import RolloutWorker
from ml2o_dist.metatrain.worker_loss import LOST, reason

POLL_S = 0.2
"""How often the driver looks whether it was asked to stop."""

BUDGET_S = 3600.0
"""`resources.max_restarts` counts the replacements of so long a time: a crash loop ends a run, a spot node does not."""

RUNS_PER_ERROR = 2
"""A key whose episode raised runs again once, on another worker: an error of the machine is not one of the episode."""

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The run was asked to stop; nothing of the meta-step under way was used."""


class PoolError(Exception):
    """The pool cannot go on; the run ends with a checkpoint."""


@dataclass(eq=False)
class _Worker:
    """One actor; `pid` is known once it is up. Who replaces it has its number, counted from 1."""

    actor: Any
    number: int
    pid: int = 0

    def __str__(self) -> str:
        return f"worker {self.number} (pid {self.pid})" if self.pid else f"worker {self.number}"


@dataclass(eq=False)
class _Task:
    """An item on its way to a result: how often it ran, where it failed last, how often it raised or was overdue."""

    index: int
    item: WorkItem
    runs: int = 0
    avoid: _Worker | None = None
    errors: int = 0
    overdue: int = 0


@dataclass(frozen=True, eq=False)
class _Flight:
    """A task that `worker` is working on, and until when (monotonic) it may."""

    task: _Task
    worker: _Worker
    deadline: float


class WorkerPool:
    """`workers` Ray actors, each with one item in flight, longest items first.

    Results come back in the order of the items whoever computed them. A worker that died, or that is far slower than
    its item's kind was so far (it hangs, or was stopped), is ended and replaced, and its item runs again.

    Attributes:
        restarts: workers replaced so far.
        repeated: episodes run again so far, after their worker was lost or they raised.
    """

    def __init__(
        self,
        workers: int,
        resources: ResourceSettings,
        faults: FaultSettings = FaultSettings(),  # noqa: B008  # frozen
        *,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Start the workers and wait until all are up.

        Raises:
            UserError: the cluster has no room for them, or they do not come up in `resources.start_timeout_s`.
            Stopped: a stop was requested meanwhile.
        """
        self._resources = resources
        self._faults = faults
        self._stop_requested = stop_requested
        self._costs = Costs(faults)
        self._replaced_at: deque[float] = deque()
        self._short_since = math.inf
        self.restarts = 0
        self.repeated = 0
        check_capacity(workers, resources, cluster_total(), "the cluster")
        self._up: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._starting: dict[Any, _Worker] = {}
        try:
            for number in range(1, workers + 1):
                self._start(number)
            self._await_start()
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> int:
        """How many workers are up."""
        return len(self._up)

    def pids(self) -> list[int]:
        """Return the process ids of the workers that are up."""
        return [worker.pid for worker in self._up]

    def run(self, items: Sequence[WorkItem], weights: Weights) -> list[EpisodeResult]:
        """Run all items under `weights`; return their results in the order given.

        An item whose episode raised twice ends the run, or with `faults.on_error=skip` has `failed_episode` for its
        result.

        Raises:
            Stopped: a stop was requested meanwhile.
            UserError: an episode found its settings or data wrong.
            PoolError: an episode failed otherwise, more workers had to be replaced than the budget allows, or fewer
                than `resources.min_workers` were up for `resources.start_timeout_s`.
        """
        reference = ray.put(weights)
        tasks = [_Task(index, item) for index, item in enumerate(items)]
        waiting = sorted(tasks, key=lambda task: self._costs.expected(task.item))
        in_flight: dict[Any, _Flight] = {}
        results: dict[int, EpisodeResult] = {}
        self._idle = list(self._up)
        try:
            while len(results) < len(items):
                self._assign(waiting, in_flight, reference)
                ready, _ = ray.wait([*in_flight, *self._starting], num_returns=1, timeout=POLL_S)
                if self._stop_requested():
                    raise Stopped
                for future in ready:
                    if future in self._starting:
                        self._idle += self._started(future)
                        continue
                    flight = in_flight.pop(future)
                    result = self._outcome(future, flight)
                    if result is None:
                        waiting.append(flight.task)
                    else:
                        results[flight.task.index] = result
                waiting += self._end_overdue(in_flight)
                self._check_floor()
        finally:
            for future in in_flight:
                ray.cancel(future, force=False)
        return [results[i] for i in range(len(items))]

    def close(self) -> None:
        """End all workers; Ray itself kills a process that does not answer within some seconds."""
        for worker in [*self._up, *self._starting.values()]:
            ray.kill(worker.actor)
        self._up, self._idle, self._starting = [], [], {}

    def _assign(self, waiting: list[_Task], in_flight: dict[Any, _Flight], reference: Any) -> None:
        """Give the idle workers the longest tasks that wait, none while fewer are up than `resources.min_workers`."""
        if self.alive < self._resources.min_workers:
            return
        for task in reversed(list(waiting)):
            others = [worker for worker in self._idle if worker is not task.avoid or self.alive == 1]
            if not others:
                continue
            worker = others[-1]
            self._idle.remove(worker)
            waiting.remove(task)
            task.runs += 1
            self.repeated += task.runs > 1
            future = worker.actor.run.remote(reference, task.item.spec)
            in_flight[future] = _Flight(task, worker, time.monotonic() + self._costs.allowed(task.item, task.overdue))

    def _outcome(self, future: Any, flight: _Flight) -> EpisodeResult | None:
        """Return the result of a flight that has ended, None where its task is to run again."""
        task, worker = flight.task, flight.worker
        try:
            result: EpisodeResult = ray.get(future)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            self._idle.append(worker)
            return self._raised(task, worker, error)
        except LOST as error:
            log.warning("%s: %s is lost: %s; it runs again elsewhere", task.item.key, worker, reason(error))
            log.debug("the whole of it: %s", error)
            self._replace(worker, f"{worker}: {reason(error)}")
            return None
        self._idle.append(worker)
        self._costs.learn(task.item, result)
        return result

    def _raised(self, task: _Task, worker: _Worker, error: RayTaskError) -> EpisodeResult | None:
        task.errors += 1
        task.avoid = worker
        what = f"{task.item.key} ({task.item.spec.problem}) failed"
        if task.errors < RUNS_PER_ERROR:
            log.warning("%s: %r; it runs once more, elsewhere if there is another worker", what, error.cause)
            return None
        if self._faults.on_error == "skip":
            log.warning("%s twice: %r; skipped (faults.on_error=skip)", what, error.cause)
            return failed_episode(repr(error.cause))
        raise PoolError(f"{what}: {error.cause!r} (twice; faults.on_error=skip goes on without it)") from error

    def _end_overdue(self, in_flight: dict[Any, _Flight]) -> list[_Task]:
        """Replace the workers whose deadline has passed; return their tasks, which get twice the time."""
        now = time.monotonic()
        late = [(future, flight) for future, flight in in_flight.items() if now > flight.deadline]
        for future, flight in late:
            task = flight.task
            log.warning(
                "%s did not end in %.0f s: %s is ended, the episode runs elsewhere, with twice the time",
                task.item.key,
                self._costs.allowed(task.item, task.overdue),
                flight.worker,
            )
            task.overdue += 1
            del in_flight[future]
            self._replace(flight.worker, f"{task.item.key} did not end in time")
        return [flight.task for _, flight in late]

    def _start(self, number: int) -> None:
        resources = self._resources
        actor = (
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
        self._starting[actor.pid.remote()] = _Worker(actor, number)

    def _replace(self, worker: _Worker, cause: str) -> None:
        """Start a worker in place of `worker`; it is given work once it answers."""
        ray.kill(worker.actor)
        if worker in self._up:
            self._up.remove(worker)
        now = time.monotonic()
        self._replaced_at.append(now)
        while now - self._replaced_at[0] > BUDGET_S:
            self._replaced_at.popleft()
        if len(self._replaced_at) > self._resources.max_restarts:
            raise PoolError(
                f"{len(self._replaced_at)} workers were lost within an hour, "
                f"resources.max_restarts={self._resources.max_restarts}; the last: {cause}"
            )
        self.restarts += 1
        self._start(worker.number)

    def _started(self, future: Any) -> list[_Worker]:
        """Return the worker behind `future` in a list; an empty one where it died and was replaced again."""
        worker = self._starting.pop(future)
        try:
            return [self._come_up(worker, future)]
        except LOST as error:
            self._replace(worker, f"{worker}: {reason(error)}")
            return []

    def _come_up(self, worker: _Worker, future: Any) -> _Worker:
        worker.pid = ray.get(future)
        self._up.append(worker)
        return worker

    def _check_floor(self) -> None:
        """Say once what is waited for while too few workers are up; raise PoolError when it has taken too long."""
        resources, now = self._resources, time.monotonic()
        if self.alive >= resources.min_workers:
            self._short_since = math.inf
            return
        missing = f"{self.alive} workers are up, resources.min_workers={resources.min_workers}"
        if self._short_since == math.inf:
            self._short_since = now
            log.warning("%s: waiting up to %g s for more; %s", missing, resources.start_timeout_s, free_room(resources))
        elif now - self._short_since > resources.start_timeout_s:
            raise PoolError(
                f"{missing}, and no other came up in resources.start_timeout_s={resources.start_timeout_s:g}: "
                f"{free_room(resources)}"
            )

    def _await_start(self) -> None:
        """Wait until every worker is up."""
        limit, total = time.monotonic() + self._resources.start_timeout_s, len(self._starting)
        while self._starting:
            if self._stop_requested():
                raise Stopped
            ready, _ = ray.wait(list(self._starting), num_returns=1, timeout=POLL_S)
            for future in ready:
                worker = self._starting.pop(future)
                try:
                    self._come_up(worker, future)
                except LOST as error:
                    raise UserError(f"{worker} died while it started: {reason(error)}") from error
            if self._starting and not ready and time.monotonic() > limit:
                raise UserError(
                    f"only {self.alive} of workers={total} could be placed in resources.start_timeout_s="
                    f"{self._resources.start_timeout_s:g}: {free_room(self._resources)}; ask for fewer workers"
                )
