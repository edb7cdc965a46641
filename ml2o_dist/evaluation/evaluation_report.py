"""An evaluation as a table: for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ml2o_dist.evaluation.evaluated import Evaluation, Row
from ml2o_dist.evaluation.report import NOTHING, number, several

OPTIMIZER = "optimizer"
GUARD = ("accepted", "guard's share")
FRONT = ("hypervolume", "IGD+", "epsilon", "outside")


def evaluation_table(evaluation: Evaluation) -> Group:
    """Return tables for the terminal, one for each problem, in the order in which the optimizers were named."""
    parts: list[Table | Text] = [Text(caption(evaluation), style="dim")]
    for problem in dict.fromkeys(row.problem for row in evaluation.rows):
        rows = [row for row in evaluation.rows if row.problem == problem]
        columns = _columns(rows)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        for name in columns:
            table.add_column(name, justify="left" if name == OPTIMIZER else "right")
        for row in rows:
            figures = row_figures(row)
            table.add_row(*(Text(figures[name]) for name in columns))
        parts += [Text(), Text(problem, style="bold underline"), table]
        parts += [Text("  " + line) for line in _notes(rows)]
    return Group(*parts)


def evaluation_markdown(evaluation: Evaluation) -> str:
    """Return the same as plain Markdown: a table for all problems, then the notes."""
    columns = _columns(evaluation.rows)
    lines = [
        caption(evaluation),
        "",
        f"| problem | {' | '.join(columns)} |",
        "|---|---|" + "---:|" * (len(columns) - 1),
    ]
    shown = ""
    for row in evaluation.rows:
        figures = row_figures(row) | {OPTIMIZER: f"`{row.optimizer}`"}
        problem = f"`{row.problem}`" if row.problem != shown else ""
        shown = row.problem
        lines.append(f"| {problem} | {' | '.join(figures[name] for name in columns)} |")
    notes = [f"- `{row.problem}`: {line}" for row in evaluation.rows for line in _notes([row])]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def row_figures(row: Row) -> dict[str, str]:
    """Return the cells of a row as text, by column."""
    loss = f"{number(row.loss)} ± {number(row.loss_standard_error, '#.2g')}"
    if row.diverged:
        loss = f"{row.diverged} of {row.seeds} diverged"
    if not row.seeds:
        loss = "failed"
    learning_rate = "" if row.learning_rate is None or "@" in row.optimizer else f"@{row.learning_rate:g}"
    front = row.front
    return {
        OPTIMIZER: row.optimizer + learning_rate + (" *" if _notes([row]) else ""),
        "loss, last tenth": loss,
        "per objective": several(row.losses, "#.3g"),
        "test accuracy": several([100 * value for value in row.test_accuracy or ()], ".1f"),
        "criticality": f"{number(row.criticality, '#.3g')} ± {number(row.criticality_standard_error, '#.2g')}",
        GUARD[0]: _share(row.acceptance),
        "evaluations": number(row.evaluations, ".0f"),
        "ms/step": number(row.ms_per_step, ".2f"),
        GUARD[1]: _share(row.guard_share),
        FRONT[0]: NOTHING if front is None else number(front.hypervolume),
        FRONT[1]: NOTHING if front is None else number(front.igd_plus, "#.3g"),
        FRONT[2]: NOTHING if front is None else number(front.additive_epsilon, "#.3g"),
        FRONT[3]: NOTHING if front is None else str(front.outside),
    }


def caption(evaluation: Evaluation) -> str:
    """Return what the figures are and how they were made."""
    settings = evaluation.settings
    text = (
        f"Summed loss over the last tenth of {settings.steps} steps and criticality of the end point on a large fixed "
        f"batch, mean ± standard error of {settings.seeds} paired seed{'' if settings.seeds == 1 else 's'}; lower is "
        "better. Criticality alone says little: it is small on flat stretches too. Evaluations: forward + backward "
        "passes of a run."
    )
    if any(row.tuning for row in evaluation.rows):
        grid, seeds = ", ".join(f"{lr:g}" for lr in settings.learning_rates), settings.tuning_seeds
        text += f" Tuned: best learning rate of {grid} on {seeds} other seed{'' if seeds == 1 else 's'}."
    if any(row.front for row in evaluation.rows):
        text += (
            " Hypervolume (higher is better), IGD+ and epsilon are of the seeds' end points against the known front; "
            "outside: end points that are not better than the reference point."
        )
    return text


def _columns(rows: Sequence[Row]) -> list[str]:
    """Return the columns of which some row has something to show."""
    figures = [row_figures(row) for row in rows]
    always = {OPTIMIZER, "loss, last tenth", "criticality", "evaluations", "ms/step"}
    return [name for name in figures[0] if name in always or any(each[name] != NOTHING for each in figures)]


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    for row in rows:
        failed = f"{row.failed} of {row.seeds + row.failed} cells failed" if row.failed else ""
        notes += [f"* {row.optimizer}: {'; '.join(filter(None, (failed, row.note)))}"] if failed or row.note else []
    return notes


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"
