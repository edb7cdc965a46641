"""`ml2o evaluate` where cells fail, where it is stopped or killed, and what it refuses."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from ml2o_dist.cli import main
from ml2o_dist.evaluation.cell_tasks import run_outcomes_on_ray
from ml2o_dist.evaluation.cells import CellFailure
from ml2o_dist.runtime.progress import StepDisplay
from ml2o_dist.workflows import benchmark_run
from ml2o_dist.workflows import evaluate as evaluations
from tests.evaluate_command import DIGITS, QUICK, ml2o, named, strict
from tests.wording import says

pytestmark = pytest.mark.usefixtures("fresh_cache", "unrendered")


def test_failed_cells_are_reported_with_exit_code_3_and_the_rest_is_there(cluster, home, monkeypatch):
    def failing(cells, on_outcome, **options):
        def keep(index, outcome):
            on_outcome(index, CellFailure(RuntimeError("a solver gave up")) if index == 1 else outcome)

        run_outcomes_on_ray(cells, keep, **options)

    monkeypatch.setattr(benchmark_run, "run_outcomes_on_ray", failing)
    result = ml2o(*QUICK, "--json")
    assert result.exit_code == 3, result.output
    answer = strict(result.stdout)
    assert [cell["seed"] for cell in answer["cells"]] == [0]
    (failed,) = answer["summary"]["failed"]
    assert (failed["optimizer"], failed["seed"], failed["error"]) == ("dssmg", 1, "RuntimeError: a solver gave up")
    line = result.stderr.splitlines()[-1]
    assert line.startswith("ml2o: 1 cells failed, 1 did not")
    assert says(line, "dssmg", "quadratic[n=3]", "seed 1", "RuntimeError: a solver gave up")
    monkeypatch.setattr(benchmark_run, "run_outcomes_on_ray", run_outcomes_on_ray)
    again = ml2o(*QUICK, "--json")
    assert again.exit_code == 0, "only what failed is run again"
    assert [cell["seed"] for cell in strict(again.stdout)["cells"]] == [0, 1]


@pytest.mark.long
@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal_it_says_and_keeps_what_is_finished(cluster, home, monkeypatch, signal_number, code):
    shown = StepDisplay.update

    def interrupting(display, done, figures=""):
        shown(display, done, figures)
        if done >= 3:
            os.kill(os.getpid(), signal_number)

    monkeypatch.setattr(StepDisplay, "update", interrupting)
    words = [*named(["dssmg", "random"], ["fonseca", "quadratic[n=3]"]), "--seeds", "10", "--steps", "300"]
    result = ml2o(*words, "--run-dir", "runs/e", "--json")
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    found = re.match(rf"ml2o: stopped by {signal.Signals(signal_number).name}.* (\d+) of 40 cells.*kept", line)
    assert found, line
    assert 3 <= int(found[1]) < 40
    assert len(list((home / "cache" / "cells").rglob("*.safetensors"))) == int(found[1])
    monkeypatch.setattr(StepDisplay, "update", shown)
    again = ml2o(*words, "--run-dir", "runs/e", "--json")
    assert again.exit_code == 0, again.output
    assert len(strict(again.stdout)["cells"]) == 40


def test_stopped_while_it_tunes_no_cell_is_finished(cluster, home, monkeypatch):
    monkeypatch.setattr(StepDisplay, "update", lambda display, done, figures="": os.kill(os.getpid(), signal.SIGTERM))
    result = ml2o(*named(["mgda"], ["quadratic[n=3]"]), "--steps", "2000")
    assert result.exit_code == 143, result.output
    assert says(result.stderr, "of 10 cells", "kept")


def refusal(*words: str) -> str:
    result = ml2o(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ml2o: ")]
    return line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (named(["gml2o:ascnt"], ["fonseca"]), ["'gml2o:ascnt'", "did you mean 'gml2o:ascent'?"]),
        (named(["initial"], ["fonsecca"]), ["'fonsecca'", "did you mean 'fonseca'?"]),
        (named(["initial"], []), ["problem", "--problem NAME", "--suite NAME"]),
        (["--suite", "quik"], ["'quik'", "did you mean 'quick'?", "analytic, paper, quick, shift"]),
        (["--suite", "quick", "--config", "x.yaml"], ["--suite", "configuration"]),
        (named(["initial"], ["fonseca@x"]), ["'fonseca@x'", "steps"]),
        (named([], ["fonseca"]), ["optimizer", "--optimizer NAME"]),
        (named(["trimmedmean"], ["fonseca"]), ["trimmedmean on fonseca", "at least 3 objectives"]),
        (named(["models:/ml2o@champion"], ["fonseca"]), ["unknown registered model 'ml2o'"]),
        ([*QUICK, "--set", "guard.esp=1"], ["'guard.esp'", "did you mean 'guard.eps'?", "guard.margin"]),
        ([*QUICK, "--set", "stepps=1"], ["'stepps'", "did you mean 'steps'?", "learning_rates"]),
        ([*QUICK, "--set", "rule.guard={}"], ["rule.guard", "gml2o:initial"]),
        ([*QUICK, "--set", "guard.fallback=mgda", *named(["gml2o:nan"], [])], ["needs its learning rate"]),
        ([*QUICK, "--seeds", "0"], ["'seeds'", "greater than or equal to 1", "0"]),
        ([*QUICK, "--set", "device=cuda"], ["device=cuda", "resources.num_gpus > 0"]),
        ([*QUICK, "--config", "nowhere.yaml"], ["'nowhere.yaml'", "not exist"]),
        ([*QUICK, "--tracking-uri", "file:///tmp/x"], ["file:///tmp/x"]),
        ([*QUICK, "--tracking-uri", "postgresql://me:secret@db/ml"], ["me:***@db", "MLFLOW_TRACKING_URI"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_ray_is_asked_for(home, monkeypatch, words, parts):
    monkeypatch.setattr(evaluations, "connected", lambda address: pytest.fail("Ray was asked for"))
    line = refusal(*words)
    for part in parts:
        assert part in line
    assert "secret" not in line


def test_a_run_directory_without_a_name_is_refused(home):
    assert "--run-dir is empty" in refusal(*QUICK, "--run-dir", "")
    result = CliRunner().invoke(main, ["meta-train", "--run-dir", ""])
    assert result.exit_code == 2
    assert "--run-dir is empty" in result.stderr


def test_a_folder_of_something_else_is_not_written_over(home, monkeypatch):
    monkeypatch.setattr(evaluations, "connected", lambda address: pytest.fail("Ray was asked for"))
    (home / "runs/a").mkdir(parents=True)
    (home / "runs/a/config.yaml").write_text("seed: 1\n")
    assert says(refusal(*QUICK, "--run-dir", "runs/a"), f"{home}/runs/a", "a meta-training", "--run-dir")
    (home / "runs/b").mkdir()
    (home / "runs/b/evaluation.json").write_text("{}")
    assert says(refusal(*QUICK, "--run-dir", "runs/b"), f"{home}/runs/b", "another evaluation", "--run-dir")
    (home / "file").write_text("")
    assert says(refusal(*QUICK, "--run-dir", "file/x"), "is a file", "--run-dir")


def without_times(answer) -> list:
    """Everything of an answer's cells and rows that is a function of what was asked for."""
    measured = {"ms_per_step", "guard_share", "loss_at_time"}
    parts = [*answer["cells"], *answer["summary"]["rows"]]
    return [{key: value for key, value in part.items() if key not in measured} for part in parts]


@pytest.mark.long
@pytest.mark.parametrize("after", [1, 5, 17])
def test_killed_at_a_random_moment_it_gives_the_same_table_and_repeats_no_finished_cell(
    cluster, home, monkeypatch, after
):
    words = [*named(["mean+sgd", "gml2o:random"], ["fonseca", DIGITS]), "--seeds", "4", "--steps", "60",
             "--set", "learning_rates=[0.01, 0.1]", "--set", "criticality_batches=4"]  # fmt: skip
    command = [sys.executable, "-m", "ml2o_dist", "evaluate", *words, "--address", "local"]
    kept = home / "cache" / "cells"
    with open(home / "stderr", "w") as errors:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=os.environ)
        limit = time.monotonic() + 120
        while len(list(kept.rglob("*.safetensors"))) < after and child.poll() is None:
            assert time.monotonic() < limit, (home / "stderr").read_text()
            time.sleep(0.01)
        time.sleep(random.Random().uniform(0, 0.2))
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=60)
    finished = {file: file.stat().st_mtime_ns for file in kept.rglob("*.safetensors") if not file.name.startswith(".")}
    assert len(finished) >= after
    ran = []
    run = benchmark_run.run_outcomes_on_ray

    def counting(cells, on_outcome, **options):
        ran.extend(cells)
        run(cells, on_outcome, **options)

    monkeypatch.setattr(benchmark_run, "run_outcomes_on_ray", counting)
    resumed = ml2o(*words, "--json")
    assert resumed.exit_code == 0, resumed.output
    assert len(finished) + len(ran) == 2 * 2 + 2 * 2 * 4
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    monkeypatch.setenv("ML2O_CACHE", str(home / "other"))
    undisturbed = ml2o(*words, "--json")
    assert without_times(strict(resumed.stdout)) == without_times(strict(undisturbed.stdout))
