"""The whole path of `ml2o evaluate`: from words to its answer, its folder and its MLflow run, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from mlflow.tracking import MlflowClient

from ml2o_dist import benchmark_run, evaluations
from ml2o_dist.artifact import save_artifact
from ml2o_dist.cli import main
from ml2o_dist.config import RuleSettings
from ml2o_dist.config_file import load_evaluation
from ml2o_dist.evaluation.cell_tasks import run_outcomes_on_ray
from ml2o_dist.evaluation.cells import CellFailure
from ml2o_dist.progress import StepDisplay
from ml2o_dist.rules.ml2o import ML2ONetwork
from ml2o_dist.tracking.registry import register_version

DIGITS = "multidigits[net=mlp,hidden=4,batch=8]"
OPTIMIZERS = ["initial", "runs/trained", "gml2o:models:/ml2o@candidate", "dssmg", "gml2o:ascent", "nan", "mean+sgd"]
PROBLEMS = ["fonseca", DIGITS]
KEYS = {"optimizer", "problem", "seed", "steps", "losses", "test_accuracy", "criticality", "acceptance",
        "evaluations", "ms_per_step", "diverged"}  # fmt: skip


def ml2o(*words: str):
    return CliRunner().invoke(main, ["evaluate", *words])


def named(optimizers, problems) -> list[str]:
    words = [word for name in optimizers for word in ("--optimizer", name)]
    return [*words, *(word for name in problems for word in ("--problem", name))]


QUICK = [*named(["dssmg"], ["quadratic[n=3]"]), "--seeds", "2", "--steps", "5"]


def strict(text: str):
    """Read JSON that has no NaN and no infinity in it, which Python would let through."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ML2O_HOME", str(tmp_path))
    monkeypatch.setenv("ML2O_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ML2O_DATA", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory):
    """One evaluation of everything in a home of its own: (home, its --json answer, what it printed beside it)."""
    home = tmp_path_factory.mktemp("home")
    rule = RuleSettings(hidden=3)
    weights = {name: tensor + 0.1 for name, tensor in ML2ONetwork(rule).state_dict().items()}
    saved = save_artifact(home / "runs" / "trained", weights, rule, {})
    register_version(f"sqlite:///{home}/mlflow.db", "ml2o", saved.path)
    options = ["tuning_seeds=1", "learning_rates=[0.1, 0.5]", "criticality_batches=4", "rule.hidden=3"]
    options.append("guard.budget=0")  # each step by itself: an adversary's are all refused
    words = [word for option in options for word in ("--set", option)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ML2O_HOME", str(home))
        patch.setenv("ML2O_CACHE", str(home / "cache"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        result = ml2o(*named(OPTIMIZERS, PROBLEMS), "--seeds", "2", "--steps", "20", "--seed", "5", *words,
                      "--run-dir", "runs/e", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    return home, strict(result.stdout), result.stderr


def figures(answer, optimizer, problem, key):
    return [cell[key] for cell in answer["cells"] if (cell["optimizer"], cell["problem"]) == (optimizer, problem)]


def test_the_answer_has_every_cell_with_the_keys_of_the_design(finished):
    _, answer, _ = finished
    assert set(answer) == {"cells", "summary"}
    assert [(cell["problem"], cell["optimizer"], cell["seed"]) for cell in answer["cells"]] == [
        (problem, optimizer, seed) for problem in PROBLEMS for optimizer in OPTIMIZERS for seed in (5, 6)
    ]
    for cell in answer["cells"]:
        assert cell.keys() >= KEYS
        assert cell["steps"] == 20
        assert len(cell["losses"]) == 2
        least = 40 if cell["optimizer"].startswith("mean") else 60  # the sum takes one backward pass
        assert cell["evaluations"] == cell["forwards"] + cell["backwards"] >= least
        assert cell["diverged"] == (cell["optimizer"] == "nan")
        assert (cell["acceptance"] is not None) == cell["optimizer"].startswith("gml2o:")
        assert (cell["test_accuracy"] is not None) == (cell["problem"] == DIGITS)
        assert (cell["criticality"] is None) == (cell["optimizer"] == "nan")
        assert cell["ms_per_step"] > 0


@pytest.mark.parametrize("problem", PROBLEMS)
def test_on_workers_too_ascent_under_the_guard_is_the_fallback(finished, problem):
    _, answer, _ = finished
    assert figures(answer, "gml2o:ascent", problem, "acceptance") == [0.0, 0.0]
    for key in ("losses", "criticality", "test_accuracy"):
        assert figures(answer, "gml2o:ascent", problem, key) == figures(answer, "dssmg", problem, key)
    assert figures(answer, "nan", problem, "losses") == [[None, None]] * 2


def test_weights_are_what_is_run(finished):
    _, answer, _ = finished
    trained, initial = (figures(answer, name, DIGITS, "losses") for name in ("runs/trained", "initial"))
    assert all(isinstance(value, float) for losses in trained for value in losses)
    assert trained != initial
    assert figures(answer, "gml2o:models:/ml2o@candidate", DIGITS, "acceptance")[0] is not None


def test_the_summary_has_a_row_for_each_pair(finished):
    home, answer, _ = finished
    summary = answer["summary"]
    assert [(row["problem"], row["optimizer"]) for row in summary["rows"]] == [
        (p, o) for p in PROBLEMS for o in OPTIMIZERS
    ]
    assert all((row["front"] is not None) == (row["problem"] == "fonseca") for row in summary["rows"])
    assert summary["rows"][-1]["learning_rate"] in (0.1, 0.5)
    assert set(summary["rows"][-1]["tuning"]) == {"0.1", "0.5"}
    assert (summary["seeds"], summary["steps"], summary["failed"]) == ([5, 6], 20, [])
    assert summary["run_dir"] == str(home / "runs" / "e")
    assert set(summary["data_sha256"]) == {"multidigits[size=0]", "multidigits[size=0] test"}


def test_it_says_where_it_is_and_how_far_and_prints_the_table(finished):
    home, _, printed = finished
    lines = printed.splitlines()
    assert lines[0] == f"run directory  {home}/runs/e"
    assert lines[1] == f"tracking URI   sqlite:///{home}/mlflow.db"
    assert "tune 4/4" in printed
    assert "evaluate 28/28" in printed
    for name in ("gml2o:ascent", "mean+sgd@0.", "2 of 2 diverged", "hypervolume", DIGITS):
        assert name in printed


def test_the_folder_has_the_results_and_settings_that_give_them_again(finished):
    home, answer, _ = finished
    folder = home / "runs" / "e"
    assert {path.name for path in folder.iterdir()} == {
        "evaluation.json", "evaluation.md", "evaluate.yaml", "run.log", "report.html", "plots"}  # fmt: skip
    assert {"learning_curves.png", "time_per_step.png", "acceptance.png"} <= {
        f.name for f in (folder / "plots").iterdir()
    }
    kept = strict((folder / "evaluation.json").read_text())
    assert kept["cells"] == answer["cells"]
    assert len(kept["summary"]["rows"][0]["curve"]["loss"]) == 20
    assert "curve" not in answer["summary"]["rows"][0]
    settings = load_evaluation(folder / "evaluate.yaml")
    assert (list(settings.optimizers), list(settings.problems)) == (OPTIMIZERS, PROBLEMS)
    assert (settings.seed, settings.seeds, settings.steps, settings.device) == (5, 2, 20, "cpu")


def test_mlflow_has_a_run_for_each_optimizer_with_tags_figures_curves_and_files(finished):
    home, answer, _ = finished
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("ml2o/evaluate").experiment_id])
    by_name = {run.data.tags["optimizer"]: run for run in runs}
    assert len(runs) == len(OPTIMIZERS)
    assert {name: run.info.run_id for name, run in by_name.items()} == answer["summary"]["mlflow_runs"]
    run = by_name["gml2o:models:/ml2o@candidate"]
    assert (run.info.status, run.info.run_name) == ("FINISHED", "ml2o v1 guarded on evaluation")
    tags = run.data.tags
    assert (tags["model"], tags["model_version"], tags["guard"]) == ("ml2o", "1", "dssmg budget=0.0")
    assert tags["suite_sha256"] == answer["summary"]["suite_sha256"]
    assert {"git", "config_hash", "suite", "role"} <= tags.keys()
    assert (by_name["dssmg"].data.tags["guard"], by_name["runs/trained"].data.tags["role"]) == ("none", "learned")
    assert (run.data.params["steps"], run.data.params["guard.margin"]) == ("20", "3.0")
    assert {each.dataset.name for each in run.inputs.dataset_inputs} == set(answer["summary"]["data_sha256"])
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"evaluation.json", "evaluation.md", "evaluate.yaml", "report.html", "plots"}

    def history(name, key):
        return {metric.step: metric.value for metric in client.get_metric_history(by_name[name].info.run_id, key)}

    place = "multidigits-net-mlp-hidden-4-batch-8"
    losses = figures(answer, "gml2o:ascent", DIGITS, "losses")
    assert history("gml2o:ascent", f"seed_loss/{place}") == pytest.approx({5: sum(losses[0]), 6: sum(losses[1])})
    assert history("gml2o:ascent", f"loss/{place}")[0] == pytest.approx(sum(map(sum, losses)) / 2)
    assert set(history("gml2o:ascent", f"acceptance_curve/{place}").values()) == {0.0}
    curve = history("gml2o:ascent", f"curve/{place}")
    assert list(curve) == list(range(1, 21))
    assert (curve[19] + curve[20]) / 2 == pytest.approx(sum(map(sum, losses)) / 2)
    assert history("nan", "loss/fonseca") == {}
    assert history("nan", "diverged") == {0: 1.0}
    assert history("dssmg", "hypervolume/fonseca")[0] > 0


def test_what_is_asked_for_again_is_found_without_ray_and_logged_once(finished, monkeypatch):
    home, answer, _ = finished
    monkeypatch.setenv("ML2O_HOME", str(home))
    monkeypatch.setenv("ML2O_CACHE", str(home / "cache"))
    monkeypatch.setattr(evaluations, "connected", lambda address: pytest.fail("Ray was asked for"))
    again = ml2o("--config", str(home / "runs/e/evaluate.yaml"), "--run-dir", "runs/e", "--json")
    assert again.exit_code == 0, again.output
    found = strict(again.stdout)
    assert found["cells"] == answer["cells"]
    assert found["summary"]["mlflow_runs"] == answer["summary"]["mlflow_runs"]
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    assert len(client.search_runs([client.get_experiment_by_name("ml2o/evaluate").experiment_id])) == len(OPTIMIZERS)


def test_without_a_run_directory_mlflow_has_the_results(cluster, home):
    result = ml2o(*QUICK, "--json")
    assert result.exit_code == 0, result.output
    answer = strict(result.stdout)
    assert answer["summary"]["run_dir"] is None
    assert "run directory" not in result.stderr
    assert {path.name for path in home.iterdir()} == {"cache", "mlflow.db", "mlartifacts"}
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    files = client.list_artifacts(answer["summary"]["mlflow_runs"]["dssmg"])
    assert {"evaluation.json", "evaluation.md", "evaluate.yaml"} <= {file.path for file in files}


def test_while_mlflow_is_away_nothing_is_lost_and_the_same_command_sends_it_later(cluster, home, monkeypatch):
    result = ml2o(*QUICK, "--tracking-uri", "http://127.0.0.1:9", "--json")
    assert result.exit_code == 0, result.output
    answer = strict(result.stdout)
    assert len(answer["cells"]) == 2
    assert answer["summary"]["mlflow_runs"] == {}
    assert "not in MLflow: MLflow at http://127.0.0.1:9 does not answer" in result.stderr
    assert "the same command sends them later" in result.stderr
    monkeypatch.setattr(evaluations, "connected", lambda address: pytest.fail("Ray was asked for"))
    uri = f"sqlite:///{home}/later.db"
    sent = ml2o(*QUICK, "--tracking-uri", uri, "--json")
    assert sent.exit_code == 0, sent.output
    run_id = strict(sent.stdout)["summary"]["mlflow_runs"]["dssmg"]
    client = MlflowClient(uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run_id, "curve/quadratic-n-3")] == [1, 2, 3, 4, 5]


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
    assert line == (
        "ml2o: 1 cells failed, 1 did not; the first: dssmg on quadratic[n=3], seed 1: RuntimeError: a solver gave up"
    )
    monkeypatch.undo()
    monkeypatch.setenv("ML2O_HOME", str(home))
    monkeypatch.setenv("ML2O_CACHE", str(home / "cache"))
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
    found = re.fullmatch(
        rf"ml2o: stopped by {signal.Signals(signal_number).name}: (\d+) of 40 cells are finished and kept: the same "
        "command goes on from there",
        line,
    )
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
    assert "of 10 cells are finished and kept" in result.stderr


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
        (named(["initial"], []), ["name at least one problem: --problem NAME, or a suite: --suite NAME"]),
        (["--suite", "quik"], ["'quik'", "did you mean 'quick'?", "analytic, paper, quick, shift"]),
        (["--suite", "quick", "--config", "x.yaml"], ["--suite is a configuration itself"]),
        (named(["initial"], ["fonseca@x"]), ["'fonseca@x'", "after @ stands how many steps"]),
        (named([], ["fonseca"]), ["name at least one optimizer: --optimizer NAME"]),
        (named(["trimmedmean"], ["fonseca"]), ["trimmedmean on fonseca", "at least 3 objectives"]),
        (named(["models:/ml2o@champion"], ["fonseca"]), ["unknown registered model 'ml2o'"]),
        ([*QUICK, "--set", "guard.esp=1"], ["'guard.esp'", "did you mean 'guard.eps'?", "guard.margin"]),
        ([*QUICK, "--set", "stepps=1"], ["'stepps'", "did you mean 'steps'?", "learning_rates"]),
        ([*QUICK, "--set", "rule.guard={}"], ["rule.guard is for meta-training; evaluate gml2o:initial"]),
        ([*QUICK, "--set", "guard.fallback=mgda", *named(["gml2o:nan"], [])], ["needs its learning rate"]),
        ([*QUICK, "--seeds", "0"], ["'seeds'", "greater than or equal to 1", "0"]),
        ([*QUICK, "--set", "device=cuda"], ["device=cuda needs resources.num_gpus > 0"]),
        ([*QUICK, "--config", "nowhere.yaml"], ["'nowhere.yaml' does not exist in the current folder"]),
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
    assert f"{home}/runs/a holds a meta-training; choose another --run-dir" in refusal(*QUICK, "--run-dir", "runs/a")
    (home / "runs/b").mkdir()
    (home / "runs/b/evaluation.json").write_text("{}")
    assert f"{home}/runs/b holds another evaluation; choose another --run-dir" in refusal(*QUICK, "--run-dir", "runs/b")
    (home / "file").write_text("")
    assert "cannot be written" in refusal(*QUICK, "--run-dir", "file/x")


@pytest.mark.long
def test_results_go_to_a_uri_too(cluster, home):
    result = ml2o(*QUICK, "--run-dir", f"file://{home}/elsewhere", "--json")
    assert result.exit_code == 0, result.output
    answer = strict(result.stdout)
    assert answer["summary"]["run_dir"] == f"file://{home}/elsewhere"
    assert strict((home / "elsewhere/evaluation.json").read_text())["cells"] == answer["cells"]
    assert list((home / "cache" / "runs").iterdir()) == []
    again = ml2o(*QUICK, "--steps", "6", "--run-dir", f"file://{home}/elsewhere", "--quiet")
    assert again.exit_code == 2
    assert again.stderr.startswith(f"ml2o: file://{home}/elsewhere holds another evaluation; choose another --run-dir")


def test_settings_from_a_file_and_words_that_override_it(home, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluations, "evaluate", lambda *words, **options: asked.append((words, options)) or {})
    (home / "e.yaml").write_text(
        "optimizers: [smg, frozen]\nproblems: [fonseca]\nseeds: 3\nsteps: 4\nguard: {p: 0.9}\n"
    )
    words = [
        "--config",
        str(home / "e.yaml"),
        "--set",
        "seeds=2",
        "--set",
        "guard.eps=0.5",
        "--seeds",
        "1",
        "--seed",
        "7",
    ]
    result = ml2o(*words, "--problem", DIGITS, "--tracking-uri", "http://h:1", "--run-dir", "r", "--address", "local")
    assert result.exit_code == 0, result.output
    ((settings, run_dir), options) = asked[0]
    assert (settings.optimizers, settings.problems) == (("smg", "frozen"), (DIGITS,))
    assert (settings.seed, settings.seeds, settings.steps) == (7, 1, 4)
    assert (settings.guard.p, settings.guard.eps, settings.tracking.uri) == (0.9, 0.5, "http://h:1")
    assert (run_dir, options["address"]) == ("r", "local")


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
