"""The pool on a real local Ray: equal results whoever dies, and one clear line for what cannot be."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import ray

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.config import ResourceSettings
from ml2o_dist.errors import UserError
from ml2o_dist.metatrain import pool as pool_module
from ml2o_dist.metatrain.episode import run_episode
from ml2o_dist.metatrain.pool import PoolError, Stopped, WorkerPool
from ml2o_dist.metatrain.schedule import Key, WorkItem, training_items
from ml2o_dist.metatrain.trainer import Trainer
from tests.metatrain.settings import small

RESOURCES = ResourceSettings()


@pytest.fixture
def pool(cluster):
    pools = []

    def make(workers, resources=RESOURCES, stop=lambda: False):
        pools.append(WorkerPool(workers, resources, stop))
        return pools[-1]

    yield make
    for each in pools:
        each.close()


def digests(trainer):
    return weights_sha256(trainer.learner.weights), weights_sha256(trainer.best_weights)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    trainer = Trainer(small(), tmp_path_factory.mktemp("calm"))
    trainer.run(lambda items, weights: [run_episode(weights, item.spec) for item in items])
    return digests(trainer)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_weights_after_12_meta_steps_do_not_depend_on_the_number_of_workers(pool, tmp_path, calm, workers):
    trainer = Trainer(small(workers=workers), tmp_path)
    trainer.run(pool(workers).run)
    assert digests(trainer) == calm


NETWORKS = {
    "family": {
        "train": [
            {"problem": "multidigits[net=cnn,channels=2-2,batch=8]"},
            {"problem": "multidigits[hidden=4,batch=8]"},
        ],
        "validation": ["multidigits[hidden=5,batch=8]"],
        "test": ["multidigits[hidden=6,batch=8]"],
        "rescale": 2.0,
    },
    "rule": {"features": "agreement", "output": "controlled"},
    "estimator": {"kind": "exact"},
    "meta_steps": 3,
}


def test_the_same_holds_for_networks_and_exact_gradients_with_a_worker_killed(pool, tmp_path):
    trainers = []
    for count in (1, 3):
        workers = pool(count)

        def on_row(step, row, workers=workers):
            if step == 1 and workers.alive == 3:
                os.kill(workers.pids()[0], signal.SIGKILL)

        trainers.append(Trainer(small(**NETWORKS), tmp_path / str(count)))
        trainers[-1].run(workers.run, on_row)
        assert workers.restarts == count // 3
    plain = Trainer(small(**NETWORKS), tmp_path / "plain")
    plain.run(lambda items, weights: [run_episode(weights, item.spec) for item in items])
    assert digests(trainers[0]) == digests(trainers[1]) == digests(plain)
    assert digests(plain)[0] != weights_sha256(Trainer(small(**NETWORKS), tmp_path).learner.weights)


def test_nor_on_a_worker_that_is_killed_on_the_way(pool, tmp_path, calm):
    trainer, workers = Trainer(small(), tmp_path), pool(2)
    victims = []

    def on_row(step, row):
        if step == 3 and "meta_loss" in row:
            victims.append(workers.pids()[0])
            threading.Thread(target=os.kill, args=(victims[0], signal.SIGKILL)).start()

    trainer.run(workers.run, on_row)
    assert digests(trainer) == calm
    assert workers.restarts == 1
    assert victims[0] not in workers.pids()
    assert len(workers.pids()) == 2


def test_nor_on_a_stop_and_a_resume_with_another_number_of_workers(pool, tmp_path, calm):
    asked = []
    first, workers = Trainer(small(), tmp_path), pool(2, stop=lambda: bool(asked))
    with pytest.raises(Stopped):
        first.run(workers.run, lambda step, row: asked.append(step) if step == 5 else None)
    first.save()
    assert first.learner.version == 5
    workers.close()
    second = Trainer(small(), tmp_path)
    second.resume()
    second.run(pool(3).run)
    assert digests(second) == calm


def test_results_come_back_in_the_order_of_the_items(pool):
    items = [item for step in range(3) for item in training_items(small(), step, "cpu")]
    weights = Trainer(small(), "unused").learner.weights
    results = pool(3).run(items, weights)
    expected = [run_episode(weights, item.spec) for item in items]
    assert [r.meta_loss for r in results] == [r.meta_loss for r in expected]


def test_more_deaths_than_the_budget_end_the_run(pool):
    workers = pool(2, ResourceSettings(max_restarts=0))
    os.kill(workers.pids()[0], signal.SIGKILL)
    items = training_items(small(), 0, "cpu")
    with pytest.raises(PoolError, match=r"1 workers died, resources\.max_restarts=0"):
        workers.run(items * 10, Trainer(small(), "unused").learner.weights)


def test_the_last_worker_lost_with_no_room_for_another_ends_the_run(pool, monkeypatch):
    workers, start = pool(1), pool_module._start
    monkeypatch.setattr(pool_module, "_start", lambda resources: start(ResourceSettings(num_cpus=99)))
    monkeypatch.setattr(workers, "_resources", ResourceSettings(start_timeout_s=2))
    os.kill(workers.pids()[0], signal.SIGKILL)
    with pytest.raises(PoolError, match=r"no worker is left, .* resources\.start_timeout_s=2"):
        workers.run(training_items(small(), 0, "cpu"), Trainer(small(), "unused").learner.weights)


def test_more_workers_than_the_cluster_can_hold_is_said_at_once(cluster):
    began = time.monotonic()
    with pytest.raises(UserError, match=r"workers=5 needs 5 CPU \(1 each\), the cluster has 4: 1 missing"):
        WorkerPool(5, RESOURCES)
    with pytest.raises(UserError, match=r"workers=1 needs 0\.5 GPU \(0\.5 each\), the cluster has 0: 0\.5 missing"):
        WorkerPool(1, ResourceSettings(num_gpus=0.5))
    assert time.monotonic() - began < 5


def test_workers_that_others_leave_no_room_for_are_named_after_a_time(pool):
    pool(3)
    with pytest.raises(UserError, match=r"only 1 of workers=2 could be placed in resources\.start_timeout_s=20"):
        WorkerPool(2, ResourceSettings(start_timeout_s=20))


def test_wrong_data_in_an_episode_is_the_users_error_and_other_errors_name_the_key(pool):
    workers = pool(1)
    item = training_items(small(), 0, "cpu")[0]
    broken = dict(Trainer(small(), "unused").learner.weights)
    del broken["head.bias"]
    with pytest.raises(PoolError, match=r"train step 0 slot 0 \(.*\) failed: RuntimeError"):
        workers.run([item], broken)
    from dataclasses import replace

    lost = replace(item.spec, problem=item.spec.problem.of("multimnist", {}), data_root="/nowhere")
    with pytest.raises(UserError, match="/nowhere"):
        workers.run([WorkItem(Key(0, 0), lost)], Trainer(small(), "unused").learner.weights)


def test_closing_ends_the_processes(pool):
    workers = pool(2)
    pids = workers.pids()
    workers.close()
    limit = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < limit
        ray.wait([ray.put(0)], timeout=0.1)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
