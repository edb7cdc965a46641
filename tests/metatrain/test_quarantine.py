"""Hosts that lose workers are put aside and come back, on a clock of the test's own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ml2o_dist.metatrain.quarantine import LOSSES, PERIOD_S, Quarantine
from tests.wording import says


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_host_is_put_aside_by_its_third_loss_alone():
    quarantine = Quarantine(Clock())
    assert [quarantine.lost("a") for _ in range(LOSSES + 1)] == [False, False, True, False]
    assert not quarantine.lost("b")
    assert quarantine.avoided() == ["a"]


def test_losses_that_lie_far_apart_are_forgiven():
    clock = Clock()
    quarantine = Quarantine(clock)
    for _ in range(10):
        assert not quarantine.lost("a")
        clock.now += PERIOD_S / (LOSSES - 1) + 1
    assert quarantine.avoided() == []


def test_a_host_is_tried_again_and_put_aside_by_one_more_loss():
    clock = Clock()
    quarantine = Quarantine(clock)
    for clock.now in (0.0, 100.0, 200.0):
        quarantine.lost("a")
    clock.now = PERIOD_S - 1
    assert quarantine.avoided() == ["a"]
    clock.now = PERIOD_S + 1
    assert quarantine.avoided() == []
    assert quarantine.lost("a")
    clock.now = 100.0 + PERIOD_S + 1  # the losses of 100, 200 and 601: the oldest is forgiven
    assert quarantine.avoided() == []


TWO_NODES = """
import json, os, signal, time
import ray
from ray.cluster_utils import Cluster
from ml2o_dist.config import ResourceSettings
from ml2o_dist.metatrain.worker import RolloutWorker
from ml2o_dist.metatrain.workers import Workers

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"big": 1}})
other = cluster.add_node(num_cpus=1, resources={"big": 1})
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
workers = Workers(RolloutWorker, 2, ResourceSettings(custom={"big": 0.5}), lambda: False)
assert len({worker.node for worker in workers.up}) == 2
seen = []
for _ in range(3):
    (victim,) = [worker for worker in workers.up if worker.node == other.node_id]
    os.kill(victim.pid, signal.SIGKILL)
    workers.replace(victim, "killed")
    ready, _ = ray.wait(list(workers.starting), timeout=60 if len(seen) < 2 else 8)
    for future in ready:
        workers.started(future)
    seen.append([worker.node == other.node_id for worker in workers.up])
workers.close()
ray.shutdown()
cluster.shutdown()
print(json.dumps(seen))
"""
"""One worker on each of two nodes, of which one is killed three times on the same node."""


@pytest.mark.long
def test_no_worker_is_started_on_a_node_that_is_put_aside():
    done = subprocess.run([sys.executable, "-c", TWO_NODES], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    again, once_more, aside = json.loads(done.stdout.splitlines()[-1])
    assert sorted(again) == sorted(once_more) == [False, True]
    assert aside == [False]  # it would have room on that node alone, and waits
    assert says(done.stderr, "loses workers", "none is started")
