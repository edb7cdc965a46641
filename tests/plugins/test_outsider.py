"""An outsider's file in a folder of its own, through every command that runs something."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from click.testing import CliRunner

from ml2o_dist.cli import main
from tests.plugins.conftest import taken_out
from tests.test_jobs import REPOSITORY, head, submit
from tests.tracking.empty_store import new_store

pytestmark = pytest.mark.usefixtures("unrendered")

__all__ = ["head"]

SOURCE = Path(__file__).with_name("outsider.py")
FAMILY = (
    "{train: [{problem: curves, choices: {hidden: [3, 4]}}], validation: ['curves[hidden=5]'], "
    "test: ['curves[hidden=6]']}"
)
RUN = [
    "--set", f"family={FAMILY}", "--set", "rule.kind=sign", "--set", "meta_steps=8", "--set", "slots=4",
    "--set", "horizon=[6,10]", "--set", "validation={every: 4, horizon: 10, instances: 1}",
    "--set", "compare=false", "--set", "tracking.register=false",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, cluster: None) -> Path:
    """A home with the file in it, an empty store of runs, and finished cells of its own; commands join the cluster."""
    shutil.copy(SOURCE, tmp_path / "mine.py")
    new_store(tmp_path)
    return tmp_path


def environment(place: Path) -> dict[str, str]:
    return os.environ | {
        "ML2O_HOME": str(place),
        "ML2O_CACHE": str(place / "cache"),
        "PYTHONPATH": str(REPOSITORY),
        "MLFLOW_TRACKING_URI": "",
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
    }


def ml2o(place: Path, *words: str, code: int = 0) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "ml2o_dist", *words, "--json"],
        capture_output=True, text=True, cwd=place, env=environment(place), timeout=280,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr


def test_two_workers_meta_train_and_cells_of_another_loss_do_not_come_back(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is in a folder from which no process could import it: what is sent to workers brings it along."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("ML2O_HOME", str(place))
    monkeypatch.setenv("ML2O_CACHE", str(place / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def here(*words: str, code: int = 0) -> Any:
        with taken_out():
            done = CliRunner().invoke(main, [*words, "--json"])
        assert done.exit_code == code, done.output
        return json.loads(done.stdout) if code == 0 else done.stderr

    def losses(command: Callable[..., Any]) -> list[float]:
        words = ["--optimizer", "rprop@0.01", "--problem", "curves", "--seeds", "1", "--steps", "10"]
        (cell,) = command("evaluate", *words, *plugin)["cells"]
        return cell["losses"]

    plugin = ["--plugin", "mine.py"]
    answer = here("meta-train", *plugin, *RUN, "--run-dir", "runs/a")
    assert answer["meta_steps"] == 8
    found = losses(here)
    assert losses(here) == found
    cells = sorted((place / "cache" / "cells").rglob("*.safetensors"))
    file = place / "mine.py"
    file.write_text(file.read_text().replace("FACTOR = 1.0", "FACTOR = 2.0"))
    doubled = losses(partial(ml2o, place))  # in another process: a file is loaded once in each
    assert len(sorted((place / "cache" / "cells").rglob("*.safetensors"))) == 2 * len(cells)
    assert doubled == pytest.approx([2 * each for each in found], rel=1e-4)
    refused = here("meta-train", *plugin, "--run-dir", "runs/a", "--resume", code=2)
    assert "plug-in 'mine.py' has sha256" in refused
    refused = here("meta-train", "--run-dir", "runs/a", "--resume", code=2)
    assert "made with the plug-in 'mine.py'" in refused
    assert "--plugin mine.py" in refused
    assert "--plugin mine.py" in here("report", "runs/a", code=2)


@pytest.mark.long
def test_a_run_whose_driver_is_killed_goes_on_to_the_same_weights(place: Path) -> None:
    plugin = ["--plugin", "mine.py"]
    longer = [*RUN, "--set", "meta_steps=30", "--set", "checkpoint_every=2"]
    whole = ml2o(place, "meta-train", *plugin, *longer, "--run-dir", "runs/whole")
    words = [sys.executable, "-m", "ml2o_dist", "meta-train", *plugin, *longer, "--run-dir", "runs/killed"]
    process = subprocess.Popen(
        words, cwd=place, env=environment(place), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + 120
    while not list((place / "runs" / "killed" / "checkpoints").glob("step_*")):
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = ml2o(place, "meta-train", *plugin, "--run-dir", "runs/killed", "--resume")
    assert resumed["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.long
def test_a_sweep_runs_its_trials_with_it(place: Path) -> None:
    (place / "sweep.yaml").write_text(
        "plugins: [mine.py]\nname: mine\ntrials: 2\nspace: {learner.lr: {choice: [0.01, 0.1]}}\n"
        f"meta_train: {{family: {FAMILY}, rule: {{kind: sign}}, meta_steps: 4, workers: 1, slots: 2, horizon: [5],"
        " validation: {every: 2, horizon: 5, instances: 1}}\n"
    )
    answer = ml2o(place, "sweep", "--config", "sweep.yaml", "--run-dir", "runs/sweep")
    assert answer["trials"] == {"TERMINATED": 2} or len(answer["trials"]) == 2


@pytest.mark.long
def test_a_pareto_set_is_compared_with_its_comparator(place: Path) -> None:
    words = [
        "--config",
        str(REPOSITORY / "tests" / "small_pareto_set.yaml"),
        "--set",
        "comparators=[soup,first-expert]",
    ]
    answer = ml2o(
        place, "pareto-set", "train", "--plugin", "mine.py", *words, "--set", "tracking.register=false",
        "--run-dir", "runs/set",
    )  # fmt: skip
    assert "first-expert" in json.dumps(answer)


@pytest.mark.long
def test_a_submitted_job_brings_the_file_in_its_working_directory(head: str, tmp_path: Path) -> None:
    plugins = [word for name in ("learned_rule", "problem") for word in ("--plugin", f"examples/plugins/{name}.py")]
    family = FAMILY.replace("curves", "two-moons")
    words = ["--set", f"family={family}", "--set", "rule.kind=by-kind", "--set", "meta_steps=2", *RUN[6:]]
    done = submit(head, tmp_path, *plugins, *words, "--run-dir", "runs/job")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "job" / "weights.safetensors").is_file()
