"""The pool on a real local Ray: equal results whoever dies, and one clear line for what cannot be."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.config import FaultSettings, ResourceSettings
from ml2o_dist.errors import UserError
from ml2o_dist.metatrain import pool as pool_module
from ml2o_dist.metatrain.episode import failed_episode, run_episode
from ml2o_dist.metatrain.pool import WorkerPool
from ml2o_dist.metatrain.schedule import Key, WorkItem, training_items, validation_items
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.metatrain.worker import RolloutWorker
from ml2o_dist.metatrain.workers import PoolError, Stopped
from tests.metatrain.executing import digests, in_process, later
from tests.metatrain.settings import small

RESOURCES = ResourceSettings()
FAULTS = FaultSettings(shortest_deadline_s=2)


@pytest.fixture
def pool(cluster):
    pools = []

    def make(workers, resources=RESOURCES, faults=FAULTS, stop=lambda: False):
        pools.append(WorkerPool(workers, resources, faults, stop_requested=stop))
        return pools[-1]

    yield make
    for each in pools:
        each.close()


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The digests of an undisturbed run by staleness."""
    found = {}
    for staleness in (0, 2):
        trainer = Trainer(small(staleness=staleness), tmp_path_factory.mktemp("calm"))
        trainer.run(later(in_process))
        found[staleness] = digests(trainer)
    assert found[0] != found[2]
    return found


@pytest.mark.parametrize(("workers", "staleness"), [(1, 0), (3, 0), (2, 2)])
def test_weights_after_12_meta_steps_do_not_depend_on_the_number_of_workers(pool, tmp_path, calm, workers, staleness):
    trainer = Trainer(small(workers=workers, staleness=staleness), tmp_path)
    trainer.run(pool(workers).begin)
    assert digests(trainer) == calm[staleness]


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
        trainers[-1].run(workers.begin, on_row)
        assert workers.restarts == count // 3
    plain = Trainer(small(**NETWORKS), tmp_path / "plain")
    plain.run(later(in_process))
    assert digests(trainers[0]) == digests(trainers[1]) == digests(plain)
    assert digests(plain)[0] != weights_sha256(Trainer(small(**NETWORKS), tmp_path).learner.weights)


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.long), 2])
def test_nor_on_a_worker_that_is_killed_on_the_way(pool, tmp_path, calm, staleness):
    trainer, workers = Trainer(small(staleness=staleness), tmp_path), pool(2)
    victims = []

    def on_row(step, row):
        if step == 3 and "meta_loss" in row:
            victims.append(workers.pids()[0])
            threading.Thread(target=os.kill, args=(victims[0], signal.SIGKILL)).start()

    trainer.run(workers.begin, on_row)
    assert digests(trainer) == calm[staleness]
    assert workers.restarts == 1
    assert victims[0] not in workers.pids()
    assert workers.alive + len(workers._workers.starting) == 2


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.long), 2])
def test_nor_on_a_stop_and_a_resume_with_another_number_of_workers(pool, tmp_path, calm, staleness):
    asked = []
    settings = small(staleness=staleness)
    first, workers = Trainer(settings, tmp_path), pool(2, stop=lambda: bool(asked))
    with pytest.raises(Stopped):
        first.run(workers.begin, lambda step, row: asked.append(step) if step == 5 else None)
    first.save()
    assert first.learner.version == 5
    workers.close()
    second = Trainer(settings, tmp_path)
    second.resume()
    second.run(pool(3).begin)
    assert digests(second) == calm[staleness]


def test_batches_that_overlap_are_each_answered_in_their_order(pool):
    weights = Trainer(small(), "unused").learner.weights
    batches = [training_items(small(), step, "cpu") for step in range(3)]
    workers = pool(2)
    pending = [workers.begin(items, weights) for items in batches]
    results = [each() for each in reversed(pending)]
    for items, found in zip(reversed(batches), results, strict=True):
        assert equal(found, [run_episode(weights, item.spec) for item in items])


def test_more_deaths_than_the_budget_end_the_run(pool):
    workers = pool(2, ResourceSettings(max_restarts=0))
    os.kill(workers.pids()[0], signal.SIGKILL)
    items = training_items(small(), 0, "cpu")
    with pytest.raises(PoolError, match=r"1 workers were lost within an hour, resources\.max_restarts=0"):
        workers.run(items * 10, Trainer(small(), "unused").learner.weights)


def test_more_workers_than_the_cluster_can_hold_is_said_at_once(cluster):
    began = time.monotonic()
    with pytest.raises(UserError, match=r"workers=5 needs 5 CPU \(1 each\), the cluster has 4: 1 missing"):
        WorkerPool(5, RESOURCES)
    with pytest.raises(UserError, match=r"workers=1 needs 0\.5 GPU \(0\.5 each\), the cluster has 0: 0\.5 missing"):
        WorkerPool(1, ResourceSettings(num_gpus=0.5))
    with pytest.raises(UserError, match=r"workers=2 needs 4 big \(2 each\).* has 0: 4 missing.*resources\.custom\.big"):
        WorkerPool(2, ResourceSettings(custom={"big": 2}))
    assert time.monotonic() - began < 5


def test_workers_are_on_nodes_with_the_labels_that_are_asked_for(pool):
    assert pool(1, ResourceSettings(labels={"market": "!spot"})).alive == 1
    with pytest.raises(UserError, match=r"only 0 of workers=1 .* each needs 1 CPU on a node labelled market=spot, the"):
        WorkerPool(1, ResourceSettings(labels={"market": "spot"}, start_timeout_s=2))


def test_workers_that_others_leave_no_room_for_are_named_after_a_time(pool):
    pool(3)
    with pytest.raises(UserError, match=r"only 1 of workers=2 could be placed in resources\.start_timeout_s=12"):
        WorkerPool(2, ResourceSettings(start_timeout_s=12))


def test_a_run_begins_with_the_workers_that_there_is_room_for_and_others_join_later(pool, calm, tmp_path):
    taken, alive = pool(3), []
    made = pool(3, ResourceSettings(start_workers=1))
    assert (made.alive, taken.alive) == (1, 3)

    def on_row(step, row):
        if step == 2 and "meta_loss" in row:
            taken.close()  # makes room
            until(lambda: made.run(training_items(small(), 0, "cpu"), trainer.learner.weights) and made.alive == 3, 60)
        alive.append(made.alive)

    trainer = Trainer(small(), tmp_path)
    trainer.run(made.begin, on_row)
    assert (alive[0], alive[-1]) == (1, 3)
    assert digests(trainer) == calm[0]


def test_wrong_data_in_an_episode_is_the_users_error(pool):
    item = training_items(small(), 0, "cpu")[0]
    lost = replace(item.spec, problem=item.spec.problem.of("multimnist", {}), data_root="/nowhere")
    with pytest.raises(UserError, match="/nowhere"):
        pool(1).run([WorkItem(Key(0, 0), lost)], Trainer(small(), "unused").learner.weights)


class Faulty(RolloutWorker):
    """A worker whose episodes can be made to raise or to hang: told by files, which every process sees."""

    folder: Path

    def run(self, weights, spec):
        name = f"{spec.seed}-{spec.estimator is None}"
        with open(self.folder / f"{name}.pids", "a") as file:
            file.write(f"{os.getpid()}\n")
        if (self.folder / f"{name}.always").exists():
            raise FloatingPointError("broken for good")
        for kind in ("once", "hang"):
            try:
                (self.folder / f"{name}.{kind}").unlink()
            except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
                continue
            if kind == "once":
                raise OSError("no space left on this node")
            while True:
                signal.pause()
        return super().run(weights, spec)


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """Workers of the class above; `order(item, what)` has the next run of `item` fail: once, always or hang."""

    class Here(Faulty):
        folder = tmp_path

    monkeypatch.setattr(pool_module, "RolloutWorker", Here)

    class Faults:
        def order(self, item, what):
            (tmp_path / f"{item.spec.seed}-{item.spec.estimator is None}.{what}").touch()

        def pids(self, item):
            return (tmp_path / f"{item.spec.seed}-{item.spec.estimator is None}.pids").read_text().split()

    return Faults()


def equal(results, expected):
    return [r.meta_loss for r in results] == [r.meta_loss for r in expected] and all(
        np.array_equal(a.gradient, b.gradient) for a, b in zip(results, expected, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_an_episode_is_tried_once_more_on_another_worker(pool, faults, workers, caplog):
    items, weights = training_items(small(), 0, "cpu"), Trainer(small(), "unused").learner.weights
    faults.order(items[1], "once")
    made = pool(workers)
    results = made.run(items, weights)
    assert equal(results, [run_episode(weights, item.spec) for item in items])
    assert (made.restarts, made.repeated) == (0, 1)
    first, second = faults.pids(items[1])
    assert (first != second) == (workers == 2)
    assert "meta-step 1 slot 1" in caplog.text
    assert "OSError('no space left on this node'); it runs once more" in caplog.text


def test_an_error_that_comes_again_ends_the_run_and_names_the_key(pool, faults):
    items = training_items(small(), 0, "cpu")
    faults.order(items[2], "always")
    with pytest.raises(PoolError, match=r"^meta-step 1 slot 2 \(.*\) failed: FloatingPointError.*on_error=skip"):
        pool(2).run(items, Trainer(small(), "unused").learner.weights)


def test_or_is_skipped_and_counted(pool, faults, tmp_path):
    settings = small(meta_steps=2)
    bad = training_items(settings, 1, "cpu")[2]
    faults.order(bad, "always")
    trainer = Trainer(settings, tmp_path / "run")
    trainer.run(pool(2, faults=FaultSettings(on_error="skip")).begin)
    assert (trainer.progress.failed_episodes, trainer.progress.skipped_episodes) == (1, 1)
    assert [row.get("failed_episodes") for row in trainer.progress.history] == [None, 0.0, 1.0]
    assert len(faults.pids(bad)) == 2

    def without_it(items, weights):
        return [failed_episode("") if item == bad else run_episode(weights, item.spec) for item in items]

    again = Trainer(settings, tmp_path / "again")
    again.run(later(without_it))
    assert digests(again) == digests(trainer)


def test_a_validation_that_fails_is_never_the_best(pool, faults, tmp_path):
    settings = small(meta_steps=1, validation={"every": 1})
    faults.order(validation_items(settings, 1, "cpu")[0], "always")
    trainer = Trainer(settings, tmp_path / "run")
    with pytest.raises(PoolError, match=r"^validation at meta-step 0 slot 0"):
        trainer.run(pool(2).begin)
    trainer.run(pool(2, faults=FaultSettings(on_error="skip")).begin)
    assert trainer.progress.best_step == -1
    assert trainer.progress.history[-1]["validation"] == math.inf


@pytest.mark.parametrize("workers", [1, 2])
def test_a_hung_episode_runs_elsewhere_and_its_worker_is_ended(pool, faults, workers, caplog):
    items, weights = training_items(small(), 0, "cpu"), Trainer(small(), "unused").learner.weights
    made = pool(workers, faults=FaultSettings(shortest_deadline_s=12, first_deadline_s=12, deadline_factor=2))
    faults.order(items[3], "hang")
    results = made.run(items, weights)
    assert equal(results, [run_episode(weights, item.spec) for item in items])
    hung, other = faults.pids(items[3])
    if workers == 2:  # the other one has run it meanwhile: nobody has waited for the deadline
        assert (made.restarts, made.repeated) == (0, 0)
        until(lambda: made.run(items, weights) and made.restarts, 60)
    assert made.restarts == 1
    assert hung != other
    what = "its twin has the result" if workers == 2 else "it runs again elsewhere"
    said = rf"meta-step 1 slot 3 did not end in 12 s: worker [12] \(pid {hung}\) is ended; {what}"
    assert re.search(said, caplog.text)
    until(lambda: not _alive(int(hung)))


def test_a_lost_worker_is_one_short_line(pool, caplog):
    made = pool(2)
    killed = made.pids()[0]
    os.kill(killed, signal.SIGKILL)
    made.run(training_items(small(), 0, "cpu"), Trainer(small(), "unused").learner.weights)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert re.fullmatch(
        rf"meta-step 1 slot \d+: worker [12] \(pid {killed}\) is lost: its process was killed or crashed; "
        "it runs again elsewhere",
        said,
    )


def test_below_the_floor_the_run_says_what_it_waits_for_and_gives_up(pool, monkeypatch, caplog):
    resources = ResourceSettings(min_workers=2, start_timeout_s=2)
    made = pool(2, resources.model_copy(update={"start_timeout_s": 30}))
    os.kill(made.pids()[0], signal.SIGKILL)
    monkeypatch.setattr(made._workers, "_resources", resources.model_copy(update={"num_cpus": 99}))
    items = training_items(small(), 0, "cpu")
    with pytest.raises(PoolError, match=r"1 workers are up, resources\.min_workers=2, and no other came up in .*=2: "):
        made.run(items * 5, Trainer(small(), "unused").learner.weights)
    assert caplog.text.count("waiting up to 2 s for more; each needs 99 CPU, the cluster has") == 1


def test_a_floor_that_is_reached_again_lets_the_run_go_on(pool, caplog):
    made = pool(2, ResourceSettings(min_workers=2))
    os.kill(made.pids()[0], signal.SIGKILL)
    items, weights = training_items(small(), 0, "cpu"), Trainer(small(), "unused").learner.weights
    assert equal(made.run(items, weights), [run_episode(weights, item.spec) for item in items])
    assert "1 workers are up, resources.min_workers=2: waiting" in caplog.text
    assert made.alive == 2


def test_closing_ends_the_processes(pool):
    workers = pool(2)
    pids = workers.pids()
    workers.close()
    until(lambda: not any(_alive(pid) for pid in pids))


def until(done, seconds=20):
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit
        ray.wait([ray.put(0)], timeout=0.1)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return False
