"""What must not change the weights: workers killed or stopped, the driver killed; and what a long run must not eat."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from mlflow.tracking import MlflowClient
from scipy.stats import theilslopes

from ml2o_dist.config import FaultSettings, ResourceSettings
from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.metatrain.pool import WorkerPool
from ml2o_dist.metatrain.schedule import training_items
from ml2o_dist.metatrain.trainer import Trainer
from tests.metatrain.executing import digests, in_process, later
from tests.metatrain.settings import small
from tests.wording import says

pytestmark = pytest.mark.long

CONFIG = Path(__file__).parent / "small_run.yaml"


def calm(settings, folder):
    trainer = Trainer(settings, folder)
    trainer.run(later(in_process))
    return digests(trainer)


@pytest.mark.parametrize("staleness", [0, 2])
def test_ten_workers_killed_at_random_moments_leave_the_weights_equal(cluster, tmp_path, staleness):
    settings, source = small(meta_steps=60, staleness=staleness), random.Random(1)
    pool = WorkerPool(3, ResourceSettings(), FaultSettings(shortest_deadline_s=5))
    victims = []

    def kill(pid, delay):
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)

    def on_row(step, row):
        if "meta_loss" not in row or pool.restarts < len(victims) or len(victims) == 10:
            return
        if pool.alive == 3:
            victims.append(source.choice(pool.pids()))
            threading.Thread(target=kill, args=(victims[-1], 0.05 * source.random())).start()
        else:
            await_workers(pool, 3)

    trainer = Trainer(settings, tmp_path / "chaos")
    try:
        trainer.run(pool.begin, on_row)
        assert len(set(victims)) == pool.restarts == 10
    finally:
        pool.close()
    assert digests(trainer) == calm(settings, tmp_path / "calm")


def await_workers(pool, count):
    """Wait for replacements between two meta-steps, so that each of the kills finds a full pool."""
    limit = time.monotonic() + 60
    while pool.alive < count:
        assert time.monotonic() < limit
        ready, _ = ray.wait(list(pool._workers.starting), timeout=1)
        for future in ready:
            pool._workers.started(future)


def test_a_stopped_worker_is_replaced_and_leaves_the_weights_equal(cluster, tmp_path):
    settings, stopped = small(meta_steps=20), []
    pool = WorkerPool(2, ResourceSettings(), FaultSettings(shortest_deadline_s=10, first_deadline_s=20))

    def on_row(step, row):
        if step == 5 and not stopped:
            stopped.append(pool.pids()[0])
            os.kill(stopped[0], signal.SIGSTOP)

    trainer = Trainer(settings, tmp_path / "stopped")
    try:
        trainer.run(pool.begin, on_row)
        items = training_items(settings, 0, "cpu")  # a backup task did its episode: it may take its time
        until(lambda: pool.run(items, trainer.learner.weights) and pool.restarts, 30)
        assert pool.restarts == 1
        assert stopped[0] not in pool.pids()
    finally:
        pool.close()
    assert digests(trainer) == calm(settings, tmp_path / "calm")
    until(lambda: not Path(f"/proc/{stopped[0]}").exists(), 30)


WORDS = ["--config", str(CONFIG), "--set", "meta_steps=40", "--set", "horizon=[60]", "--set", "checkpoint_every=4",
         "--set", "validation.every=10", "--set", "compare=false", "--run-dir", "runs/killed", "--json"]  # fmt: skip


def drive(home, *words):
    """Start the command in a process of its own; everything it starts carries `home` in its environment."""
    command = [sys.executable, "-m", "ml2o_dist", "meta-train", "--address", "local", *words]
    environment = {**os.environ, "ML2O_HOME": str(home)}
    with open(home / "stderr", "a") as errors:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        )


def descendants(home):
    """Return pid and command line of the living drivers and workers that were started with this home.

    Ray's own agents are not among them: one that is just starting when its raylet dies stays for good (Ray 2.60).
    """
    return {pid: line for pid, line in started_with(home).items() if b"ray::Roll" in line or b"ml2o_dist" in line}


def started_with(home):
    found, mark = {}, f"ML2O_HOME={home}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if state != "Z" and mark in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:
            continue
    return found


def until(done, seconds, why=lambda: ""):
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit, why()
        time.sleep(0.05)


@pytest.mark.parametrize("seconds", [0.5, 2.0, 3.5])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_stopped_while_ray_starts_ends_with_a_line_and_leaves_no_process(tmp_path, number, code, seconds):
    child = drive(tmp_path, "--config", str(CONFIG), "--run-dir", "runs/early")
    try:
        assert any(line.startswith("tracking URI") for line in child.stdout)
        time.sleep(seconds)
        os.killpg(child.pid, number)
        assert child.wait(timeout=60) == code
    finally:
        child.kill()
    *asked, line = (tmp_path / "stderr").read_text().splitlines()
    assert says(line, f"ml2o: stopped by {number.name}", "no checkpoint")
    assert len(asked) <= 1  # one where workers are starting already
    assert all(says(each, "ml2o: stopping", "meta-step", "at once") for each in asked)
    until(lambda: not started_with(tmp_path), 30, lambda: started_with(tmp_path))


def test_a_stop_of_the_whole_group_as_timeout_asks_for_it_is_one_of_the_command(tmp_path):
    child = drive(tmp_path, *WORDS)
    checkpoints = tmp_path / "runs/killed/checkpoints"
    try:
        until(lambda: (checkpoints / "step_000004").exists() or child.poll(), 120)
        os.killpg(child.pid, signal.SIGTERM)
        assert child.wait(timeout=60) == 143
    finally:
        child.kill()
    last = newest_checkpoint(checkpoints)[0].meta_step
    (line,) = (tmp_path / "stderr").read_text().splitlines()[-1:]
    assert says(line, "ml2o: stopped by SIGTERM", f"checkpoint at meta-step {last} of 40", "--resume")
    assert "lost" not in (tmp_path / "stderr").read_text()
    until(lambda: not started_with(tmp_path), 30, lambda: started_with(tmp_path))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_the_command_at_once_and_says_how_to_go_on(tmp_path, number, code):
    child = drive(tmp_path, *WORDS[:-1])
    checkpoints = tmp_path / "runs/killed/checkpoints"
    try:
        until(lambda: (checkpoints / "step_000004").exists() or child.poll(), 120)
        child.send_signal(number)
        time.sleep(0.3)
        child.send_signal(number)
        began = time.monotonic()
        assert child.wait(timeout=60) == code
        assert time.monotonic() - began < 3
    finally:
        child.kill()
    said = (tmp_path / "stderr").read_text()
    last = newest_checkpoint(checkpoints)[0].meta_step
    assert says(said, f"ml2o: stopped by {number.name}", f"{checkpoints}/step_{last:06d}")
    assert said.endswith(f"ml2o meta-train --run-dir {tmp_path}/runs/killed --resume\n")
    until(lambda: not started_with(tmp_path), 30, lambda: started_with(tmp_path))


@pytest.fixture(scope="module", params=[0, 2])
def undisturbed(request, tmp_path_factory):
    """The words of a run with a staleness, and what it answered."""
    home, words = tmp_path_factory.mktemp("calm"), [*WORDS, "--set", f"staleness={request.param}"]
    child = drive(home, *words)
    output, _ = child.communicate(timeout=200)
    assert child.returncode == 0, (home / "stderr").read_text()
    return words, json.loads(output)


@pytest.mark.timeout(600)
def test_the_driver_killed_three_times_ends_at_the_same_weights_in_one_mlflow_run(undisturbed, tmp_path):
    words, expected = undisturbed
    checkpoints, source = tmp_path / "runs" / "killed" / "checkpoints", random.Random(2)
    steps = []
    for number, step in enumerate((0, 12, 24)):
        child = drive(tmp_path, *words, *["--resume"] * (number > 0))
        try:
            until(lambda wanted=checkpoints / f"step_{step:06d}", child=child: wanted.exists() or child.poll(), 120)
            assert child.poll() is None, (tmp_path / "stderr").read_text()
            time.sleep(source.uniform(0, 1))  # anywhere in the four meta-steps that follow
        finally:
            child.kill()
            child.wait()
        steps.append(newest_checkpoint(checkpoints)[0].meta_step)
        until(lambda: not descendants(tmp_path), 60, lambda: descendants(tmp_path))
    assert steps[-1] < 40
    child = drive(tmp_path, *words, "--resume")
    output, _ = child.communicate(timeout=200)
    assert child.returncode == 0, (tmp_path / "stderr").read_text()
    answer = json.loads(output)
    assert answer["weights_sha256"] == expected["weights_sha256"]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("ml2o/meta-train").experiment_id])
    for key, steps in (("meta_loss", range(1, 41)), ("validation", (0, 10, 20, 30, 40))):
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, key)] == list(steps)
    until(lambda: not descendants(tmp_path), 60, lambda: descendants(tmp_path))
    for pid in started_with(tmp_path):
        os.kill(pid, signal.SIGKILL)


def test_a_run_leaves_no_process_behind(undisturbed):
    home = Path(undisturbed[1]["run_dir"]).parents[1]
    until(lambda: not started_with(home), 60, lambda: started_with(home))


def resident_mb(pid):
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


@pytest.fixture
def small_pages():
    """No transparent huge pages meanwhile: one that is first touched is 2 MB, whatever of it is used."""
    set_thp_disable = 41
    if ctypes.CDLL(None).prctl(set_thp_disable, 1, 0, 0, 0):
        pytest.skip("the kernel does not let a process do without huge pages")
    yield
    ctypes.CDLL(None).prctl(set_thp_disable, 0, 0, 0, 0)


def store_mb():
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return get_memory_info_reply(state).store_stats.object_store_bytes_used / 2**20


@pytest.mark.timeout(600)
def test_memory_is_flat_over_a_thousand_meta_steps(small_pages, cluster, tmp_path):
    """Megabytes of the driver, the workers and the object store every 20 meta-steps, the first 300 left out."""
    settings = small(meta_steps=1000, validation={"every": 50}, checkpoint_every=100)
    pool = WorkerPool(2, settings.resources)
    pids = {"driver": os.getpid(), "first worker": pool.pids()[0], "second worker": pool.pids()[1]}
    seen = {name: [] for name in [*pids, "object store"]}

    def on_row(step, row):
        if "meta_loss" in row and step > 300 and step % 20 == 0:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what a checkpoint needed for a moment is no leak
            for name, pid in pids.items():
                seen[name].append(resident_mb(pid))
            seen["object store"].append(store_mb())

    try:
        Trainer(settings, tmp_path).run(pool.begin, on_row)
    finally:
        pool.close()
    for name, values in seen.items():
        slope = theilslopes(values).slope  # the median of all pairs: a leak goes on, an arena that grows once does not
        growth = slope * (len(values) - 1)
        print(f"{name}: {values[0]:.2f} -> {values[-1]:.2f} MB, trend {growth:+.2f} MB over {20 * len(values)} steps")
        assert growth < 1, (name, values)
    assert max(seen["object store"]) < 1


def test_object_references_are_gone_after_a_run(cluster, tmp_path):
    from ray._private.worker import global_worker

    def held():
        gc.collect()
        return len(global_worker.core_worker.get_all_reference_counts())

    before = held()
    settings = small(meta_steps=4)
    pool = WorkerPool(2, settings.resources)
    try:
        Trainer(settings, tmp_path).run(pool.begin)
    finally:
        pool.close()
    del pool
    until(lambda: held() <= before, 30)
