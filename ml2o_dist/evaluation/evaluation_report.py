"""An evaluation as a table: for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, JustifyMethod
from rich.table import Table
from rich.text import Text

from ml2o_dist.evaluation.evaluated import Evaluation, Row
from ml2o_dist.evaluation.report import NOTHING, number, several

OPTIMIZER, LOSS, OBJECTIVES, ACCURACY = "optimizer", "loss, last tenth", "per objective", "test accuracy"
CRITICALITY, EVALUATIONS, TIME = "criticality", "evaluations", "ms/step"
ACCEPTED, SHARE = "accepted", "guard"
ALWAYS = (OPTIMIZER, LOSS, CRITICALITY, EVALUATIONS, TIME)
"""Columns that are shown though there is nothing in them."""
STAR = " *"
FRONT = ("hypervolume", "IGD+", "epsilon", "outside")
SECOND = (EVALUATIONS, TIME, ACCEPTED, SHARE, *FRONT)
"""Columns of a second table on the terminal: all would not fit."""
NARROWEST = {OPTIMIZER: 16, OBJECTIVES: 9, ACCURACY: 8}
"""Of the columns that may be broken into lines."""


def evaluation_table(evaluation: Evaluation) -> Group:
    """Return tables for the terminal, one for each problem, in the order in which the optimizers were named.

    They fit in 80 columns; costs, what the guard did and how far the known front is are in a second one.
    """
    parts: list[Table | Text] = [Text(caption(evaluation), style="dim")]
    for problem in dict.fromkeys(row.problem for row in evaluation.rows):
        rows = [row for row in evaluation.rows if row.problem == problem]
        columns = _columns(rows)
        parts += [Text(), Text(problem, style="bold underline")]
        parts.append(_table(rows, [name for name in columns if name not in SECOND]))
        second = [name for name in columns if name in SECOND]
        if second:
            parts += [Text(), _table(rows, [OPTIMIZER, *second])]
        parts += [Text("  " + line) for line in _notes(rows)]
    return Group(*parts)


def _table(rows: Sequence[Row], columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in columns:
        justify: JustifyMethod = "left" if name == OPTIMIZER else "right"
        narrowest = NARROWEST.get(name)
        table.add_column(name, justify=justify, no_wrap=narrowest is None, overflow="fold", min_width=narrowest)
    for row in rows:
        figures = row_figures(row)
        table.add_row(*(Text(figures[name]) for name in columns))
    return table


def evaluation_markdown(evaluation: Evaluation) -> str:
    """Return the same as plain Markdown: a table for all problems, then the notes."""
    columns = _columns(evaluation.rows) if evaluation.rows else list(ALWAYS)
    lines = [
        caption(evaluation),
        "",
        f"| problem | {' | '.join(columns)} |",
        "|---|---|" + "---:|" * (len(columns) - 1),
    ]
    shown = ""
    for row in evaluation.rows:
        figures = row_figures(row)
        figures[OPTIMIZER] = (
            f"`{figures[OPTIMIZER].removesuffix(STAR)}`{STAR if figures[OPTIMIZER].endswith(STAR) else ''}"
        )
        problem = f"`{row.problem}`" if row.problem != shown else ""
        shown = row.problem
        lines.append(f"| {problem} | {' | '.join(figures[name] for name in columns)} |")
    notes = [f"- `{row.problem}`: {line}" for row in evaluation.rows for line in _notes([row])]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def row_figures(row: Row) -> dict[str, str]:
    """Return the cells of a row as text, by column."""
    loss = _with_error(row.loss, row.loss_standard_error, "#.4g")
    if row.diverged:
        loss = f"{row.diverged} of {row.seeds} diverged"
    if not row.seeds:
        loss = "failed"
    learning_rate = "" if row.learning_rate is None or "@" in row.optimizer else f"@{row.learning_rate:g}"
    front = row.front
    indicators = (
        (NOTHING,) * len(FRONT)
        if front is None
        else (
            f"{number(front.hypervolume)} of {number(front.hypervolume_of_front)}",
            number(front.igd_plus, "#.3g"),
            number(front.additive_epsilon, "#.3g"),
            f"{front.outside} of {row.seeds}",
        )
    )
    return {
        OPTIMIZER: row.optimizer + learning_rate + (STAR if _notes([row]) else ""),
        LOSS: loss,
        OBJECTIVES: several(row.losses, "#.3g"),
        ACCURACY: several([100 * value for value in row.test_accuracy or ()], ".1f"),
        CRITICALITY: _with_error(row.criticality, row.criticality_standard_error, "#.3g"),
        ACCEPTED: _share(row.acceptance),
        EVALUATIONS: number(row.evaluations, ".0f"),
        TIME: number(row.ms_per_step, ".2f"),
        SHARE: _share(row.guard_share),
        **dict(zip(FRONT, indicators, strict=True)),
    }


def caption(evaluation: Evaluation) -> str:
    """Return what the figures are and how they were made."""
    settings = evaluation.settings
    text = (
        f"Summed loss over the last tenth of {settings.steps} steps and criticality of the end point on a large fixed "
        f"batch, mean ± standard error of {settings.seeds} paired seed{'' if settings.seeds == 1 else 's'}; lower is "
        "better. Criticality alone says little: it is small on flat stretches too. Evaluations: forward + backward "
        "passes of a run. Guard: its share of the steps' time."
    )
    if any(row.tuning for row in evaluation.rows):
        grid, seeds = ", ".join(f"{lr:g}" for lr in settings.learning_rates), settings.tuning_seeds
        text += f" Tuned: best learning rate of {grid} on {seeds} other seed{'' if seeds == 1 else 's'}."
    if any(row.front for row in evaluation.rows):
        text += (
            " Hypervolume (of the front's own; higher is better), IGD+ and epsilon are of the seeds' end points "
            "against the known front; outside: end points that are not better than the reference point."
        )
    return text


def _columns(rows: Sequence[Row]) -> list[str]:
    """Return the columns of which some row has something to show."""
    figures = [row_figures(row) for row in rows]
    return [name for name in figures[0] if name in ALWAYS or any(each[name] != NOTHING for each in figures)]


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    for row in rows:
        failed = f"{row.failed} of {row.seeds + row.failed} cells failed" if row.failed else ""
        notes += [f"* {row.optimizer}: {'; '.join(filter(None, (failed, row.note)))}"] if failed or row.note else []
    return notes


def _with_error(mean: float, error: float, form: str) -> str:
    shown = number(mean, form)
    return shown if shown == NOTHING else f"{shown} ± {number(error, '#.2g')}"


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"
