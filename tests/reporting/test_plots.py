"""Pictures are drawn from what they show."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest

from ml2o_dist.reporting import plots
from ml2o_dist.reporting.plots import (
    HISTORY_CAPTION,
    STRONG,
    draw_history,
    inline_svg,
    log_axis,
    plot_meta_loss,
)


def strong_pixels(path: Path) -> int:
    """How many pixels have the colour of what matters most."""
    image = matplotlib.image.imread(path)[:, :, :3]
    strong = np.array([int(STRONG[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return int((np.abs(image - strong).max(axis=2) < 0.02).sum())


def test_the_meta_loss_is_drawn(tmp_path: Path) -> None:
    history = [
        {"meta_step": k, "meta_loss": math.nan if k == 3 else 2 - k / 20, "validation": 1.0 if k % 10 == 9 else None}
        for k in range(30)
    ]
    plot_meta_loss(history, tmp_path / "meta.png")
    with_both = strong_pixels(tmp_path / "meta.png")
    plot_meta_loss([{**entry, "validation": None} for entry in history], tmp_path / "meta.png")
    with_one = strong_pixels(tmp_path / "meta.png")
    plot_meta_loss([], tmp_path / "meta.png")
    assert with_both > with_one > strong_pixels(tmp_path / "meta.png") == 0


def test_the_picture_says_that_validation_is_what_to_look_at(tmp_path: Path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    plot_meta_loss([{"meta_step": k, "meta_loss": 1.0, "validation": 1.0} for k in range(3)], tmp_path / "meta.png")
    (figure,) = drawn
    first, second = (panel.get_title("left") for panel in figure.axes)
    assert first == "Look here: validation (lower is better)"
    assert second == "Meta-loss of the rollouts (lower is better)"
    caption = " ".join(figure.get_supxlabel().split())
    assert caption == HISTORY_CAPTION
    assert "always on the same problems" in caption
    assert "every meta-step draws its horizon and its problems anew" in caption


def test_drawing_does_not_load_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "import ml2o_dist.reporting.evaluation_plots, ml2o_dist.reporting.evaluation_page\n"
        "from ml2o_dist.reporting.plots import plot_meta_loss\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plot_meta_loss([{'meta_step': 0, 'meta_loss': 1.0, 'validation': None}], Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.png")], check=True, timeout=120)


HISTORY = [
    {"meta_step": k, "meta_loss": 2 - k / 20, "gradient_norm": 10 ** (-k / 20), "learning_rate": 0.01,
     "skipped_episodes": float(k == 7), "validation": 1 - k / 100 if k % 10 == 0 else None}
    for k in range(30)
]  # fmt: skip


@pytest.mark.parametrize("key", ["meta_loss", "validation", "gradient_norm", "learning_rate", "skipped_episodes"])
def test_every_curve_of_a_run_is_an_svg_element_in_the_colours_of_the_page(key: str) -> None:
    svg = inline_svg(partial(draw_history, history=HISTORY, key=key), "what <it> is", "one")
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "what <it> is"
    assert "var(--strong-0)" in svg
    assert "var(--ink)" in svg
    assert not re.search("#[0-9a-f]{6}", svg), "a colour that the page cannot change"
    assert all(identity.startswith("one-") for identity in re.findall(r' id="([^"]*)"', svg))
    assert "http" not in svg


def test_the_drawn_curve_goes_where_the_history_goes() -> None:
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    draw_history(panel, [*HISTORY, {"meta_step": 30, "meta_loss": math.inf}, {"meta_step": 31}], "meta_loss")
    each, average = panel.get_lines()
    assert list(each.get_xdata()) == list(range(30))
    assert list(each.get_ydata()) == [2 - k / 20 for k in range(30)]
    assert each.get_linestyle() == "None", "each meta-step has other problems: nothing leads from one to the next"
    assert average.get_ydata()[0] == 2
    assert average.get_ydata()[-1] > each.get_ydata()[-1]
    panel = Figure().subplots()
    draw_history(panel, HISTORY, "validation")
    line, best = panel.get_lines()
    assert list(line.get_xdata()) == [0, 10, 20]
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (20, 0.8)


def test_a_curve_without_a_finite_figure_says_so() -> None:
    assert "none recorded" in inline_svg(partial(draw_history, history=HISTORY, key="nothing"), "x", "x")


def test_the_ticks_of_a_level_curve_differ() -> None:
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    log_axis(panel, [0.5, 0.5])
    low, high = panel.get_ylim()
    axis = panel.yaxis
    ticks = [tick for tick in axis.get_major_locator()() if low <= tick <= high]
    written = [axis.get_major_formatter()(tick) for tick in ticks]
    assert len(written) >= 3
    assert len(set(written)) == len(written)


@pytest.mark.parametrize("which", ["x", "y"])
def test_a_logarithmic_axis_reaches_a_little_further_than_its_values(which: str) -> None:
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    log_axis(panel, [0.1, 10.0], which)
    low, high = getattr(panel, f"get_{which}lim")()
    assert getattr(panel, f"get_{which}scale")() == "log"
    assert 0.05 < low < 0.1 < 10 < high < 20
    assert getattr(panel, f"get_{'y' if which == 'x' else 'x'}scale")() == "linear"
