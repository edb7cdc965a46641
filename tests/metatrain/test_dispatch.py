"""The scheduler alone, on a clock of its own, under any order of completion, failure, loss and return."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml2o_dist.config import FaultSettings
from ml2o_dist.metatrain.dispatch import RUNS_PER_ERROR, Dispatch
from ml2o_dist.metatrain.schedule import Key, WorkItem, admitted, weights_version
from tests.wording import says

FAULTS = FaultSettings(shortest_deadline_s=10, first_deadline_s=10, deadline_factor=4)


class Clock:
    """Shows what it was set to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def items_of(step: int, slots: int, purpose: str = "train", horizons: tuple[int, ...] = (1,)) -> list[WorkItem]:
    def spec(slot: int) -> Any:
        return SimpleNamespace(horizon=horizons[slot % len(horizons)], instances=1, problem="p")

    return [WorkItem(Key(step, slot, purpose), spec(slot)) for slot in range(slots)]


def result(seconds: float = 1.0) -> Any:
    return SimpleNamespace(seconds=seconds)


class Crew:
    """Workers that end, raise, die, hang and come back, as `source` has it, over a whole meta-training."""

    def __init__(self, workers: int, staleness: int, meta_steps: int, slots: int, source: random.Random) -> None:
        self.settings: Any = SimpleNamespace(staleness=staleness, meta_steps=meta_steps)
        self.slots, self.source, self.clock = slots, source, Clock()
        self.dispatch = Dispatch(FAULTS, self.clock)
        self.idle: list[object] = [object() for _ in range(workers)]
        self.gone = 0
        self.version = 0
        self.ran: dict[Key, int] = {}

    @property
    def alive(self) -> int:
        return len(self.idle) + len(self.dispatch.in_flight)

    def train(self, chaos: int) -> None:
        """Go through all meta-steps; after `chaos` events everything ends as it should."""
        begun: dict[int, Any] = {}
        while self.version < self.settings.meta_steps:
            for step in admitted(self.settings, self.version):
                if step not in begun:
                    begun[step] = self.dispatch.add(items_of(step, self.slots, horizons=(1, 5, 2)), object())
            events = 0
            while not begun[self.version].complete:
                self.assign()
                self.event(calm=chaos <= 0)
                chaos, events = chaos - 1, events + 1
                assert chaos > 0 or events < 1000, "it does not end"
            results = begun[self.version].in_order()
            assert len({id(each) for each in results}) == self.slots
            self.version += 1

    def assign(self) -> None:
        flights = self.dispatch.assign(list(self.idle), self.alive)
        for flight in flights:
            assert flight.worker in self.idle, "one item for each worker"
            self.idle.remove(flight.worker)
            key = flight.task.item.key
            assert not flight.task.done
            assert weights_version(self.settings, key.meta_step) <= self.version, "its weights are not there yet"
            assert 0 <= key.meta_step - weights_version(self.settings, key.meta_step) <= self.settings.staleness
            assert self.version <= key.meta_step <= self.version + self.settings.staleness
            self.ran[key] = self.ran.get(key, 0) + 1

    def event(self, *, calm: bool) -> None:
        self.clock.now += self.source.uniform(0, 2)
        flights = sorted(self.dispatch.in_flight, key=lambda each: (each.task.item.key, each.began))
        what = "finished" if calm else self.source.choice(["finished", "finished", "lost", "raised", "late", "back"])
        if self.gone and (what == "back" or calm or not flights):
            self.idle.append(object())
            self.gone -= 1
        elif what == "late":
            self.clock.now += 25
            for flight, allowed in self.dispatch.end_overdue():
                assert allowed > 9.99
                assert flight.worker not in self.idle
                self.gone += 1
        elif flights:
            flight = self.source.choice(flights)
            if what == "lost":
                self.dispatch.lost(flight)
                self.gone += 1
                return
            self.idle.append(flight.worker)
            if what == "raised":
                if not self.dispatch.raised(flight):
                    assert flight.task.errors == RUNS_PER_ERROR
                    self.dispatch.settle(flight.task, result())
            else:
                self.dispatch.finished(flight, result(self.source.uniform(0.1, 2)))


@settings(max_examples=200, deadline=None)
@given(
    workers=st.integers(1, 4),
    staleness=st.integers(0, 3),
    meta_steps=st.integers(1, 6),
    slots=st.integers(1, 5),
    chaos=st.integers(0, 60),
    seed=st.integers(0, 2**32),
)
def test_whatever_happens_every_key_has_one_result_and_the_lag_is_bounded(
    workers: int, staleness: int, meta_steps: int, slots: int, chaos: int, seed: int
) -> None:
    crew = Crew(workers, staleness, meta_steps, slots, random.Random(seed))
    crew.train(chaos)
    assert set(crew.ran) == {Key(step, slot) for step in range(meta_steps) for slot in range(slots)}
    assert sum(crew.ran.values()) - len(crew.ran) == crew.dispatch.repeated + crew.dispatch.backup_tasks
    if not chaos:
        assert crew.dispatch.repeated == 0


def begun(dispatch: Dispatch, workers: int) -> list[str]:
    return [str(flight.task.item.key) for flight in dispatch.assign([object() for _ in range(workers)], workers)]


def test_the_earliest_meta_step_first_its_validation_before_its_training_and_the_longest_first() -> None:
    dispatch = Dispatch(FAULTS, Clock())
    dispatch.add(items_of(0, 1), None)
    (flight,) = dispatch.assign([object()], 1)
    dispatch.finished(flight, result())  # so that costs are known
    for step in (2, 1):
        dispatch.add(items_of(step, 3, horizons=(1, 5, 2)), None)
    dispatch.add(items_of(1, 1, "validate"), None)
    assert begun(dispatch, 7) == [
        "validation at meta-step 1 slot 0",
        *(f"meta-step {number} slot {slot}" for number in (2, 3) for slot in (1, 2, 0)),
    ]


def test_a_kind_that_was_not_measured_starts_first() -> None:
    dispatch = Dispatch(FAULTS, Clock())
    known, new = items_of(0, 1)[0], items_of(0, 2)[1]
    new.spec.problem = "q"
    dispatch.add([known], None)
    (flight,) = dispatch.assign([object()], 1)
    dispatch.finished(flight, result())
    dispatch.add([known, new], None)
    assert begun(dispatch, 2) == ["meta-step 1 slot 1", "meta-step 1 slot 0"]


def straggling() -> tuple[Dispatch, Clock, Any, Any]:
    """A dispatch of which one flight has used a quarter of the ten seconds that it may take, with its batch."""
    clock = Clock()
    dispatch = Dispatch(FAULTS, clock)
    first = dispatch.add(items_of(0, 1), None)
    (flight,) = dispatch.assign([object()], 1)
    dispatch.finished(flight, result(1.0))
    assert first.complete
    batch = dispatch.add(items_of(1, 1), None)
    (slow,) = dispatch.assign([object()], 2)
    clock.now += 2.4
    assert dispatch.assign([object()], 2) == [], "not a straggler yet"
    clock.now += 0.2
    return dispatch, clock, batch, slow


@pytest.mark.parametrize("first", ["the backup", "the straggler"])
def test_an_idle_worker_runs_a_backup_task_of_a_straggler_and_the_first_result_counts(first: str) -> None:
    dispatch, _, batch, slow = straggling()
    (backup,) = dispatch.assign([object()], 2)
    assert backup.task is slow.task
    assert backup.worker is not slow.worker
    assert dispatch.assign([object()], 3) == [], "one backup is enough"
    assert (dispatch.repeated, dispatch.backup_tasks) == (0, 1)
    flights, results = (backup, slow) if first == "the backup" else (slow, backup), [result(), result()]
    dispatch.finished(flights[0], results[0])
    assert batch.in_order() == results[:1]
    dispatch.finished(flights[1], results[1])
    assert batch.results[0] is results[0]
    assert not dispatch.in_flight


def test_while_a_backup_task_runs_a_lost_straggler_is_not_run_a_third_time() -> None:
    dispatch, _, batch, slow = straggling()
    (backup,) = dispatch.assign([object()], 2)
    dispatch.lost(slow)
    assert says(slow.task.fate, "backup task", "goes on")
    assert dispatch.assign([object()], 2) == []
    dispatch.lost(backup)
    assert "again" in slow.task.fate
    (third,) = dispatch.assign([object()], 2)
    dispatch.finished(third, result())
    assert batch.complete


def test_a_straggler_that_is_lost_after_its_backup_task_has_ended_is_not_run_again() -> None:
    dispatch, _, batch, slow = straggling()
    (backup,) = dispatch.assign([object()], 2)
    dispatch.finished(backup, result())
    dispatch.lost(slow)
    assert says(slow.task.fate, "backup task", "result")
    assert batch.complete
    assert dispatch.assign([object()], 2) == []


def test_what_is_overdue_gets_twice_the_time_and_what_raised_another_worker() -> None:
    clock = Clock()
    dispatch, (one, two) = Dispatch(FAULTS, clock), (object(), object())
    dispatch.add(items_of(0, 1), None)
    (flight,) = dispatch.assign([one], 2)
    clock.now = 10.5
    assert dispatch.end_overdue() == [(flight, 10.0)]
    (flight,) = dispatch.assign([one], 2)
    assert flight.deadline - flight.began == 20.0
    assert dispatch.raised(flight)
    assert dispatch.assign([one], 2) == []
    (flight,) = dispatch.assign([one, two], 2)
    assert flight.worker is two
    assert not dispatch.raised(flight), "twice is too often"


def test_the_only_worker_gets_what_raised_on_it() -> None:
    dispatch, one = Dispatch(FAULTS, Clock()), object()
    dispatch.add(items_of(0, 1), None)
    (flight,) = dispatch.assign([one], 1)
    assert dispatch.raised(flight)
    (again,) = dispatch.assign([one], 1)
    assert again.task is flight.task


def test_what_is_dropped_does_not_come_back() -> None:
    dispatch = Dispatch(FAULTS, Clock())
    batch = dispatch.add(items_of(0, 3), None)
    flights = dispatch.assign([object()], 1)
    dispatch.drop()
    assert dispatch.assign([object()], 1) == []
    assert not dispatch.in_flight
    assert (len(flights), batch.complete) == (1, False)
