"""The whole path: `ml2o meta-train` from settings to a registered version, stopped and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from click.testing import CliRunner
from mlflow.tracking import MlflowClient

from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.cli import main
from ml2o_dist.config_file import load_settings
from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.metatrain.pool import WorkerPool
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.workflows.lifecycle import git_commit
from ml2o_dist.workflows.meta_train_end import finished_answer
from tests.evaluate_command import TWO
from tests.meta_train_command import CONFIG, ONE, QUICK, QUIET, ml2o, refusal
from tests.tracking.empty_store import new_store
from tests.wording import says


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory):
    """One whole run in a home of its own: (home, its --json answer, what it printed beside it)."""
    home = tmp_path_factory.mktemp("home")
    new_store(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ML2O_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        result = ml2o("--config", str(CONFIG), *TWO, "--run-dir", "runs/a", "--json")
    assert result.exit_code == 0, result.output
    return home, json.loads(result.stdout), result.stderr


def without_end(finished, run_dir):
    """Copy the finished run to `run_dir` as if it had been killed after its last checkpoint."""
    shutil.copytree(finished[0] / "runs" / "a", run_dir)
    for name in ("result.json", "report.html", "weights.json", "weights.safetensors"):
        (run_dir / name).unlink()


def metric_steps(home, run_id, key):
    return [metric.step for metric in MlflowClient(f"sqlite:///{home}/mlflow.db").get_metric_history(run_id, key)]


def test_a_run_answers_in_json_and_leaves_what_the_design_promises(finished):
    home, answer, printed = finished
    run_dir = home / "runs" / "a"
    assert answer["run_dir"] == str(run_dir)
    assert answer["meta_steps"] == 6
    assert answer["inner_steps_per_s"] > 0
    assert answer["weights_sha256"] == load_artifact(run_dir).weights_sha256
    for name in ("config.yaml", "weights.safetensors", "weights.json", "metrics.parquet", "run.log", "comparison.md",
                 "comparison.json", "report.html", "result.json", "trajectories/step_000001.parquet",
                 "plots/meta_loss.png", "plots/learning_curves.png",
                 "checkpoints/step_000006/manifest.json"):  # fmt: skip
        assert (run_dir / name).stat().st_size > 0 or name == "run.log"
    assert printed.splitlines()[0] == f"run directory  {run_dir}"
    assert printed.splitlines()[1] == f"tracking URI   sqlite:///{home}/mlflow.db"
    assert "meta-train 6/6" in printed
    assert "tune 2/2" in printed
    assert "evaluate 8/8" in printed


def test_the_comparison_has_every_optimizer_on_every_problem(finished):
    _, answer, _ = finished
    summary = answer["comparison"]["summary"]
    assert {row["problem"] for row in summary["rows"]} == {"multidigits[net=mlp,hidden=10,batch=16]"}
    assert [row["optimizer"] for row in summary["rows"]] == ["mean+adam", "mgda+adam@0.03", "initial", "learned"]
    assert [row["role"] for row in summary["rows"]] == ["baseline", "baseline", "other", "learned"]
    assert summary["rows"][0]["label"] in ("mean+adam@0.01", "mean+adam@0.1")
    assert all(len(row["seed_losses"]) == 2 and row["diverged"] == 0 for row in summary["rows"])
    assert [standing["optimizer"] for standing in summary["standings"]] == [row["optimizer"] for row in summary["rows"]]
    assert summary["suite"] == ""
    assert len(answer["comparison"]["cells"]) == 8


@pytest.mark.usefixtures("unrendered")
def test_the_page_shows_the_comparison_that_was_answered(finished):
    home, answer, _ = finished
    run_dir = home / "runs" / "a"
    kept = json.loads((run_dir / "comparison.json").read_text())
    assert kept["cells"] == answer["comparison"]["cells"]
    assert len(kept["summary"]["rows"][0]["curve"]["loss"]) == 20
    page = (run_dir / "report.html").read_text()
    assert "Finished after 6 of 6 meta-steps." in page
    assert answer["weights_sha256"] in page
    for row in answer["comparison"]["summary"]["rows"]:
        assert f"{row['loss']:#.4g}" in page
    written = json.loads(CliRunner().invoke(main, ["report", str(run_dir), "--json"]).stdout)
    assert written["path"] == str(run_dir / "report.html")
    assert {"curves", "comparison", "trajectories", "configuration", "origin"} <= set(written["sections"])


def test_what_was_recorded_on_workers_can_be_listed_and_drawn(finished, monkeypatch):
    home, _, _ = finished
    monkeypatch.setenv("ML2O_HOME", str(home))
    listed = json.loads(CliRunner().invoke(main, ["trajectories", "runs/a", "--json"]).stdout)
    assert sum(each["episodes"] for each in listed) == 6 * 4
    problem = max(listed, key=lambda each: each["episodes"])
    words = ["trajectories", "runs/a", "--problem", problem["problem"], "--output", "a.png", "--json"]
    answer = json.loads(CliRunner().invoke(main, words).stdout)
    assert answer == {**problem, "path": str(home / "a.png")}
    assert (home / "a.png").stat().st_size > 10_000
    wrong = CliRunner().invoke(main, ["trajectories", "runs/a", "--problem", "quadratic[n=7]"])
    assert wrong.exit_code == 2
    assert says(wrong.stderr, "'quadratic[n=7]'", "nearest")
    assert "'quadratic[n=6]'" in wrong.stderr


@pytest.mark.long
def test_a_page_that_cannot_be_made_costs_a_line_not_the_run(finished, home, monkeypatch):
    def broken(run_dir, place):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("ml2o_dist.workflows.meta_train_end.write_report", broken)
    without_end(finished, home / "runs" / "h")
    result = ml2o("--run-dir", "runs/h", "--resume", *ONE, "--set", "compare=false", "--json")
    assert result.exit_code == 0, result.output
    assert says(" ".join(result.stderr.split()), "no report.html", "RuntimeError: no fonts")
    assert not (home / "runs/h/report.html").exists()
    assert load_artifact(home / "runs/h").weights_sha256 == json.loads(result.stdout)["weights_sha256"]


def test_mlflow_has_one_run_with_every_step_once_its_pictures_and_a_candidate(finished):
    home, answer, _ = finished
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("ml2o/meta-train").experiment_id])
    assert run.info.status == "FINISHED"
    assert metric_steps(home, run.info.run_id, "meta_loss") == [1, 2, 3, 4, 5, 6]
    assert metric_steps(home, run.info.run_id, "validation") == [0, 3, 6]
    assert run.data.params["rule.hidden"] == "4"
    assert {f.path for f in client.list_artifacts(run.info.run_id, "plots")} == {
        "plots/meta_loss.png",
        "plots/learning_curves.png",
        "plots/performance_profile.png",
        "plots/pareto.png",
        "plots/time_per_step.png",
    }
    version = client.get_model_version_by_alias("ml2o", "candidate")
    assert int(version.version) == answer["registered_version"] == 1
    assert version.tags["weights_sha256"] == answer["weights_sha256"]
    assert "learned" in version.description


def test_models_list_shows_the_version(finished, monkeypatch):
    home, answer, _ = finished
    monkeypatch.setenv("ML2O_HOME", str(home))
    listed = json.loads(CliRunner().invoke(main, ["models", "list", "--json"]).stdout)
    assert [(v["name"], v["version"], v["aliases"]) for v in listed] == [("ml2o", 1, ["candidate"])]
    assert listed[0]["tags"]["weights_sha256"] == answer["weights_sha256"]
    table = CliRunner().invoke(main, ["models", "list"]).stdout
    assert answer["weights_sha256"][:8] in table


def test_resuming_a_finished_run_says_so_and_needs_neither_ray_nor_the_registry(finished, monkeypatch):
    home, answer, _ = finished
    monkeypatch.setenv("ML2O_HOME", str(home))
    monkeypatch.setattr("ml2o_dist.workflows.meta_train.connected", lambda address: pytest.fail("Ray was asked for"))
    monkeypatch.setattr(
        "ml2o_dist.workflows.meta_train_end.register_version", lambda *a, **k: pytest.fail("registered again")
    )
    again = ml2o("--run-dir", "runs/a", "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == answer
    assert "finished       6 meta-steps, nothing is left to do" in again.stderr
    assert "registered     ml2o version 1" in again.stderr
    assert "not sent" not in again.stderr
    for row in answer["comparison"]["summary"]["rows"]:
        assert f"{row['loss']:#.4g}" in again.stderr


def test_a_run_whose_end_is_not_all_there_or_not_what_is_asked_for_is_not_finished(finished, tmp_path):
    home, answer, _ = finished

    def found(change=lambda folder: None, *overrides):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(home / "runs" / "a", folder)
        change(folder)
        trainer = Trainer(load_settings(folder / "config.yaml", overrides), folder)
        trainer.resume()
        return finished_answer(trainer)

    def without_version(folder):
        kept = json.loads((folder / "result.json").read_text())
        kept["answer"]["registered_version"] = None
        (folder / "result.json").write_text(json.dumps(kept))

    def version_in_spool(folder):
        without_version(folder)
        (folder / "spool").mkdir()

    assert found() == found(lambda folder: None, "workers=1", "checkpoint_every=9") == answer
    for torn in ("{", "[]", '{"answer": {}}'):
        assert found(lambda folder, torn=torn: (folder / "result.json").write_text(torn)) is None
    for name in ("result.json", "weights.json", "weights.safetensors"):
        assert found(lambda folder, name=name: (folder / name).unlink()) is None
    for other in ("comparison.seeds=3", "tracking.model=other", "tracking.uri=sqlite:///x.db", "compare=false"):
        assert found(lambda folder: None, other) is None
    assert found(without_version) is None
    assert found(version_in_spool) == answer | {"registered_version": None}


@pytest.mark.usefixtures("unrendered")
@pytest.mark.long
def test_resuming_a_finished_run_registers_no_second_version(finished, monkeypatch):
    home, answer, _ = finished
    monkeypatch.setenv("ML2O_HOME", str(home))
    shutil.copytree(home / "runs" / "a", home / "runs" / "again")
    again = ml2o("--run-dir", "runs/again", "--resume", *ONE, "--set", "compare=false", "--json")
    assert again.exit_code == 0, again.output
    assert "resuming from  checkpoints/step_000006 (meta-step 6 of 6)" in again.stderr
    assert json.loads(again.stdout)["registered_version"] == answer["registered_version"]
    assert json.loads(again.stdout)["weights_sha256"] == answer["weights_sha256"]


@pytest.mark.usefixtures("unrendered")
def test_stopped_by_a_signal_and_resumed_in_the_same_mlflow_run(finished, home, monkeypatch):
    """The signal comes with the third meta-step's episodes."""
    begin, begun = WorkerPool.begin, []

    def signalled(pool, *words):
        begun.append(words)
        if len(begun) == 4:  # the first is the validation
            os.kill(os.getpid(), signal.SIGTERM)
        return begin(pool, *words)

    monkeypatch.setattr(WorkerPool, "begin", signalled)
    outside = signal.signal(signal.SIGTERM, lambda *words: pytest.fail("the command does not see to signals"))
    try:
        stopped = ml2o(*QUICK, "--set", "checkpoint_every=100", "--run-dir", "runs/b")
    finally:
        signal.signal(signal.SIGTERM, outside)
    assert stopped.exit_code == 143, stopped.output
    monkeypatch.setattr(WorkerPool, "begin", begin)
    assert_it_goes_on_to_the_same_end(home, finished, stopped.stderr)


def assert_it_goes_on_to_the_same_end(home, finished, error):
    assert "checkpoint at meta-step" in error
    assert f"ml2o meta-train --run-dir {home}/runs/b --resume" in error
    checkpoint, _ = newest_checkpoint(home / "runs/b/checkpoints")
    assert checkpoint.meta_step < 6
    result = ml2o("--run-dir", "runs/b", "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["weights_sha256"] == finished[1]["weights_sha256"]
    step = checkpoint.meta_step
    assert f"resuming from  checkpoints/step_{step:06d} (meta-step {step} of 6)\n" in result.stderr
    log = (home / "runs/b/run.log").read_text()
    assert log.count(f"resuming from checkpoints/step_{step:06d} (meta-step {step} of 6)\n") == 1
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("ml2o/meta-train").experiment_id])
    assert metric_steps(home, run.info.run_id, "meta_loss") == [1, 2, 3, 4, 5, 6]
    assert run.info.status == "FINISHED"


@pytest.mark.long
@pytest.mark.parametrize(
    ("signal_number", "code", "address"), [(signal.SIGINT, 130, "local"), (signal.SIGTERM, 143, "")]
)
def test_a_command_is_stopped_by_a_signal_before_its_first_meta_step(finished, home, signal_number, code, address):
    """The signal is sent at the first progress line."""
    address = address or ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "ml2o_dist", "meta-train", "--run-dir", "runs/b", "--address", address]
    words = [*QUICK, "--set", "checkpoint_every=100"]
    with open(home / "stderr", "w+") as errors:
        child = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ)
        try:
            for line in child.stdout:
                if line.startswith("meta-train"):
                    child.send_signal(signal_number)
                    break
            child.stdout.read()
            child.wait(timeout=120)
        finally:
            child.kill()
        errors.seek(0)
        error = errors.read()
    assert child.returncode == code, error
    assert_it_goes_on_to_the_same_end(home, finished, error)


def test_the_commit_is_that_of_the_package_wherever_it_is_run_from(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
    monkeypatch.chdir(tmp_path)
    assert git_commit() == head[:12]
    assert len(git_commit()) in ((12,) if (root / ".git").exists() else (0,))


def test_resume_refuses_other_image_data(finished, home, monkeypatch):
    without_end(finished, home / "runs" / "f")  # else there is nothing to do, with whatever data
    monkeypatch.setattr(
        "ml2o_dist.workflows.meta_train.check_problems", lambda settings: {"multidigits[size=0]": "0" * 64}
    )
    assert says(refusal("--run-dir", "runs/f", "--resume"), "multidigits[size=0]", "sha256 000000000000")


@pytest.mark.usefixtures("unrendered")
@pytest.mark.long
def test_a_resumed_run_sends_mlflow_what_it_may_have_missed(cluster, home):
    words = [*QUIET, "--run-dir", "runs/g"]
    assert ml2o(*words).exit_code == 0
    (home / "mlflow.db").unlink()
    (home / "runs/g/result.json").unlink()  # as if it had been killed just before its end
    assert ml2o("--run-dir", "runs/g", "--resume").exit_code == 0
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("ml2o/meta-train").experiment_id])
    assert metric_steps(home, run.info.run_id, "meta_loss") == [1, 2, 3, 4, 5, 6]
    assert metric_steps(home, run.info.run_id, "validation") == [0, 3, 6]


@pytest.mark.usefixtures("unrendered")
@pytest.mark.long
@pytest.mark.parametrize("name", ["multimnist", "published"])
def test_the_real_configurations_run_on_real_data(cluster, home, real_data_root, name):
    config = Path(__file__).parents[1] / "jobs" / "configs" / f"{name}.yaml"
    small = [
        "workers=1",
        "meta_steps=1",
        "meta_batch_size=2",
        "horizon=4",
        "validation.horizon=4",
        "compare=false",
        "tracking.register=false",
    ]
    words = [word for setting in [*small, f"data.root={real_data_root}"] for word in ("--set", setting)]
    result = ml2o("--config", str(config), *words, "--run-dir", "runs/real", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["weights_sha256"] == load_artifact(home / "runs/real").weights_sha256
    assert answer["meta_steps"] == 1


def test_a_run_directory_of_another_or_the_same_configuration_is_not_written_over(finished, monkeypatch):
    home, _, _ = finished
    monkeypatch.setenv("ML2O_HOME", str(home))
    other = refusal("--config", str(CONFIG), "--run-dir", "runs/a", "--set", "learner.lr=0.5")
    assert says(other, "another configuration", "learner.lr", "0.5", "0.003")
    same = refusal("--config", str(CONFIG), "--run-dir", "runs/a")
    assert "add --resume" in same
    resumed = refusal("--config", str(CONFIG), "--run-dir", "runs/a", "--resume", "--set", "learner.lr=0.5")
    assert "cannot resume" in resumed
    assert says(resumed, "learner.lr", "0.5", "0.003")
