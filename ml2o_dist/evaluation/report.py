"""A comparison as tables: for the terminal and as Markdown; and the words that every form of it shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ml2o_dist.evaluation.benchmark import LEARNED, Comparison, ProblemComparison, Row, Versus

NOTHING = "-"
OPTIMIZER, OBJECTIVES, ACCURACY = "optimizer", "per objective", "test accuracy"
COLUMNS = (OPTIMIZER, "loss, last tenth", OBJECTIVES, ACCURACY, "ms/step", "evaluations")


def comparison_table(comparison: Comparison) -> Group:
    """Return tables for the terminal, one per problem, best first, the best row bold; they fit in 100 columns."""
    parts: list[Table | Text] = [Text(caption(comparison), style="dim")]
    for problem in comparison.problems:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        shown = shown_columns(problem)
        for name in shown:
            wraps = name in (OBJECTIVES, ACCURACY)  # three of each would not fit beside the rest
            table.add_column(name, justify="left" if name == OPTIMIZER else "right", no_wrap=not wraps)
        for i, row in enumerate(problem.rows):
            figures = row_figures(row) | {OPTIMIZER: _mark(row) + row.label + _star(row)}
            style = ("bold " if i == 0 else "") + ("red" if is_contestant(row, LEARNED) else "")
            table.add_row(*(Text(figures[name]) for name in shown), style=style.strip())
        parts += [Text(), Text(problem.problem, style="bold underline"), table]
        parts += [Text("  " + line) for line in verdicts(problem) + notes(problem)]
    return Group(*parts)


def comparison_markdown(comparison: Comparison) -> str:
    """Return the same as plain Markdown: one table for all problems, then the verdicts and notes."""
    lines = [caption(comparison), ""]
    lines.append("| problem | " + " | ".join(COLUMNS) + " |")
    lines.append("|---|---|" + "---:|" * (len(COLUMNS) - 1))
    for problem in comparison.problems:
        for i, row in enumerate(problem.rows):
            label = f"`{row.label}`{_star(row)}"
            cells = [f"**{label}**" if i == 0 else label, *row_figures(row).values()]
            lines.append(f"| {f'`{problem.problem}`' if i == 0 else ''} | " + " | ".join(cells) + " |")
    lines.append("")
    for problem in comparison.problems:
        said = verdicts(problem) + notes(problem)
        lines += [f"- `{problem.problem}`: {'; '.join(said)}"] if said else []
    return "\n".join(lines).rstrip() + "\n"


def shown_columns(problem: ProblemComparison) -> list[str]:
    """Return the columns of one problem's table: all, but the accuracy only where some row has one."""
    return [name for name in COLUMNS if name != ACCURACY or any("test_accuracy" in row.test for row in problem.rows)]


def row_figures(row: Row) -> dict[str, str]:
    """Return the cells of a row as text, by column; the first column is the caller's."""
    loss = f"{number(row.loss)} ± {number(row.standard_error, '#.2g')}"
    if row.diverged:
        loss = f"{row.diverged} of {len(row.seed_losses)} diverged"
    accuracy = [100 * value for value in row.test.get("test_accuracy", ())]
    cells = (
        loss,
        several(row.objectives, "#.3g"),
        several(accuracy, ".1f") + (" %" if accuracy else ""),
        f"{row.ms_per_step:.2f}",
        f"{row.forwards} + {row.backwards}",
    )
    return dict(zip(COLUMNS[1:], cells, strict=True))


def several(values: Sequence[float], form: str) -> str:
    """Return all of up to three values, else their range and how many there are."""
    if not values or not all(map(math.isfinite, values)):
        return NOTHING
    if len(values) <= 3:
        return " / ".join(number(value, form) for value in values)
    return f"{number(min(values), form)} … {number(max(values), form)} ({len(values)})"


def verdicts(problem: ProblemComparison) -> list[str]:
    """Return, in a sentence each, how the learned rule does against the best baseline and the untrained network."""
    return [_verdict(versus) for versus in (problem.versus_baseline, problem.versus_initial) if versus is not None]


def _verdict(versus: Versus) -> str:
    figures = ""
    if math.isfinite(versus.difference.mean):
        error = number(versus.difference.standard_error, "#.2g")
        figures = f" ({_signed(versus.difference.mean)} ± {error}"
        figures += f", ratio {versus.ratio:.3f})" if math.isfinite(versus.ratio) else ")"
    return f"{LEARNED} - {versus.reference}: {versus.verdict}{figures}"


def notes(problem: ProblemComparison) -> list[str]:
    """Return what a reader must know about the tuning of a row, each beginning with the row's label."""
    return [f"* {row.label}: {row.note}" for row in problem.rows if row.note]


def caption(comparison: Comparison) -> str:
    """Return what the figures are and how they were made."""
    grid = ", ".join(f"{lr:g}" for lr in comparison.learning_rates)
    seeds = f"{comparison.tuning_seeds} other seed{'' if comparison.tuning_seeds == 1 else 's'}"
    any_tuned = any(row.tuning for problem in comparison.problems for row in problem.rows)
    tuned = f"Baselines: best learning rate of {grid} on {seeds}. " if any_tuned else ""
    return (
        f"Summed loss over the last tenth of {comparison.steps} steps, mean ± standard error of {comparison.seeds} "
        f"paired seeds; lower is better. {tuned}Evaluations: forward + backward passes of a run. "
        "Differences are paired: below 0, the learned rule is better."
    )


def _mark(row: Row) -> str:
    return "> " if is_contestant(row, LEARNED) else "  "


def _star(row: Row) -> str:
    return " *" if row.note else ""


def is_contestant(row: Row, label: str) -> bool:
    """Tell whether a row is that of the contestant `label`, not of a baseline that happens to be called so."""
    return row.label == label and not row.baseline


def number(value: float, form: str = "#.4g") -> str:
    """Return a figure as text, `NOTHING` for one that is not finite."""
    return format(value, form).removesuffix(".") if math.isfinite(value) else NOTHING


def _signed(value: float) -> str:
    return ("-" if value < 0 else "+") + number(abs(value), "#.3g")
