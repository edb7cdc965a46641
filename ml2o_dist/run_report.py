"""`ml2o report`: what lies in a run directory, read back and written as one page beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa

from ml2o_dist.config_file import load_settings
from ml2o_dist.errors import UserError
from ml2o_dist.evaluation.benchmark import Comparison
from ml2o_dist.evaluation.page import page_sections, render_page
from ml2o_dist.evaluation.run_record import RunRecord
from ml2o_dist.files import replacing
from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.metatrain.history import FILE as HISTORY
from ml2o_dist.metatrain.history import read_history
from ml2o_dist.metatrain.trajectories import FOLDER, Recorded, read_trajectories
from ml2o_dist.remote_files import is_uri
from ml2o_dist.run_log import RunLog, read_log

PAGE = "report.html"
Found = TypeVar("Found")


def write_report(run_dir: Path, path: Path | None = None, place: str = "") -> dict[str, Any]:
    """Write `path` (None: `RUN_DIR/report.html`) from whatever of the run is there; the run need not be finished.

    `place` is what the user knows the run by, where that is not the folder: a URI.

    Returns what `ml2o report --json` prints: `path`, the `sections` that have something to show, in `missing`, by
    section, why something is not there, and in `unread` a line for each file that cannot be read.

    Raises:
        UserError: the folder holds no run, or cannot be written.
    """
    record = load_record(run_dir, place)
    sections = page_sections(record)
    path = path or run_dir / PAGE
    try:
        with replacing(path) as stream:
            stream.write(render_page(record, sections).encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    shown = [section.name for section in sections if section.body]
    missing = {section.name: section.missing for section in sections if section.missing}
    return {"path": str(path), "sections": shown, "missing": missing, "unread": record.unread_lines}


def load_record(run_dir: Path, place: str = "") -> RunRecord:
    """Read back a run: what is not there is left out, and what cannot be read is noted in `unread`.

    Raises:
        UserError: the folder holds no config.yaml, so no run.
    """
    place = place or str(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{place} holds no run: there is no config.yaml in it")
    unread: dict[str, list[str]] = {}

    def note(name: str, lines: Sequence[str]) -> None:
        unread.setdefault(name, []).extend(line.replace(str(run_dir), place) for line in lines)

    def read(name: str, reader: Callable[[Path], Found]) -> Found | None:
        path = run_dir / name
        if not path.exists():
            return None
        try:
            return reader(path)
        except UserError as error:
            note(name, [str(error)])
        except (OSError, pa.ArrowException, ValueError, TypeError, KeyError) as error:
            note(name, [f"{path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"])
        return None

    checkpoint, refused = newest_checkpoint(run_dir / "checkpoints")
    if refused:
        note("checkpoints", [f"checkpoint refused: {refusal}" for refusal in refused])
    recorded = read(FOLDER, _recorded)
    if recorded is not None and recorded.unread:
        note(FOLDER, recorded.unread)
    return RunRecord(
        name=PurePosixPath(urlsplit(place).path).name if is_uri(place) else run_dir.name,
        path=place,
        settings=read("config.yaml", load_settings),
        history=read(HISTORY, read_history) or (),
        comparison=read("comparison.json", lambda path: Comparison.from_json(json.loads(path.read_bytes()))),
        card=read("weights.json", _card),
        checkpoint_step=checkpoint.meta_step if checkpoint else None,
        progress=checkpoint.state.get("progress", {}) if checkpoint else {},
        trajectories=recorded.rows if recorded else None,
        log=read("run.log", read_log) or RunLog(),
        unread=unread,
    )


def _card(path: Path) -> dict[str, Any]:
    card = json.loads(path.read_bytes())
    if not isinstance(card, dict):
        raise ValueError("not a JSON object")
    return card


def _recorded(folder: Path) -> Recorded | None:
    return read_trajectories(folder.parent) if any(folder.glob("step_*.parquet")) else None
