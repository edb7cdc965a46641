"""Pictures of a meta-training, and helpers for all pictures: panels drawn into axes, as PNG or inline SVG of a page."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

from ml2o_dist.evaluation.statistics import exponential_average
from ml2o_dist.runtime import shown_text
from ml2o_dist.runtime.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STRONG = "#c8102e"
"""The colour of the first learned optimizer, used for nothing else."""
STRONGS = (STRONG, "#e8710a", "#8e1a9c")
"""Colours of the learned optimizers, in their order."""
PLAIN = "#33383d"
GRID = "#d9dde1"
MUTED = ("#4f86b8", "#c3a03d", "#5fa287", "#9a86b5", "#86bfd9", "#96735d")
"""Colours of all other lines; their hue and lightness also differ for red-green colour-blind readers."""
PAGE_COLOURS = (
    {PLAIN: "ink", GRID: "grid"}
    | {colour: f"strong-{i}" for i, colour in enumerate(STRONGS)}
    | {colour: f"muted-{i}" for i, colour in enumerate(MUTED)}
)
"""The style sheet's names for these colours: a page shows them according to its light or dark scheme."""

HISTORY_CAPTION = (
    "Validation tells whether meta-training helps: it is always on the same problems, starting points and batches. The "
    "meta-loss does not, by itself: every meta-step draws its horizon and its problems anew, so it goes up and down "
    "with what was drawn."
)
"""Explains the two curves of a run; every form of the picture includes it."""


def plot_meta_loss(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a run's validation and meta-loss against the meta-step, to a PNG at `path`, with `HISTORY_CAPTION` below.

    Args:
        history: one mapping per meta-step: `meta_step`, `meta_loss`, `validation` (None where there was none).
    """
    save_figure(meta_loss_figure(history), path)


def meta_loss_figure(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the picture that `plot_meta_loss` writes."""
    figure = new_figure(9.2, 4.1)
    panels = figure.subplots(1, 2, sharex=True)
    titles = {"validation": "Look here: validation", "meta_loss": "Meta-loss of the rollouts"}
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        draw_history(panel, history, key)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=9)
        weight = "bold" if key == "validation" else "normal"
        panel.set_title(f"{title} (lower is better)", loc="left", fontsize=10, color=PLAIN, fontweight=weight)
    figure.supxlabel(textwrap.fill(HISTORY_CAPTION, 125), x=0.02, ha="left", fontsize=8.5, color=PLAIN)
    return figure


def draw_history(panel: Axes, history: Sequence[Mapping[str, Any]], key: str) -> None:
    """Draw one figure of a run, a key of its history, against the meta-step; values that are not finite are left out.

    Validation is a line of marks with the best one ringed, a count and a schedule are plain, anything else is drawn as
    points and as their exponential average (span 1/15 of the run). A gradient norm has a logarithmic axis.
    """
    from matplotlib.ticker import MaxNLocator

    points = [(entry["meta_step"], entry[key]) for entry in history if is_finite(entry.get(key))]
    steps, values = [point[0] for point in points], [point[1] for point in points]
    if not points:
        panel.text(0.5, 0.5, "none recorded", ha="center", va="center", transform=panel.transAxes, color=PLAIN)
    elif key == "validation":
        panel.plot(steps, values, color=STRONG, linewidth=1.6, marker="o", markersize=4, label="average weights")
        best = min(points, key=lambda point: point[1])
        style: dict[str, Any] = {"marker": "o", "markersize": 9, "fillstyle": "none", "linestyle": "", "clip_on": False}
        panel.plot(*best, color=PLAIN, label="best, kept", **style)
    elif key in ("learning_rate", "skipped_episodes"):
        panel.plot(steps, values, color=STRONG, linewidth=1.6, drawstyle="steps-mid" if max(values) % 1 == 0 else None)
        panel.set_ylim(bottom=0, top=None if max(values) > 0 else 1)
        if key == "skipped_episodes":
            panel.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    else:
        each: dict[str, Any] = {"marker": "o", "markersize": 3, "markeredgewidth": 0, "linestyle": "", "alpha": 0.6}
        panel.plot(steps, values, color=MUTED[0], label="each meta-step", **each)
        smooth = exponential_average(values, span=max(1.0, len(values) / 15))
        panel.plot(steps, smooth, color=STRONG, linewidth=2, label="average")
    if key == "gradient_norm" and points and min(values) > 0:
        log_axis(panel, values)
    panel.set_xlabel("meta-step")
    panel.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    plain_axes(panel)


def log_axis(panel: Axes, values: Sequence[float], which: Literal["x", "y"] = "y") -> None:
    """Make an axis logarithmic round `values` > 0, its ticks plain numbers, as many as fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values), max(values)
    ratio = high / low
    room = max(ratio, 1.5) ** 0.1  # the labels of the ticks must differ for a nearly constant curve, too
    axis = panel.yaxis if which == "y" else panel.xaxis
    panel.set(**{f"{which}scale": "log", f"{which}lim": (low / room, high * room)})
    subs = (1, 1.5, 2, 3, 4, 5, 7) if ratio < 10 else (1, 2, 5) if ratio < 200 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_locator(NullLocator())


def plain_axes(panel: Axes) -> None:
    """Reduce a panel's frame to the two axes, and add a faint grid."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(True, which="major", color=GRID, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.margins(x=0.01)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, its size in inches, without the global state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture atomically, in the format of its file name, PNG by default."""
    with replacing(path) as stream:
        figure.savefig(stream, format=path.suffix.removeprefix(".") or "png", facecolor="white")


def inline_svg(draw: Callable[[Axes], object], label: str, identity: str) -> Markup:
    """Return one panel as an <svg> element that takes the page's colours and fonts.

    Args:
        draw: draws into the axes. It must write no user's text there: such text goes into the HTML beside.
        label: a description of the picture for readers who cannot see it.
        identity: an id that no other picture of the page has.
    """
    from matplotlib import rc_context

    text = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), PLAIN)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": identity, "font.size": 9, **text}):
        figure = new_figure(4.4, 2.7)
        draw(figure.subplots())
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return _embedded(stream.getvalue(), label, identity)


def is_finite(value: Any) -> bool:
    """Tell whether a figure of a history is a finite number; it may be None."""
    return isinstance(value, int | float) and math.isfinite(value)


def _embedded(svg: str, label: str, identity: str) -> Markup:
    """Turn matplotlib's SVG document into an element: no prolog, unique ids, colours and fonts of the page."""
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    body = svg[svg.index(">", box.end()) + 1 :]
    body = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'(<g) id="[^"]*"', r"\1", body)
    body = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\g<1>{identity}-", body).replace("xlink:href", "href")
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r"font: ([0-9.]+px)[^;\"]*", r"font-size: \1", body)  # the spelling of matplotlib before 3.10
    body = re.sub(r' d="[^"]*"', lambda data: re.sub(r"(\.\d)\d+", r"\1", data.group()), body)  # tenths of a point
    for colour, name in PAGE_COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    start = f'<svg role="img" aria-label="{shown_text.html(label)}" {box.group()}>'
    return Markup(start + re.sub(r"\s+", " ", body))
