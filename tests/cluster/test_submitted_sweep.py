"""A sweep and a meta-training submitted to hosts that share a folder, and MLflow's pages as another host sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ml2o_dist.artifact_sources import load_artifact
from tests.browser import chromium
from tests.cluster.conftest import made_network
from tests.cluster.files import PASSWORDS
from tests.cluster.hosts import Host, hosts_with
from tests.cluster.ray_cluster import RayCluster
from tests.cluster.tracking import TrackingServer
from tests.cluster.training import CONFIG, answer
from tests.cluster.trials import PROCESS, Sweep, calm_best

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

TRIALS, STEPS = 6, 4
"""One trial for each CPU of the two workers, and two that wait."""


@dataclass
class Submitted:
    """What was run, and where it can be looked at; `ran`: the hosts on which processes of trials were seen."""

    server: TrackingServer
    ray: RayCluster
    folder: Path
    desk: Host
    ran: set[str]
    sweep: dict[str, Any]
    training: dict[str, Any]


@pytest.fixture(scope="module")
def submitted():
    with made_network() as network:
        server = TrackingServer(network, "compose")
        try:
            folder = network.folder / "shared"
            ray = RayCluster(network, "onprem", shared=folder)
            ray.add(1), ray.add(2)
            ray.await_nodes(3)
            words = ["--set", "meta_steps=6", "--set", "compare=false", "--json"]
            training = ray.submit(ray.head, "--config", str(CONFIG), "--run-dir", "runs/job", *words)
            with hosts_with(PROCESS, [ray.head, *ray.workers.values()]) as ran:
                sweep = Sweep(ray, folder, f"trials={TRIALS}", f"meta_train.meta_steps={STEPS}").answer()
            desk = network.host("desk", 50)
            yield Submitted(server, ray, folder, desk, ran, sweep, answer(training))
        finally:
            server.close()


SEEN = """
def told(run):
    validation = client.get_metric_history(run.info.run_id, "validation")
    return {"name": run.info.run_name, "status": run.info.status, "metrics": run.data.metrics,
            "params": run.data.params, "validation": {point.step: point.value for point in validation}}
runs = client.search_runs([client.get_experiment_by_name("ml2o/sweep/small").experiment_id])
(parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
candidates = client.search_model_versions("tags.sweep = 'small'")
answer = {"parent": told(parent), "nested": [told(run) for run in nested], "runs": len(runs),
          "files": [file.path for file in client.list_artifacts(parent.info.run_id)],
          "versions": [[each.version, each.tags["weights_sha256"], each.run_id] for each in candidates],
          "candidate": client.get_model_version_by_alias("ml2o", "candidate").version,
          "best": [run.info.run_id for run in nested if run.info.run_name == f"trial {BEST}"]}
"""


def test_trials_run_on_both_workers_and_none_on_the_head(submitted):
    assert submitted.ran == {"worker1", "worker2"}


def test_the_run_directory_is_in_the_shared_folder_with_the_weights_of_a_calm_meta_training(submitted, tmp_path):
    assert submitted.sweep["run_dir"] == "/home/ray/ml2o/runs/sweep"
    assert [trial["state"] for trial in submitted.sweep["trials"]] == ["finished"] * TRIALS
    expected = calm_best(submitted.sweep, tmp_path, f"meta_steps={STEPS}")
    assert submitted.sweep["best"]["weights_sha256"] == expected
    assert load_artifact(submitted.folder / "runs" / "sweep").weights_sha256 == expected
    assert load_artifact(submitted.folder / "runs" / "job").weights_sha256 == submitted.training["weights_sha256"]


def test_the_server_has_the_sweep_its_nested_trials_and_the_candidate(submitted):
    best = submitted.sweep["best"]
    seen = submitted.server.ask(submitted.desk, f"BEST = {best['trial']}\n{SEEN}")
    assert seen["runs"] == TRIALS + 1
    assert seen["parent"]["status"] == "FINISHED"
    assert seen["parent"]["metrics"]["best_validation"] == best["validation"]
    assert {"trials.md", "results.parquet", "report.html", "config.yaml", "plots"} <= set(seen["files"])
    nested = {run["name"]: run for run in seen["nested"]}
    for trial in submitted.sweep["trials"]:
        run = nested.pop(f"trial {trial['trial']}")
        assert run["status"] == "FINISHED"
        assert run["params"] == {key: str(value) for key, value in trial["values"].items()}
        assert run["metrics"]["best_validation"] == trial["validation"]
        assert list(run["validation"]) == ["0", "2", "4"]
    assert not nested
    ((version, digest, run_id),) = seen["versions"]
    assert (digest, [run_id]) == (best["weights_sha256"], seen["best"])
    assert (int(version), int(seen["candidate"])) == (submitted.sweep["registered_version"],) * 2


@pytest.fixture(scope="module")
def page(submitted):
    """MLflow in a Chromium on a host that runs nothing else, with what it was refused."""
    with chromium(submitted.desk.enter, submitted.desk.environment) as opened:
        login = {"username": "ml2o", "password": PASSWORDS["mlflow-password"]}
        page = opened.new_page(viewport={"width": 1600, "height": 1000}, http_credentials=login)
        page.set_default_timeout(60_000)
        page.refused = []
        page.on("response", lambda got: page.refused.append(got.url) if got.status == 403 else None)
        yield page


def open_experiment(page, name):
    """Open an experiment's runs from MLflow's first page, as somebody would."""
    page.goto("http://mlflow:5000/")
    page.get_by_text("Model training", exact=True).first.click()  # MLflow begins with its pages for agents
    page.get_by_role("link", name=name, exact=True).click()


def test_mlflow_shows_the_meta_training_with_its_curves_on_another_host(submitted, page, tmp_path):
    open_experiment(page, "ml2o/meta-train")
    page.get_by_role("link", name="job", exact=True).click()
    last = pq.read_table(submitted.folder / "runs" / "job" / "metrics.parquet").to_pylist()[-1]
    page.get_by_role("row").filter(has_text="meta_loss").get_by_text(str(last["meta_loss"])).wait_for()
    page.get_by_role("tab", name="Model metrics").click()
    page.get_by_text("job (meta_loss)").first.wait_for()
    page.screenshot(path=str(tmp_path / "run.png"))
    assert page.refused == []


def test_mlflow_shows_the_candidate_with_the_table_of_trials_on_another_host(submitted, page, tmp_path):
    best = submitted.sweep["best"]
    page.goto("http://mlflow:5000/#/models/ml2o")
    page.get_by_text("candidate").first.wait_for()
    page.goto(f"http://mlflow:5000/#/models/ml2o/versions/{submitted.sweep['registered_version']}")
    page.get_by_text(best["weights_sha256"]).wait_for()
    assert page.get_by_role("link", name=f"trial {best['trial']}", exact=True).count() == 1
    assert page.get_by_role("row").filter(has_text="finished").count() == TRIALS
    page.screenshot(path=str(tmp_path / "version.png"))
    assert page.refused == []


def test_mlflow_shows_the_trials_below_their_sweep_on_another_host(submitted, page, tmp_path):
    open_experiment(page, "ml2o/sweep/small")
    page.get_by_text(f"{TRIALS + 1} matching runs").wait_for()
    assert page.get_by_text("trial 1", exact=True).count() == 0
    page.get_by_role("row").filter(has_text="small").get_by_role("button").first.click()
    page.get_by_text("trial 1", exact=True).first.wait_for()
    for trial in submitted.sweep["trials"]:
        assert page.get_by_text(f"trial {trial['trial']}", exact=True).count() == 1
    page.screenshot(path=str(tmp_path / "sweep.png"))
    assert page.refused == []
