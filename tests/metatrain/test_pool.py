"""The pool on a real local Ray: equal results however many workers there are and whoever dies."""

from __future__ import annotations

import functools
import logging
import os
import re
import signal
import threading
from dataclasses import replace

import pytest

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.config import ResourceSettings
from ml2o_dist.metatrain.episode import run_episode
from ml2o_dist.metatrain.schedule import Key, WorkItem, training_items
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.stopping import Stopped
from tests.metatrain.executing import digests, equal, in_process, later
from tests.metatrain.processes import alive, until
from tests.metatrain.settings import small


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The digests of an undisturbed run by staleness."""

    @functools.cache
    def run(staleness):
        trainer = Trainer(small(staleness=staleness), tmp_path_factory.mktemp("calm"))
        trainer.run(later(in_process))
        return digests(trainer)

    return run


@pytest.mark.long
def test_staleness_changes_the_weights(calm):
    assert calm(0) != calm(2)


@pytest.mark.long
@pytest.mark.parametrize(("workers", "staleness"), [(1, 0), (3, 0), (2, 2)])
def test_weights_after_12_meta_steps_do_not_depend_on_the_number_of_workers(pool, tmp_path, calm, workers, staleness):
    trainer = Trainer(small(workers=workers, staleness=staleness), tmp_path)
    trainer.run(pool(workers).begin)
    assert digests(trainer) == calm(staleness)


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
    "rule": {"features": "alignment", "output": "controlled"},
    "estimator": {"kind": "exact"},
    "meta_steps": 3,
}


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_same_holds_for_networks_and_exact_gradients_with_a_worker_killed(pool, tmp_path, count):
    workers = pool(count)

    def on_row(step, row):
        if step == 1 and workers.alive == count > 1:
            os.kill(workers.pids()[0], signal.SIGKILL)

    trainer = Trainer(small(**NETWORKS), tmp_path / "pool")
    trainer.run(workers.begin, on_row)
    assert workers.restarts == (count > 1)
    plain = Trainer(small(**NETWORKS), tmp_path / "plain")
    plain.run(later(in_process))
    assert digests(trainer) == digests(plain)
    assert digests(plain)[0] != weights_sha256(Trainer(small(**NETWORKS), tmp_path).learner.weights)


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.long), 2])
def test_nor_on_a_worker_that_is_killed_on_the_way(pool, tmp_path, calm, staleness, caplog):
    """Which is one short line in the log."""
    trainer, workers = Trainer(small(staleness=staleness), tmp_path), pool(2)
    victims = []

    def on_row(step, row):
        if step == 3 and "meta_loss" in row:
            victims.append(workers.pids()[0])
            threading.Thread(target=os.kill, args=(victims[0], signal.SIGKILL)).start()

    trainer.run(workers.begin, on_row)
    assert digests(trainer) == calm(staleness)
    assert workers.restarts == 1
    assert victims[0] not in workers.pids()
    assert workers.alive + len(workers._workers.starting) == 2
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert re.fullmatch(rf"meta-step \d+ slot \d+: worker [12] \(pid {victims[0]}\).*lost.*crashed.*again.*", said)


@pytest.mark.long
@pytest.mark.parametrize("staleness", [0, 2])
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
    assert digests(second) == calm(staleness)


def test_batches_that_overlap_are_each_answered_in_their_order_and_closing_ends_the_processes(pool):
    weights = Trainer(small(), "unused").learner.weights
    batches = [training_items(small(), step, "cpu") for step in range(3)]
    workers = pool(2)
    pending = [workers.begin(items, weights) for items in batches]
    results = [each() for each in reversed(pending)]
    for items, found in zip(reversed(batches), results, strict=True):
        assert equal(found, [run_episode(weights, item.spec) for item in items])
    pids = workers.pids()
    workers.close()
    until(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.long
def test_a_run_begins_with_the_workers_that_there_is_room_for_and_others_join_later(pool, calm, tmp_path):
    taken, alive = pool(1, ResourceSettings(num_cpus=3)), []
    made = pool(2, ResourceSettings(start_workers=1))
    assert (made.alive, taken.alive) == (1, 1)

    def on_row(step, row):
        if step == 2 and "meta_loss" in row:
            taken.close()  # makes room
            until(lambda: made.run(training_items(small(), 0, "cpu"), trainer.learner.weights) and made.alive == 2, 60)
        alive.append(made.alive)

    trainer = Trainer(small(), tmp_path)
    trainer.run(made.begin, on_row)
    assert (alive[0], alive[-1]) == (1, 2)
    assert digests(trainer) == calm(0)


def test_wrong_data_in_an_episode_is_the_users_error(pool):
    item = training_items(small(), 0, "cpu")[0]
    lost = replace(item.spec, problem=item.spec.problem.of("multimnist", {}), data_root="/nowhere")
    with pytest.raises(UserError, match="/nowhere"):
        pool(1).run([WorkItem(Key(0, 0), lost)], Trainer(small(), "unused").learner.weights)
