"""The whole path of `ml2o sweep`: trials, MLflow, the best one's version, what it refuses, and what it survives."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from ray import cloudpickle

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.cli import main
from ml2o_dist.config_file import load_settings
from ml2o_dist.metatrain.checkpoint import load_checkpoint
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.sweeping.record import SweepRecord
from ml2o_dist.tracking.registry import list_versions
from ml2o_dist.tracking.sweep_runs import PARENT_TAG
from tests.metatrain.executing import in_process, later
from tests.tracking.empty_store import new_store
from tests.wording import says

CONFIG = Path(__file__).parent / "small_sweep.yaml"


def ml2o(*words: str):
    return CliRunner().invoke(main, [*words])


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory):
    """One whole sweep in a home of its own: (home, its --json answer, what it printed beside it)."""
    home = tmp_path_factory.mktemp("home")
    new_store(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ML2O_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        result = ml2o("sweep", "--config", str(CONFIG), "--run-dir", "runs/a", "--json")
    assert result.exit_code == 0, result.output
    return home, json.loads(result.stdout), result.stderr


def calm(run_dir, values):
    """The best weights of the same meta-training without Ray, and its validations."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    settings = load_settings(CONFIG.parent / "small_sweep_base.yaml", [*overrides, "device=cpu"])
    trainer = Trainer(settings, run_dir)
    trainer.run(later(in_process))
    scores = {int(row["meta_step"]): row["validation"] for row in trainer.progress.history if "validation" in row}
    return weights_sha256(trainer.best_weights), scores


def runs_of(home=None, name="small", uri=""):
    """The parent run and the nested ones by trial number, deleted ones left out: in a home's store, or at a URI."""
    client = MlflowClient(uri or f"sqlite:///{home}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name(f"ml2o/sweep/{name}").experiment_id])
    (parent,) = [run for run in found if PARENT_TAG not in run.data.tags]
    nested = {int(run.info.run_name.removeprefix("trial ")): run for run in found if PARENT_TAG in run.data.tags}
    assert len(nested) == len(found) - 1
    assert {run.data.tags[PARENT_TAG] for run in nested.values()} <= {parent.info.run_id}
    return client, parent, nested


def metric_steps(client, run, key="validation"):
    return [point.step for point in client.get_metric_history(run.info.run_id, key)]


def test_every_trial_is_the_meta_training_that_its_values_say(finished, tmp_path):
    home, answer, _ = finished
    assert answer["run_dir"] == str(home / "runs" / "a")
    assert [trial["trial"] for trial in answer["trials"]] == [1, 2, 3]
    client, _, nested = runs_of(home)
    for trial in answer["trials"]:
        digest, scores = calm(tmp_path / str(trial["trial"]), trial["values"])
        assert trial["state"] == "finished"
        assert trial["meta_steps"] == 4
        assert trial["validation"] == min(scores.values())
        history = client.get_metric_history(nested[trial["trial"]].info.run_id, "validation")
        assert {point.step: point.value for point in history} == scores
        if trial["trial"] == answer["best"]["trial"]:
            assert answer["best"]["weights_sha256"] == digest
    assert answer["best"]["validation"] == min(trial["validation"] for trial in answer["trials"])


def test_mlflow_has_a_run_for_the_sweep_and_nested_ones_with_their_values(finished):
    home, answer, _ = finished
    client, parent, nested = runs_of(home)
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "small a")
    assert parent.data.metrics["best_validation"] == answer["best"]["validation"]
    artifacts = {each.path for each in client.list_artifacts(parent.info.run_id)}
    assert {"trials.md", "results.parquet", "report.html", "config.yaml", "plots"} <= artifacts
    for trial in answer["trials"]:
        run = nested[trial["trial"]]
        assert run.info.status == "FINISHED"
        assert run.data.params == {key: str(value) for key, value in trial["values"].items()}
        assert metric_steps(client, run) == [0, 2, 4]


def test_the_best_trial_is_the_candidate_with_the_search_in_its_description(finished):
    home, answer, _ = finished
    (version,) = list_versions(f"sqlite:///{home}/mlflow.db")
    assert (version["name"], version["version"], version["aliases"]) == ("ml2o", 1, ["candidate"])
    assert answer["registered_version"] == 1
    assert version["tags"]["weights_sha256"] == answer["best"]["weights_sha256"]
    assert version["run_id"] == runs_of(home)[2][answer["best"]["trial"]].info.run_id
    assert version["description"].count("\n| ") == 5
    assert load_artifact(home / "runs" / "a").weights_sha256 == answer["best"]["weights_sha256"]


def test_the_run_directory_holds_results_the_best_configuration_and_a_page(finished, tmp_path):
    home, answer, _ = finished
    folder = home / "runs" / "a"
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert [(row["trial"], row["learner.lr"], row["rule.hidden"], row["validation"]) for row in rows] == [
        (t["trial"], t["values"]["learner.lr"], t["values"]["rule.hidden"], t["validation"]) for t in answer["trials"]
    ]
    best = load_settings(folder / "config.yaml")
    assert (best.learner.lr, best.rule.hidden) == tuple(answer["best"]["values"].values())
    assert best.compare
    assert (folder / "config.yaml").read_text().startswith(f"# of trial {answer['best']['trial']} of the sweep small\n")
    written = yaml.safe_load((folder / "sweep.yaml").read_text())
    assert written["space"] == yaml.safe_load(CONFIG.read_text())["space"]
    for trial in answer["trials"]:
        assert f"| tune/{trial['id']} |" in (folder / "trials.md").read_text()
        assert (folder / "tune" / trial["id"]).is_dir()
    page = (folder / "report.html").read_text()
    assert "Parallel coordinates" in page
    assert "data:image/png;base64," in page
    assert "it takes 10 trials" in page  # for importances
    again = ml2o("report", str(folder), "--output", str(tmp_path / "page.html"), "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["unread"] == []
    assert (tmp_path / "page.html").read_text() == page
    assert not list((folder / "tune").glob("*/meta-training"))
    assert not (folder / "spools").exists()


def test_what_is_printed_beside_the_answer(finished):
    _, answer, said = finished
    assert "sweep 0/3  starting  left ?" in said
    assert "sweep 3/3  best validation" in said
    assert f"(trial {answer['best']['trial']})" in said
    assert "registered     ml2o version 1" in said
    assert "tune" not in said.replace("/tune", "").lower().replace("ml2o_dist", "")


def test_a_finished_sweep_is_only_told_again_and_refuses_to_be_another(finished, monkeypatch):
    home, answer, _ = finished
    monkeypatch.setenv("ML2O_HOME", str(home))
    again = ml2o("sweep", "--run-dir", "runs/a", "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == answer
    assert "nothing is left to do" in again.stderr
    for words, parts in (
        (["--config", str(CONFIG), "--run-dir", "runs/a"], ["holds this sweep", "add --resume"]),
        (["--config", str(CONFIG), "--run-dir", "runs/a", "--seed", "1"], ["another sweep", "seed", "1", "0"]),
        (
            ["--run-dir", "runs/a", "--resume", "--set", "trials=5"],
            ["trials", "5", "3", "to add trials"],
        ),
        (["--run-dir", "runs/b", "--resume"], ["nothing to resume", "sweep.yaml"]),
        (["--resume"], ["--resume needs --run-dir"]),
        (["--run-dir", "runs/b"], ["a sweep needs a `space`", "--config", "jobs/configs/sweep.yaml"]),
        (["--config", "runs/a/config.yaml", "--run-dir", "runs/b"], ["looks like a meta-training's", "`meta_train`"]),
        (["--config", str(CONFIG), "--run-dir", "s3://bucket/x"], ["s3://bucket/x", "folder"]),
    ):
        refused = ml2o("sweep", *words)
        assert refused.exit_code == 2, refused.output
        assert refused.stderr.count("\n") == 1
        for part in parts:
            assert part in refused.stderr
    taken = ml2o("meta-train", "--run-dir", "runs/a")
    assert (taken.exit_code, "holds a sweep" in taken.stderr) == (2, True)
    evaluated = ml2o("evaluate", "--optimizer", "dssmg", "--problem", "fonseca", "--run-dir", "runs/a")
    assert (evaluated.exit_code, "holds a sweep" in evaluated.stderr) == (2, True)
    (home / "runs" / "m").mkdir()
    (home / "runs" / "m" / "config.yaml").write_text("{}")
    swept = ml2o("sweep", "--config", str(CONFIG), "--run-dir", "runs/m")
    assert (swept.exit_code, "holds a meta-training" in swept.stderr) == (2, True)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def plant(tune, ids, marker):
    """Put hostile pickles wherever Ray Tune leaves some of its own, under names that sort last."""
    hostile = cloudpickle.dumps(Hostile(marker))
    coded = {"_type": "CLOUDPICKLE_FALLBACK", "value": hostile.hex()}
    trial = json.dumps({"trainable_name": "x", "status": "PENDING", "placement_group_factory": hostile.hex()})
    state = {"trial_data": [[trial, json.dumps({"last_result": coded})]], "runner_data": {"x": coded}, "stats": coded}
    for name in ("tuner.pkl", "trainable.pkl", "trainer.pkl", "searcher-state-9999-12-31_00-00-00.pkl",
                 "basic-variant-state-9999-12-31_00-00-00.json", "search_gen_state-9999-12-31_00-00-00.json",
                 "callback_states.pkl"):  # fmt: skip
        (tune / name).write_bytes(hostile)
    (tune / "experiment_state-9999-12-31_00-00-00.json").write_text(json.dumps(state))
    for id in ids:
        for name in ("error.pkl", "params.pkl", ".tune_metadata", "checkpoint_000000/.tune_metadata",
                     "checkpoint_000000/dict_checkpoint.pkl"):  # fmt: skip
            (tune / id / name).write_bytes(hostile)
        (tune / id / "checkpoint_000000" / ".metadata.json").write_text(json.dumps({"x": coded}))


@pytest.mark.long
def test_a_sweep_that_was_killed_and_moved_goes_on_and_unpickles_nothing_of_its_folder(finished, home, tmp_path):
    """One trial had ended, one was amid its way, one had not begun; the folder came from somebody who means harm."""
    before, answer, _ = finished
    folder, marker = home / "runs" / "moved", tmp_path / "marker"
    shutil.copytree(before / "runs" / "a", folder)
    for name in ("result.json", "weights.safetensors", "weights.json", "mlflow.json"):
        (folder / name).unlink(missing_ok=True)
    ids = [trial["id"] for trial in answer["trials"]]
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    kept = [
        line
        for line in lines
        if line["trial"] == ids[0] or (line["trial"] == ids[1] and line.get("meta_step", 9 * ("state" in line)) <= 2)
    ]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    (folder / "trials.jsonl").write_text(text)
    shutil.rmtree(folder / "tune" / ids[2])
    plant(folder / "tune", ids[:2], marker)
    result = ml2o("sweep", "--run-dir", "runs/moved", "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert not marker.exists()
    again = json.loads(result.stdout)
    assert again["run_dir"] == str(folder)
    told = ("trial", "state", "values", "meta_steps", "validation", "best_meta_step")
    assert [{key: each[key] for key in told} for each in again["trials"]] == [
        {key: each[key] for key in told} for each in answer["trials"]
    ]
    assert again["best"]["weights_sha256"] == answer["best"]["weights_sha256"]
    written = (folder / "trials.jsonl").read_text()
    assert written.startswith(text)
    reports = [
        (line["trial"], line["meta_step"]) for line in map(json.loads, written.splitlines()) if "meta_step" in line
    ]
    third = again["trials"][2]["id"]
    assert sorted(reports) == sorted((id, step) for id in (*ids[:2], third) for step in (0, 2, 4))
    assert not list((folder / "tune").glob("*.pkl"))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("space.learner.rl={uniform: [0, 1]}", "did you mean 'learner.lr'?"),
        ("meta_train.workers=64", "workers=64 needs 64 CPU"),
        ("driver.num_cpus=4", "workers=1 needs 1 CPU (1 each) ... has 0"),
        ("space.workers={choice: [1, 64]}", "workers=64 needs 64 CPU"),
        ("meta_train.resources.custom={big: 1}", "workers=1 needs 1 big (1 each) ... has 0: 1 missing"),
        ("meta_train.resources.labels={market: spot}", "no node ... resources.labels"),
        ("space.family.train={choice: [[{problem: multimnist}]]}", "MNIST"),
    ],
)
def test_nothing_starts_where_something_is_wrong(cluster, home, override, part, monkeypatch):
    monkeypatch.setenv("ML2O_DATA", str(home))
    store = (home / "mlflow.db").read_bytes()
    result = ml2o("sweep", "--config", str(CONFIG), "--set", override, "--run-dir", "runs/x")
    assert result.exit_code == 2, result.output
    assert says(result.stderr, part)
    assert not (home / "runs" / "x" / "sweep.yaml").exists()
    assert (home / "mlflow.db").read_bytes() == store


def test_optuna_that_is_not_there_is_one_line(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = ml2o("sweep", "--config", str(CONFIG), "--set", "search=optuna")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert says(result.stderr, "search=optuna", "pip install 'ml2o-dist[sweep]'")


@pytest.mark.long
def test_a_trial_that_raises_is_named_with_exit_code_3_and_the_others_count(cluster, home):
    failing = "space={resources.start_timeout_s: {grid: [0.001, 60]}, learner.lr: {grid: [0.01, 0.02]}}"
    words = ["--config", str(CONFIG), "--set", "search=grid", "--set", "trials=null", "--set", "retries=0"]
    result = ml2o("sweep", *words, "--set", failing, "--run-dir", "runs/f", "--json")
    assert result.exit_code == 3, result.output
    answer = json.loads(result.stdout)
    states = {(t["values"]["resources.start_timeout_s"], t["state"]) for t in answer["trials"]}
    assert states == {(0.001, "failed"), (60, "finished")}
    assert len(answer["trials"]) == 4
    assert answer["best"]["values"]["resources.start_timeout_s"] == 60
    assert answer["registered_version"] == 1
    assert says(result.stderr, "ml2o: 2 of 4 trials failed", "trial ")
    assert "resources.start_timeout_s=0.001" in result.stderr
    assert "ml2o sweep --run-dir" in result.stderr
    _, _, nested = runs_of(home)
    assert sorted(run.info.status for run in nested.values()) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]
    again = ml2o("sweep", "--run-dir", "runs/f", "--resume", "--json")
    assert again.exit_code == 3, again.output
    assert json.loads(again.stdout)["registered_version"] == 1
    assert len(runs_of(home)[2]) == 4


@pytest.mark.long
def test_drawn_values_that_do_not_go_together_are_a_trial_that_fails(cluster, home):
    space = "space={workers: {choice: [1, 2]}, resources.min_workers: {choice: [1, 2]}}"
    words = ["--config", str(CONFIG), "--set", space, "--set", "trials=6", "--set", "meta_train.workers=2"]
    result = ml2o("sweep", *words, "--run-dir", "runs/c", "--json")
    assert result.exit_code == 3, result.output
    trials = json.loads(result.stdout)["trials"]
    together = {trial["trial"]: trial["values"] != {"workers": 1, "resources.min_workers": 2} for trial in trials}
    assert set(together.values()) == {True, False}
    assert {trial["trial"]: trial["state"] == "finished" for trial in trials} == together
    assert says(result.stderr, "resources.min_workers=2", "workers=1")


@pytest.mark.long
def test_optuna_searches_by_what_trials_said(cluster, home):
    words = [
        "--set",
        "search=optuna",
        "--set",
        "trials=6",
        "--set",
        "max_concurrent=2",
        "--set",
        "meta_train.meta_steps=2",
    ]
    result = ml2o("sweep", "--config", str(CONFIG), *words, "--run-dir", "runs/o", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert len(answer["trials"]) == 6
    assert len({trial["values"]["learner.lr"] for trial in answer["trials"]}) == 6
    assert {trial["values"]["rule.hidden"] for trial in answer["trials"]} <= {2, 4}
    assert all(0.001 <= trial["values"]["learner.lr"] <= 0.1 for trial in answer["trials"])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_pbt_copies_weights_and_changes_values_in_lockstep(cluster, home, recwarn):
    overrides = ["scheduler=pbt", "trials=4", "pbt={quantile: 0.5, interval: 2}", "meta_train.meta_steps=8"]
    overrides.append("space={learner.lr: {loguniform: [0.0001, 0.5]}}")
    words = [word for override in overrides for word in ("--set", override)]
    result = ml2o("sweep", "--config", str(CONFIG), *words, "--run-dir", "runs/p", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert [trial["state"] for trial in answer["trials"]] == ["finished"] * 4
    assert not [warning for warning in recwarn if "reuse_actors" in str(warning.message)]
    assert "schedule of values" in (home / "runs" / "p" / "config.yaml").read_text().splitlines()[1]
    client, _, nested = runs_of(home)
    exploited = 0
    for run in nested.values():
        assert metric_steps(client, run) == [0, 2, 4, 6, 8]
        rates = [point.value for point in client.get_metric_history(run.info.run_id, "learner.lr")]
        assert all(0.0001 <= rate <= 0.5 for rate in rates)
        exploited += len(set(rates)) > 1
    assert exploited >= 2
    record = SweepRecord(home / "runs" / "p")
    for trial in record.in_order:
        folders = (home / "runs" / "p" / "tune" / trial.id).glob("checkpoint_*")
        last = max((load_checkpoint(folder) for folder in folders), key=lambda each: each.meta_step)
        assert last.meta_step == 8
        values = [report.values for report in trial.reports.values()]
        changed = [step for step, this, then in zip((0, 2, 4, 6), values, values[1:], strict=False) if this != then]
        if changed:  # its weights were another's then, and with them came the other's history
            steps, scores = (last.tensors[f"history/{name}"].tolist() for name in ("meta_step", "validation"))
            rows = dict(zip(steps, scores, strict=True))
            others = [each.reports[changed[-1]].validation for each in record.in_order if each is not trial]
            assert rows[changed[-1]] in others
            assert rows[changed[-1]] < trial.reports[changed[-1]].validation
