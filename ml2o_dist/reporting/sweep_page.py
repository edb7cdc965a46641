"""A sweep as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ml2o_dist.config_file import flat_settings
from ml2o_dist.reporting.document import PageHead, Section, document, duration, warnings_section
from ml2o_dist.reporting.evaluation_figures import Shown
from ml2o_dist.reporting.html_templates import SortableRow, macros
from ml2o_dist.reporting.run_record import Record
from ml2o_dist.reporting.sweep_plots import PICTURES
from ml2o_dist.runtime.reading import MIB, read_bytes
from ml2o_dist.sweeping.importance import importance
from ml2o_dist.sweeping.record import FILE, SweepRecord, Trial, shown, shown_step
from ml2o_dist.sweeping.settings import SweepSettings

PICTURE_LIMIT = 16 * MIB
"""Largest picture that a page includes, in bytes."""


@dataclass(frozen=True)
class SweepPageRecord(Record):
    """The content of a sweep's folder; None or empty for what is missing (so far).

    Attributes:
        pictures: by name, the PNG files of `plots/`.
    """

    settings: SweepSettings | None = None
    trials: SweepRecord | None = None
    pictures: Mapping[str, bytes] = field(default_factory=dict)


def read_pictures(folder: Path) -> dict[str, bytes]:
    """Return the pictures in `folder` (a sweep's `plots/`) by name; raises UserError."""
    files = {name: folder / f"{name}.png" for name in PICTURES}
    return {
        name: read_bytes(file, "picture", PICTURE_LIMIT, folder.parent) for name, file in files.items() if file.exists()
    }


def sweep_page_sections(record: SweepPageRecord) -> list[Section]:
    """Return the parts of the page in their order, each with its HTML or the reason why it has none."""
    return [
        _trials(record),
        *(_picture(record, name) for name in PICTURES),
        _failed(record),
        _configuration(record),
        warnings_section(record),
    ]


def render_sweep(record: SweepPageRecord, sections: Sequence[Section]) -> str:
    """Return the whole document."""
    head = PageHead("Sweep", record.name, record.path, _state(record), _tiles(record), record.unread_lines)
    return document(head, sections)


def _all(record: SweepPageRecord) -> list[Trial]:
    return record.trials.in_order if record.trials else []


def _state(record: SweepPageRecord) -> str:
    trials = _all(record)
    ended = sum(trial.state != "running" for trial in trials)
    total = f" of {record.settings.count}" if record.settings else ""
    return f"{ended}{total} trials have ended{f'; {record.log.ended}' if record.log.ended else ''}."


def _tiles(record: SweepPageRecord) -> list[tuple[str, str]]:
    trials = _all(record)
    best = record.trials.best() if record.trials else None
    tiles = []
    if best is not None:
        tiles.append(("Best validation", f"{best.score:.4f}, trial {best.number}"))
        tiles += [(key, shown(value)) for key, value in best.values.items()]
    stopped, failed = (sum(trial.state == state for trial in trials) for state in ("stopped", "failed"))
    tiles += [("Stopped early", str(stopped)), ("Failed", str(failed))]
    if seconds := sum(trial.last.seconds for trial in trials if trial.last):
        tiles.append(("Meta-training, all trials", duration(seconds)))
    return tiles


def _trials(record: SweepPageRecord) -> Section:
    if not record.trials or not record.trials.trials:
        return Section("trials", "Trials", missing=record.why_not(FILE, "No trial has begun."))
    keys = list(dict.fromkeys(key for trial in _all(record) for key in trial.values))
    columns = ["trial", "state", "meta-steps", "best at", "validation", *keys, "folder"]
    best = record.trials.best()
    rows = []
    for trial in record.trials.ranked():
        figures = {
            "trial": Shown(str(trial.number), trial.number),
            "state": Shown(trial.state, trial.state),
            "meta-steps": Shown(str(trial.meta_steps), trial.meta_steps),
            "best at": Shown(shown_step(trial.best_at), math.nan if trial.best_at is None else trial.best_at),
            "validation": Shown(shown(trial.score), trial.score if math.isfinite(trial.score) else math.nan),
        }
        for key in keys:
            value = trial.values.get(key)
            figures[key] = Shown(shown(value), value if isinstance(value, int | float) else shown(value))
        figures["folder"] = Shown(trial.folder, trial.folder)
        rows.append(SortableRow("learned" if trial is best else "", figures))
    said = "Validation of the weights that are kept, on problems that training did not see: lower is better."
    said += ' "Best at" is the meta-step that they are from.'
    notes = record.trials.notes(record.settings.scheduler if record.settings else "")
    return Section("trials", "Trials", macros("sweep").trials([said, *notes], columns, rows))


def _picture(record: SweepPageRecord, name: str) -> Section:
    title = name.replace("_", " ").capitalize()
    said = PICTURES[name]
    if name == "importance" and record.settings and record.trials:
        said = importance(record.settings, record.trials).caption
    if name not in record.pictures:
        why = said if name == "importance" else "Drawn when the sweep is done."
        return Section(name, title, missing=record.why_not("plots", why))
    return Section(name, title, macros("sweep").picture(said, record.pictures[name], title))


def _failed(record: SweepPageRecord) -> Section:
    rows = [("", [str(trial.number), trial.error]) for trial in _all(record) if trial.error]
    body = macros("parts").table("Failed trials", ["trial", "error"], rows, "words tall")
    return Section("failed", "Failed trials", body, "" if rows else "None.")


def _configuration(record: SweepPageRecord) -> Section:
    title = "Configuration"
    if record.settings is None:
        return Section("configuration", title, missing=record.why_not("sweep.yaml", "No configuration."))
    every = flat_settings(record.settings)
    ours = {key: value for key, value in every.items() if not key.startswith("meta_train.") and value is not None}
    return Section("configuration", title, macros("sweep").configuration(ours, every))
