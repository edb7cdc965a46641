"""Rollouts replayed in a process of its own: the weights of backward=worker, whoever dies, and bounded memory."""

from __future__ import annotations

import functools
import os
import signal
import time

import pytest
import ray
import torch

from ml2o_dist.config import FaultSettings, LearnerSettings, PlacementSettings, ResourceSettings
from ml2o_dist.metatrain import replays as replays_module
from ml2o_dist.metatrain.capacity import room_for_workers
from ml2o_dist.metatrain.pool import WorkerPool
from ml2o_dist.metatrain.schedule import training_items
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.metatrain.worker import Replayer
from ml2o_dist.metatrain.workers import PoolError
from ml2o_dist.runtime.errors import UserError
from tests.metatrain.executing import digests, in_process, later
from tests.metatrain.settings import small

FAULTS = FaultSettings(shortest_deadline_s=5)


@pytest.fixture
def pool(cluster):
    pools = []

    def make(workers, faults=FAULTS, learner=LearnerSettings(), resources=ResourceSettings()):  # noqa: B008
        while pools:
            pools.pop().close()  # one at a time has room
        pools.append(WorkerPool(workers, resources, faults, learner=learner))
        return pools[-1]

    yield make
    for each in pools:
        each.close()


def trained(folder, begin, on_row=lambda step, row: None, **settings):
    trainer = Trainer(small(meta_steps=6, backward="learner", **settings), folder)
    trainer.run(begin, on_row)
    return trainer


@pytest.fixture(scope="module")
def calm(cluster, tmp_path_factory):
    """Return an undisturbed run with one worker, by staleness."""

    @functools.cache
    def run(staleness):
        one = WorkerPool(1, ResourceSettings(), FAULTS, learner=LearnerSettings())
        try:
            return trained(tmp_path_factory.mktemp("calm"), one.begin, staleness=staleness)
        finally:
            one.close()

    return run


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.long), 2])
def test_the_weights_are_those_of_backward_worker_to_rounding(tmp_path, calm, staleness):
    worker = trained(tmp_path / "worker", later(in_process), staleness=staleness)
    for name, tensor in worker.learner.weights.items():
        torch.testing.assert_close(calm(staleness).learner.weights[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("staleness", [0, 2])
def test_the_number_of_workers_changes_no_bit(pool, tmp_path, calm, staleness):
    calm = digests(calm(staleness))  # before: one pool at a time has room
    assert digests(trained(tmp_path / "ours", pool(2).begin, staleness=staleness)) == calm


@pytest.mark.long
def test_a_replayer_or_a_worker_that_is_killed_changes_nothing(pool, tmp_path, calm):
    victims, calm = [], digests(calm(0))
    mine = pool(2)

    def on_row(step, row):
        if "meta_loss" in row and step in (2, 4):
            pid = ray.get(mine._replays._actor.where.remote())[0] if step == 2 else mine.pids()[0]
            victims.append(pid)
            os.kill(pid, signal.SIGKILL)

    assert digests(trained(tmp_path / "killed", mine.begin, on_row)) == calm
    assert mine.restarts == len(victims) == 2


@pytest.mark.long
def test_a_replayer_that_hangs_is_replaced(pool, tmp_path, calm):
    stopped, calm = [], digests(calm(0))
    mine = pool(2, FaultSettings(shortest_deadline_s=5, first_deadline_s=20))  # another one starts in it

    def on_row(step, row):
        if "meta_loss" in row and step == 2:
            stopped.append(ray.get(mine._replays._actor.where.remote())[0])
            os.kill(stopped[0], signal.SIGSTOP)

    assert digests(trained(tmp_path / "hangs", mine.begin, on_row)) == calm
    assert mine.restarts == 1
    limit = time.monotonic() + 30
    while os.path.exists(f"/proc/{stopped[0]}"):
        assert time.monotonic() < limit
        time.sleep(0.1)


class SlowReplayer(Replayer):
    """Takes its time."""

    def replay(self, weights, spec, batch):
        time.sleep(0.15)
        return super().replay(weights, spec, batch)


@pytest.mark.long
def test_workers_begin_nothing_while_too_many_rollouts_wait(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(replays_module, "Replayer", SlowReplayer)
    mine, most = pool(2, learner=LearnerSettings(rollouts=2)), []
    add = mine._replays.add

    def noted(*arguments):
        add(*arguments)
        most.append(len(mine._replays.under_way))

    monkeypatch.setattr(mine._replays, "add", noted)
    trained(tmp_path, mine.begin, slots=8)
    assert max(most) in (2, 3)  # the limit, and what the other worker had begun before
    assert len(most) == 6 * 8


class FailingReplayer(Replayer):
    """Cannot replay one slot's episodes."""

    def replay(self, weights, spec, batch):
        if spec.seed == SEED:
            raise FloatingPointError("no replay")
        return super().replay(weights, spec, batch)


SEED = training_items(small(), 2, "cpu")[1].spec.seed


@pytest.mark.long
def test_a_replay_that_raises_ends_the_run_or_is_skipped_and_counted(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(replays_module, "Replayer", FailingReplayer)
    with pytest.raises(PoolError, match=r"replay of meta-step 3 slot 1 failed.*FloatingPointError\('no replay'\)"):
        trained(tmp_path / "abort", pool(1).begin)
    trainer = trained(tmp_path / "skip", pool(1, FaultSettings(on_error="skip")).begin)
    assert trainer.progress.failed_episodes == 1


def test_a_replayer_that_has_no_room_is_told_of(pool):
    learner = LearnerSettings(resources=PlacementSettings(num_cpus=50))
    with pytest.raises(UserError, match=r"backward=learner\).*placed.* 3 s.*50 CPU.* 0 GPU"):
        pool(1, learner=learner, resources=ResourceSettings(start_timeout_s=3))


@pytest.mark.long
def test_a_meta_training_gets_the_pool_that_its_settings_ask_for(cluster):
    for backward, replays in (("worker", False), ("learner", True)):
        settings = small(backward=backward, workers=1)
        made = WorkerPool.of(settings)
        try:
            assert (made._replays is not None) == replays
            (result,) = made.run(training_items(settings, 0, "cpu")[:1], Trainer(settings, "unused").learner.weights)
            assert result.gradient is not None
        finally:
            made.close()


def test_the_process_that_replays_takes_its_share_of_the_room():
    total = {"CPU": 4.0, "GPU": 1.0}
    shared = small(backward="learner", learner={"resources": {"num_cpus": 1, "num_gpus": 0.5}})
    assert room_for_workers(shared, total) == {"CPU": 3.0, "GPU": 0.5}
    assert room_for_workers(small(), total) == total
