"""The lifecycle of every run with a run directory: its folder, its MLflow run, and how it ends and is resumed."""

from __future__ import annotations

import logging
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from ml2o_dist.config_file import dump_settings, flat_settings, settings_hash
from ml2o_dist.rundir.directory import check_folder
from ml2o_dist.runtime.errors import Aborted, Incomplete, Interrupted, UserError
from ml2o_dist.runtime.files import home_folder, replacing
from ml2o_dist.runtime.remote_files import is_uri
from ml2o_dist.runtime.shown_text import headed
from ml2o_dist.runtime.stopping import StopRequest
from ml2o_dist.tracking.records import Status
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.spool import SPOOL_FOLDER
from ml2o_dist.tracking.store import redacted

CLOSE_LIMIT_S, STOP_LIMIT_S = 10.0, 3.0
"""How long the end of a run may wait for MLflow; after a stop, Ray gives a job 3 s by default. The rest is spooled."""

log = logging.getLogger(__name__)


def shared_folder(run_dir: str, kind: str) -> Path:
    """Return the folder of a run of a `kind` that needs a folder which all its machines share; raises UserError."""
    if not run_dir:
        raise UserError("--run-dir is empty (a variable of the shell that is not set?)")
    if is_uri(run_dir):
        raise UserError(
            f"--run-dir {run_dir!r}: {kind} needs a folder that all its machines share, not a URI; the best weights "
            "are in MLflow's registry, too"
        )
    folder = home_folder() / run_dir
    check_folder(folder)
    return folder


def resume_command(command: str, place: str | Path) -> str:
    """Return the command that resumes a run of `ml2o COMMAND` in the run directory `place`."""
    return f"ml2o {command} --run-dir {shlex.quote(str(place))} --resume"


def show_places(console: Console, place: str | Path, uri: str) -> None:
    """Say where the run and its MLflow records are."""
    console.print(f"run directory  {place}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"tracking URI   {redacted(uri)}", markup=False, highlight=False, soft_wrap=True)


def write_settings(file: Path, settings: BaseModel) -> None:
    """Write the settings of a run into its folder; raises UserError."""
    try:
        with replacing(file) as stream:
            stream.write(dump_settings(settings).encode())
    except OSError as error:
        raise UserError(f"run directory {str(file.parent)!r} cannot be written: {error.strerror or error}") from error


@contextmanager
def aborted_in_a_line(again: str, last_words: Callable[[], str]) -> Iterator[None]:
    """Turn an error that no setting would fix into `Aborted` with `last_words`, and log its traceback.

    An `Aborted` that names the command `again` stays as it is.
    """
    try:
        yield
    except (Incomplete, Interrupted, UserError):
        raise
    except Exception as error:
        cause = error if isinstance(error, Aborted) else error.__context__  # ending Ray may fail after an abort
        if isinstance(error, Aborted) and again in str(error):
            raise
        log.info("aborted", exc_info=True)  # the traceback goes to run.log, the line to the screen
        said = str(cause) if isinstance(cause, Aborted) else f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise Aborted(said if again in said else f"{said}; {last_words()}") from error


def open_run(
    settings: BaseModel, experiment: str, folder: Path, uri: str, stop: StopRequest, title: str, place: str, **more: Any
) -> MlflowSink:
    """Begin or resume the MLflow run of a run directory, with its settings as parameters.

    Args:
        title: the name of a new run.  place: the user's name for the folder.  more: as in `MlflowSink.open`.
    """
    return MlflowSink.open(
        uri,
        experiment,
        run_name=title,
        params={key: str(value)[:500] for key, value in flat_settings(settings).items()},
        tags={"config_hash": settings_hash(settings), "git": git_commit(), "run_dir": place},
        run_dir=folder,
        stop=stop,
        **more,
    )


@contextmanager
def closed_as_it_ends(
    close: Callable[[Status, float], str], stop: StopRequest, console: Console, uri: str, again: str
) -> Iterator[None]:
    """End MLflow runs as the `with` block ended: finished, failed, or killed by a signal.

    Args:
        close: takes the status and how many seconds it may wait; returns in words what MLflow has not got.
        again: the command that sends it later.
    """
    status: Status = "FINISHED"
    try:
        yield
    except BaseException as error:
        status = "KILLED" if isinstance(error, Interrupted) else "FAILED"
        raise
    finally:
        if unsent := close(status, STOP_LIMIT_S if stop() else CLOSE_LIMIT_S):
            say_unsent(console, unsent, uri, again)


@contextmanager
def tracked_run(
    settings: BaseModel,
    experiment: str,
    folder: Path,
    uri: str,
    console: Console,
    stop: StopRequest,
    *,
    title: str,
    place: str,
    again: str,
    **more: Any,
) -> Iterator[MlflowSink]:
    """Begin or resume one MLflow run, and end it as the `with` block ended; arguments as in the functions above."""
    sink = open_run(settings, experiment, folder, uri, stop, title, place, **more)

    def close(status: Status, limit_s: float) -> str:
        values = sink.close(status, limit_s)
        return waiting_values(folder, values) if is_unsent(sink) else ""

    with closed_as_it_ends(close, stop, console, uri, again):
        yield sink


def is_unsent(sink: MlflowSink) -> bool:
    """Tell whether MLflow lacks records of a closed run: values, files, or its end."""
    return sink.spool is not None or sink.unsent > 0


def waiting_values(folder: Path, values: int) -> str:
    """Return in words how many values wait in a run directory."""
    return f"{values} values wait in {folder / SPOOL_FOLDER}"


def say_unsent(console: Console, unsent: str, uri: str, again: str) -> None:
    """Say what MLflow has not got, and how to send it."""
    console.print(headed("not sent to MLflow:", f"{unsent}; when {redacted(uri)} answers: {again}"), soft_wrap=True)


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
