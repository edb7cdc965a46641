"""`ml2o report` and `ml2o trajectories` on run directories in every state."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from ml2o_dist.artifact import save_artifact
from ml2o_dist.cli import main
from ml2o_dist.config_file import dump_settings
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.workflows.report import load_evaluation_record, load_record, write_report
from tests.evaluation.synthetic import DIGITS_ROWS, evaluation
from tests.metatrain.executing import Cut, cut_after, in_process, later
from tests.metatrain.settings import small
from tests.reporting.test_meta_train_page import Page
from tests.wording import says

COMPARISON = evaluation(DIGITS_ROWS[:1] + DIGITS_ROWS[-2:-1])
LOG = """2026-11-24 20:00:00,123 INFO ml2o_dist.metatrain.pool: all is well
2026-11-24 20:00:01,123 WARNING ml2o_dist.metatrain.trainer: meta-step 3: 1 of 4 episodes were not finite, skipped
Traceback (most recent call last):
2026-11-24 20:00:02,123 ERROR ml2o_dist.tracking.sink: no answer from <server>
"""


def call(*words):
    return CliRunner().invoke(main, list(words))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run without Ray: trained in process, compared by hand."""
    folder = tmp_path_factory.mktemp("trained") / "the run"
    settings = small(meta_steps=4)
    trainer = Trainer(settings, folder)
    trainer.progress.tracking_run = "the-mlflow-run"
    trainer.run(later(in_process))
    (folder / "config.yaml").write_text(dump_settings(settings))
    save_artifact(folder, trainer.best_weights, settings.rule, {"git": "0123456789ab", "best_meta_step": 4})
    (folder / "comparison.json").write_text(json.dumps(COMPARISON.to_json(curves=True)))
    (folder / "run.log").write_text(LOG)
    return folder


@pytest.fixture
def rendered_dir(trained, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "the run"))


@pytest.fixture
def run_dir(rendered_dir, unrendered) -> Path:
    """The same, where the pictures of its page do not matter."""
    return rendered_dir


def test_everything_in_the_folder_is_in_the_page(run_dir):
    result = call("report", str(run_dir), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "path": str(run_dir / "report.html"),
        "sections": [
            "curves",
            "comparison",
            "learning-curves",
            "profile",
            "end-points",
            "time",
            "trajectories",
            "configuration",
            "origin",
            "warnings",
        ],
        "missing": {},
        "unread": [],
    }
    page = Page((run_dir / "report.html").read_text())
    for said in [
        "the run",
        "0.5000 ± 0.012",
        "1 of 4 episodes were not finite",
        "no answer from <server>",
        "0123456789ab",
    ]:
        assert said in page.text
    assert "all is well" not in page.text
    record = load_record(run_dir)
    assert record.progress["tracking_run"] == "the-mlflow-run"
    assert record.card["weights_sha256"] in page.text
    assert record.meta_steps == 4


def test_made_again_it_is_the_same_and_replaces_the_old_one(rendered_dir):
    write_report(rendered_dir)
    first = (rendered_dir / "report.html").read_bytes()
    write_report(rendered_dir)
    assert (rendered_dir / "report.html").read_bytes() == first


def test_a_run_that_was_cut_off_says_what_it_has_and_what_not(tmp_path, unrendered):
    settings = small(meta_steps=8, checkpoint_every=2)
    (tmp_path / "config.yaml").write_text(dump_settings(settings))
    answer = write_report(tmp_path)
    assert answer["sections"] == ["configuration", "origin"]
    assert set(answer["missing"]) == {"curves", "comparison", "trajectories", "origin", "warnings"}
    with pytest.raises(Cut):
        Trainer(settings, tmp_path).run(later(cut_after(6)))
    result = call("report", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "comparison: No comparison: it is made when meta-training is done." in result.stdout
    page = Page((tmp_path / "report.html").read_text())
    assert "Not finished: meta-step 4 of 8 at the last checkpoint." in page.text
    assert "No weights yet" in page.text


SECTIONS = {
    "config.yaml": "configuration",
    "metrics.parquet": "curves",
    "comparison.json": "comparison",
    "weights.json": "origin",
    "trajectories": "trajectories",
}


CUTS = {"cut": lambda content: content[:-50], "empty": lambda content: b"", "other": lambda content: b"\x00 no use"}


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        *[(name, "cut") for name in SECTIONS],
        *[pytest.param(name, cut, marks=pytest.mark.long) for name in SECTIONS for cut in ("empty", "other")],
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_cause_and_the_rest_is_shown(run_dir, name, cut):
    broken = sorted(path for path in (run_dir / name, *(run_dir / name).glob("*")) if path.is_file())
    for file in broken:
        file.write_bytes(CUTS[cut](file.read_bytes()))
    if name == "config.yaml" and load_record(run_dir).settings is not None:
        pytest.skip("YAML that was cut may be whole YAML")
    result = call("report", str(run_dir), "--json", "--quiet")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert set(answer["missing"]) == {SECTIONS[name]}
    said = answer["missing"][SECTIONS[name]]
    assert str(broken[0]) in said.replace("'", "")
    assert answer["unread"] == [said]
    assert result.stderr.splitlines() == [f"ml2o: {said}"]
    page = Page((run_dir / "report.html").read_text())
    assert page.text.count(said) == 2, "at the top, and where it is missed"
    assert "yet" not in said
    assert page.text.count("No weights yet") == page.text.count("Not finished") == 0
    assert ("Finished after 4 of 4 meta-steps." in page.text) == (name not in ("config.yaml", "weights.json"))


def test_a_trajectory_file_that_cannot_be_read_hides_no_other(run_dir):
    before = json.loads(call("trajectories", str(run_dir), "--json", "--quiet").stdout)
    broken = run_dir / "trajectories" / "step_000002.parquet"
    broken.write_bytes(broken.read_bytes()[:-50])
    result = call("report", str(run_dir), "--json", "--quiet")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert "trajectories" in answer["sections"]
    assert answer["missing"] == {}
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"ml2o: {broken} cannot be read")
    assert line.removeprefix("ml2o: ") in Page((run_dir / "report.html").read_text()).text
    listed = call("trajectories", str(run_dir), "--json", "--quiet")
    assert listed.exit_code == 0
    (said,) = listed.stderr.splitlines()
    assert says(said, line, "other files")
    assert sum(each["episodes"] for each in json.loads(listed.stdout)) == sum(e["episodes"] for e in before) - 4
    drawn = call("trajectories", str(run_dir), "--problem", "fonseca")
    assert drawn.exit_code == 0
    assert len(drawn.stderr.splitlines()) == 1
    for file in (run_dir / "trajectories").iterdir():
        file.write_bytes(b"")
    failed = call("trajectories", str(run_dir))
    assert failed.exit_code == 2
    (line,) = failed.stderr.splitlines()
    assert "step_000001.parquet cannot be read" in line


def test_metrics_without_any_checkpoint_are_not_said_to_be_unwritten(run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "weights.json").unlink()
    (run_dir / "metrics.parquet").write_bytes(b"")
    write_report(run_dir)
    text = Page((run_dir / "report.html").read_text()).text
    assert "Not finished." in text
    assert "no checkpoint has been written yet" not in text
    assert "metrics.parquet cannot be read" in text


def test_a_refused_checkpoint_is_named(run_dir):
    newest = run_dir / "checkpoints" / "step_000004" / "state.json"
    newest.write_bytes(newest.read_bytes()[:-5])
    write_report(run_dir)
    assert f"checkpoint refused: {newest}" in Page((run_dir / "report.html").read_text()).text


@pytest.fixture
def evaluation_dir(tmp_path, unrendered) -> Path:
    """What `ml2o evaluate` leaves in its folder."""
    folder = tmp_path / "the evaluation"
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(COMPARISON.to_json(curves=True), allow_nan=False))
    (folder / "evaluate.yaml").write_text(dump_settings(COMPARISON.settings))
    (folder / "run.log").write_text(LOG)
    return folder


def test_an_evaluation_has_the_same_page_as_a_comparison(evaluation_dir):
    result = call("report", str(evaluation_dir), "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer == {
        "path": str(evaluation_dir / "report.html"),
        "sections": [
            "comparison", "learning-curves", "profile", "end-points", "time", "configuration", "origin", "warnings"
        ],
        "missing": {},
        "unread": [],
    }  # fmt: skip
    page = Page((evaluation_dir / "report.html").read_text())
    for said in ["Evaluation the evaluation Finished.", "0.5000 ± 0.012", "learned is 0.625 of mean+adam@0.01: better",
                 "no answer from <server>", "learning_rates [0.001, 0.01, 0.1]"]:  # fmt: skip
        assert said in page.text, said


def test_an_evaluation_that_is_not_done_says_so(evaluation_dir):
    (evaluation_dir / "evaluation.json").unlink()
    answer = write_report(evaluation_dir)
    assert answer["sections"] == ["configuration", "warnings"]
    assert set(answer["missing"]) == {"comparison", "origin"}
    assert "No results yet" in Page((evaluation_dir / "report.html").read_text()).text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "evaluation.json' is not JSON"),
        ("[]", "evaluation.json cannot be read ... no evaluation of this version"),
        ('{"steps": 60, "problems": []}', "evaluation.json cannot be read ... no evaluation of this version"),
        ('{"cells": [], "summary": {"rows": 1}}', "no evaluation of this version ... settings"),
    ],
)
def test_results_that_are_no_evaluation_are_named_with_their_cause(evaluation_dir, content, said):
    (evaluation_dir / "evaluation.json").write_text(content)
    result = call("report", str(evaluation_dir), "--json", "--quiet")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["sections"] == ["configuration", "warnings"]
    (line,) = answer["unread"]
    assert says(line, said)
    assert str(evaluation_dir) in line
    assert "pydantic" not in line
    assert line in Page((evaluation_dir / "report.html").read_text()).text


def test_a_comparison_of_an_older_version_is_named_and_the_rest_is_shown(run_dir):
    (run_dir / "comparison.json").write_text('{"steps": 60, "seeds": 3, "problems": [], "tuning_seeds": 1}')
    answer = write_report(run_dir)
    assert set(answer["missing"]) == {"comparison"}
    (line,) = answer["unread"]
    assert says(line, f"{run_dir}/comparison.json cannot be read", "no evaluation of this version")
    assert "curves" in answer["sections"]


def test_settings_are_taken_from_the_results_where_their_file_is_gone(evaluation_dir):
    (evaluation_dir / "evaluate.yaml").unlink()
    assert "configuration" in write_report(evaluation_dir)["sections"]
    assert load_evaluation_record(evaluation_dir).settings == COMPARISON.settings


def test_an_evaluation_at_a_uri_goes_by_its_uri(evaluation_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("ML2O_HOME", str(tmp_path))
    (evaluation_dir / "evaluation.json").write_text("{")
    uri = f"file://{evaluation_dir}".replace(" ", "%20")
    result = call("report", uri)
    assert result.exit_code == 0, result.output
    assert "ml2o-run-" not in result.output + (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("command", ["report", "trajectories"])
def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(tmp_path, command):
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = call(command, str(folder))
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert str(folder) in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["report", "trajectories"])
@pytest.mark.parametrize("inside", ["", "trajectories/step_000001.parquet"])
def test_what_is_wrong_at_a_uri_is_said_of_the_uri(tmp_path, monkeypatch, command, inside):
    """Not of the temporary folder that it was downloaded to."""
    monkeypatch.setenv("ML2O_HOME", str(tmp_path))
    uri = f"file://{tmp_path}/runs/nope"
    if inside:
        for name in ("config.yaml", inside):
            (tmp_path / "runs/nope" / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / "runs/nope" / name).write_bytes(b"")
    result = call(command, uri)
    page = tmp_path / "report.html"
    assert result.exit_code == (0 if inside and command == "report" else 2)
    assert page.exists() == (result.exit_code == 0)
    assert f"{uri}/{inside} cannot be read" in result.stderr if inside else f"{uri}" in result.stderr
    assert "ml2o-run-" not in result.output + (page.read_text() if page.exists() else "")
    if page.exists():
        assert "<h1>nope</h1>" in page.read_text()
        assert f"{uri}/{inside} cannot be read" in page.read_text()


def test_a_relative_run_directory_is_looked_for_in_ml2o_home(run_dir, monkeypatch):
    monkeypatch.setenv("ML2O_HOME", str(run_dir.parent))
    assert call("report", "the run").exit_code == 0


def test_a_page_that_cannot_be_written_is_one_line_and_exit_code_2(run_dir, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ml2o_dist.workflows.report.replacing", full)
    result = call("report", str(run_dir))
    assert result.exit_code == 2
    assert says(result.stderr, "report.html cannot be written", "No space left on device")


def test_recorded_problems_are_listed_and_one_is_drawn_where_its_pictures_belong(rendered_dir):
    listed = json.loads(call("trajectories", str(rendered_dir), "--json").stdout)
    assert [each["problem"] for each in listed] == sorted(each["problem"] for each in listed)
    assert sum(each["episodes"] for each in listed) == 16
    table = call("trajectories", str(rendered_dir)).stdout
    assert all(each["problem"] in table for each in listed)
    drawn = call("trajectories", str(rendered_dir), "--problem", "fonseca")
    assert drawn.exit_code == 0, drawn.output
    assert (rendered_dir / "plots" / "trajectories-fonseca.png").stat().st_size > 10_000
    assert str(rendered_dir / "plots" / "trajectories-fonseca.png") in drawn.stdout


def test_an_output_without_a_problem_is_refused(run_dir):
    result = call("trajectories", str(run_dir), "--output", "a.png")
    assert result.exit_code == 2
    assert "--output needs --problem" in result.stderr


def test_a_run_s_name_is_escaped(run_dir):
    evil = run_dir.with_name("<script>alert(1)<script>")
    run_dir.rename(evil)
    write_report(evil)
    text = (evil / "report.html").read_text()
    assert text.count("<script") == 1, "the page's own"
    assert "&lt;script&gt;alert(1)" in text
    assert isinstance(Page(text), HTMLParser)
