"""Records that wait for MLflow: briefly in a queue, then in the spool; in memory only if the disk cannot be written."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence

from ml2o_dist.tracking.records import Point, Record
from ml2o_dist.tracking.spool import Batch, Spool
from ml2o_dist.tracking.store_run import METRICS_PER_CALL

_RETRY_S = 5.0
"""Seconds between two tries to write to a disk that is full."""

_log = logging.getLogger("ml2o_dist.tracking")


class Backlog:
    """A queue whose own thread writes its records to a spool, so that callers who add records never wait.

    Attributes:
        overflowed: records dropped, the oldest first, because more than `capacity` were in memory.
    """

    def __init__(self, spool: Spool | None, capacity: int) -> None:
        """Start the thread that writes to `spool`; with None everything stays in memory."""
        self.overflowed = 0
        self._spool = spool
        self._capacity = capacity
        self._changed = threading.Condition()  # guards everything below
        self._queue: deque[Record] = deque()
        self._writing: Sequence[Record] = ()
        self._sending: Sequence[Record] = ()  # from memory
        self._in_memory = spool is None
        self._closed = False
        self._thread: threading.Thread | None = None
        if spool is not None:
            self._thread = threading.Thread(target=self._write, args=(spool,), name="mlflow-spool", daemon=True)
            self._thread.start()

    @property
    def unsent(self) -> int:
        """How many records wait, in memory and in the spool."""
        with self._changed:
            return len(self._held()) + (self._spool.unsent if self._spool else 0)

    @property
    def unsent_values(self) -> int:
        """How many of the waiting records are metric values."""
        with self._changed:
            return _values(self._held()) + (self._spool.unsent_values if self._spool else 0)

    @property
    def in_memory_only(self) -> int:
        """How many of the metric values would be lost with this process."""
        with self._changed:
            return _values(self._held())

    def put(self, records: Sequence[Record]) -> None:
        """Add records; returns at once. Raises RuntimeError after `close`."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the sink is closed")
            self._queue.extend(records)
            self._drop_the_oldest()
            self._changed.notify_all()

    def take(self) -> Batch:
        """Return the records to send next, empty if there are none; the caller must call `sent` or `put_back`."""
        if self._spool is not None:
            batch = self._spool.read(METRICS_PER_CALL)
            if batch.records:
                return batch
        with self._changed:
            records: list[Record] = []
            while self._in_memory and self._queue and len(records) < METRICS_PER_CALL:
                if not isinstance(self._queue[0], Point):
                    if not records:
                        records.append(self._queue.popleft())
                    break
                records.append(self._queue.popleft())
            self._sending = records
            return Batch(records)

    def sent(self, batch: Batch) -> None:
        """Remove a batch that MLflow has accepted."""
        if self._spool is not None and batch.end is not None:
            self._spool.advance(batch)
            return
        with self._changed:
            self._sending = ()

    def put_back(self, batch: Batch) -> None:
        """Keep a batch that MLflow has not accepted."""
        if batch.end is None:
            with self._changed:
                self._queue.extendleft(reversed(batch.records))
                self._sending = ()
                self._drop_the_oldest()

    def rewind(self) -> None:
        """Mark everything in the spool as unsent, for a new run that has none of it."""
        if self._spool is not None:
            self._spool.rewind()

    def settle(self, limit_s: float) -> bool:
        """Wait at most `limit_s` seconds for pending writes to the disk; tells whether all are done."""
        with self._changed:
            return self._changed.wait_for(lambda: self._in_memory or not (self._queue or self._writing), limit_s)

    def close(self, limit_s: float) -> None:
        """Accept no more records, and write the queue to the spool within at most `limit_s` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(limit_s)

    def _write(self, spool: Spool) -> None:
        said = closed = False
        while not closed:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or bool(self._queue and not self._in_memory),
                    timeout=_RETRY_S if self._in_memory else None,
                )
                closed = self._closed
                self._writing = tuple(self._queue)
                self._queue.clear()
            try:
                if self._writing:
                    spool.append(self._writing)
                if closed:
                    spool.flush()
                failed = False
            except OSError as error:
                failed = True
                if not said:
                    said = True
                    _log.warning(
                        "%s cannot be written: %s; what MLflow has not taken is kept in memory",
                        spool.folder,
                        error.strerror or error,
                    )
            with self._changed:
                if failed:
                    self._queue.extendleft(reversed(self._writing))
                    self._drop_the_oldest()
                self._writing = ()
                self._in_memory = failed
                self._changed.notify_all()

    def _held(self) -> Sequence[Record]:
        return (*self._sending, *self._writing, *self._queue)

    def _drop_the_oldest(self) -> None:
        while len(self._queue) > self._capacity:
            self._queue.popleft()
            self.overflowed += 1


def _values(records: Sequence[Record]) -> int:
    return sum(isinstance(record, Point) for record in records)
