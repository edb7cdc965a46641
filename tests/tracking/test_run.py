"""One MLflow run in a real sqlite store: each call may be made twice, by the same process or by its successor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from mlflow import MlflowClient

from ml2o_dist.tracking.identity import RUN_KEY_TAG, RunIdentity
from ml2o_dist.tracking.records import End, Params, Point
from ml2o_dist.tracking.store import connect
from ml2o_dist.tracking.store_run import MlflowRun, RunGone
from tests.tracking.empty_store import new_store
from tests.wording import says

EXPERIMENT = "ml2o/meta-train"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_store(tmp_path_factory.mktemp("run"))


@pytest.fixture
def identity(uri: str) -> RunIdentity:
    return RunIdentity(uri, EXPERIMENT, "named", created_ms=1_700_000_000_000)


def history(uri: str, run_id: str | None, key: str) -> list[tuple[int, float, int]]:
    return [(point.step, point.value, point.timestamp) for point in connect(uri).get_metric_history(run_id, key)]


def runs_of(uri: str, identity: RunIdentity) -> list[str]:
    client = connect(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = client.search_runs([experiment.experiment_id], f"tags.`{RUN_KEY_TAG}` = '{identity.run_key}'")
    return [run.info.run_id for run in found]


def lose_the_answer(patch: pytest.MonkeyPatch, call: str) -> None:
    """Let the next `call` of an MlflowClient be carried out and raise nevertheless, once."""
    real = getattr(MlflowClient, call)

    def carried_out(self: MlflowClient, *words: Any, **options: Any) -> None:
        patch.setattr(MlflowClient, call, real)
        real(self, *words, **options)
        raise ConnectionResetError("the answer was lost")

    patch.setattr(MlflowClient, call, carried_out)


def test_a_batch_whose_answer_was_lost_is_there_once(
    uri: str, identity: RunIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MlflowRun(uri, identity)
    assert run.start()
    batch = [Point("a", step / 3, step, 1000 + step) for step in range(500)]
    batch += [Point("nan", float("nan"), 7, 5), Point("inf", float("inf"), 7, 5)]
    lose_the_answer(monkeypatch, "log_batch")
    with pytest.raises(ConnectionResetError):
        run.send_points(batch)
    run.send_points(batch)
    run.send_points(batch[:10])
    assert history(uri, run.run_id, "a") == [(step, step / 3, 1000 + step) for step in range(500)]
    assert len(history(uri, run.run_id, "nan")) == len(history(uri, run.run_id, "inf")) == 1


def test_a_successor_takes_no_step_that_the_run_holds_even_if_nothing_was_noted(
    uri: str, identity: RunIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = MlflowRun(uri, identity)
    first.start()
    lose_the_answer(monkeypatch, "log_batch")
    with pytest.raises(ConnectionResetError):
        first.send_points([Point("a", 1.0, 0, 10), Point("a", 2.0, 1, 11)])
    second = MlflowRun(uri, identity)  # has the run key only
    assert not second.start()
    assert second.run_id == first.run_id
    second.send_points([Point("a", 1.5, 0, 20), Point("a", 2.5, 1, 21), Point("a", 3.5, 2, 22), Point("a", 9.0, 2, 23)])
    second.send_points([Point("a", 9.0, 2, 24), Point("b", 1.0, 0, 24)])
    assert history(uri, first.run_id, "a") == [(0, 1.0, 10), (1, 2.0, 11), (2, 3.5, 22)]
    assert history(uri, first.run_id, "b") == [(0, 1.0, 24)]


def test_a_creation_whose_answer_was_lost_makes_one_run(
    uri: str, identity: RunIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MlflowRun(uri, identity)
    lose_the_answer(monkeypatch, "create_run")
    with pytest.raises(ConnectionResetError):
        run.start()
    assert run.run_id is None
    assert not run.start()
    assert runs_of(uri, identity) == [run.run_id]
    info = connect(uri).get_run(run.run_id).info
    assert (info.run_name, info.start_time, info.status) == ("named", 1_700_000_000_000, "RUNNING")
    run.send(End("KILLED", 1_700_000_009_000))
    info = connect(uri).get_run(run.run_id).info
    assert (info.status, info.end_time) == ("KILLED", 1_700_000_009_000)


def test_params_are_sent_once(uri: str, identity: RunIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MlflowRun(uri, identity)
    run.start()
    lose_the_answer(monkeypatch, "log_batch")
    params = Params({"seed": "1", "workers": "2"})
    with pytest.raises(ConnectionResetError):
        run.send(params)
    run.send(params)
    again = MlflowRun(uri, replace(identity, run_id=run.run_id or ""))
    again.start()
    again.send(Params({"workers": "3", "new": "4"}))
    assert connect(uri).get_run(run.run_id).data.params == {"seed": "1", "workers": "2", "new": "4"}


def test_a_run_that_the_server_lost_is_begun_again(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    address = new_store(tmp_path_factory.mktemp("lost"))
    run = MlflowRun(address, RunIdentity(address, EXPERIMENT))
    assert run.start()
    first = run.run_id
    connect(address)._tracking_client.store._hard_delete_run(first)
    with pytest.raises(RunGone, match=f"run {first}.*not there"):
        run.send_points([Point("a", 1.0, 0, 0)])
    assert run.start()
    run.send_points([Point("a", 1.0, 0, 0)])
    assert run.run_id != first
    assert history(address, run.run_id, "a") == [(0, 1.0, 0)]
    assert says(caplog.text, f"MLflow run {first}", f"not at {address}", "new one")
