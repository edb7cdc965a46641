"""A sweep's page: trials, pictures, what is missing and why; nothing of a user's gets into the HTML unescaped."""

from __future__ import annotations

import math
import shutil

import pytest

from ml2o_dist.config_file import dump_settings
from ml2o_dist.reporting.sweep_plots import plot_sweep
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.sweeping.importance import importance
from ml2o_dist.sweeping.record import FILE
from ml2o_dist.workflows.report import write_report
from tests.sweeping.test_importance import recorded


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweep")

    def score(values, source):
        return math.inf if values["learner.ema"] > 0.85 else abs(math.log10(values["learner.lr"]) + 2) + source.random()

    settings, record = recorded(place, score, 24)
    record.begin("25", {"learner.lr": 0.1, "learner.ema": 0.5, "rule.output": "<b>scaled"})
    record.end("25", "failed", "ValueError: <script>")
    (place / "sweep.yaml").write_text(dump_settings(settings))
    plot_sweep(settings, record, importance(settings, record), place / "plots")
    return place


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "sweep")


def test_the_page_shows_trials_pictures_and_what_failed(folder):
    answer = write_report(folder)
    assert answer["unread"] == []
    assert answer["sections"] == ["trials", "parallel_coordinates", "importance", "progress", "failed", "configuration"]
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "&lt;script&gt;" in page
    assert "ValueError: <script>" not in page
    assert "<b>scaled" not in page
    assert "random forest" in page
    assert ">best at<" in page
    assert ">tune/1<" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_sweep_that_has_just_begun_says_what_is_missing(folder):
    for picture in (folder / "plots").iterdir():
        picture.unlink()
    (folder / FILE).write_text("")
    answer = write_report(folder)
    assert answer["missing"]["trials"] == "No trial has begun."
    assert "it takes 10 trials" in answer["missing"]["importance"]


def test_settings_that_cannot_be_read_are_named_and_the_rest_is_shown(folder):
    (folder / "sweep.yaml").write_text("spice: {}\n")
    answer = write_report(folder)
    assert len(answer["unread"]) == 1
    assert "'spice'" in answer["unread"][0] or "'space'" in answer["unread"][0]
    assert "trials" in answer["sections"]


def test_pictures_of_too_few_trials_are_not_drawn(tmp_path):
    settings, record = recorded(tmp_path, lambda *_: math.inf, 3)
    assert plot_sweep(settings, record, importance(settings, record), tmp_path) == []
    (tmp_path / "one").mkdir()
    one = recorded(tmp_path / "one", lambda *_: 1.0, 1)
    names = {path.stem for path in plot_sweep(*one, importance(*one), tmp_path)}
    assert names == {"parallel_coordinates", "progress"}


def test_a_folder_without_anything_is_still_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.yaml"):
        write_report(tmp_path)
