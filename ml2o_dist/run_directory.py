"""The folder of one run: whether it may be used, its configuration, its log."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.config_file import dump_settings, first_difference, load_settings, parse_settings
from ml2o_dist.errors import UserError
from ml2o_dist.files import replacing
from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.tracking.identity import load_identity
from ml2o_dist.tracking.spool import SPOOL_FOLDER, unsent_values


def resolved(run_dir: Path, home: Path) -> Path:
    """Return `run_dir` as an absolute path, against ML2O_HOME where it is relative."""
    return run_dir if run_dir.is_absolute() else home / run_dir


def resumed_settings(folder: Path, overrides: Sequence[str]) -> MetaTrainSettings:
    """Read the settings of the run in `folder`, to go on with it; raises UserError where there is none."""
    if not (folder / "config.yaml").exists():
        raise UserError(f"nothing to resume: {folder} holds no config.yaml")
    return load_settings(folder / "config.yaml", overrides)


def check_fresh(run_dir: Path, settings: MetaTrainSettings) -> bool:
    """Raise UserError where `run_dir` holds a run that has got as far as a checkpoint.

    Tells whether it holds this very run, killed before that: its MLflow run is gone on with.
    """
    checkpoint, _ = newest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        return _holds_start_of(run_dir, settings)
    difference = first_difference(settings, parse_settings(checkpoint.state["config"]))
    if difference:
        raise UserError(f"{run_dir} holds a run of another configuration ({difference}); choose another --run-dir")
    raise UserError(f"{run_dir} holds a run of this configuration; add --resume to go on, or choose another --run-dir")


def _holds_start_of(run_dir: Path, settings: MetaTrainSettings) -> bool:
    identity = load_identity(run_dir)
    if identity is None:
        return False
    try:
        difference = first_difference(settings, parse_settings(identity.config))
    except UserError as error:  # of another version
        difference = str(error)
    if difference and (values := unsent_values(run_dir / SPOOL_FOLDER)):
        raise UserError(
            f"{run_dir} holds {values} values, not yet sent to MLflow, of a run of another configuration "
            f"({difference}); send them with `ml2o sync {run_dir}`, or choose another --run-dir"
        )
    return not difference


@contextmanager
def written_to(run_dir: Path, settings: MetaTrainSettings, console: Console) -> Iterator[None]:
    """Write config.yaml and log to run.log, warnings to the console too, for the time of a `with` block."""
    try:
        with replacing(run_dir / "config.yaml") as stream:
            stream.write(dump_settings(settings).encode())
        file = logging.FileHandler(run_dir / "run.log")
    except OSError as error:
        raise UserError(f"run directory {str(run_dir)!r} cannot be written: {error.strerror}") from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    screen = RichHandler(logging.WARNING, console, show_time=False, show_path=False)
    ours = logging.getLogger("ml2o_dist")
    level = ours.level
    ours.setLevel(logging.INFO)
    for handler in (file, screen):
        ours.addHandler(handler)
    try:
        yield
    finally:
        for handler in (file, screen):
            ours.removeHandler(handler)
            handler.close()
        ours.setLevel(level)
