"""A picture of the guard's effect: loss and criticality over the steps, guarded, unguarded, fallback alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ml2o_dist.reporting.plots import MUTED, PLAIN, STRONG, log_axis, new_figure, plain_axes, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNGUARDED = MUTED[0]
ROOM = 3.0
"""Multiple of the highest guarded or fallback value up to which an axis shows an unguarded run."""


@dataclass(frozen=True)
class Curve:
    """Summed loss and criticality, means over the seeds, after the numbers of steps `at`; NaN where not finite."""

    at: tuple[int, ...]
    loss: tuple[float, ...]
    criticality: tuple[float, ...]


@dataclass(frozen=True)
class GuardColumn:
    """One rule of a picture: by itself, under the guard, and the fallback alone."""

    rule: str
    unguarded: Curve
    guarded: Curve
    fallback: Curve


def plot_guard(columns: Sequence[GuardColumn], title: str, fallback: str, path: Path) -> None:
    """Draw a column for each rule to a PNG: losses above criticality (a small one alone is not good).

    Axes are shared along a row and scaled to the guarded runs and the fallback. A text marks runs that became
    non-finite.
    """
    figure = new_figure(max(2.15 * len(columns), 6.4), 5.4)
    panels = figure.subplots(2, len(columns), squeeze=False, sharex=True, sharey="row")
    for row, (name, label) in enumerate((("loss", "summed loss"), ("criticality", "criticality"))):
        for panel, column in zip(panels[row], columns, strict=True):
            _draw(panel, column, name, fallback)
            if row == 0:
                panel.set_title(column.rule, fontsize=10, loc="left", color=PLAIN, parse_math=False)
            else:
                panel.set_xlabel("step")
        _scale(panels[row][0], columns, name)
        panels[row][0].set_ylabel(label)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, fontsize=12, fontweight="bold", color=PLAIN, parse_math=False)
    save_figure(figure, path)


def _draw(panel: Axes, column: GuardColumn, name: str, fallback: str) -> None:
    def line(curve: Curve, label: str, colour: str, width: float, style: str = "-") -> None:
        panel.plot(curve.at, getattr(curve, name), style, color=colour, linewidth=width, label=label)

    line(column.unguarded, "unguarded", UNGUARDED, 1.6, "--")
    line(column.guarded, f"guarded by {fallback}", STRONG, 3.2)
    line(column.fallback, f"{fallback} alone", PLAIN, 1.0)  # on top: it often coincides with the guarded line
    values = getattr(column.unguarded, name)
    gone = next((k for k, value in enumerate(values) if not math.isfinite(value)), None)
    if gone is not None:
        text = f"unguarded: not finite\nby step {column.unguarded.at[gone]}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        where = panel.transAxes
        panel.text(0.97, 0.96, text, ha="right", va="top", fontsize=8, color=UNGUARDED, transform=where, bbox=box)
    plain_axes(panel)


def _scale(panel: Axes, columns: Sequence[GuardColumn], name: str) -> None:
    sound = [v for c in columns for curve in (c.guarded, c.fallback) for v in getattr(curve, name) if math.isfinite(v)]
    if not sound:
        return
    low, high = min(sound), max(sound)
    others = [v for c in columns for v in getattr(c.unguarded, name) if low < v <= ROOM * high]
    if low > 0:
        log_axis(panel, [low, max([high, *others])])
    else:
        room = 0.1 * (high - low) or 1.0
        panel.set_ylim(low - room, high + room)
