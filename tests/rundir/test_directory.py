"""A run directory that cannot be one, and how warnings are shown."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from ml2o_dist.cli import main
from ml2o_dist.config_file import load_settings
from ml2o_dist.rundir.directory import written_to
from ml2o_dist.runtime.shown_text import ForeignTextConsole
from tests.wording import says

CONFIG = Path(__file__).parents[1] / "small_run.yaml"


@pytest.fixture
def no_ray(tmp_path, monkeypatch):
    monkeypatch.setenv("ML2O_HOME", str(tmp_path))
    monkeypatch.setattr("ml2o_dist.workflows.meta_train.connected", lambda address: pytest.fail("Ray was asked for"))


def ml2o(*words):
    return CliRunner().invoke(main, ["meta-train", "--config", str(CONFIG), *words])


@pytest.mark.parametrize(
    "words",
    [
        ["meta-train", "--resume"],
        ["sweep", "--resume"],
        ["pareto-set", "train", "--resume"],
        ["evaluate", "--optimizer", "initial", "--problem", "fonseca"],
    ],
)
@pytest.mark.parametrize("link", ["checkpoints", "tune/a", "tune/a/checkpoint_000000", "training/pwe", "experts/ray"])
def test_a_link_out_of_a_run_directory_is_refused_before_anything_is_written(tmp_path, monkeypatch, words, link):
    monkeypatch.setenv("ML2O_HOME", str(tmp_path))
    monkeypatch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray was started"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "step_000001").write_text("mine")
    folder = tmp_path / "given"
    (folder / link).parent.mkdir(parents=True)
    (folder / "inside").symlink_to(folder)  # which leads nowhere else
    (folder / link).symlink_to(tmp_path / "mine")
    result = CliRunner().invoke(main, [*words, "--run-dir", "given"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("ml2o: ")
    assert says(result.stderr, f"'{folder}'", f"{folder / link} is a link")
    assert (tmp_path / "mine" / "step_000001").read_text() == "mine"


@pytest.mark.parametrize("below", ["", "/runs/a"])
@pytest.mark.parametrize("words", [[], ["--resume"]])
def test_a_file_in_place_of_the_run_directory_is_the_one_line(no_ray, tmp_path, below, words):
    (tmp_path / "file").write_text("")
    for every in (words, ["--quiet", *words]):
        result = ml2o("--run-dir", f"file{below}", *every)
        assert result.exit_code == 2
        place, file = f"{tmp_path}/file{below}", f"{tmp_path}/file"
        assert (result.stderr.count("\n"), result.stdout) == (1, "")
        assert result.stderr.startswith("ml2o: ")
        assert says(result.stderr, f"'{place}'", f"'{file}' is a file", "--run-dir")
    without_config = CliRunner().invoke(main, ["meta-train", "--run-dir", "file", "--resume"])
    assert says(without_config.stderr, "is a file", "--run-dir")


def test_too_many_workers_for_this_machine_are_refused_before_ray_starts(no_ray, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    result = ml2o("--run-dir", "x", "--address", "local", "--set", "workers=99")
    assert result.exit_code == 2
    assert says(result.stderr, "ml2o: ", "workers=99 needs 99 CPU (1 each)", "has 2: 97 missing")
    assert not (tmp_path / "x").exists()


def test_a_damaged_mlflow_json_says_that_a_new_run_begins(no_ray, tmp_path, monkeypatch, caplog):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/mlflow.json").write_text("{")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    assert "workers=9999" in ml2o("--run-dir", "x", "--address", "local", "--set", "workers=9999").stderr
    (said,) = [record.getMessage() for record in caplog.records if "mlflow.json" in record.getMessage()]
    assert said.startswith(f"file '{tmp_path}/x/mlflow.json' is not JSON: ")
    assert said.endswith("; a new MLflow run begins")


def test_a_warning_is_one_line_that_nothing_pads(tmp_path):
    stream = io.StringIO()
    with written_to(tmp_path, load_settings(CONFIG), Console(file=stream, width=60)):
        log = logging.getLogger("ml2o_dist.metatrain.pool")
        log.warning("a worker [1, 2] died: %s", "word " * 20)
        log.info("not shown")
    assert stream.getvalue() == f"WARNING a worker [1, 2] died: {'word ' * 20}".rstrip() + "\n"
    assert "WARNING ml2o_dist.metatrain.pool: a worker" in (tmp_path / "run.log").read_text()


def test_warnings_and_the_log_show_control_characters_as_letters(tmp_path):
    stream = io.StringIO()
    with written_to(tmp_path, load_settings(CONFIG), ForeignTextConsole(file=stream, width=300)):
        logging.getLogger("ml2o_dist").warning("file %s is gone", "[x] \x1b[2J\u202e[/]")
    for text in (stream.getvalue(), (tmp_path / "run.log").read_text()):
        assert "file [x] \\x1b[2J\\u202e[/] is gone" in text
        assert "\x1b" not in text
