"""`ray job submit` of the real script on a real head of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.config_file import load_settings
from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.runtime.cluster import one_start_at_a_time
from ml2o_dist.tracking.registry import list_versions
from tests.metatrain.executing import in_process, later
from tests.wording import says

REPOSITORY = Path(__file__).parents[1]
RAY = Path(sys.executable).parent / "ray"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_answer(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + 180  # a busy machine
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < limit, log.read_text()


@pytest.fixture
def head():
    """A Ray head with 2 CPUs; yields the address of its dashboard. Ended by pid, since others may be running."""
    folder, dashboard = tempfile.mkdtemp(prefix="ray"), free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PATH": path}
    command = [RAY, "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}",
               f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
               "--num-cpus=2", f"--temp-dir={folder}"]  # fmt: skip
    address, process = f"http://127.0.0.1:{dashboard}", None
    try:
        with one_start_at_a_time(), open(Path(folder) / "head.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            await_answer(f"{address}/api/version", process, Path(folder) / "head.log")
        yield address
    finally:
        if process:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def submit(
    address: str, home: Path, *words: str, options: tuple[str, ...] = (), script: str = "meta_train.py"
) -> subprocess.CompletedProcess[str]:
    runtime = {"env_vars": {"ML2O_HOME": str(home), "ML2O_CACHE": os.environ["ML2O_CACHE"], "OMP_NUM_THREADS": "1"}}
    command = [RAY, "job", "submit", *options, "--address", address, "--runtime-env-json", json.dumps(runtime),
               "--working-dir", str(REPOSITORY), "--", "python", f"jobs/{script}", *words]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    limit = time.monotonic() + 60
    while True:
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
        # The dashboard answers a moment before the agent that starts jobs has registered with it.
        if "No available agent" not in done.stderr or time.monotonic() > limit:
            return done


@pytest.mark.long
def test_a_submitted_job_leaves_run_and_version_outside_its_working_directory(head, tmp_path):
    words = [
        "--config",
        str(REPOSITORY / "tests" / "small_run.yaml"),
        "--set",
        "compare=false",
        "--set",
        "workers=1",
        "--set",
        "meta_steps=2",
        "--run-dir",
        "runs/job",
    ]
    done = submit(head, tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"run directory  {tmp_path}/runs/job" in done.stdout
    assert ": 2 CPU, 0 GPU" in done.stdout
    versions = list_versions(f"sqlite:///{tmp_path}/mlflow.db")
    assert [(v["name"], v["version"], v["aliases"]) for v in versions] == [("ml2o", 1, ["candidate"])]
    assert versions[0]["tags"]["weights_sha256"] == load_artifact(tmp_path / "runs" / "job").weights_sha256


@pytest.mark.long
def test_a_submitted_job_that_the_cluster_cannot_hold_fails_with_the_line_that_says_so(head, tmp_path):
    failed = submit(head, tmp_path, "--config", str(REPOSITORY / "tests" / "small_run.yaml"), "--set", "workers=9")
    assert failed.returncode != 0
    assert says(failed.stdout + failed.stderr, "workers=9 needs 9 CPU (1 each)", "has 2: 7 missing")


@pytest.mark.long
def test_a_job_that_is_stopped_leaves_a_checkpoint_within_its_grace_and_another_job_goes_on(head, tmp_path):
    """`ray job stop` gives 3 s by default. What is left of the meta-step under way is not used."""
    config, checkpoints = REPOSITORY / "tests" / "small_run.yaml", tmp_path / "runs" / "job" / "checkpoints"
    overrides = ["meta_steps=40", "horizon=[60]", "checkpoint_every=5", "compare=false", "tracking.register=false"]
    words = ["--config", str(config), "--run-dir", "runs/job", *[w for o in overrides for w in ("--set", o)]]
    started = submit(head, tmp_path, *words, options=("--no-wait", "--submission-id", "stopped"))
    assert started.returncode == 0, started.stdout + started.stderr
    limit = time.monotonic() + 120
    while not (checkpoints / "step_000005").exists():
        assert time.monotonic() < limit
        time.sleep(0.05)

    def job(*verb: str) -> str:
        command = [RAY, "job", *verb, "stopped", "--address", head]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    job("stop")
    assert "stopped" in job("status").lower()
    written = (tmp_path / "runs" / "job" / "run.log").read_text()
    (step,) = re.findall(r"stopped by SIGTERM.*checkpoint at meta-step (\d+) of 40", written)
    assert newest_checkpoint(checkpoints)[0].meta_step == int(step) < 40
    resumed = submit(head, tmp_path, "--run-dir", "runs/job", "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    calm = Trainer(load_settings(config, [*overrides, "device=cpu"]), tmp_path / "calm")
    calm.run(later(in_process))
    assert load_artifact(tmp_path / "runs" / "job").weights_sha256 == weights_sha256(calm.best_weights)


@pytest.mark.long
def test_a_submitted_evaluation_leaves_its_results_outside_its_working_directory(head, tmp_path):
    words = [
        "--optimizer",
        "gml2o:nan",
        "--optimizer",
        "dssmg",
        "--problem",
        "fonseca",
        "--seeds",
        "2",
        "--steps",
        "10",
    ]
    done = submit(head, tmp_path, *words, "--run-dir", "runs/e", script="evaluate.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"run directory  {tmp_path}/runs/e" in done.stdout
    assert ": 2 CPU, 0 GPU" in done.stdout
    cells = json.loads((tmp_path / "runs" / "e" / "evaluation.json").read_text())["cells"]
    assert [(cell["optimizer"], cell["seed"]) for cell in cells] == [
        ("gml2o:nan", 0), ("gml2o:nan", 1), ("dssmg", 0), ("dssmg", 1)]  # fmt: skip
    assert [cell["losses"] for cell in cells[:2]] == [cell["losses"] for cell in cells[2:]]
    assert (tmp_path / "mlflow.db").exists()
    failed = submit(head, tmp_path, "--optimizer", "randon", "--problem", "fonseca", script="evaluate.py")
    assert failed.returncode != 0
    assert "did you mean 'random'?" in failed.stdout + failed.stderr


@pytest.mark.long
def test_a_submitted_sweep_leaves_its_best_optimizer_outside_its_working_directory(head, tmp_path):
    words = ["--config", str(REPOSITORY / "tests" / "small_sweep.yaml"), "--set", "trials=2", "--run-dir", "runs/s"]
    done = submit(head, tmp_path, *words, script="sweep.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"run directory  {tmp_path}/runs/s" in done.stdout
    (version,) = list_versions(f"sqlite:///{tmp_path}/mlflow.db")
    assert version["tags"]["weights_sha256"] == load_artifact(tmp_path / "runs" / "s").weights_sha256
    assert (tmp_path / "runs" / "s" / "report.html").is_file()
    failed = submit(head, tmp_path, *words, "--set", "space.rule.hiden={choice: [2]}", script="sweep.py")
    assert failed.returncode != 0
    assert "did you mean 'rule.hidden'?" in failed.stdout + failed.stderr
