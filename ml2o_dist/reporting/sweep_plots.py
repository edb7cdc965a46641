"""Pictures of a sweep: parallel coordinates, the importance of its keys, and the best score over the trials."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ml2o_dist.reporting.plots import GRID, MUTED, PLAIN, STRONG, new_figure, plain_axes, save_figure
from ml2o_dist.sweeping.importance import Importances, as_number
from ml2o_dist.sweeping.record import SweepRecord, Trial
from ml2o_dist.sweeping.settings import Distribution, SweepSettings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = {
    "parallel_coordinates": "A line for each trial, from its values to its score; the best one is red",
    "importance": "What the scores depend on",
    "progress": "Score of each trial, and of the best one so far",
}
"""Captions of the pictures, by file name in `plots/`."""

LONGEST_LABEL = 18
"""Longest value at an axis, in characters."""

Place = tuple[float, str]
"""A tick: (position from 0 to 1, label)."""


def plot_sweep(settings: SweepSettings, record: SweepRecord, importances: Importances, folder: Path) -> list[Path]:
    """Write the pictures of a sweep into `folder`, except for empty ones; return their paths."""
    scored = _scored(record)
    figures: dict[str, Figure | None] = {
        "parallel_coordinates": _parallel_coordinates(settings, scored) if scored else None,
        "importance": _importance(importances) if importances.by_key else None,
        "progress": _progress(scored) if scored else None,
    }
    written = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # a picture of an earlier state of the sweep
        else:
            save_figure(figure, path)
            written.append(path)
    return written


def progress_figure(record: SweepRecord) -> Figure | None:
    """Return the picture of each trial's score and the best one so far; None if no trial has a score."""
    scored = _scored(record)
    return _progress(scored) if scored else None


def _scored(record: SweepRecord) -> list[Trial]:
    return [trial for trial in record.in_order if math.isfinite(trial.score)]


def _parallel_coordinates(settings: SweepSettings, trials: list[Trial]) -> Figure:
    scores = [trial.score for trial in trials]
    axes = [(key, *_axis(each, [trial.values[key] for trial in trials])) for key, each in settings.space.items()]
    low, high = min(scores), max(scores)
    span = (high - low) or 1.0
    places = [(score - low) / span if high > low else 0.5 for score in scores]
    ends = [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")] if high > low else [(0.5, f"{low:.4g}")]
    axes.append(("validation", places, ends))
    figure = new_figure(max(6.0, 1.9 * len(axes)), 4.2)
    panel = figure.subplots()
    best = min(range(len(trials)), key=lambda i: scores[i])
    order = sorted(range(len(trials)), key=lambda i: -scores[i])
    ranks = {trial: rank for rank, trial in enumerate(reversed(order))}
    for i in order:
        shade = 0.9 - 0.7 * ranks[i] / max(1, len(order) - 1)
        style = (STRONG, 2.2, 1.0) if i == best else (MUTED[0], 1.1, shade)
        panel.plot(range(len(axes)), [axis[1][i] for axis in axes], color=style[0], linewidth=style[1], alpha=style[2])
    for x, (_, _, ticks) in enumerate(axes):
        panel.axvline(x, color=PLAIN, linewidth=0.8)
        for y, label in ticks:
            panel.annotate(
                label, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5, color=PLAIN,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
            )  # fmt: skip
    panel.set_xticks(range(len(axes)), [axis[0] for axis in axes], fontsize=8.5)
    panel.set(yticks=[], ylim=(-0.06, 1.06), xlim=(-0.1, len(axes) - 0.55))
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    return figure


def _axis(distribution: Distribution, values: list[object]) -> tuple[list[float], list[Place]]:
    """Return the positions of the values on an axis from 0 to 1, and its ticks."""
    if distribution.interval is None:
        last = max(1, len(distribution.values) - 1)
        return (
            [as_number(distribution, value) / last for value in values],
            [(i / last, _label(value)) for i, value in enumerate(distribution.values)],
        )
    low, high = (as_number(distribution, end) for end in distribution.interval)
    places = [(as_number(distribution, value) - low) / (high - low) for value in values]
    ticks = [(share, low + share * (high - low)) for share in (0.0, 0.5, 1.0)]
    return places, [(share, f"{10**x if distribution.logarithmic else x:.3g}") for share, x in ticks]


def _label(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    shortened = text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 3]}..."
    return shortened.replace("$", r"\$")  # no formula


def _importance(importances: Importances) -> Figure:
    shown = importances.by_key[::-1]
    figure = new_figure(7.0, 1.2 + 0.32 * len(shown))
    panel = figure.subplots()
    colour = MUTED[0] if importances.out_of_bag > 0 else GRID
    panel.barh(
        [each.key for each in shown],
        [each.loss for each in shown],
        xerr=[each.spread for each in shown],
        color=colour,
        ecolor=PLAIN,
        height=0.6,
    )
    panel.set_xlabel(f"loss of R^2 when shuffled (out-of-bag R^2: {importances.out_of_bag:.2f})", fontsize=8.5)
    plain_axes(panel)
    return figure


def _progress(trials: list[Trial]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7.0, 3.2)
    panel: Axes = figure.subplots()
    numbers, scores = [trial.number for trial in trials], [trial.score for trial in trials]
    panel.plot(numbers, scores, linestyle="", marker="o", markersize=4, color=MUTED[0], label="each trial")
    panel.step(numbers, np.minimum.accumulate(scores), where="post", color=STRONG, linewidth=1.6, label="best so far")
    panel.set_xlabel("trial")
    panel.set_ylabel("validation (lower is better)")
    panel.legend(frameon=False, fontsize=8.5)
    panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    plain_axes(panel)
    return figure
