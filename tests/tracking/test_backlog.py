"""The backlog: on the disk at once, in memory only while the disk takes nothing, and never waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ml2o_dist.tracking import backlog as backlog_module
from ml2o_dist.tracking.backlog import Backlog
from ml2o_dist.tracking.records import Point, Record
from ml2o_dist.tracking.spool import Spool
from tests.wording import says

FULL = OSError(28, "No space left on device")


def points(*steps: int) -> list[Point]:
    return [Point("a", float(step), step, step) for step in steps]


def drained(backlog: Backlog) -> list[Record]:
    records: list[Record] = []
    while (batch := backlog.take()).records:
        records += batch.records
        backlog.sent(batch)
    return records


class PickySpool(Spool):
    """A spool whose disk can be full, or so slow that it does not return."""

    full = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate = threading.Event()
        self.gate.set()
        self.tries = 0

    def append(self, records: Sequence[Record]) -> None:
        self.gate.wait()
        self.tries += 1
        if self.full:
            raise FULL
        super().append(records)


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PickySpool:
    monkeypatch.setattr(backlog_module, "_RETRY_S", 0.01)
    return PickySpool(tmp_path / "spool")


def test_what_is_put_in_is_on_the_disk_without_being_asked_for(spool: PickySpool, tmp_path: Path) -> None:
    backlog = Backlog(spool, 100)
    backlog.put(points(0, 1))
    assert backlog.settle(10)
    assert spool.unsent == 2  # a SIGKILL from here on loses nothing
    assert backlog.in_memory_only == 0
    backlog.close(10)
    spool.close()
    assert drained(Backlog(Spool(tmp_path / "spool"), 100)) == points(0, 1)


def test_a_disk_that_hangs_is_not_waited_for(spool: PickySpool) -> None:
    spool.gate.clear()
    backlog = Backlog(spool, 100)
    start = time.monotonic()
    for step in range(50):
        backlog.put(points(step))
    backlog.close(0.1)
    assert time.monotonic() - start < 2
    assert backlog.unsent_values == backlog.in_memory_only == 50
    spool.gate.set()


def test_a_full_disk_is_said_once_and_memory_keeps_what_it_would_not_take(
    spool: PickySpool, caplog: pytest.LogCaptureFixture
) -> None:
    backlog = Backlog(spool, 100)
    backlog.put(points(0))
    assert backlog.settle(10)
    spool.full = True
    backlog.put(points(1, 2))
    assert backlog.settle(10)
    assert backlog.in_memory_only == 2
    assert drained(backlog) == points(0, 1, 2)  # from the disk, then from memory
    backlog.put(points(3))
    tries = spool.tries
    while spool.tries < tries + 3:
        time.sleep(0.01)
    backlog.close(10)
    assert (backlog.unsent_values, backlog.in_memory_only) == (1, 1)
    (line,) = [record.getMessage() for record in caplog.records]
    assert says(line, f"{spool.folder} cannot be written", "No space left on device", "memory")


def test_a_disk_with_room_again_gets_what_memory_kept(spool: PickySpool) -> None:
    spool.full = True
    backlog = Backlog(spool, 100)
    backlog.put(points(0, 1))
    assert backlog.settle(10)
    batch = backlog.take()
    backlog.put_back(batch)  # the server is away too
    spool.full = False
    backlog.close(10)
    assert backlog.in_memory_only == 0
    assert list(spool.read(10).records) == points(0, 1)


def test_memory_is_bounded_and_the_oldest_goes(spool: PickySpool) -> None:
    spool.full = True
    backlog = Backlog(spool, 10)
    for step in range(25):
        backlog.put(points(step))
    assert backlog.settle(10)
    taken = backlog.take()
    backlog.put(points(25, 26, 27))
    backlog.put_back(taken)
    backlog.close(10)
    assert backlog.overflowed == 18
    assert drained(backlog) == points(*range(18, 28))
