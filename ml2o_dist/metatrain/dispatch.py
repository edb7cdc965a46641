"""Decides which item runs next on which worker and which runs again: bookkeeping without Ray, driven by the pool."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml2o_dist.config import FaultSettings
from ml2o_dist.metatrain.costs import Costs
from ml2o_dist.metatrain.episode import EpisodeResult
from ml2o_dist.metatrain.schedule import WorkItem

RUNS_PER_ERROR = 2
"""A key whose episode raised is retried once, on another worker, since the machine may have caused the error."""

BACKUP_AFTER = 0.25
"""An idle worker starts a backup task for an episode that has used this share of the time it may take."""


@dataclass(eq=False)
class Batch:
    """Items that run under the same weights, and the results so far by the position of their item."""

    items: Sequence[WorkItem]
    weights: Any
    results: dict[int, EpisodeResult] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every item has its result."""
        return len(self.results) == len(self.items)

    def in_order(self) -> list[EpisodeResult]:
        """Return the results in the order of the items."""
        return [self.results[place] for place in range(len(self.items))]


@dataclass(eq=False)
class Task:
    """An item and its attempts: how often it ran, where it failed last, how often it raised or was overdue."""

    batch: Batch
    place: int
    expected: float
    runs: int = 0
    flying: int = 0
    avoid: Any = None
    errors: int = 0
    overdue: int = 0

    @property
    def item(self) -> WorkItem:
        """The item that runs."""
        return self.batch.items[self.place]

    @property
    def done(self) -> bool:
        """Whether its result is known."""
        return self.place in self.batch.results

    @property
    def fate(self) -> str:
        """What happens after an attempt without a result, in words: nothing, its backup task goes on, or a retry."""
        if self.done:
            return "its backup task has the result"
        return "its backup task goes on" if self.flying else "it runs again elsewhere"


@dataclass(frozen=True, eq=False)
class InFlight:
    """An attempt at a task: the `worker`, when it `began` and its deadline (seconds of the clock)."""

    task: Task
    worker: Any
    began: float
    deadline: float


class Dispatch:
    """Items that wait or run, from one batch or from several at once.

    Items of the earliest meta-step start first, its validation before its training (the order in which the results
    are waited for), and among these the item with the longest measured cost. An item is retried when its worker was
    lost or it raised. A straggler gets a backup task when a worker is idle. Episodes are pure functions, so the first
    result counts and a second one would be equal.

    Attributes:
        repeated: retries so far, because the worker was lost, or the episode raised or was overdue.
        backup_tasks: backup tasks started so far.
    """

    def __init__(self, faults: FaultSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._faults = faults
        self._clock = clock
        self._costs = Costs(faults)
        self._waiting: list[Task] = []  # the most urgent task comes last
        self._in_flight: set[InFlight] = set()
        self.repeated = 0
        self.backup_tasks = 0

    @property
    def in_flight(self) -> Collection[InFlight]:
        """The attempts in flight."""
        return self._in_flight

    def add(self, items: Sequence[WorkItem], weights: Any) -> Batch:
        """Queue the items as a batch and return it."""
        batch = Batch(items, weights)
        for place, item in enumerate(items):
            self._wait(Task(batch, place, self._costs.expected(item)))
        return batch

    def drop(self) -> None:
        """Drop all tasks that wait or are in flight."""
        self._waiting.clear()
        self._in_flight.clear()

    def assign(self, idle: Iterable[Any], alive: int) -> list[InFlight]:
        """Return what the `idle` ones of `alive` workers are to begin now."""
        begun, spare = [], []
        for worker in idle:
            task = self._next(worker, alive)
            if task is None:
                spare.append(worker)
            else:
                begun.append(self._begin(task, worker))
        if spare and not self._waiting:
            begun += [self._begin(task, worker) for worker, task in zip(spare, self._stragglers(), strict=False)]
        return begun

    def finished(self, flight: InFlight, result: EpisodeResult) -> None:
        """Record the result of an attempt; if its backup task was faster, the result is already known and stays."""
        self.rolled_out(flight, result)
        self.settle(flight.task, result)

    def rolled_out(self, flight: InFlight, result: EpisodeResult) -> None:
        """Record that an attempt ended whose result is not complete yet; `settle` or `again` follows."""
        self._land(flight)
        self._costs.learn(flight.task.item, result)

    def settle(self, task: Task, result: EpisodeResult) -> None:
        """Record `result` for the task, unless it has one, even if another attempt is in flight."""
        task.batch.results.setdefault(task.place, result)

    def again(self, task: Task) -> None:
        """Queue a task again, unless it is done or in flight."""
        if not task.done and not task.flying:
            task.expected = self._costs.expected(task.item)
            self._wait(task)

    def lost(self, flight: InFlight) -> None:
        """Retry the task of an attempt whose worker was lost."""
        self._land(flight)
        self.again(flight.task)

    def raised(self, flight: InFlight) -> bool:
        """Retry the task of an attempt that raised, on another worker if there is one; False if it raised too often."""
        self._land(flight)
        task = flight.task
        task.errors += 1
        task.avoid = flight.worker
        if task.errors >= RUNS_PER_ERROR and not task.done:
            return False
        self.again(task)
        return True

    def end_overdue(self) -> list[tuple[InFlight, float]]:
        """Return attempts past their deadline with the seconds they had; retry their tasks with twice that time."""
        late = [flight for flight in self._in_flight if self._clock() > flight.deadline]
        for flight in late:
            self._land(flight)
            flight.task.overdue += 1
            self.again(flight.task)
        return [(flight, flight.deadline - flight.began) for flight in late]

    def _next(self, worker: Any, alive: int) -> Task | None:
        for place in range(len(self._waiting) - 1, -1, -1):
            if self._waiting[place].avoid is not worker or alive == 1:
                return self._waiting.pop(place)
        return None

    def _stragglers(self) -> list[Task]:
        """Return tasks that have used much of their time and have no backup task, the slowest first."""
        now = self._clock()
        late = [
            ((now - flight.began) / (flight.deadline - flight.began), flight.task)
            for flight in self._in_flight
            if flight.task.flying == 1 and not flight.task.done
        ]
        late.sort(key=lambda each: each[0], reverse=True)
        return [task for used, task in late if used > BACKUP_AFTER]

    def _begin(self, task: Task, worker: Any) -> InFlight:
        if task.flying:
            self.backup_tasks += 1
        elif task.runs:
            self.repeated += 1
        task.runs += 1
        task.flying += 1
        now = self._clock()
        flight = InFlight(task, worker, now, now + self._costs.allowed(task.item, task.overdue))
        self._in_flight.add(flight)
        return flight

    def _land(self, flight: InFlight) -> None:
        self._in_flight.discard(flight)
        flight.task.flying -= 1

    def _wait(self, task: Task) -> None:
        insort(self._waiting, task, key=_urgency)


def _urgency(task: Task) -> tuple[int, bool, float, int]:
    key = task.item.key
    return -key.meta_step, key.purpose != "train", task.expected, -key.slot
