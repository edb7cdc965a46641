"""The whole path of `ml2o evaluate`: from words to its answer, its folder and its MLflow run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from mlflow.tracking import MlflowClient

from ml2o_dist.artifact import save_artifact
from ml2o_dist.config import RuleSettings
from ml2o_dist.config_file import load_evaluation
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from ml2o_dist.tracking.registry import register_version
from ml2o_dist.workflows import evaluate as evaluations
from tests.evaluate_command import DIGITS, QUICK, TWO, ml2o, named, strict
from tests.tracking.empty_store import new_store
from tests.wording import says

pytestmark = pytest.mark.usefixtures("fresh_cache", "unrendered")

OPTIMIZERS = ["initial", "runs/trained", "gml2o:models:/ml2o@candidate", "dssmg", "gml2o:ascent", "nan", "mean+sgd"]
PROBLEMS = ["fonseca", DIGITS]
KEYS = {"optimizer", "problem", "seed", "steps", "losses", "test_accuracy", "criticality", "acceptance",
        "evaluations", "ms_per_step", "diverged"}  # fmt: skip


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory):
    """One evaluation of everything in a home of its own: (home, its --json answer, what it printed beside it)."""
    home = tmp_path_factory.mktemp("home")
    rule = RuleSettings(hidden=3)
    weights = {name: tensor + 0.1 for name, tensor in ML2ONetwork(rule).state_dict().items()}
    saved = save_artifact(home / "runs" / "trained", weights, rule, {})
    register_version(new_store(home), "ml2o", saved.path)
    options = ["tuning_seeds=1", "learning_rates=[0.1, 0.5]", "criticality_batches=4", "rule.hidden=3"]
    options.append("guard.budget=0")  # each step by itself: an adversary's are all refused
    words = [word for option in options for word in ("--set", option)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ML2O_HOME", str(home))
        patch.setenv("ML2O_CACHE", str(home / "cache"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        result = ml2o(*named(OPTIMIZERS, PROBLEMS), *TWO, "--seeds", "2", "--steps", "20", "--seed", "5", *words,
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
    assert says(result.stderr, "not in MLflow", "http://127.0.0.1:9 does not answer")
    assert "same command" in result.stderr
    monkeypatch.setattr(evaluations, "connected", lambda address: pytest.fail("Ray was asked for"))
    uri = new_store(home, "later.db")
    sent = ml2o(*QUICK, "--tracking-uri", uri, "--json")
    assert sent.exit_code == 0, sent.output
    run_id = strict(sent.stdout)["summary"]["mlflow_runs"]["dssmg"]
    client = MlflowClient(uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run_id, "curve/quadratic-n-3")] == [1, 2, 3, 4, 5]


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
    assert says(again.stderr, f"ml2o: file://{home}/elsewhere", "another evaluation", "--run-dir")


def test_settings_from_a_file_and_words_that_override_it(home, monkeypatch):
    asked = []

    def run(*words, **options):
        asked.append((words, options))
        return SimpleNamespace(failed=[]), {}, []

    monkeypatch.setattr(evaluations, "run_evaluation", run)
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
