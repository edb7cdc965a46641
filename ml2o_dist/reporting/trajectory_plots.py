"""Pictures of one problem's recorded trajectories: its episodes early and late in meta-training."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ml2o_dist.evaluation.statistics import exponential_average
from ml2o_dist.reporting.plots import MUTED, PLAIN, STRONG, log_axis, new_figure, plain_axes, save_figure
from ml2o_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = ("-", "--", ":")
"""Line styles of the first, second and third objective or pair; of more than three, mean and range are drawn."""
MOST_THIN = 12
"""Maximum number of single trajectories drawn behind the medians of a stage."""

CAPTION = (
    "Thick: medians of the trajectories of equal length, one line for each length, which ends where they end. "
    "Thin: single trajectories, smoothed."
)
"""Explains the lines; every form of the picture includes it."""


@dataclass(frozen=True)
class Stage:
    """The episodes of one problem in the first, or the last, third of its recorded meta-steps.

    `values` has, for each column of the data set, one array [K, L] for each episode and instance.
    """

    label: str
    colour: str
    values: dict[str, list[NDArray[np.float64]]]


@dataclass(frozen=True)
class TrajectoryPanel:
    """One picture: its title, its legend of line styles ("" for a single kind of line), and its drawing function."""

    title: str
    lines: tuple[str, ...]
    draw: Callable[[Axes], None]


def stages(table: pa.Table) -> list[Stage]:
    """Split one problem's rows, as `read_trajectories` returns them, into an early and a late stage; a single recorded
    meta-step gives one stage."""
    meta_steps = sorted(set(table["meta_step"].to_pylist()))
    third = max(1, len(meta_steps) // 3)
    if len(meta_steps) == 1:
        return [_stage(table, "recorded", STRONG, meta_steps)]
    early, late = meta_steps[:third], meta_steps[-third:]
    return [_stage(table, "early", MUTED[0], early), _stage(table, "late", STRONG, late)]


def trajectory_panels(parts: list[Stage]) -> list[TrajectoryPanel]:
    """Return the panels of one problem: losses, gradient norms and cosines, update norm and direction.

    Thin lines are single trajectories, exponential averages (span 1/20 of their steps). Thick lines are medians over
    all trajectories of one horizon, so that each median covers the same ones at every step (`CAPTION`). With only one
    objective there is no panel of cosines.
    """
    objectives = parts[0].values["losses"][0].shape[1]
    names = tuple(f"objective {i + 1}" for i in range(objectives))
    pairs = tuple(f"objectives {i + 1} and {j + 1}" for i in range(objectives) for j in range(i + 1, objectives))
    panels = [
        _panel(parts, "Loss on the step's batch", "losses", names),
        _panel(parts, "Gradient norm", "gradient_norms", names),
        _panel(parts, "Cosine between gradients (below 0: in conflict)", "gradient_cosines", pairs),
        _panel(parts, "Length of the update", "update_norm", ("",)),
        _panel(parts, "Cosine of update and negative mean gradient", "descent_cosine", ("",)),
    ]
    return [panel for panel in panels if panel.lines]


def plot_trajectories(table: pa.Table, path: Path) -> None:
    """Draw the panels of one problem's rows, as `read_trajectories` returns them, to a picture at `path`.

    Raises:
        UserError: the picture cannot be written to `path`.
    """
    from matplotlib.lines import Line2D

    parts = stages(table)
    panels = trajectory_panels(parts)
    figure = new_figure(12.6, 6.6)
    axes = figure.subplots(2, 3).flatten().tolist()
    for panel, each in zip(axes, panels, strict=False):
        each.draw(panel)
        panel.set_title(each.title, loc="left", fontsize=10, color=PLAIN)
        kinds = [Line2D([], [], color=PLAIN, linestyle=style) for style in STYLES[: len(each.lines)]]
        if len(each.lines) > 1:
            panel.legend(kinds, list(each.lines), frameon=False, fontsize=8)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    colours = [Line2D([], [], color=part.colour, linewidth=2.4) for part in parts]
    labels = [part.label.replace(" (", "\n(") for part in parts]
    axes[-1].legend(colours, labels, loc="center left", frameon=False, fontsize=10)
    axes[-1].text(0.02, 0.95, textwrap.fill(CAPTION, 52), va="top", color=PLAIN, fontsize=9)
    problem = table["problem"][0].as_py()
    figure.suptitle(problem, fontsize=12, fontweight="bold", color=PLAIN, parse_math=False)
    try:
        save_figure(figure, path)
    except (OSError, ValueError) as error:  # matplotlib raises ValueError for an unknown file format
        raise UserError(f"the picture cannot be written to {str(path)!r}: {error}") from error


def trajectories_file(run_dir: Path, problem: str) -> Path:
    """Return the path of the picture of one problem."""
    return run_dir / "plots" / f"trajectories-{re.sub(r'[^A-Za-z0-9=.-]+', '_', problem).strip('_')}.png"


def _stage(table: pa.Table, name: str, colour: str, meta_steps: list[int]) -> Stage:
    rows = np.flatnonzero(np.isin(table["meta_step"].to_numpy(), meta_steps))
    part = table.take(rows)
    starts = np.flatnonzero(part["step"].to_numpy() == 0)[1:]
    values = {}
    for column in ("losses", "gradient_norms", "gradient_cosines", "update_norm", "descent_cosine"):
        chunk = part[column].combine_chunks()
        flat = (chunk.flatten() if pa.types.is_list(chunk.type) else chunk).to_numpy().astype(np.float64)
        values[column] = np.split(flat.reshape(len(rows), -1), starts)
    count = len(starts) + 1
    first, last = min(meta_steps), max(meta_steps)
    span = f"meta-step {first}" if first == last else f"meta-steps {first} to {last}"
    lengths = sorted(Counter(len(each) for each in values["losses"]).items())
    several = f" ({', '.join(f'{number} of {steps}' for steps, number in lengths)} steps)" if len(lengths) > 1 else ""
    return Stage(f"{name}: {span}, {count} {'trajectory' if count == 1 else 'trajectories'}{several}", colour, values)


def _panel(parts: list[Stage], title: str, column: str, names: tuple[str, ...]) -> TrajectoryPanel:
    several = len(names) > len(STYLES)

    def draw(panel: Axes) -> None:
        seen: list[float] = []
        for part in parts:
            smooth = [_smooth(each) for each in part.values[column]]
            middles = _medians(smooth)
            if several:
                for middle in middles:
                    panel.plot(middle.mean(axis=1), color=part.colour, linewidth=2)
                    low, high = middle.min(axis=1), middle.max(axis=1)
                    panel.fill_between(range(len(middle)), low, high, color=part.colour, alpha=0.2, linewidth=0)
            else:
                _lines(panel, smooth, middles, part.colour)
            seen += [value for each in smooth for value in each.flatten().tolist() if math.isfinite(value)]
        if "cosine" in column:
            panel.set_ylim(-1.08, 1.08)
            panel.set_yticks((-1, -0.5, 0, 0.5, 1))
            panel.axhline(0, color=PLAIN, linewidth=0.8)
        elif seen and min(seen) > 0:
            log_axis(panel, seen)
        panel.set_xlabel("step")
        plain_axes(panel)

    lines = (f"mean and range of {len(names)}",) if several else names
    return TrajectoryPanel(title, lines, draw)


def _lines(panel: Axes, smooth: list[NDArray[np.float64]], middles: list[NDArray[np.float64]], colour: str) -> None:
    for i, style in zip(range(smooth[0].shape[1]), STYLES, strict=False):
        if len(smooth) > 1:
            for each in smooth[:: math.ceil(len(smooth) / MOST_THIN)]:
                panel.plot(each[:, i], color=colour, linewidth=0.7, alpha=0.3, linestyle=style)
        for middle in middles:
            panel.plot(middle[:, i], color=colour, linewidth=1.9, linestyle=style, zorder=3)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    span = max(1.0, len(values) / 20)
    return np.array([exponential_average(column.tolist(), span) for column in values.T]).reshape(values.shape[::-1]).T


def _medians(trajectories: list[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Return for each horizon K, the shortest first, the median [K, L] over its trajectories [K, L].

    A median over several horizons would jump where the short trajectories end, without any meaning.
    """
    horizons = sorted({len(each) for each in trajectories})
    return [np.median([each for each in trajectories if len(each) == horizon], axis=0) for horizon in horizons]
