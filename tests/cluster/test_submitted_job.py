"""A meta-training submitted to hosts on which the commands of cluster/ have started Ray, looked at from outside."""

from __future__ import annotations

import json
import shlex

import pytest

from ml2o_dist.artifact_sources import load_artifact
from tests.cluster.files import manifest
from tests.cluster.hosts import hosts_with
from tests.cluster.ray_cluster import RayCluster
from tests.cluster.tracking import TrackingServer
from tests.cluster.training import CONFIG, HOME, Training, calm, leaves_nothing
from tests.wording import says

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

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


STATUS = """
import base64, os, urllib.error, urllib.request
known = f"ml2o:{os.environ['MLFLOW_TRACKING_PASSWORD']}"
def status(headers, login=known):
    asked = urllib.request.Request("http://mlflow:5000/ajax-api/2.0/mlflow/experiments/search", b'{"max_results": 1}')
    asked.headers = {"Content-Type": "application/json", **headers}
    if login:
        asked.headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    try:
        return urllib.request.urlopen(asked).status
    except urllib.error.HTTPError as error:
        return error.code
answer = {
    "a name that is not its own": status({"Host": "elsewhere.example"}),  # DNS rebinding
    "a name that begins like its own": status({"Host": "mlflow.elsewhere.example:5000"}),
    "nobody": status({}, ""),
    "a wrong password": status({}, "ml2o:wrong"),
    "a page of another origin": status({"Origin": "http://elsewhere.example"}),
    "its own page": status({"Origin": "http://mlflow:5000"}),
}
"""


@pytest.mark.parametrize(("how", "tracking"), [("kuberay", "kubernetes"), ("onprem", "compose")])
def test_a_job_runs_on_all_workers_and_leaves_run_metrics_and_version_on_the_server(network, tmp_path, how, tracking):
    server = TrackingServer(network, tracking)
    try:
        ray = RayCluster(network, how)
        ray.add(1), ray.add(2)
        ray.await_nodes(3)
        overrides = ["meta_steps=12", "compare=false"]
        words = [
            "--config",
            str(CONFIG),
            "--run-dir",
            "runs/job",
            *[w for o in overrides for w in ("--set", o)],
            "--json",
        ]
        with hosts_with("ray::RolloutWorker", [ray.head, *ray.workers.values()]) as ran:
            printed = ray.submit(ray.head, *words)
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
        assert list(server.ask(ray.workers[1], STATUS).values()) == [403, 403, 401, 401, 403, 200]
        with pytest.raises(AssertionError, match="AuthenticationError"):
            ray.head.sh(f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN={'f' * 64} ray job list --address {ray.dashboard}")
        leaves_nothing(ray)
    finally:
        server.close()


def test_the_end_of_the_heads_pod_stops_its_jobs_with_a_checkpoint(network):
    """Kubernetes runs preStop first; what it has not done when the grace period is over is killed."""
    ray = RayCluster(network, "kuberay")
    ray.add(1)
    ray.await_nodes(2)
    training = Training(
        ray, "meta_steps=60", "horizon=[60]", "checkpoint_every=2", "tracking.uri=sqlite:////home/ray/m.db"
    )
    training.await_step(6)
    (container,) = manifest("raycluster", "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    ray.head.sh(shlex.join(container["lifecycle"]["preStop"]["exec"]["command"]), timeout=60)
    assert says(training.log(), "SIGTERM", "checkpoint at meta-step")
    assert "was stopped" in training.printed()  # Ray's word for its end; `ray job submit` ends with 0 then
