"""Pictures are written of what there is to show, each optimizer in its colour."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from ml2o_dist.evaluation.evaluated import Curve
from ml2o_dist.reporting import evaluation_plots
from ml2o_dist.reporting.evaluation_plots import plot_evaluation
from ml2o_dist.reporting.plots import STRONG, STRONGS
from tests.evaluation.synthetic import CURVED, DIGITS_ROWS, EVALUATION, HOSTILE, evaluation, failed, row, suite

ALL = ["learning_curves", "performance_profile", "pareto", "time_per_step", "acceptance"]


def pixels(path: Path, colour: str) -> int:
    """How many pixels have a colour."""
    image = matplotlib.image.imread(path)[:, :, :3]
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return int((np.abs(image - wanted).max(axis=2) < 0.02).sum())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    shown = replace(EVALUATION, rows=tuple(r for r in EVALUATION.rows if r.problem != CURVED))
    return plot_evaluation(shown, tmp_path_factory.mktemp("plots") / "deeper")


def test_all_five_are_written_where_all_have_something_to_show(pictures: list[Path]) -> None:
    assert [path.stem for path in pictures] == ALL
    assert sorted(path.name for path in pictures[0].parent.iterdir()) == sorted(f"{name}.png" for name in ALL)


def test_the_learned_optimizer_is_strong_in_every_picture_that_it_is_in(pictures: list[Path]) -> None:
    for path in pictures[:4]:
        assert pixels(path, STRONG) > 300, path.stem
    assert pixels(pictures[4], STRONG) == 0, "it has no guard"
    assert pixels(pictures[4], STRONGS[1]) > 300


def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Figures by the name of their file, in place of files: drawing them is what takes the time."""
    figures: dict[str, object] = {}
    monkeypatch.setattr(evaluation_plots, "save_figure", lambda figure, path: figures.update({path.stem: figure}))
    return figures


def test_what_has_nothing_to_show_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    assert plot_evaluation(evaluation([]), tmp_path) == []
    one = evaluation([row("mean+adam", "p", 1.0, objectives=1, curve=Curve())])
    assert [path.stem for path in plot_evaluation(one, tmp_path)] == ["performance_profile", "time_per_step"]
    broken = evaluation([failed(row("mean+adam", "p", 1.0))])
    assert plot_evaluation(broken, tmp_path) == []
    below = evaluation([row("mean+adam", "p", -1.0, objectives=1)])
    assert [path.stem for path in plot_evaluation(below, tmp_path)] == ["learning_curves", "time_per_step"]
    assert list(tmp_path.iterdir()) == []
    assert figures


def test_a_suite_has_a_panel_for_each_problem_and_one_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    shown = suite()
    plot_evaluation(shown, tmp_path)
    for name, count in {"learning_curves": 12, "pareto": 11, "time_per_step": 12, "acceptance": 12}.items():
        figure = figures[name]
        titles = [panel.get_title("left") for panel in figure.axes if panel.axison]
        assert len(titles) == count
        problems = [title.replace("\n", "") for title in titles]
        assert problems == [problem for problem in shown.problems if name != "pareto" or "m=1" not in problem]
        assert len(figure.legends) == (name != "time_per_step")
    legend = [text.get_text() for text in figures["learning_curves"].legends[0].get_texts()]
    assert sorted(legend) == sorted({each.optimizer for each in shown.rows})
    guarded = [text.get_text() for text in figures["acceptance"].legends[0].get_texts()]
    assert guarded == ["gml2o:models:/ml2o@candidate", "gml2o:random"]
    named = [panel for panel in figures["time_per_step"].axes if panel.get_yticklabels()[0].get_text()]
    assert len(named) == 3, "names stand at the first panel of each line alone"


def test_names_are_shown_letter_by_letter(tmp_path: Path) -> None:
    rows = [replace(each, optimizer=HOSTILE, problem=HOSTILE) for each in DIGITS_ROWS[-1:]]
    assert len(plot_evaluation(evaluation(rows), tmp_path)) == 5
