"""The guard's picture shows every rule, is scaled to the sound runs, and says which run ended."""

from __future__ import annotations

import math

import pytest
from matplotlib.figure import Figure

from ml2o_dist.reporting import guard_plots
from ml2o_dist.reporting.guard_plots import Curve, GuardColumn, plot_guard

AT = (0, 10, 20)


def drawn(monkeypatch, tmp_path, columns) -> Figure:
    figures = []
    save = guard_plots.save_figure
    monkeypatch.setattr(guard_plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
    plot_guard(columns, "a title", "DSSMG", tmp_path / "guard.png")
    assert (tmp_path / "guard.png").read_bytes().startswith(b"\x89PNG")
    return figures[0]


def column(rule, unguarded):
    return GuardColumn(
        rule, unguarded, Curve(AT, (5.0, 2.0, 1.0), (1.0, 0.5, 0.1)), Curve(AT, (5.0, 3.0, 2.0), (1.0, 0.4, 0.2))
    )


def test_each_rule_has_its_losses_and_criticality(monkeypatch, tmp_path):
    gone = Curve(AT, (5.0, 1e30, math.nan), (1.0, math.nan, math.nan))
    still = Curve(AT, (5.0, 5.0, 5.0), (1.0, 1.0, 1.0))
    figure = drawn(monkeypatch, tmp_path, [column("huge", gone), column("frozen", still)])
    above, below = figure.axes[:2], figure.axes[2:]
    assert [panel.get_title(loc="left") for panel in above] == ["huge", "frozen"]
    for panels, name in ((above, "loss"), (below, "criticality")):
        for panel, expected in zip(panels, (column("huge", gone), column("frozen", still)), strict=True):
            lines = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
            assert lines["guarded by DSSMG"] == list(getattr(expected.guarded, name))
            assert lines["DSSMG alone"] == list(getattr(expected.fallback, name))
            assert len(lines["unguarded"]) == 3
    assert above[0].get_ylim()[1] < 20
    assert [text.get_text() for text in above[0].texts] == ["unguarded: not finite\nby step 20"]
    assert [text.get_text() for text in below[0].texts] == ["unguarded: not finite\nby step 10"]
    assert not [*above[1].texts, *below[1].texts]


@pytest.mark.parametrize("low", [-3.0, 0.5])
def test_losses_below_zero_have_a_plain_axis(monkeypatch, tmp_path, low):
    curve = Curve(AT, (5.0, 2.0, low), (1.0, 0.5, 0.1))
    figure = drawn(monkeypatch, tmp_path, [GuardColumn("ascent", curve, curve, curve)])
    assert figure.axes[0].get_yscale() == ("log" if low > 0 else "linear")
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < low < 5.0 < top
