"""A meta-training submitted to hosts on which the commands of cluster/ have started Ray, looked at from outside."""

from __future__ import annotations

import json
import threading

import pytest

from ml2o_dist.artifact import load_artifact, weights_sha256
from ml2o_dist.config_file import load_settings
from ml2o_dist.metatrain.trainer import Trainer
from tests.cluster.files import ROOT
from tests.cluster.hosts import until
from tests.cluster.ray_cluster import RayCluster
from tests.cluster.tracking import TrackingServer
from tests.metatrain.executing import in_process, later

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

CONFIG = ROOT / "tests" / "small_run.yaml"
HOME = "home/ray/ml2o"  # ML2O_HOME of runtime_env.yaml, in a host's folder
RUN = """
(run,) = client.search_runs([client.get_experiment_by_name("ml2o/meta-train").experiment_id])
(version,) = client.search_model_versions("name='ml2o'")
answer = {
    "status": run.info.status,
    "steps": [metric.step for metric in client.get_metric_history(run.info.run_id, "meta_loss")],
    "version": [int(version.version), version.tags["weights_sha256"]],
    "artifacts": [file.path for file in client.list_artifacts(run.info.run_id)],
}
"""


def calm(folder, *overrides):
    """Return the weights that the run ends at in one process, without Ray."""
    trainer = Trainer(load_settings(CONFIG, [*overrides, "device=cpu"]), folder)
    trainer.run(later(in_process))
    return weights_sha256(trainer.best_weights)


def held(ray):
    """Return the objects that somebody refers to, but for what Ray's own agent keeps of a job that it has started."""

    def owner(each):
        (host,) = [host for host in (ray.head, *ray.workers.values()) if host.address == each["ip"]]
        return host.sh(f"cat /proc/{each['pid']}/cmdline").strip("\0")

    return [(owner(each), each) for each in ray.ask("list_objects()") if owner(each) != "ray::DashboardAgent"]


def leaves_nothing(ray):
    """Assert that Ray holds no living actor and no object, and that its hosts are empty once it is stopped."""
    assert ray.ask("list_actors(filters=[('state', '!=', 'DEAD')])") == []
    until(lambda: held(ray) == [], 60, lambda: held(ray))
    for host in [ray.head, *ray.workers.values()]:
        assert not [line for line in host.command_lines() if "ray::RolloutWorker" in line]
        host.sh("ray stop")
        until(lambda host=host: not host.command_lines(), 30, lambda host=host: host.command_lines())


@pytest.mark.parametrize(("how", "tracking"), [("kuberay", "kubernetes"), ("onprem", "compose")])
def test_a_job_runs_on_all_workers_and_leaves_run_metrics_and_version_on_the_server(network, tmp_path, how, tracking):
    server = TrackingServer(network, tracking)
    try:
        ray = RayCluster(network, how)
        hosts = {host.name: host for host in (ray.add(1), ray.add(2), ray.head)}
        ray.await_nodes(3)
        ran, over = set(), threading.Event()

        def watch():
            while not over.wait(0.1):
                ran.update(n for n, h in hosts.items() if any("ray::RolloutWorker" in c for c in h.command_lines()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        overrides = ["meta_steps=12", "compare=false"]
        words = [
            "--config",
            str(CONFIG),
            "--run-dir",
            "runs/job",
            *[w for o in overrides for w in ("--set", o)],
            "--json",
        ]
        try:
            printed = ray.submit(ray.head, *words)
        finally:
            over.set()
            watcher.join()
        assert "run directory  /home/ray/ml2o/runs/job" in printed
        assert "tracking URI   http://mlflow:5000" in printed
        assert ran == {"worker1", "worker2"}  # the head takes no work
        (answer,) = [json.loads(line) for line in printed.splitlines() if line.startswith('{"run_dir"')]
        expected = calm(tmp_path / "calm", *overrides)
        assert answer["weights_sha256"] == expected
        assert load_artifact(ray.head.folder / HOME / "runs" / "job").weights_sha256 == expected
        seen = server.ask(ray.workers[1], RUN)
        assert seen["status"] == "FINISHED"
        assert seen["steps"] == list(range(1, 13))
        assert seen["version"] == [1, expected]
        assert "config.yaml" in json.dumps(seen["artifacts"])
        with pytest.raises(AssertionError, match="AuthenticationError"):
            ray.head.sh(f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN={'f' * 64} ray job list --address {ray.dashboard}")
        leaves_nothing(ray)
    finally:
        server.close()
