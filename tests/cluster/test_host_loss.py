"""Hosts that die, come, and are cut off, a full object store and an absent MLflow: the weights stay what they are."""

from __future__ import annotations

import shlex

import pytest

from tests.cluster.hosts import until
from tests.cluster.ray_cluster import RayCluster
from tests.cluster.tracking import TrackingServer
from tests.cluster.training import Training, calm, leaves_nothing

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

OVERRIDES = (
    "meta_steps=100",
    "horizon=[60]",
    "checkpoint_every=1",
    "keep_checkpoints=100",
    "validation.every=20",
    "workers=4",
    "compare=false",
    "faults.shortest_deadline_s=20",
    "faults.first_deadline_s=30",
)


@pytest.fixture(scope="module", params=[0, 2], ids=lambda staleness: f"staleness{staleness}")
def expected(request, tmp_path_factory):
    """The setting of a staleness, and the weights of a calm run in one process."""
    staleness = f"staleness={request.param}"
    return staleness, calm(tmp_path_factory.mktemp("calm"), *OVERRIDES, staleness)


def test_a_host_that_dies_and_one_that_is_added_leave_the_weights_equal(network, expected):
    ray = RayCluster(network, "kuberay")
    ray.add(1), ray.add(2)
    ray.await_nodes(3)
    training = Training(ray, *OVERRIDES, expected[0], "tracking.uri=sqlite:////home/ray/mlflow.db")
    training.await_step(8)
    ray.end(2)  # SIGKILL of all it runs, at once
    training.await_step(20)
    ray.add(3)
    ray.await_nodes(3)
    training.await_step(30)
    assert training.goes_on
    ray.end(1)  # what is left runs on the host that was added
    assert training.answer()["weights_sha256"] == expected[1]
    assert " is lost: " in training.log(), training.log()
    leaves_nothing(ray)


def test_a_host_that_is_cut_off_and_started_again_leaves_the_weights_equal(network, expected):
    ray = RayCluster(network, "onprem")
    ray.add(1), ray.add(2)
    ray.await_nodes(3)
    training = Training(ray, *OVERRIDES, expected[0], "tracking.uri=sqlite:////home/ray/mlflow.db")
    training.await_step(8)
    ray.workers[2].cut_off()
    until(lambda: ray.alive() == 2, 60)
    training.await_step(20)
    ray.workers[2].join_again()
    ray.start_worker(ray.workers[2])  # the launcher's commands: `ray stop`, then `ray start`
    ray.await_nodes(3)
    training.await_step(30)
    assert training.goes_on
    ray.end(1)
    assert training.answer()["weights_sha256"] == expected[1]
    leaves_nothing(ray)


BALLAST = """
import time, ray
from pathlib import Path
import numpy as np
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(log_to_driver=False)

@ray.remote(num_cpus=0)
class Holder:
    def fill(self):
        self.held = [ray.put(np.ones(10_000_000, np.uint8)) for _ in range(15)]  # 150 MB into a store of 100

hosts = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]]
holders = [Holder.options(scheduling_strategy=host).remote() for host in hosts * 2]
ray.get([holder.fill.remote() for holder in holders])
Path("/home/ray/full").touch()
while not Path("/home/ray/over").exists():
    time.sleep(0.2)
"""


def test_a_full_object_store_and_an_absent_mlflow_server_leave_weights_and_metrics_complete(network, expected):
    server = TrackingServer(network, "compose")
    try:
        ray = RayCluster(network, "kuberay")
        ray.add(1), ray.add(2)
        ray.await_nodes(3)
        home = ray.head.folder / "home" / "ray"
        ballast = ray.head.start(f"python -c {shlex.quote(BALLAST)}", "ballast.log")
        until((home / "full").exists, 120, lambda: (ray.head.folder / "ballast.log").read_text())
        assert all(list(host.folder.glob("ray/**/*spilled_objects*/*")) for host in ray.workers.values())
        training = Training(ray, *OVERRIDES, expected[0])
        training.await_step(8)
        server.kill()
        training.await_step(30)
        server.start()
        assert training.answer()["weights_sha256"] == expected[1]
        (home / "over").touch()
        assert ballast.wait(timeout=60) == 0
        seen = server.ask(ray.head, METRICS)
        assert seen["steps"] == list(range(1, 101))
        leaves_nothing(ray)
    finally:
        server.close()


METRICS = """
(run,) = client.search_runs([client.get_experiment_by_name("ml2o/meta-train").experiment_id])
answer = {"steps": [metric.step for metric in client.get_metric_history(run.info.run_id, "meta_loss")]}
"""
