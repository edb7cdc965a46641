"""Panels of an evaluation: learning curves, end points, time, the guard's decisions.

Only `draw_times` writes a user's text into a panel, so that a page can include the other panels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ml2o_dist.evaluation.evaluated import Evaluation, Row
from ml2o_dist.evaluation.statistics import exponential_average
from ml2o_dist.evaluation.table_statistics import performance_profile, ratios_to_best
from ml2o_dist.reporting.evaluation_figures import seed_losses
from ml2o_dist.reporting.optimizer_looks import Look, short_name
from ml2o_dist.reporting.plots import GRID, PLAIN, log_axis, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Looks = Mapping[str, Look]
Points = Sequence[Sequence[float]]
"""[k, m]: losses of end points, or of points of a front."""

ABOVE_START = 3.0
"""A logarithmic axis ends at this multiple of the loss at the start at most."""
FRONT_LINES = 40
"""Maximum number of points drawn of a front of three or more objectives, each as a line."""
LARGEST_FACTOR, FACTORS = 10.0, 200
"""The largest factor tau of the performance profile, and the number of factors."""
VALUES_SHOWN = 6
"""With more objectives than this the axes do not show their ranges."""


def draw_curves(panel: Axes, rows: Sequence[Row], looks: Looks) -> None:
    """Draw one problem's learning curves, the summed loss on each step's own batch.

    Curves are exponential averages (span 1/20 of the points) of the mean over the seeds; bands are one standard error,
    averaged alike. The axis is logarithmic if all losses are positive. To keep the curves apart, it covers the runs
    that did not diverge, up to a few times the loss at the start.
    """
    sound: list[float] = []
    starts: list[float] = []
    for i, row in enumerate(sorted(rows, key=lambda row: looks[row.optimizer].layer())):
        steps, middle = row.curve.steps, _smooth(row.curve.loss)
        look = looks[row.optimizer]
        _line(panel, steps, middle, look, (i, len(rows)))
        error = _smooth(row.curve.error)
        low, high = ([m + sign * e for m, e in zip(middle, error, strict=True)] for sign in (-1, 1))
        alpha = 0.22 if look.strong else 0.13
        panel.fill_between(steps, low, high, color=look.colour, alpha=alpha, linewidth=0, zorder=look.layer() - 1)
        if not row.diverged or all(each.diverged for each in rows):
            sound += filter(math.isfinite, middle)
            starts += [value for value in middle[:1] if math.isfinite(value)]
    if sound and min(sound) > 0:
        log_axis(panel, [min(sound), min(max(sound), ABOVE_START * max(starts, default=max(sound)))])
    elif sound:
        lowest, highest, start = min(sound), max(sound), max(starts, default=max(sound))
        _scale(panel, "y", lowest, min(highest, 2 * start - lowest) if start > lowest else highest)
    plain_axes(panel)
    if lost := sum(bool(row.diverged) for row in rows):
        _say(panel, f"{lost} of {len(rows)} diverged")


def draw_acceptance(panel: Axes, rows: Sequence[Row], looks: Looks) -> None:
    """Draw for each guarded optimizer the share of seeds whose learned candidate the guard took, over the steps.

    Curves are exponential averages (span 1/20 of the points).
    """
    guarded = [row for row in rows if row.curve.acceptance is not None]
    for i, row in enumerate(guarded):
        shares = [100 * share for share in _smooth(row.curve.acceptance or ())]
        _line(panel, row.curve.steps, shares, looks[row.optimizer], (i, len(guarded)))
    panel.set_ylim(-4, 104)
    panel.set_yticks((0, 25, 50, 75, 100))
    plain_axes(panel)


def draw_profile(panel: Axes, losses: Mapping[str, Sequence[float]], looks: Looks) -> None:
    """Draw for each optimizer the share of its runs whose loss is within a factor tau of the best one's, over tau.

    Args:
        losses: as `profile_losses` returns them.
    """
    ratios = ratios_to_best(list(losses.values()))
    last = float(np.clip(ratios[np.isfinite(ratios)].max(), 1.1, LARGEST_FACTOR))
    factors = np.geomspace(1, last, FACTORS).tolist()
    shares = dict(zip(losses, performance_profile(ratios, factors), strict=True))
    for name in sorted(losses, key=lambda name: looks[name].layer()):
        look = looks[name]
        style: dict[str, Any] = {"drawstyle": "steps-post", "linewidth": look.width, "zorder": look.layer()}
        panel.plot(factors, 100 * shares[name], look.line, color=look.colour, **style)
    if last > 2:  # a shorter logarithmic axis has no ticks
        log_axis(panel, factors, "x")
    panel.set_xlim(1, last)
    panel.set_ylim(-3, 103)
    panel.set_xlabel("factor of the best loss on the same problem and seed")
    panel.set_ylabel("runs within it, %")
    plain_axes(panel)


def draw_ends(panel: Axes, ends: Mapping[str, Points], front: Points, looks: Looks) -> None:
    """Draw the seeds' end points of each optimizer in front of the known Pareto front, if there is one.

    Two objectives give marks in a plane. More give lines over the objectives (parallel coordinates), each objective
    scaled to its own range; thick lines are means over the seeds. End points that are not finite or far from all others
    are left out; the panel shows their number.
    """
    points = [point for each in ends.values() for point in each]
    highest = [_highest(reached) for reached in zip(*points, strict=True)]
    finite = {name: [point for point in each if all(map(math.isfinite, point))] for name, each in ends.items()}
    shown = {
        name: [point for point in each if all(x <= high for x, high in zip(point, highest, strict=True))]
        for name, each in finite.items()
    }
    within = [*front, *(point for each in shown.values() for point in each)] or [
        [0.0] * len(highest),
        [1.0] * len(highest),
    ]
    ranges = [(min(values), max(values)) for values in zip(*within, strict=True)]
    (_draw_plane if len(ranges) == 2 else _draw_parallel)(panel, shown, front, ranges, looks)
    known, drawn = (sum(map(len, each.values())) for each in (finite, shown))
    left_out = {"diverged": len(points) - known, "far outside": known - drawn}
    if notes := [f"{count} end point{'' if count == 1 else 's'} {why}" for why, count in left_out.items() if count]:
        _say(panel, "\n".join(notes))


def draw_times(panel: Axes, rows: Sequence[Row], looks: Looks, *, named: bool) -> None:
    """Draw a bar of ms per step for each optimizer, with its evaluations per step and, if `named`, its name."""
    known = [row.ms_per_step if math.isfinite(row.ms_per_step) else 0.0 for row in rows]
    places = range(len(rows))
    panel.barh(places, known, height=0.62, color=[looks[row.optimizer].colour for row in rows])
    for place, row in zip(places, rows, strict=True):
        said = f" {row.ms_per_step:.3g} ms, {evaluations_per_step(row):.3g} evals" if row.seeds else " failed"
        panel.text(known[place], place, said, va="center", fontsize=8, color=PLAIN)
    panel.set_yticks(places, [short_name(row.optimizer) if named else "" for row in rows], fontsize=9)
    for label in panel.get_yticklabels():
        label.set_parse_math(False)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.75 * max(known, default=0) or 1)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.grid(True, axis="x", color=GRID, linewidth=0.6)
    panel.set_axisbelow(True)


def profile_losses(evaluation: Evaluation) -> dict[str, list[float]]:
    """Return the loss of each run by optimizer, inf if it diverged; {} if nothing can be compared.

    A run is a problem and a seed. Optimizers whose runs all failed are left out, then runs that failed or are missing
    for some optimizer. Problems with a loss <= 0 are left out: no loss is within a factor of it.
    """
    losses: dict[str, list[float]] = {row.optimizer: [] for row in evaluation.rows if row.seeds}
    for problem in evaluation.problems:
        found = {row.optimizer: seed_losses(evaluation, row) for row in evaluation.rows_of(problem)}
        if not losses.keys() <= found.keys():
            continue
        runs = zip(*(found[name] for name in losses), strict=True)
        made = [run for run in runs if not any(map(math.isnan, run))]
        known = [loss for run in made for loss in run if math.isfinite(loss)]
        if known and min(known) > 0:
            for each, of_one in zip(losses.values(), zip(*made, strict=True), strict=True):
                each += of_one
    return losses if any(losses.values()) else {}


def end_points(evaluation: Evaluation, problem: str) -> dict[str, Points]:
    """Return the end points of a problem by optimizer, {} if it has fewer than two objectives."""
    ends: dict[str, list[Sequence[float]]] = {}
    for cell in evaluation.cells:
        if cell.problem == problem and len(cell.end_losses) > 1:
            ends.setdefault(cell.optimizer, []).append(cell.end_losses)
    return dict(ends)


def evaluations_per_step(row: Row) -> float:
    """Return the number of forward and backward passes per step."""
    return row.evaluations / row.steps


def _draw_plane(
    panel: Axes, ends: Mapping[str, Points], front: Points, ranges: Sequence[tuple[float, float]], looks: Looks
) -> None:
    if front:
        panel.plot(*zip(*front, strict=True), ".", color=PLAIN, markersize=2.5, alpha=0.55, zorder=1)
    for name, each in ends.items():
        look = looks[name]
        if each:
            first, second = zip(*each, strict=True)
            style: dict[str, Any] = {"alpha": 0.85, "linewidths": 0, "zorder": look.layer()}
            panel.scatter(first, second, s=36 if look.strong else 26, c=look.colour, marker=look.mark, **style)
    _scale(panel, "x", *ranges[0], linear=bool(front))
    _scale(panel, "y", *ranges[1], linear=bool(front))
    panel.set_xlabel("objective 1")
    panel.set_ylabel("objective 2")
    plain_axes(panel)
    panel.margins(0)


def _draw_parallel(
    panel: Axes, ends: Mapping[str, Points], front: Points, ranges: Sequence[tuple[float, float]], looks: Looks
) -> None:
    places = range(1, len(ranges) + 1)

    def scaled(point: Sequence[float]) -> list[float]:
        return [(x - low) / (high - low) if high > low else 0.5 for x, (low, high) in zip(point, ranges, strict=True)]

    for point in front[:: math.ceil(len(front) / FRONT_LINES) or 1]:
        panel.plot(places, scaled(point), color=PLAIN, linewidth=0.6, alpha=0.25, zorder=1)
    for name, each in ends.items():
        look = looks[name]
        for point in each:
            panel.plot(places, scaled(point), color=look.colour, linewidth=0.8, alpha=0.3, zorder=look.layer() - 1)
        if each:
            mean = scaled([sum(column) / len(each) for column in zip(*each, strict=True)])
            panel.plot(
                places, mean, look.line, color=look.colour, linewidth=look.width, marker=look.mark, markersize=4.5,
                zorder=look.layer(),
            )  # fmt: skip
    for place, (low, high) in zip(places, ranges, strict=True):
        if len(ranges) <= VALUES_SHOWN:
            panel.text(place, 1.04, f"{high:.2g}", ha="center", fontsize=8, color=PLAIN)
            panel.text(place, -0.04, f"{low:.2g}", ha="center", va="top", fontsize=8, color=PLAIN)
    panel.set_xticks(places, [f"objective {place}" if len(ranges) <= 3 else str(place) for place in places])
    panel.set_xlim(0.7, len(ranges) + 0.3)
    panel.set_ylim(-0.14, 1.25)
    panel.set_yticks((0, 1), ("lowest", "highest"))
    if len(ranges) > 3:
        panel.set_xlabel("objective")
    plain_axes(panel)
    panel.grid(True, axis="x", color=GRID, linewidth=1.2)


def _highest(reached: Sequence[float]) -> float:
    """Return the highest value shown: end points far above the third quartile are not shown."""
    known = sorted(filter(math.isfinite, reached))
    if not known:
        return -math.inf
    low, typical = known[0], known[3 * (len(known) - 1) // 4]
    return min(known[-1], typical + 3 * (typical - low)) if typical > low else known[-1]


def _say(panel: Axes, what: str) -> None:
    where: dict[str, Any] = {"ha": "right", "va": "top", "transform": panel.transAxes, "zorder": 9}
    panel.text(0.99, 0.99, what, fontsize=8, color=PLAIN, **where)


def _line(panel: Axes, steps: Sequence[int], values: Sequence[float], look: Look, order: tuple[int, int]) -> None:
    """Draw a line with some marks, at other places on each line; `order` is (index of the line, number of lines)."""
    place, of = order
    marks: dict[str, Any] = {
        "marker": look.mark,
        "markersize": 4.5,
        "markevery": (0.03 + 0.2 * place / max(of, 1), 0.2),
    }
    panel.plot(
        steps,
        values,
        look.line,
        color=look.colour,
        linewidth=look.width,
        zorder=look.layer(),
        markeredgewidth=0,
        **marks,
    )


def _smooth(values: Sequence[float]) -> list[float]:
    return exponential_average(values, max(1.0, len(values) / 20))


def _scale(panel: Axes, which: Literal["x", "y"], low: float, high: float, *, linear: bool = True) -> None:
    """Scale an axis from `low` to `high`: logarithmically if these are far apart and `linear` is False."""
    if not linear and high > 100 * low > 0:
        log_axis(panel, (low, high), which)
        return
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    panel.set(**{f"{which}lim": (low - room, high + room)})
