"""The small commands and the help texts."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from ml2o_dist.cli import main
from ml2o_dist.cli.command import command
from ml2o_dist.runtime.errors import Incomplete
from tests.wording import says


def call(*words):
    return CliRunner().invoke(main, list(words))


@pytest.mark.parametrize(
    "words", [[], ["meta-train"], ["evaluate"], ["models"], ["models", "list"], ["problems", "list"], ["data", "fetch"]]
)
def test_every_command_has_a_help_text(words):
    result = call(*words, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output
    assert len(result.output.splitlines()) > 5


def test_problems_list_names_every_problem_and_its_settings():
    listed = json.loads(call("problems", "list", "--json").stdout)
    by_name = {entry["name"]: entry for entry in listed}
    assert {"quadratic", "fonseca", "zdt1", "zdt2", "zdt3", "dtlz2", "cagrad_toy", "multidigits", "multimnist",
            "multifashion", "multifashionmnist"} <= by_name.keys()  # fmt: skip
    assert by_name["quadratic"]["settings"]["m"] == 2
    assert "fonseca" in call("problems", "list").stdout


def test_problems_show_counts_objectives_and_parameters():
    shown = json.loads(call("problems", "show", "quadratic[m=3,n=20]", "--json").stdout)
    assert (shown["objectives"], shown["parameters"]) == (3, 20)
    assert "3 objectives, 20 parameters" in call("problems", "show", "quadratic[m=3,n=20]").stdout


def test_problems_show_says_what_it_can_without_image_data(tmp_path):
    words = ("problems", "show", "multimnist[net=cnn]", "--data-root", str(tmp_path))
    shown = json.loads(call(*words, "--json").stdout)
    assert shown["settings"]["net"] == "cnn"
    assert "parameters" not in shown
    assert f"{tmp_path}/MNIST" in shown["missing"]
    assert "its sizes are not known" in call(*words).stdout


def test_an_unknown_problem_is_one_line_on_stderr_and_exit_code_2():
    result = call("problems", "show", "fonsecca")
    assert result.exit_code == 2
    assert says(result.stderr, "ml2o: ", "problem 'fonsecca'", "'fonseca'")
    assert len(result.stderr.splitlines()) == 1


def test_data_status_says_what_is_missing(tmp_path):
    records = json.loads(call("data", "status", "--data-root", str(tmp_path), "--json").stdout)
    assert len(records) == 8
    assert {record["content"] for record in records} == {"missing"}


def test_data_status_knows_the_official_content(real_data_root):
    records = json.loads(call("data", "status", "--data-root", real_data_root, "--json").stdout)
    assert {record["content"] for record in records} == {"official"}


def test_models_list_without_a_store_is_empty_and_creates_none(tmp_path, monkeypatch):
    monkeypatch.setenv("ML2O_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert json.loads(call("models", "list", "--json").stdout) == []
    assert "no registered models" in call("models", "list").stdout
    assert list(tmp_path.iterdir()) == []


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "ml2o_dist", "--version"], capture_output=True, text=True, check=True)
    assert "0.1.0" in done.stdout


@pytest.mark.parametrize("ends", ["well", "incomplete"])
def test_with_json_nothing_else_is_on_stdout_whoever_prints(ends):
    @click.command()
    @command
    def talks(console):
        print("(raylet) A worker died")
        if ends == "incomplete":
            raise Incomplete("not all", {"answer": 1})
        return {"answer": 1}

    result = CliRunner().invoke(talks, ["--json"])
    assert (json.loads(result.stdout), result.exit_code) == ({"answer": 1}, 0 if ends == "well" else 3)
    assert "(raylet) A worker died" in result.stderr
    assert "(raylet) A worker died" in CliRunner().invoke(talks, []).stdout
