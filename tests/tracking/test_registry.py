"""Versions in a real sqlite registry: registered once, listed, resolved, loaded by MLflow without pickle."""

from __future__ import annotations

import os
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException

from ml2o_dist.artifact import save_artifact
from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, ML2ORule
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.names import checked_model_name
from ml2o_dist.tracking.registry import list_versions, register_version, resolve_model
from ml2o_dist.tracking.transfer import import_version
from ml2o_dist.workflows.register_pareto_set import resolve_set
from tests.tracking.filled_registry import RULE, Registry

UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test from an empty folder: nothing may land there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_versions_count_up_and_the_alias_goes_with_the_newest(registry: Registry, tmp_path: Path) -> None:
    first = register_version(registry.uri, "counted", registry.artifact(1), run_id=registry.run_id, description="12 %")
    second = register_version(
        registry.uri, "counted", registry.artifact(2), run_id=registry.run_id, tags={"git": "abc"}
    )
    assert (first, second) == (1, 2)
    listed = list_versions(registry.uri, "counted")
    assert [(entry["name"], entry["version"], entry["aliases"]) for entry in listed] == [
        ("counted", 1, []),
        ("counted", 2, ["candidate"]),
    ]
    assert listed[0]["tags"]["weights_sha256"] == load_artifact(registry.artifact(1)).weights_sha256
    assert listed[1]["tags"]["config_hash"] == "hash2"
    assert listed[1]["tags"]["git"] == "abc"
    assert listed[1]["run_id"] == registry.run_id
    assert abs((datetime.now(UTC) - datetime.fromisoformat(listed[1]["created"])).total_seconds()) < 300
    assert registry.client.get_model_version("counted", "1").description == "12 %"
    assert os.listdir(tmp_path) == []


def test_the_same_weights_of_the_same_run_are_registered_once(registry: Registry) -> None:
    first = register_version(registry.uri, "once", registry.artifact(1), run_id=registry.run_id)
    newer = register_version(registry.uri, "once", registry.artifact(2), run_id=registry.run_id)
    again = register_version(registry.uri, "once", registry.artifact(1), run_id=registry.run_id)
    other_run = register_version(registry.uri, "once", registry.artifact(1), run_id=registry.new_run())
    assert (first, newer, again, other_run) == (1, 2, 1, 3)
    assert [entry["aliases"] for entry in list_versions(registry.uri, "once")] == [[], [], ["candidate"]]


def test_equal_weights_under_other_settings_are_another_version(registry: Registry, tmp_path: Path) -> None:
    weights = ML2ONetwork(RULE).state_dict()
    versions = []
    for lr in (0.01, 0.5, 0.01):
        saved = save_artifact(tmp_path / f"lr{lr}", weights, RULE.model_copy(update={"lr": lr}), {})
        versions.append(register_version(registry.uri, "rated", saved.path, run_id=registry.run_id))
    assert versions == [1, 2, 1]
    files = [str(tmp_path / f"lr{lr}" / "weights.safetensors") for lr in (0.01, 0.5)]
    assert [import_version(registry.uri, "brought", load_artifact(file), file) for file in files * 2] == [
        (1, True), (2, True), (1, False), (2, False)]  # fmt: skip
    registry.client.delete_model_version_tag("rated", "1", "rule_sha256")  # as versions of before are
    assert register_version(registry.uri, "rated", tmp_path / "lr0.01", run_id=registry.run_id) == 1


def test_an_alias_never_moves_back(registry: Registry) -> None:
    for number in (1, 2, 1):
        register_version(registry.uri, "forward", registry.artifact(number), run_id=registry.run_id)
    assert [entry["aliases"] for entry in list_versions(registry.uri, "forward")] == [[], ["candidate"]]


def test_an_alias_lost_in_a_crash_is_set_by_the_next_call(registry: Registry) -> None:
    register_version(registry.uri, "crashed", registry.artifact(1), run_id=registry.run_id)
    registry.client.delete_registered_model_alias("crashed", "candidate")
    register_version(registry.uri, "crashed", registry.artifact(1), run_id=registry.run_id)
    assert list_versions(registry.uri, "crashed")[0]["aliases"] == ["candidate"]


def test_a_version_without_a_run_is_possible(registry: Registry) -> None:
    assert register_version(registry.uri, "untracked", registry.artifact(1)) == 1
    assert register_version(registry.uri, "untracked", registry.artifact(1)) == 1


def test_by_alias_and_by_number_the_weights_come_back(registry: Registry) -> None:
    for number in (1, 2):
        register_version(registry.uri, "resolved", registry.artifact(number), run_id=registry.run_id)
    for reference, number in (("models:/resolved/1", 1), ("models:/resolved@candidate", 2), ("models:/resolved/2", 2)):
        file = resolve_model(registry.uri, reference)
        assert load_artifact(file).weights_sha256 == load_artifact(registry.artifact(number)).weights_sha256
        assert registry.folder / "mlartifacts" in file.parents


def test_an_optimizer_is_no_pareto_set(registry: Registry) -> None:
    register_version(registry.uri, "other", registry.artifact(1), run_id=registry.run_id)
    with pytest.raises(UserError, match=r"^models:/other/1 is no Pareto set$"):
        resolve_set(registry.uri, "models:/other/1")


def test_an_artifact_is_loaded_by_its_registered_name(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    register_version(registry.uri, "named", registry.artifact(5), run_id=registry.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    expected = load_artifact(registry.artifact(5)).weights_sha256
    assert load_artifact("models:/named@candidate").weights_sha256 == expected


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("models:/named@champion", r"alias.*'named' 'champion'.*candidate"),
        ("models:/named/9", r"version.*'named' '9'.*allowed: 1"),
        ("models:/namd@candidate", r"model 'namd'.*'named'"),
        ("models:/named", r"models:/NAME@ALIAS"),
        ("named@candidate", r"models:/NAME@ALIAS"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(registry: Registry, reference: str, message: str) -> None:
    register_version(registry.uri, "named", registry.artifact(1), run_id=registry.run_id)
    with pytest.raises(UserError, match=message):
        resolve_model(registry.uri, reference)


def test_a_vanished_file_is_named(registry: Registry) -> None:
    register_version(registry.uri, "vanished", registry.artifact(1), run_id=registry.run_id)
    shutil.rmtree(resolve_model(registry.uri, "models:/vanished/1").parent)
    with pytest.raises(UserError, match=r"models:/vanished/1.*weights\.safetensors'.*not there"):
        resolve_model(registry.uri, "models:/vanished/1")


def test_a_store_that_does_not_exist_lists_nothing_and_is_not_created(tmp_path: Path) -> None:
    assert list_versions(f"sqlite:///{tmp_path}/mlflow.db") == []
    with pytest.raises(UserError, match="unknown registered model 'ml2o'"):
        resolve_model(f"sqlite:///{tmp_path}/mlflow.db", "models:/ml2o@candidate")
    assert os.listdir(tmp_path) == []


def test_a_broken_artifact_is_not_registered(registry: Registry, tmp_path: Path) -> None:
    shutil.copytree(registry.artifact(1).parent, tmp_path / "broken")
    (tmp_path / "broken" / "weights.json").unlink()
    with pytest.raises(UserError, match=r"weights\.json' is missing"):
        register_version(registry.uri, "broken", tmp_path / "broken", run_id=registry.run_id)
    assert list_versions(registry.uri, "broken") == []


def test_an_unknown_run_is_refused_in_one_line(registry: Registry) -> None:
    with pytest.raises(UserError, match=r"sqlite:.*refused.*Run with id=0{32} not found"):
        register_version(registry.uri, "orphan", registry.artifact(1), run_id="0" * 32)


def test_a_server_that_is_away_is_an_error_in_seconds(registry: Registry) -> None:
    def list_() -> Any:
        return list_versions(UNREACHABLE)

    def register() -> Any:
        return register_version(UNREACHABLE, "ml2o", registry.artifact(1))

    for call in (list_, register, lambda: resolve_model(UNREACHABLE, "models:/ml2o/1")):
        start = time.monotonic()
        with pytest.raises(UserError, match=rf"{UNREACHABLE} does not answer.*refused") as refusal:
            call()
        assert time.monotonic() - start < 10
        assert "\n" not in str(refusal.value)


def test_mlflow_loads_a_version_without_pickle(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    register_version(registry.uri, "served", registry.artifact(1), run_id=registry.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    gradients = np.random.default_rng(0).normal(size=(5, 2, 7)).astype(np.float32)
    model = mlflow.pyfunc.load_model("models:/served@candidate")
    updates = model.predict(gradients)

    artifact = load_artifact(registry.artifact(1))
    rule = ML2ORule.from_weights(artifact.rule, artifact.weights)
    state = rule.initial_state(1, 2, ParameterLayout.vector(7))
    for step in range(5):
        update, state = rule.update(torch.from_numpy(gradients[None, step]), state)
        np.testing.assert_array_equal(updates[step], update[0].numpy())
    assert np.abs(updates).min() > 0
    pickled = {".pkl", ".pickle", ".pt", ".pth", ".joblib"}
    files = list((registry.folder / "mlartifacts").rglob("*"))
    assert files
    assert not [file for file in files if file.suffix in pickled]


def test_mlflow_takes_every_name_that_passes_and_not_one_with_a_dot(registry: Registry) -> None:
    for name in ("my-model_2", "Größe", "a b", "a#b?c", "[x]", "x" * 200):
        assert checked_model_name(name) == name
        registry.client.create_registered_model(f"{name}.lock.lock")
        assert register_version(registry.uri, name, registry.artifact(1)) == 1
        assert resolve_model(registry.uri, f"models:/{name}/1").exists()
    with pytest.raises(MlflowException, match="Invalid model name"):
        registry.client.create_logged_model(registry.experiment_id, name="a.b")
