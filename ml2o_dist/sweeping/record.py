"""What the trials of a sweep have reported: lines of `trials.jsonl`, the truth behind tables, MLflow and pages."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ml2o_dist import shown_text
from ml2o_dist.files import replacing

FILE, TABLE = "trials.jsonl", "results.parquet"
"""The record, and the table of trials that is made of it."""

FOLDER = "tune"
"""Ray Tune's part of the run directory: its state, and a folder with the checkpoints of each trial."""

State = Literal["running", "finished", "stopped", "failed"]
"""stopped: by the scheduler, before its last meta-step."""


@dataclass(frozen=True)
class Report:
    """What a trial said at one validation.

    Attributes:
        values: of the search space by key, as they were then (population-based training changes them).
        validation: of the weights at `meta_step`; `best_validation` of those that are kept, from `best_meta_step`.
        seconds: of meta-training so far.
    """

    meta_step: int
    validation: float
    best_validation: float
    best_meta_step: int
    seconds: float
    values: Mapping[str, Any]
    meta_loss: float | None = None


@dataclass
class Trial:
    """One trial: `number` counts from 1 in the order of their beginning, `id` is Tune's."""

    id: str
    number: int
    values: dict[str, Any]
    state: State = "running"
    error: str = ""
    reports: dict[int, Report] = field(default_factory=dict)

    @property
    def last(self) -> Report | None:
        """What it said last."""
        return self.reports[max(self.reports)] if self.reports else None

    @property
    def score(self) -> float:
        """Validation of its best weights, infinite where there is none."""
        return self.last.best_validation if self.last else math.inf

    @property
    def best_at(self) -> int | None:
        """The meta-step of its best weights; None where there are none."""
        return self.last.best_meta_step if self.last else None

    @property
    def folder(self) -> str:
        """Where its checkpoints are, in the run directory."""
        return f"{FOLDER}/{self.id}"

    @property
    def meta_steps(self) -> int:
        """How many it has done."""
        return max(self.reports, default=0)

    def to_json(self) -> dict[str, Any]:
        """Return it as `ml2o sweep --json` prints it; null where there is no finite number."""
        last = self.last
        return {
            "trial": self.number,
            "id": self.id,
            "state": self.state,
            "values": self.values,
            "meta_steps": self.meta_steps,
            "validation": _finite(self.score),
            "best_meta_step": self.best_at,
            "seconds": last.seconds if last else None,
            "error": self.error or None,
        }


class SweepRecord:
    """All trials by their id; every change is a line of the file first."""

    def __init__(self, folder: Path) -> None:
        """Read what is there; a line that a kill has cut is left out."""
        self.file = folder / FILE
        self.trials: dict[str, Trial] = {}
        for line in self.file.read_bytes().split(b"\n")[:-1] if self.file.exists() else ():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError):
                continue

    def begin(self, id: str, values: Mapping[str, Any]) -> Trial:
        """Note that a trial runs (again) with these values; a new one has the lowest number that is free."""
        known = self.trials.get(id)
        taken = {trial.number for trial in self.trials.values()}
        number = known.number if known else next(free for free in count(1) if free not in taken)
        if known is None or known.state != "running" or known.values != dict(values):
            self._write({"trial": id, "number": number, "values": dict(values)})
        return self.trials[id]

    def report(self, id: str, report: Report) -> None:
        """Add a report; one of the same meta-step, from before a kill, gives way to it."""
        self._write({"trial": id, **report.__dict__, "values": dict(report.values)})

    def end(self, id: str, state: State, error: str = "") -> None:
        """Note how a trial has ended."""
        self._write({"trial": id, "state": state, "error": error})

    def forget(self, ids: Sequence[str]) -> None:
        """Drop trials, as if they had never been."""
        if not ids:
            return
        lines = [line for line in self.file.read_bytes().split(b"\n")[:-1] if not _is_of(line, ids)]
        with replacing(self.file) as stream:
            stream.write(b"".join(line + b"\n" for line in lines))
        for id in ids:
            del self.trials[id]

    @property
    def in_order(self) -> list[Trial]:
        """All trials by their number."""
        return sorted(self.trials.values(), key=lambda trial: trial.number)

    def best(self) -> Trial | None:
        """Return the trial with the lowest score among those that did not fail; None: there is none."""
        whole = [trial for trial in self.trials.values() if trial.state != "failed" and math.isfinite(trial.score)]
        return min(whole, key=lambda trial: (trial.score, trial.number), default=None)

    def ranked(self) -> list[Trial]:
        """Return all trials, the best first, those that failed last."""
        return sorted(self.trials.values(), key=lambda trial: (trial.state == "failed", trial.score, trial.number))

    def so_far(self, count: int) -> str:
        """Say how many of `count` trials are where."""
        ended = sum(trial.state != "running" for trial in self.trials.values())
        begun = len(self.trials)
        return f"{ended} of {count} trials ended, {begun - ended} under way, {count - begun} not begun"

    def notes(self, scheduler: str) -> list[str]:
        """Say what the table of trials does not show by itself."""
        notes = []
        best = self.best()
        if best is not None and best.best_at == 0:
            notes.append(
                f"The best weights, of trial {best.number}, are those of meta-step 0: of a network that is not trained "
                "yet, which no meta-training here has improved on."
            )
        if scheduler == "pbt":
            notes.append(
                "With scheduler=pbt weights come from a schedule of values, which trials.jsonl has by meta-step; shown "
                "are the last ones, with which alone a meta-training comes to other weights."
            )
        return notes

    def _write(self, entry: Mapping[str, Any]) -> None:
        with self.file.open("ab") as stream:
            if stream.tell() and not _ends_a_line(self.file):
                stream.write(b"\n")  # after a line that was cut
            stream.write(json.dumps(entry).encode() + b"\n")
        self._take(entry)

    def _take(self, entry: Mapping[str, Any]) -> None:
        id = entry["trial"]
        if "number" in entry:
            trial = self.trials.setdefault(id, Trial(id, entry["number"], {}))
            trial.state, trial.error, trial.values = "running", "", dict(entry["values"])
            return
        trial = self.trials[id]
        if "meta_step" in entry:
            report = Report(**{key: value for key, value in entry.items() if key != "trial"})
            trial.reports[report.meta_step] = report
            trial.values = dict(report.values)
        else:
            trial.state, trial.error = entry["state"], entry["error"]


def write_table(folder: Path, record: SweepRecord) -> Path:
    """Write a row for each trial: its figures, and each key of the space as a column; values of mixed kinds as JSON."""
    rows = [trial.to_json() for trial in record.in_order]
    keys = list(dict.fromkeys(key for row in rows for key in row["values"]))
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0] if name != "values"}
    for key in keys:
        column = [row["values"].get(key) for row in rows]
        plain = all(type(value) is type(column[0]) and isinstance(value, int | float | str) for value in column)
        columns[key] = column if plain else [json.dumps(value) for value in column]
    path = folder / TABLE
    with replacing(path) as stream:
        pq.write_table(pa.table(columns), stream)
    return path


def markdown(record: SweepRecord, name: str, scheduler: str) -> str:
    """Return the trials as a Markdown table, the best first, and what is to be said of it."""
    ranked = record.ranked()
    keys = list(dict.fromkeys(key for trial in ranked for key in trial.values))
    head = ["trial", "state", "meta-steps", "best at", "validation", *map(shown_text.markdown, keys), "folder"]
    rows = [
        [
            str(each.number),
            shown_text.markdown(each.state),
            str(each.meta_steps),
            shown_step(each.best_at),
            shown(each.score),
            *(shown_text.markdown(shown(each.values.get(k))) for k in keys),
            shown_text.markdown(each.folder),
        ]
        for each in ranked
    ]
    lines = [f"Sweep `{name}`: {len(ranked)} trials, validation of the kept weights (lower is better).", ""]
    lines += [shown_text.markdown_row(cells) for cells in (head, ["---"] * len(head), *rows)]
    lines += [line for note in record.notes(scheduler) for line in ("", shown_text.markdown(note))]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """Return a value of the space, or a figure, as a table has it."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return value if isinstance(value, str) else json.dumps(value)


def shown_step(step: int | None) -> str:
    """Return a meta-step, where there is one, as a table has it."""
    return "-" if step is None else str(step)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _is_of(line: bytes, ids: Sequence[str]) -> bool:
    try:
        return json.loads(line)["trial"] in ids
    except ValueError:
        return True


def _ends_a_line(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(-1, 2)
        return stream.read() == b"\n"
