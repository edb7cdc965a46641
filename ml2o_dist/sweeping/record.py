"""The reports of a sweep's trials: lines of `trials.jsonl`, from which tables, MLflow and pages are made."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ml2o_dist.runtime import shown_text
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import replacing
from ml2o_dist.runtime.reading import MIB, check_own_file, read_bytes
from ml2o_dist.sweeping.record_lines import Beginning, Copy, End, Entry, Report, State, entry_of, line_of

FILE, TABLE = "trials.jsonl", "results.parquet"
"""The record of the trials, and the table that is made from it."""

FOLDER = "tune"
"""Ray Tune's part of the run directory: its state, and a folder with the checkpoints of each trial."""

LIMIT = 512 * MIB
"""Bytes of the record: more than a million reports."""


@dataclass
class Trial:
    """One trial: `number` counts trials from 1 in the order in which they began, `id` names the trial's folder.

    Attributes:
        values: the current values of the search space's keys.
        copied: the checkpoint of another trial that this trial resumes from; None once it has reported since the copy.
        runs_with: the values that its process was started with; its reports are recorded with them.
        begun_with: the values that the trial began with.
    """

    id: str
    number: int
    values: dict[str, Any]
    state: State = "running"
    error: str = ""
    reports: dict[int, Report] = field(default_factory=dict)
    copied: Copy | None = None
    runs_with: dict[str, Any] = field(default_factory=dict, compare=False)
    begun_with: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def last(self) -> Report | None:
        """The newest report."""
        return self.reports[max(self.reports)] if self.reports else None

    @property
    def score(self) -> float:
        """Validation score of its best weights; infinite if there is none."""
        return self.last.best_validation if self.last else math.inf

    @property
    def best_at(self) -> int | None:
        """The meta-step of its best weights; None if there are none."""
        return self.last.best_meta_step if self.last else None

    @property
    def folder(self) -> str:
        """The folder of its checkpoints, relative to the run directory."""
        return f"{FOLDER}/{self.id}"

    @property
    def meta_steps(self) -> int:
        """The number of meta-steps done."""
        return max(self.reports, default=0)

    def to_json(self) -> dict[str, Any]:
        """Return the trial as `ml2o sweep --json` prints it; values that are not finite become null."""
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
    """All trials by their id; every change is first written to the file as a line.

    Attributes:
        left_out: the number of unusable lines; `reason` tells why the first of them is unusable. A last line that a
            kill has cut is not counted.
        in_time: trial and meta-step of every report, in the order of arrival.
    """

    def __init__(self, folder: Path) -> None:
        """Read the record in `folder`; raises UserError if it is a link, no regular file, or too large."""
        self.file = folder / FILE
        check_own_file(self.file)
        self.trials: dict[str, Trial] = {}
        self.left_out, self.reason = 0, ""
        self.in_time: dict[tuple[str, int], None] = {}
        self._numbers: dict[int, str] = {}
        try:
            lines = read_bytes(self.file, "record of trials", LIMIT).split(b"\n")[:-1]
        except FileNotFoundError:
            lines = []
        for number, line in enumerate(lines, start=1):
            try:
                self._take(*entry_of(line))
            except UserError as error:
                self.left_out += 1
                self.reason = self.reason or f"line {number}: {error}"

    def begin(self, id: str, values: Mapping[str, Any]) -> Trial:
        """Note that a trial runs (again) with these values; a new trial gets the lowest free number."""
        known = self.trials.get(id)
        number = known.number if known else next(free for free in count(1) if free not in self._numbers)
        if known is None or known.state != "running" or known.values != dict(values):
            self._write(id, Beginning(number, values))
        self.trials[id].runs_with = dict(values)
        return self.trials[id]

    def report(self, id: str, report: Report) -> None:
        """Add a report; it replaces an earlier report of the same meta-step, which the trial has repeated."""
        if report.meta_step in self.trials[id].reports:
            self._drop(lambda trial, entry: _is_at(entry, report.meta_step) and trial == id)
        self._write(id, report)

    def copy(self, id: str, source: str, meta_step: int, values: Mapping[str, Any]) -> None:
        """Note that a trial resumes from the checkpoint of trial `source` at `meta_step`, with these values."""
        self._write(id, Copy(source, meta_step, values))

    def end(self, id: str, state: State, error: str = "") -> None:
        """Note how a trial has ended."""
        self._write(id, End(state, error))

    def rewind(self, id: str, meta_step: int) -> None:
        """Drop a trial's entries after `meta_step`: the trial resumes there and reports them again."""
        known = self.trials[id]
        later = [step for step in known.reports if step > meta_step]
        if not later and (known.copied is None or known.copied.at <= meta_step):
            return
        self._drop(lambda trial, entry: trial == id and _is_after(entry, meta_step))
        for step in later:
            del known.reports[step], self.in_time[id, step]
        if known.copied is not None and known.copied.at > meta_step:
            known.copied = None
        if known.copied is None:
            known.values = dict(known.last.values if known.last else known.begun_with)

    @property
    def in_order(self) -> list[Trial]:
        """All trials by their number."""
        return sorted(self.trials.values(), key=lambda trial: trial.number)

    def best(self) -> Trial | None:
        """Return the trial with the lowest finite score among those that did not fail; None if there is none."""
        whole = [trial for trial in self.trials.values() if trial.state != "failed" and math.isfinite(trial.score)]
        return min(whole, key=lambda trial: (trial.score, trial.number), default=None)

    def ranked(self) -> list[Trial]:
        """Return all trials, the best first, those that failed last."""
        return sorted(self.trials.values(), key=lambda trial: (trial.state == "failed", trial.score, trial.number))

    def so_far(self, count: int) -> str:
        """Return in words how many of `count` trials have ended, are running, and have not begun."""
        ended = sum(trial.state != "running" for trial in self.trials.values())
        begun = len(self.trials)
        return f"{ended} of {count} trials ended, {begun - ended} under way, {count - begun} not begun"

    @property
    def what_is_left_out(self) -> str:
        """How many lines of the file are not used, and why; "" if all are used."""
        if not self.left_out:
            return ""
        lines = "1 line is" if self.left_out == 1 else f"{self.left_out} lines are"
        return f"{self.file.name}: {lines} left out; {self.reason}"

    def notes(self, scheduler: str) -> list[str]:
        """Return remarks that the table of trials does not show by itself."""
        notes = []
        if self.left_out:
            notes.append(f"{self.what_is_left_out}.")
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

    def _write(self, id: str, entry: Entry) -> None:
        if self.file.exists() and not _ends_a_line(self.file):
            self._drop(lambda trial, entry: False)  # removes only the last line, which a kill has cut
        with self.file.open("ab") as stream:
            stream.write(line_of(id, entry))
        self._take(id, entry)

    def _drop(self, unwanted: Callable[[str, Entry], bool]) -> None:
        """Rewrite the file without the lines whose entry is `unwanted`."""
        lines = read_bytes(self.file, "record of trials", LIMIT).split(b"\n")[:-1]
        with replacing(self.file) as stream:
            stream.writelines(line + b"\n" for line in lines if not _says(line, unwanted))

    def _take(self, id: str, entry: Entry) -> None:
        """Apply the entry of one line; raises UserError if it contradicts earlier lines."""
        if isinstance(entry, Beginning):
            if (other := self._numbers.setdefault(entry.number, id)) != id:
                raise UserError(f"trial {id!r} has the number {entry.number} of trial {other!r}")
            trial = self.trials.setdefault(id, Trial(id, entry.number, {}))
            trial.state, trial.error, trial.values = "running", "", dict(entry.values)
            if not (trial.reports or trial.copied):
                trial.begun_with = dict(entry.values)
            return
        if id not in self.trials:
            raise UserError(f"there is no trial {id!r} yet")
        trial = self.trials[id]
        if isinstance(entry, Report):
            trial.reports[entry.meta_step] = entry
            # The last report before an exchange triggers it, so this report is written after the copies are on record.
            if trial.copied is None or trial.copied.at < entry.meta_step:
                trial.values, trial.copied = dict(entry.values), None
            self.in_time[id, entry.meta_step] = None
        elif isinstance(entry, Copy):
            if entry.source not in self.trials:
                raise UserError(f"there is no trial {entry.source!r} yet")
            trial.values, trial.copied = dict(entry.values), entry
        else:
            trial.state, trial.error = entry.state, entry.error


def write_table(folder: Path, record: SweepRecord) -> Path:
    """Write a row for each trial: its figures, and a column for each key of the space; mixed types become JSON."""
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
    """Return the trials as a Markdown table, the best first, followed by remarks."""
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
    """Return a value of the space, or a figure, as table text."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return value if isinstance(value, str) else json.dumps(value)


def shown_step(step: int | None) -> str:
    """Return a meta-step, if there is one, as table text."""
    return "-" if step is None else str(step)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _is_at(entry: Entry, meta_step: int) -> bool:
    return isinstance(entry, Report) and entry.meta_step == meta_step


def _is_after(entry: Entry, meta_step: int) -> bool:
    return (isinstance(entry, Report) and entry.meta_step > meta_step) or (
        isinstance(entry, Copy) and entry.at > meta_step
    )


def _says(line: bytes, unwanted: Callable[[str, Entry], bool]) -> bool:
    try:
        return unwanted(*entry_of(line))
    except UserError:
        return False


def _ends_a_line(file: Path) -> bool:
    """Tell whether the file ends with a newline."""
    with file.open("rb") as stream:
        if stream.seek(0, 2) == 0:
            return True
        stream.seek(-1, 2)
        return stream.read() == b"\n"
