"""`ml2o report`: read the folder of a run, evaluation or sweep, and write its contents as one page beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ml2o_dist.artifact import CARD_LIMIT, parse_card
from ml2o_dist.config_file import load_evaluation, load_settings, read_settings
from ml2o_dist.evaluation.evaluated import Evaluation
from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.metatrain.history import FILE as HISTORY
from ml2o_dist.metatrain.history import read_history
from ml2o_dist.metatrain.trainer import checked_progress
from ml2o_dist.metatrain.trajectories import FOLDER, Recorded, read_trajectories
from ml2o_dist.paretoset.results import read_fronts
from ml2o_dist.paretoset.settings import ParetoSetSettings
from ml2o_dist.plugins import find_loaded
from ml2o_dist.reporting.evaluation_page import evaluation_page_sections, render_evaluation
from ml2o_dist.reporting.meta_train_page import page_sections, render_page
from ml2o_dist.reporting.pareto_set_page import SetPageRecord, render_set, set_page_sections
from ml2o_dist.reporting.run_record import EvaluationRecord, RunRecord
from ml2o_dist.reporting.sweep_page import SweepPageRecord, read_pictures, render_sweep, sweep_page_sections
from ml2o_dist.rundir.log import RunLog, read_log
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import replacing
from ml2o_dist.runtime.reading import MIB, read_bytes, read_json, read_yaml
from ml2o_dist.runtime.remote_files import is_uri
from ml2o_dist.sweeping.record import FILE as TRIALS
from ml2o_dist.sweeping.record import SweepRecord
from ml2o_dist.sweeping.space import load_sweep

PAGE = "report.html"
EVALUATION = ("evaluation.json", "evaluate.yaml")
"""Files that `ml2o evaluate` writes to its folder: results, settings."""
SWEEP = "sweep.yaml"
"""The first file that `ml2o sweep` writes to its folder: its settings."""
PARETO_SET = "pareto_set.yaml"
"""The first file that `ml2o pareto-set train` writes to its folder: its settings."""
PICTURE_LIMIT = 16 * MIB
"""Maximum bytes of a picture in a page."""
Found = TypeVar("Found")


def write_report(run_dir: Path, path: Path | None = None, place: str = "") -> dict[str, Any]:
    """Write `path` (None: `RUN_DIR/report.html`) from the files of a run, evaluation or sweep, finished or not.

    `place` is the user's name for the folder if that is not its path: a URI.

    Returns what `ml2o report --json` prints: `path`, the `sections` that have content, `missing` with the reason for
    each section without content, and `unread` with a line for each file that cannot be read.

    Raises:
        UserError: the folder holds none of them, cannot be written, or was made with plug-ins that are not loaded.
    """
    for name in ("config.yaml", EVALUATION[1], SWEEP, PARETO_SET):
        _check_plugins(run_dir / name)
    if (run_dir / PARETO_SET).is_file():
        pareto_set = load_set_record(run_dir, place)
        sections, unread = set_page_sections(pareto_set), pareto_set.unread_lines
        page = render_set(pareto_set, sections)
    elif (run_dir / SWEEP).is_file():
        record = load_sweep_record(run_dir, place)
        sections, unread = sweep_page_sections(record), record.unread_lines
        page = render_sweep(record, sections)
    elif not (run_dir / "config.yaml").is_file() and any((run_dir / name).is_file() for name in EVALUATION):
        evaluation = load_evaluation_record(run_dir, place)
        sections, unread = evaluation_page_sections(evaluation), evaluation.unread_lines
        page = render_evaluation(evaluation, sections)
    else:
        run = load_record(run_dir, place)
        sections, unread = page_sections(run), run.unread_lines
        page = render_page(run, sections)
    path = path or run_dir / PAGE
    try:
        with replacing(path) as stream:
            stream.write(page.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    shown = [section.name for section in sections if section.body]
    missing = {section.name: section.missing for section in sections if section.missing}
    return {"path": str(path), "sections": shown, "missing": missing, "unread": unread}


def load_record(run_dir: Path, place: str = "") -> RunRecord:
    """Read back a run; missing files are left out, and unreadable ones are noted in `unread`.

    Raises:
        UserError: the folder holds no config.yaml, so no run.
    """
    files = _Files(run_dir, place)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{files.place} holds no run and no evaluation: there is no config.yaml, and no {EVALUATION[0]}, in it"
        )
    checkpoint, refused = newest_checkpoint(run_dir / "checkpoints")
    if refused:
        files.note("checkpoints", [f"checkpoint refused: {refusal}" for refusal in refused])
    recorded = files.read(FOLDER, _recorded)
    if recorded is not None and recorded.unread:
        files.note(FOLDER, recorded.unread)
    return RunRecord(
        name=files.name,
        path=files.place,
        settings=files.read("config.yaml", lambda file: load_settings(file, within=run_dir)),
        history=files.read(HISTORY, lambda file: read_history(file, within=run_dir)) or (),
        comparison=files.read("comparison.json", _evaluation),
        card=files.read("weights.json", _card),
        checkpoint_step=checkpoint.meta_step if checkpoint else None,
        progress=files.checked("checkpoints", lambda: checked_progress(checkpoint.state.get("progress"))) or {}
        if checkpoint
        else {},
        trajectories=recorded.rows if recorded else None,
        log=files.read("run.log", read_log) or RunLog(),
        unread=files.unread,
    )


def load_evaluation_record(folder: Path, place: str = "") -> EvaluationRecord:
    """Read back an evaluation; missing files become None, and unreadable ones are noted in `unread`."""
    files = _Files(folder, place)
    evaluation = files.read(EVALUATION[0], _evaluation)
    settings = files.read(EVALUATION[1], lambda file: load_evaluation(file, within=folder))
    return EvaluationRecord(
        name=files.name,
        path=files.place,
        evaluation=evaluation,
        settings=evaluation.settings if settings is None and evaluation is not None else settings,
        log=files.read("run.log", read_log) or RunLog(),
        unread=files.unread,
    )


def load_sweep_record(folder: Path, place: str = "") -> SweepPageRecord:
    """Read back a sweep; missing files are left out, and unreadable ones are noted in `unread`."""
    files = _Files(folder, place)
    return SweepPageRecord(
        name=files.name,
        path=files.place,
        settings=files.read(SWEEP, lambda file: load_sweep(file, within=folder)),
        trials=files.read(TRIALS, lambda file: SweepRecord(file.parent)),
        pictures=files.read("plots", read_pictures) or {},
        log=files.read("run.log", read_log) or RunLog(),
        unread=files.unread,
    )


def load_set_record(folder: Path, place: str = "") -> SetPageRecord:
    """Read back a Pareto set; missing files are left out, and unreadable ones are noted in `unread`."""
    files = _Files(folder, place)
    fronts = files.read("fronts.json", read_fronts)
    picture = folder / "plots" / "fronts.png"
    return SetPageRecord(
        name=files.name,
        path=files.place,
        settings=files.read(PARETO_SET, lambda file: read_settings(ParetoSetSettings, file, (), within=folder)),
        names=fronts.tasks if fronts else (),
        results=fronts.approaches if fronts else (),
        provenance={"git": fronts.git or ""} | fronts.data_sha256 if fronts else {},
        picture=files.read("plots", lambda _: read_bytes(picture, "picture", PICTURE_LIMIT, folder)) or b"",
        log=files.read("run.log", read_log) or RunLog(),
        unread=files.unread,
    )


def _check_plugins(file: Path) -> None:
    """Raise UserError unless the plug-ins that `file` names are loaded: without them its settings cannot be read."""
    try:
        tree = read_yaml(file, "settings", within=file.parent)
    except (UserError, OSError):
        return  # the page says what cannot be read
    plugins = tree.get("plugins") if isinstance(tree, dict) else None
    for each in plugins if isinstance(plugins, list) else ():
        if isinstance(each, dict) and isinstance(each.get("name"), str) and isinstance(each.get("sha256"), str):
            find_loaded(each["name"], each["sha256"])


class _Files:
    """Reads a folder's files; unreadable ones are noted in `unread` by name."""

    def __init__(self, folder: Path, place: str) -> None:
        self.folder, self.place = folder, place or str(folder)
        self.unread: dict[str, list[str]] = {}

    @property
    def name(self) -> str:
        return PurePosixPath(urlsplit(self.place).path).name if is_uri(self.place) else self.folder.name

    def note(self, name: str, lines: Sequence[str]) -> None:
        self.unread.setdefault(name, []).extend(line.replace(str(self.folder), self.place) for line in lines)

    def read(self, name: str, reader: Callable[[Path], Found]) -> Found | None:
        """Return the result of `reader` for a file or folder; None if it is missing or cannot be read."""
        path = self.folder / name
        if not os.path.lexists(path):
            return None
        return self.checked(name, lambda: reader(path))

    def checked(self, name: str, reader: Callable[[], Found]) -> Found | None:
        """Return the result of `reader`, or note under `name` why it failed."""
        try:
            return reader()
        except UserError as error:
            self.note(name, [str(error)])
        except OSError as error:  # the folder exists, the file does not
            self.note(name, [f"{self.folder / name} cannot be read: {error.strerror or error}"])
        return None


def _evaluation(path: Path) -> Evaluation:
    """Read an evaluation; raises UserError for another format."""
    tree = read_json(path, "evaluation", within=path.parent, finite=True)
    try:
        return Evaluation.from_json(tree)
    except UserError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _card(path: Path) -> dict[str, Any]:
    """Read the parts of a card that the page shows; raises UserError."""
    return parse_card(path, read_bytes(path, "card file", CARD_LIMIT, path.parent))


def _recorded(folder: Path) -> Recorded | None:
    return read_trajectories(folder.parent) if any(folder.glob("step_*.parquet")) else None
