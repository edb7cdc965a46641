"""The sink: every metric arrives exactly once, and whoever logs never waits."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking.records import Params, Point, Tags, Upload
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.spool import Spool
from ml2o_dist.tracking.store import connect
from ml2o_dist.tracking.store_run import METRICS_PER_CALL
from tests.tracking.fake_run import FakeRun
from tests.wording import says

EXPERIMENT = "ml2o/meta-train"
NEVER_S = 3600.0
"""A flush interval that does not come: what is sent in the test is sent because it asked."""


@pytest.fixture
def run() -> FakeRun:
    return FakeRun()


def sink_of(run: FakeRun, **settings: Any) -> MlflowSink:
    return MlflowSink(run, "nowhere", **{"flush_s": NEVER_S, **settings})


def values(run: FakeRun, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in run.points if point.key == key]


def test_everything_arrives_once_in_order_in_few_calls(run: FakeRun) -> None:
    run.gate.clear()
    sink = sink_of(run)
    for step in range(1500):
        sink.log({"a": step, "b": -step}, step)
    run.gate.set()
    assert sink.close() == 0
    assert values(run, "a") == [(step, float(step)) for step in range(1500)]
    assert values(run, "b") == [(step, -float(step)) for step in range(1500)]
    assert run.calls == [METRICS_PER_CALL] * 3
    assert run.ended == "FINISHED"


def test_params_tags_and_files_keep_their_place(run: FakeRun, tmp_path: Path) -> None:
    run.gate.clear()
    sink = sink_of(run)
    sink.log_params({"seed": 1})
    sink.log({"a": 1}, 0)
    sink.set_tags({"git": None, "config_hash": "abc"})
    sink.log_artifact(tmp_path / "x.png", "plots")
    run.gate.set()
    assert sink.close("KILLED") == 0
    assert run.words == [Params({"seed": "1"}), Tags({"config_hash": "abc"}), Upload(tmp_path / "x.png", "plots")]
    assert run.ended == "KILLED"


def test_logging_does_not_wait_for_a_server_that_hangs(run: FakeRun) -> None:
    run.gate.clear()  # every call hangs
    sink = sink_of(run)
    start = time.monotonic()
    for step in range(10_000):
        sink.log({"a": step}, step)
    assert time.monotonic() - start < 5
    assert sink.close(limit_s=0.2) == 10_000
    assert time.monotonic() - start < 8
    run.gate.set()


def test_an_outage_is_said_once_and_nothing_is_lost(run: FakeRun, caplog: pytest.LogCaptureFixture) -> None:
    sink = sink_of(run)
    sink.log({"a": 0}, 0)
    assert sink.flush()
    run.away = True
    for step in (1, 2, 3):
        sink.log({"a": step}, step)
        assert not sink.flush(limit_s=0.1)
    assert sink.unsent == 3
    run.away = False
    assert sink.flush()
    assert sink.close() == 0
    assert values(run, "a") == [(step, float(step)) for step in range(4)]
    away, back = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert says(away, "MLflow at nowhere does not answer", "goes on", "sent later", "nobody there")
    assert says(back, "MLflow at nowhere", "again")


def test_an_error_of_code_is_said_as_one_and_its_figures_are_kept(
    run: FakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink = sink_of(run)
    sink.log({"a": 0}, 0)
    assert sink.flush()
    with monkeypatch.context() as patch:
        patch.setattr(FakeRun, "send_points", lambda self, points: points.nothing)
        sink.log({"a": 1}, 1)
        assert not sink.flush(limit_s=0.5)
    assert "does not answer" not in caplog.text
    assert says(caplog.text, "MLflow at nowhere", "sent nothing", "goes on", "sent later")
    assert "AttributeError in test_sink.py, line " in caplog.text
    assert sink.flush()
    assert sink.close() == 0
    assert values(run, "a") == [(0, 0.0), (1, 1.0)]


def test_a_server_that_comes_late_gets_it_all(run: FakeRun) -> None:
    run.away = True
    sink = sink_of(run)
    sink.log({"a": 1}, 0)
    assert not sink.flush(limit_s=0.1)
    assert sink.run_id is None
    run.away = False
    assert sink.flush()
    assert sink.run_id == "run"
    assert values(run, "a") == [(0, 1.0)]
    sink.close()
    assert run.started == 1


def test_a_server_that_never_comes_costs_a_count_and_no_time(run: FakeRun, caplog: pytest.LogCaptureFixture) -> None:
    run.away = True
    sink = sink_of(run)
    sink.log({"a": 1, "b": 2}, 0)
    start = time.monotonic()
    assert sink.close() == 2
    assert time.monotonic() - start < 5
    assert says(caplog.text, "2 metric values", "not sent", "nowhere")
    assert run.ended is None


def test_what_is_refused_for_good_does_not_hold_up_the_rest(run: FakeRun, caplog: pytest.LogCaptureFixture) -> None:
    run.bad_key = "b@d"
    run.gate.clear()
    sink = sink_of(run)
    for step in range(20):
        sink.log({"a": step, "b@d" if step in (4, 11) else "b": step}, step)
    run.gate.set()
    assert sink.close() == 0
    assert [step for step, _ in values(run, "a")] == list(range(20))
    assert [step for step, _ in values(run, "b")] == [step for step in range(20) if step not in (4, 11)]
    assert sink.refused == 2
    assert caplog.text.count("does not take") == 1


def test_the_queue_is_bounded_and_drops_the_oldest(run: FakeRun) -> None:
    run.gate.clear()
    sink = sink_of(run, capacity=10)
    for step in range(25):
        sink.log({"a": step}, step)
    assert (sink.unsent, sink.overflowed) == (10, 15)
    run.gate.set()
    assert sink.flush()
    assert [step for step, _ in values(run, "a")] == list(range(15, 25))
    sink.close()


def test_the_thread_sends_without_being_asked(run: FakeRun) -> None:
    arrived = threading.Event()
    send: Callable[[Sequence[Point]], None] = run.send_points

    def send_and_tell(points: Sequence[Point]) -> None:
        send(points)
        arrived.set()

    run.send_points = send_and_tell  # type: ignore[method-assign]
    sink = sink_of(run, flush_s=0.01)
    sink.log({"a": 1}, 0)
    assert arrived.wait(10)
    sink.close()


def test_a_closed_sink_takes_no_more_and_may_be_closed_again(run: FakeRun) -> None:
    sink = sink_of(run)
    assert sink.close() == 0
    assert sink.close("FAILED") == 0
    assert run.ended == "FINISHED"
    with pytest.raises(RuntimeError, match="closed"):
        sink.log({"a": 1}, 0)


def spooled(run: FakeRun, folder: Path) -> MlflowSink:
    return sink_of(run, spool=Spool(folder))


def test_a_spool_is_sent_by_the_next_sink_in_order_and_then_removed(run: FakeRun, tmp_path: Path) -> None:
    run.away = True
    first = spooled(run, tmp_path / "spool")
    first.log_params({"seed": 1})
    for step in range(3):
        first.log({"a": step}, step)
    assert first.close("KILLED") == 3
    assert first.spool == tmp_path / "spool"
    run.away = False
    second = spooled(run, tmp_path / "spool")
    for step in range(3, 6):
        second.log({"a": step}, step)
    assert second.close() == 0
    assert values(run, "a") == [(step, float(step)) for step in range(6)]
    assert run.words == [Params({"seed": "1"})]
    assert run.ended == "FINISHED"  # the first sink's KILLED is void: the run went on
    assert second.spool is None
    assert list(tmp_path.iterdir()) == []


def test_killed_between_sending_and_noting_the_same_points_are_sent_again(run: FakeRun, tmp_path: Path) -> None:
    """MLflow stores equal points once, and a run that is gone on with is asked (test_run.py, in a real store)."""
    first = spooled(run, tmp_path / "spool")
    assert first.flush()  # its thread is up, and waits for the next call
    for step in range(5):
        first.log({"a": step}, step)
    run.lost_answers = 1
    assert not first.flush()
    sent = list(run.points)
    assert len(sent) == 5
    shutil.copytree(tmp_path / "spool", tmp_path / "killed")  # what a SIGKILL leaves
    assert first.close() == 0
    assert run.points == sent * 2
    again = FakeRun()
    second = spooled(again, tmp_path / "killed")
    assert second.close() == 0
    assert again.points == sent


def test_on_a_full_disk_the_figures_still_arrive(
    run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*words: Any) -> int:
        raise OSError(28, "No space left on device")

    sink = spooled(run, tmp_path / "spool")
    monkeypatch.setattr(os, "pwrite", full)
    for step in range(5):
        sink.log({"a": step}, step)
    assert sink.flush()
    run.away = True
    sink.log({"a": 5}, 5)
    assert sink.close() == 1
    assert values(run, "a") == [(step, float(step)) for step in range(5)]
    assert caplog.text.count("No space left on device") == 1
    assert says(caplog.text, "1 metric values", "not sent", "nowhere", "lost")


def test_an_unreachable_server_does_not_keep_training(caplog: pytest.LogCaptureFixture) -> None:
    start = time.monotonic()
    sink = MlflowSink.open("http://127.0.0.1:9", EXPERIMENT, params={"seed": 1})
    for step in range(1000):
        sink.log({"meta_loss": step}, step)
    assert sink.run_id is None
    assert sink.close() == 1000
    assert time.monotonic() - start < 15
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(messages) == 2
    assert says(messages[0], "http://127.0.0.1:9 does not answer", "goes on")
    assert "Connection refused" in messages[0]
    assert says(messages[1], "1000 metric values", "not sent")
    assert "\n" not in messages[0]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real sqlite store, created before any test that measures time."""
    address = f"sqlite:///{tmp_path_factory.mktemp('sink')}/mlflow.db"
    connect(address).search_experiments()
    return address


def history(uri: str, run_id: str | None, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in connect(uri).get_metric_history(run_id, key))


def test_a_run_in_a_real_store(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    picture = tmp_path / "curve.png"
    picture.write_bytes(b"png")
    many = {f"key{i}": "v" * 10 for i in range(130)}  # more than one call takes
    sink = MlflowSink.open(uri, EXPERIMENT, None, "first", {"seed": 3, **many}, {"config_hash": "abc"})
    assert sink.run_id is not None
    for step in range(300):
        sink.log({"meta_loss": 1 / (step + 1), "lr": float("nan") if step == 7 else 0.1}, step)
    sink.log_artifact(picture, "plots")
    assert sink.close() == 0
    client = connect(uri)
    run = client.get_run(sink.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params == {"seed": "3", **many}
    assert run.data.tags["config_hash"] == "abc"
    assert history(uri, sink.run_id, "meta_loss") == [(step, 1 / (step + 1)) for step in range(300)]
    assert len(history(uri, sink.run_id, "lr")) == 300
    stored = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / "ml2o-meta-train" / str(sink.run_id)
    assert (stored / "artifacts" / "plots" / "curve.png").read_bytes() == b"png"
    assert list((tmp_path / "cwd").iterdir()) == []


def test_a_resumed_run_goes_on_without_a_step_twice(uri: str) -> None:
    first = MlflowSink.open(uri, EXPERIMENT, None, "resumed", {"workers": 2})
    for step in range(10):
        first.log({"meta_loss": step, "sparse": step} if step % 5 == 0 else {"meta_loss": step}, step)
    first.close("KILLED")

    second = MlflowSink.open(uri, EXPERIMENT, first.run_id, "ignored", {"workers": 3, "new": 1})
    assert second.run_id == first.run_id
    assert connect(uri).get_run(first.run_id).info.status == "RUNNING"
    for step in range(6, 15):  # the checkpoint was at step 6
        second.log({"meta_loss": step, "sparse": step, "fresh": step}, step)
    assert second.close() == 0
    assert history(uri, first.run_id, "meta_loss") == [(step, float(step)) for step in range(15)]
    assert history(uri, first.run_id, "sparse") == [(step, float(step)) for step in (0, 5, *range(6, 15))]
    assert history(uri, first.run_id, "fresh") == [(step, float(step)) for step in range(6, 15)]
    run = connect(uri).get_run(first.run_id)
    assert run.data.params == {"workers": "2", "new": "1"}
    assert (run.info.status, run.info.run_name) == ("FINISHED", "resumed")


def test_a_run_that_is_gone_is_replaced_with_a_warning(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    sink = MlflowSink.open(uri, EXPERIMENT, "0" * 32)
    assert sink.run_id not in (None, "0" * 32)
    assert says(caplog.text, f"MLflow run {'0' * 32}", f"not at {uri}", "new one")
    sink.close()


def test_a_metric_that_mlflow_refuses_is_dropped_alone(uri: str) -> None:
    sink = MlflowSink.open(uri, EXPERIMENT)
    sink.log({"good": 1.0, "b@d!": 2.0}, 0)
    sink.log_artifact(Path("/nowhere/gone.png"))
    sink.log({"good": 2.0}, 1)
    assert sink.close() == 0
    assert sink.refused == 2
    assert history(uri, sink.run_id, "good") == [(0, 1.0), (1, 2.0)]


def test_a_deleted_experiment_is_refused_in_one_line(uri: str) -> None:
    client = connect(uri)
    client.delete_experiment(client.create_experiment("deleted"))
    with pytest.raises(UserError, match=r"'deleted'.*deleted.*experiments restore") as refusal:
        MlflowSink.open(uri, "deleted")
    assert "\n" not in str(refusal.value)


def test_a_store_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is a text file, not a database")
    with pytest.raises(UserError, match="is not an sqlite file"):
        MlflowSink.open(f"sqlite:///{tmp_path}/mlflow.db", EXPERIMENT)
