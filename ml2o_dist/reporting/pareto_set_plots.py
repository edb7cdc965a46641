"""Pictures of fronts: two tasks in the plane, three in space, more as parallel coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml2o_dist.paretoset.approaches import EXPERTS, OURS
from ml2o_dist.paretoset.results import ApproachResult, best_first
from ml2o_dist.reporting.plots import MUTED, PLAIN, STRONG, new_figure, plain_axes, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")


def plot_fronts(results: Sequence[ApproachResult], names: Sequence[str], path: Path) -> None:
    """Draw the test losses of every approach's front to a PNG at `path`; `names` are the tasks'."""
    save_figure(fronts_figure(results, names), path)


def fronts_figure(results: Sequence[ApproachResult], names: Sequence[str]) -> Figure:
    """Return the picture that `plot_fronts` writes."""
    shown = [result for result in best_first(results) if "test" in result.fronts]
    shown.sort(key=lambda result: result.approach == OURS)  # ours is drawn last, on top
    draw = {2: _plane, 3: _space}.get(len(names), _parallel)
    return draw(shown, names)


def look(result: ApproachResult, place: int) -> dict[str, Any]:
    """Return colour and mark of an approach; `place` is its index in the order of drawing."""
    if result.approach == OURS:
        return {"color": STRONG, "marker": "o", "markersize": 6, "linewidth": 2.0, "zorder": 3}
    mark = MARKS[1 + place % (len(MARKS) - 1)]
    return {"color": MUTED[place % len(MUTED)], "marker": mark, "markersize": 5, "linewidth": 1.0}


def _plane(results: Sequence[ApproachResult], names: Sequence[str]) -> Figure:
    figure = new_figure(7.6, 5.4)
    panel = figure.subplots()
    for place, result in enumerate(results):
        losses = result.fronts["test"].losses
        order = losses[:, 0].argsort()
        style = look(result, place) | ({"linestyle": ""} if result.approach == EXPERTS else {})  # marks, no line
        panel.plot(losses[order, 0].tolist(), losses[order, 1].tolist(), label=result.approach, **style)
    panel.set_xlabel(f"test loss, {names[0]}", color=PLAIN)
    panel.set_ylabel(f"test loss, {names[1]}", color=PLAIN)
    panel.set_title("Fronts: lower and further left is better", loc="left", fontsize=10, color=PLAIN)
    plain_axes(panel)
    panel.margins(0.05)
    panel.legend(frameon=False, fontsize=9)
    return figure


def _space(results: Sequence[ApproachResult], names: Sequence[str]) -> Figure:
    figure = new_figure(7.6, 6.4)
    panel: Any = figure.add_subplot(projection="3d")
    for place, result in enumerate(results):
        style = look(result, place) | {"linestyle": ""}
        panel.plot(*result.fronts["test"].losses.T.tolist(), label=result.approach, **style)
    panel.set(xlabel=names[0], ylabel=names[1], zlabel=names[2])
    panel.set_title("Test losses of the fronts: lower is better", loc="left", fontsize=10, color=PLAIN)
    panel.legend(frameon=False, fontsize=9)
    return figure


def _parallel(results: Sequence[ApproachResult], names: Sequence[str]) -> Figure:
    figure = new_figure(1.5 + 1.2 * len(names), 5.0)
    panel = figure.subplots()
    for place, result in enumerate(results):
        for row, losses in enumerate(result.fronts["test"].losses.tolist()):
            panel.plot(range(len(names)), losses, label=result.approach if row == 0 else None, **look(result, place))
    panel.set_xticks(range(len(names)), labels=list(names), rotation=20, ha="right")
    panel.set_ylabel("test loss", color=PLAIN)
    panel.set_title("A line for each preference: lower is better", loc="left", fontsize=10, color=PLAIN)
    plain_axes(panel)
    panel.legend(frameon=False, fontsize=9)
    return figure
