"""Workers of a pool on a real local Ray: where they get room, what is said where there is none, budget and floor."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from ml2o_dist.config import LearnerSettings, ResourceSettings
from ml2o_dist.metatrain.capacity import has_labels
from ml2o_dist.metatrain.episode import run_episode
from ml2o_dist.metatrain.pool import WorkerPool
from ml2o_dist.metatrain.schedule import training_items
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.metatrain.workers import PoolError
from ml2o_dist.runtime.errors import UserError
from tests.metatrain.executing import equal
from tests.metatrain.settings import small
from tests.wording import says


def test_more_deaths_than_the_budget_end_the_run(pool):
    workers = pool(2, ResourceSettings(max_restarts=0))
    os.kill(workers.pids()[0], signal.SIGKILL)
    items = training_items(small(), 0, "cpu")
    with pytest.raises(PoolError, match=r"1 workers.*lost.*hour.*resources\.max_restarts=0"):
        workers.run(items * 10, Trainer(small(), "unused").learner.weights)


def test_more_workers_than_the_cluster_can_hold_is_said_at_once(cluster):
    began = time.monotonic()
    with pytest.raises(UserError, match=r"workers=5 needs 5 CPU \(1 each\).*cluster has 4: 1 missing"):
        WorkerPool(5, ResourceSettings())
    with pytest.raises(UserError, match=r"workers=1 needs 0\.5 GPU \(0\.5 each\).*cluster has 0: 0\.5 missing"):
        WorkerPool(1, ResourceSettings(num_gpus=0.5))
    with pytest.raises(UserError, match=r"workers=2 needs 4 big \(2 each\).* has 0: 4 missing.*resources\.custom\.big"):
        WorkerPool(2, ResourceSettings(custom={"big": 2}))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("labels", "selected"),
    [
        ({}, "abc"),
        ({"market": "spot"}, "a"),
        ({"market": "!spot"}, "bc"),
        ({"market": "in(spot, reserved)"}, "ab"),
        ({"market": "!in(spot,reserved)"}, "c"),
        ({"market": "!on-demand", "zone": "1"}, "b"),
    ],
)
def test_labels_select_the_nodes_that_ray_selects(labels, selected):
    nodes = {"a": {"market": "spot"}, "b": {"market": "reserved", "zone": "1"}, "c": {"zone": "2"}}
    assert [name for name, node in nodes.items() if has_labels(node, labels)] == list(selected)


def test_workers_are_on_nodes_with_the_labels_that_are_asked_for(pool):
    assert pool(1, ResourceSettings(labels={"market": "!spot"})).alive == 1
    began = time.monotonic()
    for words in ("spot", "in(spot, reserved)"):
        with pytest.raises(UserError) as refused:
            WorkerPool(1, ResourceSettings(labels={"market": words}))
        line = str(refused.value)
        assert "\n" not in line
        assert says(line, "no node", "labels", "resources.labels", f"market={words}", "no such labels")
    with pytest.raises(UserError, match=r"no node .* learner\.resources\.labels.*market=spot"):
        WorkerPool(1, ResourceSettings(), learner=LearnerSettings(resources={"labels": {"market": "spot"}}))
    assert time.monotonic() - began < 5


@pytest.mark.long
def test_workers_that_others_leave_no_room_for_are_named_after_a_time(pool):
    pool(3)
    with pytest.raises(UserError, match=r"only 1 of workers=2.*placed.*resources\.start_timeout_s=12"):
        WorkerPool(2, ResourceSettings(start_timeout_s=12))


@pytest.mark.long
def test_below_the_floor_the_run_says_what_it_waits_for_and_gives_up(pool, monkeypatch, caplog):
    resources = ResourceSettings(min_workers=2, start_timeout_s=2)
    made = pool(2, resources.model_copy(update={"start_timeout_s": 30}))
    os.kill(made.pids()[0], signal.SIGKILL)
    monkeypatch.setattr(made._workers, "_resources", resources.model_copy(update={"num_cpus": 99}))
    items = training_items(small(), 0, "cpu")
    with pytest.raises(PoolError, match=r"1 workers.*resources\.min_workers=2.*=2"):
        made.run(items * 5, Trainer(small(), "unused").learner.weights)
    assert len(re.findall(r"waiting up to 2 s.*99 CPU.*cluster has", caplog.text)) == 1


@pytest.mark.long
def test_a_floor_that_is_reached_again_lets_the_run_go_on(pool, caplog):
    made = pool(2, ResourceSettings(min_workers=2))
    os.kill(made.pids()[0], signal.SIGKILL)
    items, weights = training_items(small(), 0, "cpu"), Trainer(small(), "unused").learner.weights
    assert equal(made.run(items, weights), [run_episode(weights, item.spec) for item in items])
    assert says(caplog.text, "1 workers", "resources.min_workers=2", "waiting")
    assert made.alive == 2
