"""A comparison as tables (terminal, Markdown) and pictures; a run's meta-loss as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ml2o_dist.evaluation.benchmark import INITIAL, LEARNED, Comparison, ProblemComparison, Row, Versus
from ml2o_dist.evaluation.statistics import exponential_average
from ml2o_dist.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOTHING = "-"
STRONG = "#c8102e"
"""The colour of the learned rule, and of nothing else."""
PLAIN = "#33383d"
MUTED = ("#5b8db8", "#7aa974", "#c9a24b", "#9a86b5", "#6fb0aa", "#b58a7a")
"""Baselines and further contestants, in the order in which they first appear."""
OPTIMIZER, OBJECTIVES, ACCURACY = "optimizer", "per objective", "test accuracy"
COLUMNS = (OPTIMIZER, "loss, last tenth", OBJECTIVES, ACCURACY, "ms/step", "evaluations")


def comparison_table(comparison: Comparison) -> Group:
    """Return tables for the terminal, one per problem, best first, the best row bold; they fit in 100 columns."""
    parts: list[Table | Text] = [Text(_caption(comparison), style="dim")]
    for problem in comparison.problems:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        shown = [
            name for name in COLUMNS if name != ACCURACY or any("test_accuracy" in row.test for row in problem.rows)
        ]
        for name in shown:
            wraps = name in (OBJECTIVES, ACCURACY)  # three of each would not fit beside the rest
            table.add_column(name, justify="left" if name == OPTIMIZER else "right", no_wrap=not wraps)
        for i, row in enumerate(problem.rows):
            figures = _figures(row) | {OPTIMIZER: _mark(row) + row.label + _star(row)}
            style = ("bold " if i == 0 else "") + ("red" if _is(row, LEARNED) else "")
            table.add_row(*(Text(figures[name]) for name in shown), style=style.strip())
        parts += [Text(), Text(problem.problem, style="bold underline"), table]
        parts += [Text("  " + line) for line in _verdicts(problem) + _notes(problem)]
    return Group(*parts)


def comparison_markdown(comparison: Comparison) -> str:
    """Return the same as plain Markdown: one table for all problems, then the verdicts and notes."""
    lines = [_caption(comparison), ""]
    lines.append("| problem | " + " | ".join(COLUMNS) + " |")
    lines.append("|---|---|" + "---:|" * (len(COLUMNS) - 1))
    for problem in comparison.problems:
        for i, row in enumerate(problem.rows):
            label = f"`{row.label}`{_star(row)}"
            cells = [f"**{label}**" if i == 0 else label, *_figures(row).values()]
            lines.append(f"| {f'`{problem.problem}`' if i == 0 else ''} | " + " | ".join(cells) + " |")
    lines.append("")
    for problem in comparison.problems:
        said = _verdicts(problem) + _notes(problem)
        lines += [f"- `{problem.problem}`: {'; '.join(said)}"] if said else []
    return "\n".join(lines).rstrip() + "\n"


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Draw learning curves, a panel per problem: the summed loss on each step's own batch, to a PNG at `path`.

    Curves are exponential averages (span 1/20 of the run) of the mean over the seeds; bands are one standard error,
    averaged alike. A panel whose losses are all positive has a logarithmic axis.
    """
    count = len(comparison.problems)
    columns = 2 if count == 4 else min(count, 3)
    rows = math.ceil(count / columns)
    figure = _figure(max(4.6 * columns, 6.4), 3.6 * rows + 1.1)
    colours = _colours(comparison)
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    handles: dict[str, Any] = {}
    for panel, problem in zip(panels, comparison.problems, strict=False):
        for row in sorted(problem.rows, key=_layer):
            handles.setdefault(row.optimizer, _curve(panel, row, colours[row.optimizer], comparison.steps))
        _finish_panel(panel, problem, comparison.steps)
    for panel in panels[count:]:
        panel.set_axis_off()
    for i in range(count):
        if i % columns == 0:
            panels[i].set_ylabel("summed loss on the step's batch")
        if i + columns >= count:
            panels[i].set_xlabel("step")
    order = [name for name in colours if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=len(order), frameon=False)
    figure.suptitle(
        f"Problems not seen in meta-training: mean of {comparison.seeds} paired seeds (lower is better)",
        fontsize=12,
        fontweight="bold",
        color=PLAIN,
    )
    _save(figure, path)


def plot_meta_loss(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a run's meta-loss and validation against the meta-step, to a PNG at `path`.

    Args:
        history: one mapping per meta-step: `meta_step`, `meta_loss`, `validation` (None where there was none).
    """
    figure = _figure(9.2, 3.7)
    left, right = figure.subplots(1, 2, sharex=True)
    for panel, key, title in ((left, "meta_loss", "Meta-loss of the rollouts"), (right, "validation", "Validation")):
        points = [(entry["meta_step"], entry[key]) for entry in history if _finite(entry.get(key))]
        steps, values = [point[0] for point in points], [point[1] for point in points]
        if key == "meta_loss":
            panel.plot(steps, values, color=MUTED[0], alpha=0.45, linewidth=1, label="each meta-step")
            smooth = exponential_average(values, span=max(1.0, len(values) / 15))
            panel.plot(steps, smooth, color=STRONG, linewidth=2, label="average")
        elif points:
            panel.plot(steps, values, color=STRONG, linewidth=1.6, marker="o", markersize=4, label="average weights")
            best = min(points, key=lambda point: point[1])
            style = {"marker": "o", "markersize": 9, "fillstyle": "none", "linestyle": "", "clip_on": False}
            panel.plot(*best, color=PLAIN, label="best, kept", **style)
        if points:
            panel.legend(frameon=False, fontsize=9)
        else:
            panel.text(0.5, 0.5, "none recorded", ha="center", va="center", transform=panel.transAxes, color=PLAIN)
        panel.set_title(f"{title} (lower is better)", loc="left", fontsize=10, color=PLAIN)
        panel.set_xlabel("meta-step")
        _plain_axes(panel)
    _save(figure, path)


def _figures(row: Row) -> dict[str, str]:
    """The cells of a row, by column; the first column is its caller's."""
    loss = f"{_number(row.loss)} ± {_number(row.standard_error, '#.2g')}"
    if row.diverged:
        loss = f"{row.diverged} of {len(row.seed_losses)} diverged"
    accuracy = [100 * value for value in row.test.get("test_accuracy", ())]
    cells = (
        loss,
        _several(row.objectives, "#.3g"),
        _several(accuracy, ".1f") + (" %" if accuracy else ""),
        f"{row.ms_per_step:.2f}",
        f"{row.forwards} + {row.backwards}",
    )
    return dict(zip(COLUMNS[1:], cells, strict=True))


def _several(values: Sequence[float], form: str) -> str:
    """All of up to three values, else the range of the objectives and how many there are."""
    if not values or not all(map(math.isfinite, values)):
        return NOTHING
    if len(values) <= 3:
        return " / ".join(_number(value, form) for value in values)
    return f"{_number(min(values), form)} … {_number(max(values), form)} ({len(values)})"


def _verdicts(problem: ProblemComparison) -> list[str]:
    return [_verdict(versus) for versus in (problem.versus_baseline, problem.versus_initial) if versus is not None]


def _verdict(versus: Versus) -> str:
    figures = ""
    if math.isfinite(versus.difference.mean):
        error = _number(versus.difference.standard_error, "#.2g")
        figures = f" ({_signed(versus.difference.mean)} ± {error}"
        figures += f", ratio {versus.ratio:.3f})" if math.isfinite(versus.ratio) else ")"
    return f"{LEARNED} - {versus.reference}: {versus.verdict}{figures}"


def _notes(problem: ProblemComparison) -> list[str]:
    return [f"* {row.label}: {row.note}" for row in problem.rows if row.note]


def _caption(comparison: Comparison) -> str:
    grid = ", ".join(f"{lr:g}" for lr in comparison.learning_rates)
    return (
        f"Summed loss over the last tenth of {comparison.steps} steps, mean ± standard error of {comparison.seeds} "
        f"paired seeds; lower is better. Baselines: best learning rate of {grid} on {comparison.tuning_seeds} other "
        f"seed{'' if comparison.tuning_seeds == 1 else 's'}. Evaluations: forward + backward passes of a run. "
        "Differences are paired: below 0, the learned rule is better."
    )


def _mark(row: Row) -> str:
    return "> " if _is(row, LEARNED) else "  "


def _star(row: Row) -> str:
    return " *" if row.note else ""


def _is(row: Row, label: str) -> bool:
    return row.label == label and not row.baseline


def _number(value: float, form: str = "#.4g") -> str:
    return format(value, form).removesuffix(".") if math.isfinite(value) else NOTHING


def _signed(value: float) -> str:
    return ("-" if value < 0 else "+") + _number(abs(value), "#.3g")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _colours(comparison: Comparison) -> dict[str, str]:
    colours = {LEARNED: STRONG, INITIAL: PLAIN}
    names = sorted({(not row.baseline, row.optimizer) for problem in comparison.problems for row in problem.rows})
    others = [name for _, name in names if name not in colours]
    return colours | {name: MUTED[i % len(MUTED)] for i, name in enumerate(others)}


def _layer(row: Row) -> int:
    """Baselines below, the untrained network on them, the learned rule on top."""
    return 2 if _is(row, LEARNED) else 1 if _is(row, INITIAL) else 0


def _span(steps: int) -> float:
    return max(1.0, steps / 20)


def _curve(panel: Axes, row: Row, colour: str, steps: int) -> Any:
    middle, error = (exponential_average(values, _span(steps)) for values in (row.curve, row.curve_error))
    strong = _is(row, LEARNED)
    (line,) = panel.plot(
        middle,
        color=colour,
        linewidth=2.4 if strong else 1.5,
        linestyle="--" if _is(row, INITIAL) else "-",
        zorder=3 if strong else 2,
    )
    low, high = ([m + sign * e for m, e in zip(middle, error, strict=True)] for sign in (-1, 1))
    panel.fill_between(range(len(middle)), low, high, color=colour, alpha=0.22 if strong else 0.12, linewidth=0)
    return line


def _finish_panel(panel: Axes, problem: ProblemComparison, steps: int) -> None:
    """Scale a panel to the runs that did not diverge, else nothing could be told apart."""
    sound = [row for row in problem.rows if not row.diverged] or problem.rows
    seen = [v for row in sound for v in exponential_average(row.curve, _span(steps)) if math.isfinite(v)]
    if seen and min(seen) > 0:
        low, high = min(seen), max(seen)
        room = max(high / low, 1.01) ** 0.1
        panel.set_yscale("log")
        panel.set_ylim(low / room, high * room)
        _plain_log_ticks(panel, high / low)
    elif seen:
        low, high = min(seen), max(seen)
        room = 0.1 * (high - low) or 1.0
        panel.set_ylim(low - room, high + room)
    panel.set_title(problem.problem, loc="left", fontsize=10, color=PLAIN)
    _plain_axes(panel)


def _plain_log_ticks(panel: Axes, ratio: float) -> None:
    """Write ticks of a logarithmic axis as plain numbers, as many of each decade as there is room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    subs = (1, 1.5, 2, 3, 4, 5, 7) if ratio < 10 else (1, 2, 5) if ratio < 200 else (1,)
    panel.yaxis.set_major_locator(LogLocator(subs=subs))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def _plain_axes(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(True, which="major", color="#d9dde1", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.margins(x=0.01)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as stream:
        figure.savefig(stream, format="png", facecolor="white")
