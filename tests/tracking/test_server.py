"""The sink and a real server that is killed, hangs, or comes late: each metric is there once, and nobody waited."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.store import connect
from ml2o_dist.tracking.sync import Synced, sync
from tests.tracking.mlflow_server import MlflowServer

EXPERIMENT = "ml2o/meta-train"
LOG_LIMIT_S = 0.1
"""What no `log` may take, a queue's append: on an idle machine it is some 20 microseconds."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server")
    yield server
    server.kill()


class Training(threading.Thread):
    """Logs two metrics a step, a hundred steps a second, until it is told to stop."""

    def __init__(self, sink: MlflowSink, first: int = 0) -> None:
        super().__init__()
        self.sink = sink
        self.steps = first
        self.slowest = 0.0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.01):
            before = time.monotonic()
            self.sink.log({"meta_loss": 1 / (self.steps + 1), "workers": 2.0}, self.steps)
            self.slowest = max(self.slowest, time.monotonic() - before)
            self.steps += 1

    def stop(self) -> None:
        self.done.set()
        self.join()
        assert self.slowest < LOG_LIMIT_S


def steps_of(uri: str, run_id: str | None, key: str) -> list[int]:
    return [point.step for point in connect(uri).get_metric_history(run_id, key)]


def synced(run_dir: Path) -> Synced:
    """Sync, again where it is said to be possible again: a server that was stopped may first end its own workers."""
    limit = time.monotonic() + 60
    while True:
        try:
            return sync(run_dir)
        except UserError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.5)


@pytest.mark.long
def test_a_server_killed_and_started_again_has_each_step_once_and_training_never_waited(
    server: MlflowServer, tmp_path: Path
) -> None:
    server.start()
    run_dir = tmp_path / "run"
    picture = run_dir / "curve.png"
    sink = MlflowSink.open(server.uri, EXPERIMENT, run_name="killed", params={"seed": 1}, run_dir=run_dir)
    training = Training(sink)
    training.start()
    while not steps_of(server.uri, sink.run_id, "workers"):
        time.sleep(0.1)
    server.kill()
    at_kill = training.steps
    picture.write_bytes(b"while it was away")
    sink.log_artifact(picture, "plots")
    assert not sink.flush()
    picture.write_bytes(b"later")
    server.start()
    while training.steps < at_kill + 100:
        time.sleep(0.1)
    training.stop()
    assert sink.flush(60)
    assert sink.close() == 0
    for key in ("meta_loss", "workers"):
        assert steps_of(server.uri, sink.run_id, key) == list(range(training.steps))
    client = connect(server.uri)
    run = client.get_run(sink.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "1"}
    kept = client.download_artifacts(sink.run_id, "plots/curve.png", str(tmp_path))
    assert Path(kept).read_bytes() == b"while it was away"
    assert not (run_dir / "spool").exists()


@pytest.mark.long
def test_killed_five_times_while_points_flow(server: MlflowServer, tmp_path: Path) -> None:
    """At no particular moment: connections break with a batch written, half written, and not begun."""
    server.start()
    sink = MlflowSink.open(server.uri, EXPERIMENT, run_dir=tmp_path / "run")
    trainings = [Training(sink)]
    trainings[0].start()
    for round_ in range(5):
        after = trainings[0].steps + 100 + 37 * round_
        while trainings[0].steps < after:
            sink.flush(0.05)
        server.kill()
        server.start()
    trainings[0].stop()
    assert sink.flush(60)
    assert sink.close() == 0
    for key in ("meta_loss", "workers"):
        assert steps_of(server.uri, sink.run_id, key) == list(range(trainings[0].steps))


@pytest.mark.long
def test_a_server_that_hangs_holds_up_neither_training_nor_the_end(server: MlflowServer, tmp_path: Path) -> None:
    server.start()
    run_dir = tmp_path / "run"
    sink = MlflowSink.open(server.uri, EXPERIMENT, run_dir=run_dir)
    training = Training(sink)
    training.start()
    while not steps_of(server.uri, sink.run_id, "workers"):
        time.sleep(0.1)
    server.signal(signal.SIGSTOP)
    at_stop = training.steps
    while training.steps < at_stop + 500:
        time.sleep(0.1)
    training.stop()
    before = time.monotonic()
    assert sink.close("KILLED", limit_s=2.0) > 0
    assert time.monotonic() - before < 4
    assert sink.spool == run_dir / "spool"
    server.signal(signal.SIGCONT)
    answer = synced(run_dir)
    assert (answer["run_id"], answer["status"]) == (sink.run_id, "KILLED")
    for key in ("meta_loss", "workers"):
        assert steps_of(server.uri, sink.run_id, key) == list(range(training.steps))
    assert connect(server.uri).get_run(sink.run_id).info.status == "KILLED"


@pytest.mark.long
def test_a_run_goes_on_across_dead_servers_and_dead_drivers(server: MlflowServer, tmp_path: Path) -> None:
    """Begun with no server, gone on with one, killed with neither an end nor a note, gone on with again."""
    run_dir = tmp_path / "run"
    first = MlflowSink.open(server.uri, EXPERIMENT, run_dir=run_dir)
    for step in range(100):
        first.log({"meta_loss": float(step)}, step)
    assert first.close("KILLED") == 100
    server.start()
    second = MlflowSink.open(server.uri, EXPERIMENT, run_dir=run_dir)
    for step in range(80, 200):
        second.log({"meta_loss": step + 0.5}, step)
    assert second.flush(60)
    server.kill()
    for step in range(200, 300):
        second.log({"meta_loss": step + 0.5}, step)
    assert second.close("FAILED") == 100
    server.start()
    (run_dir / "spool" / "sent.json").unlink()
    third = MlflowSink.open(server.uri, EXPERIMENT, run_dir=run_dir)
    for step in range(150, 350):
        third.log({"meta_loss": step + 0.7}, step)
    assert third.flush(60)
    assert third.close() == 0
    client = connect(server.uri)
    points = client.get_metric_history(third.run_id, "meta_loss")
    assert [point.step for point in points] == list(range(350))
    assert [point.value for point in points if point.step in (0, 99, 100, 299, 300)] == [0.0, 99.0, 100.5, 299.5, 300.7]
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert (run.info.run_id, run.info.status) == (third.run_id, "FINISHED")
