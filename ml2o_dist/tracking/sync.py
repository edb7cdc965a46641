"""Send a spool by hand: the records that a run could not send to MLflow, once the server is back."""

from __future__ import annotations

import logging
import os
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking.identity import IDENTITY_FILE, RunIdentity, load_identity, save_identity
from ml2o_dist.tracking.named_servers import check_known, remember
from ml2o_dist.tracking.records import End, Point, Record, Status
from ml2o_dist.tracking.spool import SPOOL_FOLDER, Spool
from ml2o_dist.tracking.store import one_line, redacted, refused, resolve_tracking_uri, shortened
from ml2o_dist.tracking.store_run import METRICS_PER_CALL, MlflowRun, RunGone, send_records

_log = logging.getLogger("ml2o_dist.tracking")


class Synced(TypedDict):
    """The output of `ml2o sync --json`; `status`, the run's end, is None if there was nothing to send."""

    run_dir: str
    tracking_uri: str
    run_id: str
    records: int
    values: int
    refused: int
    status: Status | None
    registered_version: int | None


def sync(run_dir: Path, tracking_uri: str = "") -> Synced:
    """Send the unsent records of the run in `run_dir` to MLflow, record there how the run ended, and remove the spool.

    A killed run has no record of its end and is ended as KILLED. If this call is cut short, the next one continues
    after the records that were sent.

    Args:
        tracking_uri: the store, as `resolve_tracking_uri` takes it; "": the store that the run was tracked at, which
            must be a server that the environment or a run on this machine has named.

    Raises:
        UserError: there is no run, it is still going on, or MLflow does not answer or refuses.
    """
    identity = load_identity(run_dir)
    folder = run_dir / SPOOL_FOLDER
    if not folder.is_dir():
        if identity is None:
            raise UserError(f"{run_dir} holds no run that was tracked: neither {IDENTITY_FILE} nor {SPOOL_FOLDER}/")
        return Synced(
            run_dir=str(run_dir),
            tracking_uri=identity.uri,
            run_id=identity.run_id,
            records=0,
            values=0,
            refused=0,
            status=None,
            registered_version=None,
        )
    if identity is None:
        raise UserError(f"{run_dir / IDENTITY_FILE} is missing: it names the MLflow run that {folder} belongs to")
    uri = _tracking_uri(identity, tracking_uri, run_dir)
    try:
        spool = Spool(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be opened: {error.strerror or error}") from error
    try:
        return _send(run_dir, spool, replace(identity, uri=redacted(uri)), uri)
    finally:
        spool.close()


def sync_command(run_dir: Path, uri: str) -> str:
    """Return the command that sends the spool in `run_dir`, whose run is tracked at `uri`."""
    password = "" if redacted(uri) == uri else "MLFLOW_TRACKING_URI=... "  # no disk has the password
    return f"{password}ml2o sync {shlex.quote(str(run_dir))}"


def _send(run_dir: Path, spool: Spool, identity: RunIdentity, uri: str) -> Synced:
    run, left_out = MlflowRun(uri, identity, run_dir), 0
    status: Status | None = None
    records = values = 0

    def refuse(record: Record, error: Exception) -> None:
        nonlocal left_out
        left_out += 1
        _log.warning("MLflow at %s does not take %s: %s", redacted(uri), shortened(record), one_line(error))

    try:
        if run.start():
            spool.rewind()
        remember(uri)
        save_identity(run_dir, replace(identity, run_id=run.run_id or ""))
        while (batch := spool.read(METRICS_PER_CALL)).records:
            send_records(run, batch.records, refuse)
            spool.advance(batch)
            records += len(batch.records)
            values += sum(isinstance(record, Point) for record in batch.records)
            status = next((record.status for record in batch.records if isinstance(record, End)), status)
        if status is None:
            status = "KILLED"
            run.send(End(status, time.time_ns() // 1_000_000))
    except RunGone as error:
        raise UserError(f"MLflow at {redacted(uri)}: {error}; the same command begins another run") from error
    except Exception as error:  # MLflow lets its database's and requests' errors through
        raise error if isinstance(error, UserError) else refused(uri, error) from error
    spool.remove()
    return Synced(
        run_dir=str(run_dir),
        tracking_uri=redacted(uri),
        run_id=run.run_id or "",
        records=records,
        values=values,
        refused=left_out,
        status=status,
        registered_version=run.version,
    )


def _tracking_uri(identity: RunIdentity, given: str, run_dir: Path) -> str:
    """Return the URI to send to: `given`, else the run's own, whose password only the environment may have."""
    if given:
        return resolve_tracking_uri(given)
    if "***" not in identity.uri:
        check_known(identity.uri, run_dir / IDENTITY_FILE)
        return identity.uri
    from_environment = resolve_tracking_uri() if os.environ.get("MLFLOW_TRACKING_URI") else ""
    if redacted(from_environment) == identity.uri:
        return from_environment
    raise UserError(
        f"the run was tracked at {identity.uri}, whose password is on no disk: "
        "give the URI in the environment variable MLFLOW_TRACKING_URI"
    )
