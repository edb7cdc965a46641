"""`ml2o report`: what lies in a run directory, read back and written as one page beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ml2o_dist.config_file import load_settings
from ml2o_dist.errors import UserError
from ml2o_dist.evaluation.benchmark import Comparison
from ml2o_dist.evaluation.page import RunRecord, Warned, page_sections, render_page
from ml2o_dist.files import replacing
from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.metatrain.trajectories import FOLDER, read_trajectories

PAGE = "report.html"
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\S* (WARNING|ERROR|CRITICAL) \S+: (.*)")

Found = TypeVar("Found")


def write_report(run_dir: Path, path: Path | None = None) -> dict[str, Any]:
    """Write `path` (None: `RUN_DIR/report.html`) from whatever of the run is there; the run need not be finished.

    Returns what `ml2o report --json` prints: `path`, the `sections` that have something to show, and in `missing`, by
    section, why something is not there.

    Raises:
        UserError: the folder holds no run, or cannot be written.
    """
    record = load_record(run_dir)
    sections = page_sections(record)
    path = path or run_dir / PAGE
    try:
        with replacing(path) as stream:
            stream.write(render_page(record, sections).encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    shown = [section.name for section in sections if section.body]
    missing = {section.name: section.missing for section in sections if section.missing}
    return {"path": str(path), "sections": shown, "missing": missing}


def load_record(run_dir: Path) -> RunRecord:
    """Read back a run: what is not there is left out, and what cannot be read is noted in `unread`.

    Raises:
        UserError: the folder holds no config.yaml, so no run.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} holds no run: there is no config.yaml in it")
    unread: list[str] = []

    def read(name: str, reader: Callable[[Path], Found]) -> Found | None:
        path = run_dir / name
        if not path.exists():
            return None
        try:
            return reader(path)
        except UserError as error:
            unread.append(str(error))
        except (OSError, pa.ArrowException, ValueError, TypeError, KeyError) as error:
            unread.append(f"{path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}")
        return None

    checkpoint, refused = newest_checkpoint(run_dir / "checkpoints")
    unread += [f"checkpoint refused: {refusal}" for refusal in refused]
    return RunRecord(
        name=run_dir.name,
        path=str(run_dir),
        settings=read("config.yaml", load_settings),
        history=read("metrics.parquet", _history) or (),
        comparison=read("comparison.json", lambda path: Comparison.from_json(json.loads(path.read_bytes()))),
        card=read("weights.json", _card),
        progress=checkpoint.state.get("progress", {}) if checkpoint else {},
        trajectories=read(FOLDER, _recorded),
        warnings=read("run.log", _warnings) or (),
        unread=unread,
    )


def _history(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.ParquetFile(path).read().to_pylist()
    return rows


def _card(path: Path) -> dict[str, Any]:
    card = json.loads(path.read_bytes())
    if not isinstance(card, dict):
        raise ValueError("not a JSON object")
    return card


def _recorded(folder: Path) -> pa.Table | None:
    return read_trajectories(folder.parent) if any(folder.glob("step_*.parquet")) else None


def _warnings(path: Path) -> list[Warned]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [Warned(*match.groups()) for line in lines if (match := _LINE.fullmatch(line))]
