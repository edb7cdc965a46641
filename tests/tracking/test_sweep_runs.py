"""A sweep's runs in MLflow: nested, told twice and written once, kept while MLflow is away, deleted when lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.store import connect
from ml2o_dist.tracking.sweep_runs import PARENT_TAG, SweepRuns
from tests.tracking.empty_store import new_store
from tests.tracking.fake_run import FakeRun
from tests.tracking.mlflow_server import MlflowServer

EXPERIMENT = "ml2o/sweep/x"


def tell(uri: str, folder: Path, key: str, steps: range, wait_s: float = 30.0) -> SweepRuns:
    """Tell of two trials, as a process of its own does; one of them comes to its end."""
    parent = MlflowSink.open(uri, EXPERIMENT, run_name="x", run_dir=folder, wait_s=wait_s)
    runs = SweepRuns(uri, EXPERIMENT, parent, key, folder / "spools")
    for number, trial in enumerate(("a", "b"), start=1):
        runs.begin(trial, f"trial {number}", {"learner.lr": number / 10})
        for step in steps:
            runs.log(trial, step, {"validation": 1 / (step + 1)})
    runs.tag("a", {"state": "finished", "error": None})
    runs.end("a", "FINISHED", 10)
    runs.close(10)
    parent.close("FINISHED", 10)
    return runs


def by_name(uri: str) -> dict[str, Any]:
    client = connect(uri)
    found = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def check(uri: str, last: int) -> None:
    runs, client = by_name(uri), connect(uri)
    assert sorted(runs) == ["trial 1", "trial 2", "x"]
    for number in (1, 2):
        run = runs[f"trial {number}"]
        assert run.data.tags[PARENT_TAG] == runs["x"].info.run_id
        assert run.data.params == {"learner.lr": str(number / 10)}
        points = client.get_metric_history(run.info.run_id, "validation")
        assert [(point.step, point.value) for point in points] == [(i, 1 / (i + 1)) for i in range(last)]
    assert [runs[name].info.status for name in ("x", "trial 1", "trial 2")] == ["FINISHED", "FINISHED", "KILLED"]
    assert runs["trial 1"].data.tags["state"] == "finished"


def test_what_is_told_again_is_written_once(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    first = tell(uri, tmp_path / "run", "key", range(3))
    check(uri, 3)
    again = tell(uri, tmp_path / "run", "key", range(5))
    check(uri, 5)
    assert (
        first.run_ids
        == again.run_ids
        == {each: by_name(uri)[f"trial {n}"].info.run_id for n, each in ((1, "a"), (2, "b"))}
    )
    assert again.unsent == 0
    assert not (tmp_path / "run" / "spools").exists()


@pytest.mark.long
def test_what_a_server_that_was_away_has_not_got_is_there_when_it_is_told_again(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server")
    try:
        before = tell(server.uri, tmp_path / "run", "key", range(3), wait_s=0.5)
        assert (before.unsent, before.unsent_values) == (2, 6)
        assert before.run_ids == {}
        server.start()
        after = tell(server.uri, tmp_path / "run", "key", range(4))
        assert after.unsent == 0
        check(server.uri, 4)
    finally:
        server.kill()


@pytest.mark.long
def test_what_could_not_be_sent_when_a_trial_ended_is_sent_when_the_server_answers(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server")
    parent = MlflowSink.open(server.uri, EXPERIMENT, run_name="x", run_dir=tmp_path / "run", wait_s=0.5)
    runs = SweepRuns(server.uri, EXPERIMENT, parent, "key", tmp_path / "run" / "spools")
    try:
        for number, (trial, status) in enumerate((("a", "FINISHED"), ("b", "KILLED")), start=1):
            runs.begin(trial, f"trial {number}", {"learner.lr": number / 10})
            for step in range(3):
                runs.log(trial, step, {"validation": 1 / (step + 1)})
            runs.tag(trial, {"state": "finished", "error": None})
            runs.end(trial, status, 10)
        assert (runs.unsent, runs.unsent_values, runs.run_ids) == (2, 6, {})
        server.start()
        assert parent.flush(60)
        runs.send_again()
        assert (runs.unsent, runs.unsent_values, sorted(runs.run_ids)) == (0, 0, ["a", "b"])
        runs.close(10)
        parent.close("FINISHED", 10)
        check(server.uri, 3)
        assert not (tmp_path / "run" / "spools").exists()
    finally:
        server.kill()


@pytest.mark.parametrize("trial", ["../../precious", "..", "", "a/b", "/tmp", "a\0b"])
def test_the_id_of_a_trial_leads_out_of_no_folder(tmp_path: Path, trial: str) -> None:
    """Ids are read back from a file of the sweep."""
    (tmp_path / "precious").mkdir()
    parent = MlflowSink(FakeRun(), "nowhere")
    runs = SweepRuns(f"sqlite:///{tmp_path}/mlflow.db", EXPERIMENT, parent, "key", tmp_path / "sweep" / "spools")
    with pytest.raises(UserError, match="would not lie in"):
        runs.begin(trial, "x", {})
    parent.close()
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
