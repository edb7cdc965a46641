"""The thread between a run and MLflow: training hands over its figures and never waits for a server, nor for a disk.

One thread (`backlog`) writes the records to the run's spool, and another sends them from there. While the server is
away the spool keeps them, and the thread retries at growing intervals. Records that are left at the end stay in the
spool, for `--resume` or `ml2o sync`. If records are sent twice, MLflow keeps them once (`run`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml2o_dist.tracking.backlog import Backlog
from ml2o_dist.tracking.identity import RunIdentity, load_identity, save_identity
from ml2o_dist.tracking.named_servers import remember
from ml2o_dist.tracking.records import End, Params, Point, Record, Status, Tags, Upload, Version
from ml2o_dist.tracking.spool import SPOOL_FOLDER, Spool
from ml2o_dist.tracking.store import is_temporary, one_line, redacted, refused, shortened
from ml2o_dist.tracking.store_run import MlflowRun, Run, RunGone, send_records

_CAPACITY = 100_000
"""Records kept in memory if the disk cannot be written: a day of a run that logs one a second, some 20 MB."""

_LONGEST_PAUSE_S = 30.0

_log = logging.getLogger("ml2o_dist.tracking")


class MlflowSink:
    """Sends one run's figures to MLflow from a thread of its own.

    Attributes:
        refused: records that MLflow will never take (a bad metric name, a file that is gone), dropped with a warning.
    """

    def __init__(
        self,
        run: Run,
        place: str,
        spool: Spool | None = None,
        *,
        on_begun: Callable[[str], None] = lambda run_id: None,
        flush_s: float = 2.0,
        capacity: int = _CAPACITY,
    ) -> None:
        """Start the threads; sinks are usually made with `open`.

        Args:
            place: names the store in messages.
            spool: its records are sent first; with None everything stays in memory, up to `capacity` records.
            on_begun: called with the run's id as soon as that is known.
        """
        self.refused = 0
        self._run = run
        self._place = place
        self._spool = spool
        self._on_begun = on_begun
        self._flush_s = flush_s
        self._backlog = Backlog(spool, capacity)
        self._begun = False
        self._away = False
        self._changed = threading.Condition()  # guards everything below
        self._asked = self._served = 0  # calls of `flush`, and those that a delivery has followed
        self._closed = False
        self._ending = False  # one last try
        self._tried = False
        self._first_error: Exception | None = None
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
        run_dir: Path | None = None,
        config: Mapping[str, Any] | None = None,
        go_on: bool = True,
        wait_s: float = 30.0,
        stop: Callable[[], bool] = lambda: False,
    ) -> MlflowSink:
        """Begin a run, or resume one; metric steps that it has recorded are not recorded again.

        Args:
            uri: the tracking URI, as `resolve_tracking_uri` returns it.
            experiment: the experiment's name; created if there is none.
            run_id: the run to resume if `run_dir` does not know it.
            run_name: only for a new run.
            params, tags: sent first; params that the run already has are not changed.
            run_dir: holds the spool and the run's identity; with None both are only in memory.
            config: stored with the identity; callers compare it to decide about `go_on`.
            go_on: False begins another run in `run_dir` and drops the spooled records of the earlier one.
            wait_s: how long to wait for the server's first answer, or until `stop()`. Without an answer a warning is
                logged, training continues, and the thread keeps retrying.

        Raises:
            UserError: the server answered, and refused (a deleted experiment, no permission), the URI is unusable, or
                another process is writing the spool.
        """
        otherwise = f"the run goes on in MLflow run {run_id}" if run_id else "a new MLflow run begins"
        known = load_identity(run_dir, otherwise) if run_dir and go_on else None
        new = RunIdentity(redacted(uri), experiment, run_name, run_id or "", config=config or {})
        identity = (
            replace(known, uri=new.uri, experiment=experiment, run_id=known.run_id or new.run_id) if known else new
        )
        spool = _open_spool(run_dir, go_on) if run_dir else None

        def note(run_id: str) -> None:
            if run_dir and run_id != identity.run_id:
                save_identity(run_dir, replace(identity, run_id=run_id))

        remember(uri)
        if run_dir and identity != known:
            save_identity(run_dir, identity)
        sink = cls(MlflowRun(uri, identity, run_dir), redacted(uri), spool, on_begun=note)
        if params:
            sink.log_params(params)
        if tags:
            sink.set_tags(tags)
        sink._wait_for_an_answer(uri, wait_s, stop)
        return sink

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None while the server has never answered."""
        return self._run.run_id

    @property
    def unsent(self) -> int:
        """How many metric values are waiting."""
        return self._backlog.unsent_values

    @property
    def overflowed(self) -> int:
        """How many records were dropped, oldest first, because disk writes failed and the memory limit was reached."""
        return self._backlog.overflowed

    @property
    def spool(self) -> Path | None:
        """The folder of the unsent records; None if everything was sent or the rest is only in memory."""
        return self._spool.folder if self._spool and not self._spool.removed else None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hand over the values of `metrics` at `step`; returns at once."""
        now = _now_ms()
        self._backlog.put([Point(key, float(value), step, now) for key, value in metrics.items()])

    def log_params(self, params: Mapping[str, object]) -> None:
        """Hand over settings; returns at once."""
        self._backlog.put([Params({key: str(value) for key, value in params.items()})])

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Hand over tags, those that are not None; returns at once."""
        self._backlog.put([Tags({key: str(value) for key, value in tags.items() if value is not None})])

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Hand over a file for the run's artifacts; returns at once. It is copied a moment later."""
        self._backlog.put([Upload(path.absolute(), folder)])

    def register_later(self, model: str, path: Path, description: str) -> None:
        """Have the learned optimizer in folder `path` registered as a version of `model` once the server is back."""
        self._backlog.put([Version(path.absolute(), model, description)])

    def flush(self, limit_s: float = 10.0) -> bool:
        """Try once to send all waiting records, within at most `limit_s` seconds; tells whether all were sent."""
        until = time.monotonic() + limit_s
        if not self._backlog.settle(limit_s):
            return False
        with self._changed:
            self._asked = asked = self._asked + 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._served >= asked, until - time.monotonic())
        return not self._backlog.unsent

    def close(self, status: Status = "FINISHED", limit_s: float = 10.0) -> int:
        """Send what is left, mark the run as ended, and return how many metric values could not be sent.

        Takes at most `limit_s` seconds; a server that does not answer is tried once more. The spool is removed if
        everything was sent. Closing again is harmless.
        """
        until = time.monotonic() + limit_s
        with self._changed:
            first, self._closed = not self._closed, True
        if first:
            self._backlog.put([End(status, _now_ms())])
            self._backlog.close(limit_s)
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(max(0.0, until - time.monotonic()))
        lost = self._backlog.in_memory_only + self.overflowed
        if first and lost:
            _log.warning("%d metric values were not sent to MLflow at %s and are lost", lost, self._place)
        if self._spool:
            self._spool.close()
        return self.unsent

    def _wait_for_an_answer(self, uri: str, wait_s: float, stop: Callable[[], bool]) -> None:
        until = time.monotonic() + wait_s
        with self._changed:
            while not self._tried and time.monotonic() < until and not stop():
                self._changed.wait(timeout=0.1)
            answered, error = self._tried, self._first_error
        if error is not None and not is_temporary(error):
            self.close("FAILED")
            raise refused(uri, error)
        if not answered and not stop():
            _log.warning("MLflow at %s has not answered in %.0f s; the run goes on without it", self._place, wait_s)

    def _work(self) -> None:
        pause, ending = 0.0, False
        while not ending:
            with self._changed:
                self._changed.wait_for(lambda: self._ending or self._asked > self._served, timeout=pause)
                asked, ending = self._asked, self._ending
            sent = self._deliver(ending)
            with self._changed:
                self._tried = True
                self._served = asked
                self._changed.notify_all()
            pause = self._flush_s if sent else min(_LONGEST_PAUSE_S, max(1.0, 2 * pause))

    def _deliver(self, ending: bool) -> bool:
        """Send all waiting records; return False if that fails."""
        try:
            if not self._begun:
                self._begin()
            while (batch := self._backlog.take()).records:
                if (
                    isinstance(batch.records[0], End) and not ending
                ):  # of an earlier start, or its turn comes in `close`
                    self._backlog.put_back(batch)
                    break
                try:
                    send_records(self._run, batch.records, self._refuse)
                except Exception:
                    self._backlog.put_back(batch)
                    raise
                self._backlog.sent(batch)
        except Exception as error:  # any error of MLflow or its database: if the thread died, the rest would be lost
            self._begun = self._begun and not isinstance(error, RunGone)
            self._missed(error)
            return False
        if self._away:
            _log.warning("MLflow at %s answers again", self._place)  # the outage was logged, so log its end
        self._away = False
        if ending and self._spool and not self._backlog.unsent:
            self._spool.remove()
        return True

    def _begin(self) -> None:
        if self._run.start():
            self._backlog.rewind()
        self._begun = True
        self._on_begun(self._run.run_id or "")

    def _refuse(self, record: Record, error: Exception) -> None:
        self.refused += 1
        if self.refused == 1:
            _log.warning("MLflow at %s does not take %s: %s", self._place, shortened(record), one_line(error))

    def _missed(self, error: Exception) -> None:
        """Log once per outage that the server is away."""
        if not self._tried:
            self._first_error = error
        if not self._away and (self._tried or is_temporary(error)):  # else `open` raises it
            if isinstance(error, RunGone):
                said, why = f"MLflow at {self._place} lost the run", one_line(error)
            elif is_temporary(error):
                said, why = f"MLflow at {self._place} does not answer", one_line(error)
            else:
                said, why = f"MLflow at {self._place} was sent nothing", str(refused(self._place, error))
                _log.info("sending to MLflow failed", exc_info=error)
            _log.warning("%s; the run goes on, its figures are kept and sent later: %s", said, why)
        self._away = True


def _open_spool(run_dir: Path, go_on: bool) -> Spool | None:
    """Open or create the spool in `run_dir`; None, with a warning, if the disk cannot be written."""
    try:
        spool = Spool(run_dir / SPOOL_FOLDER)
        if not go_on:
            spool.remove()
            spool = Spool(run_dir / SPOOL_FOLDER)
    except OSError as error:
        _log.warning(
            "no spool in %s: %s; what MLflow has not taken is kept in memory", run_dir, error.strerror or error
        )
        return None
    return spool


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
