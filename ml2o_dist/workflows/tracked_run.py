"""The MLflow run of a meta-training: begin it with the settings, end it as the meta-training ended."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.config_file import flat_settings, settings_hash
from ml2o_dist.rundir.storage import RunStorage
from ml2o_dist.runtime.errors import Interrupted
from ml2o_dist.runtime.shown_text import headed
from ml2o_dist.runtime.stopping import StopRequest
from ml2o_dist.tracking.records import Status
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.spool import SPOOL_FOLDER
from ml2o_dist.tracking.store import redacted
from ml2o_dist.tracking.sync import sync_command

CLOSE_LIMIT_S, STOP_LIMIT_S = 10.0, 3.0
"""How long the end of a run may wait for MLflow; after a stop, Ray gives a job 3 s by default. The rest is spooled."""


@contextmanager
def tracked_run(
    settings: MetaTrainSettings,
    storage: RunStorage,
    uri: str,
    console: Console,
    stop: StopRequest,
    *,
    run_id: str | None = None,
    go_on: bool = False,
) -> Iterator[MlflowSink]:
    """Open or resume an MLflow run, and end it as the `with` block ended.

    If MLflow has not got all figures, it says where they are and how to send them.

    Args:
        uri, run_id, go_on: as in `MlflowSink.open`.  tags: in addition to those that every run has.
        close_limit_s: how long the end may wait for MLflow, unless a stop was requested.
    """
    sink = MlflowSink.open(
        uri,
        settings.tracking.experiment,
        run_id,
        storage.title,
        params={key: str(value)[:500] for key, value in flat_settings(settings).items()},
        tags={"config_hash": settings_hash(settings), "git": git_commit(), "run_dir": storage.name},
        run_dir=storage.folder,
        config=settings.model_dump(mode="json", by_alias=True),
        go_on=go_on,
        stop=stop,
    )
    status: Status = "FINISHED"
    try:
        yield sink
    except BaseException as error:
        status = "KILLED" if isinstance(error, Interrupted) else "FAILED"
        raise
    finally:
        unsent = sink.close(status, STOP_LIMIT_S if stop() else CLOSE_LIMIT_S)
        if sink.spool:
            say_unsent(console, unsent, storage.folder, uri)


def say_unsent(console: Console, values: int, run_dir: Path, uri: str) -> None:
    """Say what is unsent in the spool of `run_dir`, and how to send it."""
    console.print(
        headed(
            "not sent to MLflow:",
            f"{values} values wait in {run_dir / SPOOL_FOLDER}; when {redacted(uri)} answers: "
            f"{sync_command(run_dir, uri)}",
        ),
        soft_wrap=True,
    )


def git_commit() -> str:
    """Return the commit of the checkout that this package runs from; "" if it is installed or copied."""
    checkout = Path(__file__).parents[2]
    command = ["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    top, _, commit = done.stdout.strip().partition("\n")
    return commit if done.returncode == 0 and Path(top) == checkout else ""  # else a repository around site-packages
