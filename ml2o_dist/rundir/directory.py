"""Checks the folder of a run, and reads and writes its configuration and log."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.config_file import dump_settings, first_difference, load_settings, parse_settings, resolve_settings
from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.rundir.kinds import check_kind
from ml2o_dist.rundir.log import BEGUN, FORM
from ml2o_dist.rundir.storage import RunStorage
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import replacing
from ml2o_dist.runtime.reading import check_own_file, lies_within
from ml2o_dist.runtime.shown_text import headed, visible
from ml2o_dist.tracking.identity import load_identity
from ml2o_dist.tracking.named_servers import check_resumed, remember
from ml2o_dist.tracking.spool import SPOOL_FOLDER, unsent_values
from ml2o_dist.tracking.store import resolve_tracking_uri


def resumed_settings(storage: RunStorage, overrides: Sequence[str]) -> MetaTrainSettings:
    """Read the settings of a run in order to resume it; raise UserError if there is none."""
    check_folder(storage.folder)
    file = storage.folder / "config.yaml"
    if not file.exists():
        raise UserError(f"nothing to resume: {storage.name} holds no config.yaml")
    settings = load_settings(file, overrides, within=storage.folder)
    check_resumed(settings.tracking.uri, overrides, file)
    return settings


def check_fresh(run_dir: Path, settings: MetaTrainSettings) -> bool:
    """Raise UserError if `run_dir` holds a run with a checkpoint.

    Returns whether it holds the start of this same run, killed before its first checkpoint; its MLflow run is resumed.
    """
    check_kind(run_dir, "a meta-training")
    checkpoint, _ = newest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        return _holds_start_of(run_dir, settings)
    try:
        difference = first_difference(settings, parse_settings(checkpoint.state.get("config")))
    except UserError as error:  # the settings are of another version, or not of a run
        difference = str(error)
    if difference:
        raise UserError(f"{run_dir} holds a run of another configuration ({difference}); choose another --run-dir")
    raise UserError(f"{run_dir} holds a run of this configuration; add --resume to go on, or choose another --run-dir")


def only_begun(run_dir: Path) -> bool:
    """Tell whether `run_dir` holds a run that ended after its config.yaml but before its first checkpoint."""
    return (run_dir / "config.yaml").is_file() and not any((run_dir / "checkpoints").glob("step_*"))


def check_begun_with(run_dir: Path, settings: MetaTrainSettings) -> None:
    """Raise UserError if a run without a checkpoint has another configuration in its config.yaml."""
    difference = first_difference(settings, resolve_settings(load_settings(run_dir / "config.yaml", within=run_dir)))
    if difference:
        raise UserError(f"cannot resume {run_dir} with another configuration: {difference}")


def _holds_start_of(run_dir: Path, settings: MetaTrainSettings) -> bool:
    identity = load_identity(run_dir, "a new MLflow run begins")
    if identity is None:
        return False
    try:
        difference = first_difference(settings, parse_settings(identity.config))
    except UserError as error:  # the settings are of another version
        difference = str(error)
    if difference and (values := unsent_values(run_dir / SPOOL_FOLDER)):
        raise UserError(
            f"{run_dir} holds {values} values, not yet sent to MLflow, of a run of another configuration "
            f"({difference}); send them with `ml2o sync {run_dir}`, or choose another --run-dir"
        )
    return not difference


FOLDERS = ("checkpoints", "experts", "fronts", "plots", "training", "trajectories", "tune")
"""The folders that a run directory may contain, in which files are written and removed."""


def check_folder(run_dir: Path) -> None:
    """Raise UserError if `run_dir` or one of its parents is a file, or if no folder can have its name.

    Raise it also if one of its `FOLDERS` has a link that leads out of it: a directory from somebody else may contain
    such a link, and we would then write or remove the user's own files elsewhere.
    """
    try:
        there = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    if "\0" in str(run_dir):  # `exists` returns False for such a name
        raise UserError(f"run directory {str(run_dir)!r} has a NUL character in its name")
    if not there.is_dir():
        raise UserError(f"run directory {str(run_dir)!r}: {str(there)!r} is a file; choose another --run-dir")
    for folder in map(run_dir.joinpath, FOLDERS):
        below = (Path(root, name) for root, folders, files in os.walk(folder) for name in (*folders, *files))
        for path in (folder, *below):
            if path.is_symlink() and not lies_within(path, run_dir):
                raise UserError(f"run directory {str(run_dir)!r}: {path} is a link out of it")


def check_writable(run_dir: Path) -> None:
    """Raise UserError if `run_dir` is on a read-only disk or may not be written; leave no file behind."""
    there = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise _unwritable(run_dir, error) from error


@contextmanager
def written_to(run_dir: Path, settings: MetaTrainSettings, console: Console) -> Iterator[None]:
    """Write config.yaml and log as `logged_to` does, for the time of a `with` block."""
    remember(resolve_tracking_uri(settings.tracking.uri))  # before the folder holds a run that can be resumed
    try:
        with replacing(run_dir / "config.yaml") as stream:
            stream.write(dump_settings(settings).encode())
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    with logged_to(run_dir, console):
        yield


@contextmanager
def logged_to(run_dir: Path, console: Console) -> Iterator[None]:
    """Create `run_dir` and log to its run.log (warnings also to the console) for the time of a `with` block."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        check_own_file(run_dir / "run.log")
        file = _RunLog(run_dir / "run.log", console)
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    file.setFormatter(_Letters(FORM))
    screen = _Screen(logging.WARNING, console)
    ours = logging.getLogger("ml2o_dist")
    level = ours.level
    ours.setLevel(logging.INFO)
    for handler in (file, screen):
        ours.addHandler(handler)
    ours.info(BEGUN)
    try:
        yield
    finally:
        for handler in (file, screen):
            ours.removeHandler(handler)
            handler.close()
        ours.setLevel(level)


class _Letters(logging.Formatter):
    """Escapes the control characters of names and messages, since a log may be read in a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), lines=True)


class _Screen(logging.Handler):
    """Shows a record as one line without padding; the terminal may wrap it."""

    def __init__(self, level: int, console: Console) -> None:
        super().__init__(level)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        line = Text.assemble((record.levelname, "yellow"), " ", " ".join(record.getMessage().split()))
        self._console.print(line, soft_wrap=True)


class _RunLog(logging.FileHandler):
    """The run's log. If the disk is full, it warns once per outage and tries again with the next record."""

    def __init__(self, file: Path, console: Console) -> None:
        super().__init__(file)
        self._console = console
        self._unwritable = False

    def flush(self) -> None:
        super().flush()
        self._unwritable = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._unwritable:
            self._unwritable = True
            self._console.print(headed(f"{self.baseFilename} cannot be written:", str(error.strerror)))

    def close(self) -> None:
        with suppress(OSError):  # records that could not be written, as was reported
            super().close()


def _unwritable(run_dir: Path, error: OSError) -> UserError:
    return UserError(f"run directory {str(run_dir)!r} cannot be written: {error.strerror or error}")
