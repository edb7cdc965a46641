"""A whole sweep while MLflow is away: it ends well, says what was not sent, and `--resume` sends it, once."""

from __future__ import annotations

import json
import threading

import pytest

from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.sweeping.record import SweepRecord
from ml2o_dist.tracking.registry import list_versions
from tests.test_sweep import CONFIG, metric_steps, ml2o, runs_of
from tests.tracking.mlflow_server import MlflowServer

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture
def server(tmp_path):
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server")
    yield server
    server.kill()


def swept(home, uri):
    """Run a sweep of three trials, one at a time; check that it ended as if MLflow had been there."""
    words = ["--config", str(CONFIG), "--run-dir", "runs/a", "--set", "max_concurrent=1", "--tracking-uri", uri]
    result = ml2o("sweep", *words, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    folder = home / "runs" / "a"
    assert [trial["state"] for trial in answer["trials"]] == ["finished"] * 3
    assert load_artifact(folder).weights_sha256 == answer["best"]["weights_sha256"]
    assert (folder / "trials.md").read_text().count("\n| ") == 5
    assert (folder / "report.html").exists()
    return answer, result.stderr


def check_that_it_is_told(said, home, uri):
    """One line says what was not sent and how it is."""
    (line,) = [line for line in said.splitlines() if "not sent to MLflow" in line]
    assert f"when {uri} answers: ml2o sweep --run-dir {home}/runs/a --resume" in line
    assert "Traceback" not in said
    return line


def check_that_resume_completes_it(home, uri, before):
    """After `--resume` MLflow has all of the sweep, each thing once; another `--resume` finds nothing to do."""
    again = ml2o("sweep", "--run-dir", "runs/a", "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert "not sent" not in again.stderr
    answer = json.loads(again.stdout)
    assert answer == before | {"registered_version": 1}
    check_that_mlflow_has_all(home, uri, answer)
    assert not list((home / "runs" / "a").glob("spool*"))
    last = ml2o("sweep", "--run-dir", "runs/a", "--resume", "--json")
    assert (last.exit_code, "nothing is left to do" in last.stderr) == (0, True)
    assert json.loads(last.stdout) == answer


def check_that_mlflow_has_all(home, uri, answer):
    client, parent, nested = runs_of(uri=uri)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["best_validation"] == answer["best"]["validation"]
    artifacts = {each.path for each in client.list_artifacts(parent.info.run_id)}
    assert {"trials.md", "results.parquet", "report.html", "config.yaml", "plots"} <= artifacts
    assert sorted(nested) == [1, 2, 3]
    for trial in SweepRecord(home / "runs" / "a").in_order:
        run = nested[trial.number]
        assert (run.info.status, run.data.tags["state"]) == ("FINISHED", "finished")
        assert run.data.params == {key: str(value) for key, value in trial.values.items()}
        assert metric_steps(client, run) == [0, 2, 4]
        points = client.get_metric_history(run.info.run_id, "validation")
        assert [point.value for point in points] == [trial.reports[step].validation for step in (0, 2, 4)]
    (version,) = list_versions(uri)
    assert (version["version"], version["aliases"]) == (1, ["candidate"])
    assert version["run_id"] == nested[answer["best"]["trial"]].info.run_id
    assert version["tags"]["weights_sha256"] == answer["best"]["weights_sha256"]


def when(condition, action):
    """Do something as soon as the sweep, which runs in the test's own thread, is so far."""
    over = threading.Event()

    def wait():
        while not over.is_set() and not condition():
            over.wait(0.05)
        if not over.is_set():
            action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return over, thread


def reports(home):
    file = home / "runs" / "a" / "trials.jsonl"
    return file.read_text().count('"meta_step"') if file.exists() else 0


def test_a_sweep_whose_server_is_down_from_the_start(cluster, home, server):
    answer, said = swept(home, server.uri)
    assert answer["registered_version"] is None
    check_that_it_is_told(said, home, server.uri)
    server.start()
    check_that_resume_completes_it(home, server.uri, answer)


def test_a_sweep_whose_server_is_killed_on_the_way(cluster, home, server):
    """Killed when the second trial has begun: the first one's run is there, the third one's never was."""
    server.start()
    over, thread = when(lambda: reports(home) >= 4, server.kill)
    try:
        answer, said = swept(home, server.uri)
    finally:
        over.set()
        thread.join()
    check_that_it_is_told(said, home, server.uri)
    server.start()
    check_that_resume_completes_it(home, server.uri, answer)
