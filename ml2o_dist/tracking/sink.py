"""The thread between a run and MLflow: training hands over its figures and never waits for a server.

What was handed over is queued and sent in batches. While the server is away the queue keeps it, up to a bound, and
the thread asks again at growing intervals.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ml2o_dist.tracking.run import METRICS_PER_CALL, MlflowRun, Params, Point, Run, Status, Tags, Upload, Words
from ml2o_dist.tracking.store import is_temporary, one_line, redacted, refused

_CAPACITY = 100_000
"""Records kept while the server is away: a day of a run that logs one a second, some 20 MB."""

_LONGEST_PAUSE_S = 30.0

_log = logging.getLogger("ml2o_dist.tracking")


class MlflowSink:
    """Sends one run's figures to MLflow from a thread of its own.

    Attributes:
        refused: records that MLflow will never take (a bad metric name, a file that is gone), dropped with a warning.
        overflowed: records dropped because more than `capacity` were waiting, the oldest first.
    """

    def __init__(self, run: Run, place: str, *, flush_s: float = 2.0, capacity: int = _CAPACITY) -> None:
        """Start the thread; `place` names the store in messages. `open` is the usual way to a sink."""
        self.refused = 0
        self.overflowed = 0
        self._run = run
        self._place = place
        self._flush_s = flush_s
        self._capacity = capacity
        self._changed = threading.Condition()  # guards everything below
        self._queue: deque[Point | Words] = deque()
        self._sending: list[Point | Words] = []
        self._status: Status | None = None  # set when the sink is being closed
        self._hurry = False
        self._started = False
        self._first_error: Exception | None = None
        self._tried = False
        self._away = False
        self._thread = threading.Thread(target=self._work, name="mlflow-sink", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        uri: str,
        experiment: str,
        run_id: str | None = None,
        run_name: str = "",
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, object] | None = None,
        *,
        wait_s: float = 30.0,
    ) -> MlflowSink:
        """Begin a run, or go on with `run_id`, whose recorded metric steps are then not recorded again.

        Args:
            uri: where, as `resolve_tracking_uri` returns it.
            experiment: its name; created if there is none.
            run_name: only for a new run.
            params, tags: sent first; params that the run already has stay as they are.
            wait_s: how long to wait for the server's first answer. Without one, a warning is logged, training goes
                on, and the thread keeps asking.

        Raises:
            UserError: the server answered, and refused (a deleted experiment, no permission), or the URI is unusable.
        """
        sink = cls(MlflowRun(uri, experiment, run_id, run_name), redacted(uri))
        if params:
            sink.log_params(params)
        if tags:
            sink.set_tags(tags)
        with sink._changed:
            answered = sink._changed.wait_for(lambda: sink._tried, timeout=wait_s)
            error = sink._first_error
        if error is not None and not is_temporary(error):
            sink.close("FAILED")
            raise refused(uri, error)
        if not answered:
            _log.warning("MLflow at %s has not answered in %.0f s; training goes on without it", sink._place, wait_s)
        return sink

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None while the server has never answered."""
        return self._run.run_id

    @property
    def unsent(self) -> int:
        """How many metric values are waiting."""
        with self._changed:
            return sum(isinstance(record, Point) for record in (*self._sending, *self._queue))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hand over the values of `metrics` at `step`; returns at once."""
        now = time.time_ns() // 1_000_000
        self._put([Point(key, float(value), step, now) for key, value in metrics.items()])

    def log_params(self, params: Mapping[str, object]) -> None:
        """Hand over settings; returns at once."""
        self._put([Params({key: str(value) for key, value in params.items()})])

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Hand over tags, those that are not None; returns at once."""
        self._put([Tags({key: str(value) for key, value in tags.items() if value is not None})])

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Hand over a file for the run's artifacts; returns at once. It is read later: leave it there."""
        self._put([Upload(path.absolute(), folder)])

    def flush(self, limit_s: float = 10.0) -> bool:
        """Wait until nothing is waiting, at most `limit_s` seconds; tells whether all was sent."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._queue and not self._sending, timeout=limit_s)

    def close(self, status: Status = "FINISHED", limit_s: float = 10.0) -> int:
        """Send what is left, mark the run as ended, and return how many metric values could not be sent.

        Takes at most `limit_s` seconds; a server that does not answer is asked once more. Closing again is harmless.
        """
        with self._changed:
            first = self._status is None
            self._status = self._status or status
            self._changed.notify_all()
        self._thread.join(limit_s)
        unsent = self.unsent
        if first and (unsent or self.overflowed):
            _log.warning("%d metric values were not sent to MLflow at %s", unsent + self.overflowed, self._place)
        return unsent

    def _put(self, records: Sequence[Point | Words]) -> None:
        with self._changed:
            if self._status is not None:
                raise RuntimeError("the sink is closed")
            self._queue.extend(records)
            while len(self._queue) > self._capacity:
                self._queue.popleft()
                self.overflowed += 1

    def _work(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._status is not None or self._hurry, timeout=pause)
                self._hurry = False
                status = self._status
            sent = self._deliver()
            if status is not None:
                if sent:
                    self._attempt(partial(self._run.end, status))
                return
            pause = self._flush_s if sent else min(_LONGEST_PAUSE_S, max(1.0, 2 * pause))

    def _deliver(self) -> bool:
        """Send everything that is queued; False where the server does not answer."""
        if not self._started:
            self._started = self._attempt(self._run.start)
        sent = self._started
        while sent and self._take():
            sent = self._send(self._sending)
            with self._changed:
                if not sent:
                    self._queue.extendleft(reversed(self._sending))
                self._sending = []
                self._changed.notify_all()
        with self._changed:
            self._tried = True
            self._changed.notify_all()
        return sent

    def _take(self) -> bool:
        """Move the next call's worth from the queue to `_sending`: points up to the limit, or one other record."""
        with self._changed:
            while self._queue and len(self._sending) < METRICS_PER_CALL:
                if not isinstance(self._queue[0], Point):
                    if not self._sending:
                        self._sending.append(self._queue.popleft())
                    break
                self._sending.append(self._queue.popleft())
            return bool(self._sending)

    def _send(self, records: Sequence[Point | Words]) -> bool:
        """Send one call's worth; what MLflow refuses for good is halved until the culprit is alone, and dropped."""
        points = [record for record in records if isinstance(record, Point)]
        try:
            if points:
                self._run.send_points(points)
            for record in records:
                if not isinstance(record, Point):
                    self._run.send(record)
        except Exception as error:  # whatever MLflow and its database raise: a thread that died would lose the rest
            if is_temporary(error):
                self._missed(error)
                return False
            if len(records) > 1:
                half = len(records) // 2
                return self._send(records[:half]) and self._send(records[half:])
            self.refused += 1
            if self.refused == 1:
                _log.warning("MLflow at %s does not take %s: %s", self._place, records[0], one_line(error))
        self._answered()
        return True

    def _attempt(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # as in _send
            self._missed(error)
            return False
        self._answered()
        return True

    def _missed(self, error: Exception) -> None:
        """Say once per outage that the server is away."""
        if not self._tried:
            self._first_error = error
        if not self._away and (self._tried or is_temporary(error)):  # else `open` raises it
            _log.warning(
                "MLflow at %s does not answer; training goes on, its figures are kept and sent later: %s",
                self._place,
                one_line(error),
            )
        self._away = True

    def _answered(self) -> None:
        if self._away:
            _log.info("MLflow at %s answers again", self._place)
        self._away = False
