"""What the package wrote and computed before its rooms were rebuilt: read, gone on with, and equal to the last bit."""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ml2o_dist import load_artifact
from ml2o_dist.artifact import weights_sha256
from ml2o_dist.cli import main
from ml2o_dist.config_file import load_settings
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.coordinatewise.rule import ML2ORule
from ml2o_dist.tracking.registry import list_versions
from tests.made_before import figures
from tests.made_before.make import HERE, HOME
from tests.metatrain.executing import in_process, later

pytestmark = pytest.mark.usefixtures("unrendered")

HASHES = json.loads((HERE / "hashes.json").read_text())
same_cpu = pytest.mark.skipif(figures.cpu() != HASHES["cpu"], reason=f"the figures are of {HASHES['cpu']}")


@pytest.fixture
def before(home: Path) -> Path:
    """A home as it was left: a finished run in runs/a, the store of runs and its files."""
    shutil.copytree(HERE / "run", home / "runs" / "a")
    shutil.copytree(HERE / "mlartifacts", home / "mlartifacts")
    (home / "mlflow.db").write_bytes(gzip.decompress((HERE / "store.db.gz").read_bytes()))
    with sqlite3.connect(home / "mlflow.db") as store:
        for (table,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for _, column, kind, *_ in store.execute(f"PRAGMA table_info({table})").fetchall():
                if kind.upper().startswith(("VARCHAR", "TEXT", "CLOB")):
                    store.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(HOME), str(home)))
    return home


@same_cpu
@pytest.mark.parametrize("name", figures.TRAININGS)
def test_meta_trainings_end_at_the_same_weights(name: str) -> None:
    assert figures.trained(name) == HASHES["trained"][name]


@same_cpu
def test_cells_of_quick_have_the_same_losses() -> None:
    assert figures.quick() == HASHES["quick"]


@same_cpu
def test_the_shipped_recipe_begins_the_same(real_data_root: str) -> None:
    assert figures.recipe(real_data_root) == HASHES["recipe"]


def test_the_artifact_loads() -> None:
    found = load_artifact(HERE / "weights.safetensors")
    assert found.weights_sha256 == HASHES["weights_sha256"]


@same_cpu
def test_a_run_goes_on_from_its_last_checkpoint_but_one(before: Path) -> None:
    folder = before / "runs" / "a"
    shutil.rmtree(folder / "checkpoints" / "step_000006")
    trainer = Trainer(load_settings(folder / "config.yaml"), folder)
    assert trainer.resume() == []
    assert trainer.learner.version == 4
    trainer.run(later(in_process))
    assert weights_sha256(trainer.best_weights) == HASHES["weights_sha256"]


def test_a_finished_run_is_told_again_and_shown(before: Path) -> None:
    result = CliRunner().invoke(main, ["meta-train", "--run-dir", "runs/a", "--resume", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["weights_sha256"] == HASHES["weights_sha256"]
    shown = CliRunner().invoke(main, ["report", "runs/a", "--json"])
    assert shown.exit_code == 0, shown.output
    assert {"curves", "comparison", "trajectories", "configuration"} <= set(json.loads(shown.stdout)["sections"])


@pytest.mark.parametrize("kind", figures.KINDS)
def test_optimizers_go_on(kind: str, tmp_path: Path) -> None:
    saved = torch.load(HERE / "optimizers.pt", weights_only=True)[kind]
    torch.testing.assert_close(figures.gone_on(kind, saved, HERE / "weights.safetensors"), saved["after"])


def test_the_registered_version_is_listed_promoted_and_runs(before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.pyfunc

    uri = f"sqlite:///{before}/mlflow.db"
    (version,) = list_versions(uri)
    assert (version["name"], version["version"], version["aliases"]) == ("ml2o", 1, ["candidate"])
    assert version["tags"]["weights_sha256"] == HASHES["weights_sha256"]
    forced = CliRunner().invoke(main, ["models", "promote", "ml2o/1", "--force", *figures.GATE, "--json"])
    assert forced.exit_code == 0, forced.output
    assert load_artifact("models:/ml2o@champion").weights_sha256 == HASHES["weights_sha256"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    gradients = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    updates = mlflow.pyfunc.load_model("models:/ml2o/1").predict(gradients)
    found = load_artifact(HERE / "weights.safetensors")
    rule = ML2ORule.from_weights(found.rule, found.weights)
    state = rule.initial_state(1, 2, ParameterLayout.vector(5))
    for row, gradient in zip(updates, gradients, strict=True):
        update, state = rule.update(torch.from_numpy(gradient)[None], state)
        np.testing.assert_array_equal(row, update[0].numpy())
