"""`ml2o meta-train` where something breaks on the way, and what it refuses."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.config_file import dump_settings, load_settings
from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.metatrain.pool import WorkerPool
from ml2o_dist.runtime.errors import UserError
from tests.meta_train_command import CONFIG, ONE, QUIET, ml2o, refusal
from tests.wording import says

pytestmark = pytest.mark.usefixtures("unrendered")


@pytest.mark.long
@pytest.mark.parametrize("error", [RuntimeError("a solver gave up"), UserError("a solver gave up")])
def test_a_comparison_that_breaks_costs_neither_weights_nor_version_and_exits_with_3(cluster, home, monkeypatch, error):
    def broken(cells, on_outcome, **options):
        raise error

    monkeypatch.setattr("ml2o_dist.workflows.benchmark_run.run_outcomes_on_ray", broken)
    result = ml2o("--config", str(CONFIG), *ONE, "--set", "meta_steps=2", "--run-dir", "runs/d", "--json")
    assert result.exit_code == 3, result.output
    answer = json.loads(result.stdout)
    assert answer["comparison"] is None
    assert answer["registered_version"] == 1
    assert says(result.stderr, "comparison failed", f"{type(error).__name__}: a solver gave up")
    assert "a solver gave up" in (home / "runs/d/run.log").read_text()


@pytest.mark.parametrize(
    ("fallback", "line"),
    [("dsmg", "unknown aggregator 'dsmg'"), ("mgda+sgd", "rule.guard.fallback='mgda+sgd' ... learning rate")],
)
def test_a_wrong_fallback_of_the_guard_is_said_before_ray_is_asked_for(home, monkeypatch, fallback, line):
    monkeypatch.setattr("ml2o_dist.workflows.meta_train.connected", lambda address: pytest.fail("Ray was asked for"))
    words = ["--set", "estimator.kind=replay", "--set", f"rule.guard.fallback={fallback}", "--run-dir", "runs/f"]
    result = ml2o("--config", str(CONFIG), *words)
    assert result.exit_code == 2, result.output
    assert says(result.stderr, line)


def test_an_error_in_mid_run_aborts_with_a_checkpoint_and_exit_code_4(cluster, home, monkeypatch):
    real, calls = WorkerPool.begin, []

    def failing(pool, items, weights):
        calls.append(items)
        if len(calls) == 4:
            raise MemoryError("no memory left")
        return real(pool, items, weights)

    monkeypatch.setattr(WorkerPool, "begin", failing)
    result = ml2o(*QUIET, "--run-dir", "runs/e")
    assert result.exit_code == 4, result.output
    assert says(result.stderr, "MemoryError: no memory left", "checkpoint at meta-step 2 of 6")
    assert newest_checkpoint(home / "runs/e/checkpoints")[0].meta_step == 2
    assert "Traceback" not in result.stderr


def test_a_tracking_server_that_is_down_costs_the_version_not_the_run(cluster, home):
    words = ["--config", str(CONFIG), *ONE, "--set", "compare=false", "--set", "meta_steps=2"]
    result = ml2o(*words, "--run-dir", "runs/c", "--tracking-uri", "http://127.0.0.1:9", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["registered_version"] is None
    assert "not registered" in result.stderr
    assert load_artifact(home / "runs/c").weights_sha256 == json.loads(result.stdout)["weights_sha256"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--set", "meta_stps=5"], ["'meta_stps'", "did you mean 'meta_steps'?"]),
        (["--set", "family.test=[fonsecca]"], ["'fonsecca'", "did you mean 'fonseca'?"]),
        (["--set", "family.train=[{problem: multidigits, choices: {activation: [relu, tanhh]}}]"], ["'tanhh'", "tanh"]),
        (["--set", "rule.output=cubic"], ["'rule.output'", "'controlled' or 'scaled'", "'cubic'"]),
        (["--set", "rule.output=residual", "--set", "rule.warmup=2"], ["'rule'", "warmup=2.0", "output=controlled"]),
        (["--set", "comparison.baselines=[mgdaa+adam]"], ["'mgdaa'", "did you mean 'mgda'?"]),
        (["--set", "workers=99"], ["workers=99 needs 99 CPU (1 each)", "has 4: 95 missing"]),
        (
            ["--set", "rule.objectives=per_objective", "--set", "rule.count=3"],
            ["rule.num_objectives=3", "the problem has 2"],
        ),
        (["--resume"], ["--resume needs --run-dir"]),
        (["--resume", "--run-dir", "runs/none"], ["nothing to resume", "runs/none", "no config.yaml"]),
        (["--config", "nowhere.yaml"], ["'nowhere.yaml'", "not exist"]),
        (["--tracking-uri", "file:///tmp/x"], ["file:///tmp/x"]),
        (["--tracking-uri", "postgresql://me:secret@db/ml"], ["me:***@db", "MLFLOW_TRACKING_URI"]),
        (["--address", "127.0.0.1:1"], ["--address '127.0.0.1:1'", "no Ray cluster"]),
        (["--address", "nowhere:port"], ["--address 'nowhere:port'", "auto, local or HOST:PORT"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_exits_with_2(cluster, home, words, parts):
    line = refusal(*QUIET, *words) if "--config" not in words and "--resume" not in words else refusal(*words)
    for part in parts:
        assert part in line
    assert "secret" not in line
    assert not (home / "runs").exists() or "workers=99" in line


def test_a_data_root_without_the_files_says_which_and_how_to_get_it(cluster, home):
    line = refusal(*QUIET, "--set", "family.test=[multimnist]", "--set", f"data.root={home}")
    for part in (str(home), "MNIST/raw/train-images-idx3-ubyte.gz", "ml2o data fetch"):
        assert part in line


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_a_corrupt_gzip_is_named_before_the_run(cluster, home, real_data_root, name):
    broken = home / "MNIST" / "raw" / name
    broken.parent.mkdir(parents=True)
    for file in (Path(real_data_root) / "MNIST" / "raw").iterdir():
        if file.name != broken.name:
            (broken.parent / file.name).symlink_to(file)
    broken.write_bytes(gzip.compress(b"\0" * 1000)[:40])
    line = refusal(*QUIET, "--set", "family.test=[multimnist]", "--set", f"data.root={home}")
    assert name in line


@pytest.mark.long
def test_a_run_that_was_cut_short_before_its_first_checkpoint_begins(cluster, home):
    """A supervisor repeats one command: it must come to a run that goes on."""
    settings = load_settings(CONFIG, ["compare=false", "tracking.register=false"])
    folder = home / "runs" / "a"
    (folder / "checkpoints" / "tmp_000000").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_settings(settings))
    line = refusal("--run-dir", "runs/a", "--resume", "--set", "meta_steps=7")
    assert says(line, "ml2o: cannot resume", str(folder), "another configuration", "meta_steps", "7", "6")
    result = ml2o("--run-dir", "runs/a", "--resume", *ONE, "--json")
    assert result.exit_code == 0, result.output
    assert "resuming from  the beginning" in result.stderr
    assert json.loads(result.stdout)["meta_steps"] == 6


def test_checkpoints_that_are_all_damaged_are_no_beginning(home):
    settings = load_settings(CONFIG, ["compare=false", "tracking.register=false"])
    (home / "runs" / "a" / "checkpoints" / "step_000002").mkdir(parents=True)
    (home / "runs" / "a" / "config.yaml").write_text(dump_settings(settings))
    assert says(refusal("--run-dir", "runs/a", "--resume"), "no valid checkpoint", "refused")
