"""Pictures of an evaluation as PNG files: a panel for each problem, one legend for all of them."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml2o_dist.evaluation.evaluated import Evaluation
from ml2o_dist.reporting.evaluation_panels import (
    Looks,
    draw_acceptance,
    draw_curves,
    draw_ends,
    draw_profile,
    draw_times,
    end_points,
    profile_losses,
)
from ml2o_dist.reporting.optimizer_looks import optimizer_looks, short_name
from ml2o_dist.reporting.plots import PLAIN, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHARACTER = 0.083
"""Width of a character of a legend, in inches."""


def plot_evaluation(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write the pictures of an evaluation into `folder`, except for empty ones; return their paths.

    learning_curves.png, performance_profile.png, pareto.png (problems of two or more objectives), time_per_step.png
    and acceptance.png (where an optimizer is guarded).
    """
    looks = optimizer_looks(evaluation)
    figures = {
        "learning_curves": _curves(evaluation, looks),
        "performance_profile": _profile(evaluation, looks),
        "pareto": _pareto(evaluation, looks),
        "time_per_step": _times(evaluation, looks),
        "acceptance": _acceptance(evaluation, looks),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(folder / f"{name}.png")
            save_figure(figure, written[-1])
    return written


def curves_figure(evaluation: Evaluation) -> Figure | None:
    """Return the learning curves, a panel for each problem; None without curves."""
    return _curves(evaluation, optimizer_looks(evaluation))


def _curves(evaluation: Evaluation, looks: Looks) -> Figure | None:
    problems = [p for p in evaluation.problems if any(row.curve.steps for row in evaluation.rows_of(p))]

    def draw(panel: Axes, problem: str) -> None:
        draw_curves(panel, evaluation.rows_of(problem), looks)

    title = f"Learning curves: mean ± standard error of {_seeds(evaluation)} (lower is better)"
    return _grid(problems, draw, title, "step", "summed loss on the step's batch", looks)


def _profile(evaluation: Evaluation, looks: Looks) -> Figure | None:
    losses = profile_losses(evaluation)
    if not losses:
        return None
    figure = new_figure(8.4, 4.6)
    panel = figure.subplots()
    draw_profile(panel, losses, looks)
    panel.set_title(
        "Performance profile: how many runs end within a factor of the best (higher is better)",
        loc="left", fontsize=11, fontweight="bold", color=PLAIN,
    )  # fmt: skip
    _legend(figure, {name: looks[name] for name in looks if name in losses})
    return figure


def _pareto(evaluation: Evaluation, looks: Looks) -> Figure | None:
    ends = {problem: end_points(evaluation, problem) for problem in evaluation.problems}

    def draw(panel: Axes, problem: str) -> None:
        draw_ends(panel, ends[problem], evaluation.fronts.get(problem, ()), looks)

    front = ", and the known front in grey" if evaluation.fronts else ""
    title = f"End points of {_seeds(evaluation)}{front} (lower is better)"
    shown = {name: look for name, look in looks.items() if any(name in each for each in ends.values())}
    return _grid([problem for problem, each in ends.items() if each], draw, title, "", "", shown)


def _times(evaluation: Evaluation, looks: Looks) -> Figure | None:
    problems = [p for p in evaluation.problems if any(row.seeds for row in evaluation.rows_of(p))]
    rows = {problem: evaluation.rows_of(problem) for problem in problems}
    alike = len({tuple(row.optimizer for row in each) for each in rows.values()}) == 1
    named = problems[:: _columns(len(problems))] if alike else problems

    def draw(panel: Axes, problem: str) -> None:
        draw_times(panel, rows[problem], looks, named=problem in named)

    height = 0.9 + 0.27 * max(map(len, rows.values()), default=0)
    title = "Time per step, and forward and backward passes per step (lower is better)"
    return _grid(problems, draw, title, "median ms per step", "", {}, height=height, letters=44 if alike else 26)


def _acceptance(evaluation: Evaluation, looks: Looks) -> Figure | None:
    guarded = [row for row in evaluation.rows if row.curve.acceptance is not None]

    def draw(panel: Axes, problem: str) -> None:
        draw_acceptance(panel, evaluation.rows_of(problem), looks)

    title = f"The guard: share of {_seeds(evaluation)} whose learned candidate is taken"
    shown = {name: look for name, look in looks.items() if name in {row.optimizer for row in guarded}}
    return _grid(list(dict.fromkeys(row.problem for row in guarded)), draw, title, "step", "accepted, %", shown)


def _grid(
    problems: Sequence[str],
    draw: Callable[[Axes, str], None],
    title: str,
    xlabel: str,
    ylabel: str,
    looks: Looks,
    *,
    height: float = 2.9,
    letters: int = 44,
) -> Figure | None:
    """Draw a panel for each problem, `height` inches high, `letters` of its name in a line; None without a problem."""
    if not problems:
        return None
    count = len(problems)
    columns = _columns(count)
    rows = math.ceil(count / columns)
    width = 4.4 if columns < 4 else 3.9
    figure = new_figure(max(width * columns, 7.2), height * rows + 1.1)
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for i, (panel, problem) in enumerate(zip(panels, problems, strict=False)):
        draw(panel, problem)
        panel.set_title(_folded(problem, letters), loc="left", fontsize=9.5, color=PLAIN, parse_math=False)
        if ylabel and i % columns == 0:
            panel.set_ylabel(ylabel)
        if xlabel and i + columns >= count:
            panel.set_xlabel(xlabel)
    for panel in panels[count:]:
        panel.set_axis_off()
    _legend(figure, looks)
    figure.suptitle(title, fontsize=12, fontweight="bold", color=PLAIN)
    return figure


def _columns(panels: int) -> int:
    return min(panels, 2 if panels == 4 else 3 if panels <= 9 else 4) or 1


def _folded(name: str, letters: int) -> str:
    """Break a long name into lines, after a comma if it has one."""
    lines = [""]
    for part in re.findall(r"[^,]*,|[^,]+$", name):
        for piece in textwrap.wrap(part, letters, break_on_hyphens=False):
            if lines[-1] and len(lines[-1]) + len(piece) > letters:
                lines.append("")
            lines[-1] += piece
    return "\n".join(lines)


def _legend(figure: Figure, looks: Looks) -> None:
    """Put the legend of the lines below the panels, in as many columns as fit."""
    from matplotlib.lines import Line2D

    if not looks:
        return
    handles = [
        Line2D([], [], color=look.colour, linestyle=look.line, linewidth=look.width, marker=look.mark, markersize=5)
        for look in looks.values()
    ]
    names = [short_name(name) for name in looks]
    columns = int(figure.get_figwidth() / (CHARACTER * max(map(len, names)) + 0.65))
    style: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "handlelength": 2.6}
    legend = figure.legend(handles, names, ncols=max(1, min(columns, len(names))), **style)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _seeds(evaluation: Evaluation) -> str:
    seeds = evaluation.settings.seeds
    return f"{seeds} paired seed{'' if seeds == 1 else 's'}"
