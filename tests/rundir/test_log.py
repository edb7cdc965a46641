"""What a log says of how a run ended is what the run itself wrote there."""

from __future__ import annotations

import logging
import signal
from types import SimpleNamespace

import pytest
from rich.console import Console

from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.rundir.directory import written_to
from ml2o_dist.rundir.log import RunLog, Warned, read_log
from ml2o_dist.rundir.storage import RunStorage
from ml2o_dist.runtime.errors import Aborted, Incomplete, Interrupted
from ml2o_dist.runtime.stopping import Stopped, StopRequest
from ml2o_dist.workflows import meta_train as runs
from ml2o_dist.workflows import meta_train_end as finishing
from ml2o_dist.workflows.report import load_record, write_report
from tests.metatrain.executing import in_process, later
from tests.metatrain.settings import small
from tests.wording import says

QUIET = Console(quiet=True)
SINK = SimpleNamespace(run_id="", flush=lambda: None, log_artifact=lambda *arguments: None)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A run that has only its end before it."""
    settings = small(meta_steps=2, tracking={"register": False})
    trainer = Trainer(settings, tmp_path_factory.mktemp("home") / "run")
    trainer.run(later(in_process))
    return trainer


def ended(trainer, monkeypatch, how):
    """Finish the run, whose comparison raises `how`."""

    def comparison(*arguments):
        raise how

    monkeypatch.setattr(finishing, "_compare", comparison)
    storage, stop = RunStorage(str(trainer.run_dir), trainer.run_dir), StopRequest(signal.SIGTERM)
    with written_to(trainer.run_dir, trainer.settings, QUIET), runs._saved(trainer, storage, stop):
        finishing.finish(trainer, storage, SINK, "", QUIET, stop)


def no_comparison(trainer):
    return write_report(trainer.run_dir)["missing"]["comparison"]


@pytest.mark.long
def test_a_comparison_that_was_stopped_or_failed_is_said_to_be_that(trainer, monkeypatch):
    with pytest.raises(Interrupted):
        ended(trainer, monkeypatch, Stopped())
    assert load_record(trainer.run_dir).log.ended == "stopped by SIGTERM"
    assert "stopped by SIGTERM" in no_comparison(trainer)
    with pytest.raises(Incomplete):
        ended(trainer, monkeypatch, ValueError("a solver\ngave up"))
    assert says(no_comparison(trainer), "failed", "ValueError: a solver gave up", "run.log")
    assert "Traceback" in (trainer.run_dir / "run.log").read_text()
    with pytest.raises(KeyboardInterrupt):  # nothing is written of it, as of SIGKILL: what stood there is not its own
        ended(trainer, monkeypatch, KeyboardInterrupt())
    assert load_record(trainer.run_dir).log.ended == ""
    assert says(no_comparison(trainer), "being made", "killed")


def test_an_abort_is_said_to_be_one(trainer):
    storage = RunStorage(str(trainer.run_dir), trainer.run_dir)
    with (
        pytest.raises(Aborted),
        written_to(trainer.run_dir, trainer.settings, QUIET),
        runs._saved(trainer, storage, StopRequest()),
    ):
        raise RuntimeError("no more")
    assert load_record(trainer.run_dir).log.ended == "aborted"


def test_warnings_of_all_processes_are_kept(tmp_path):
    for number in range(2):
        with written_to(tmp_path, small(), QUIET):
            logging.getLogger("ml2o_dist.metatrain.pool").warning("worker %d died", number)
            logging.getLogger("ml2o_dist.metatrain.pool").info("all is well")
    log = read_log(tmp_path / "run.log")
    assert [(each.level, each.message) for each in log.warnings] == [
        ("WARNING", "worker 0 died"),
        ("WARNING", "worker 1 died"),
    ]
    assert len(log.warnings[0].time) == 19


def test_what_looks_like_an_end_in_a_traceback_or_inside_a_message_is_none(tmp_path):
    line = "2026-11-24 20:00:01,123 WARNING ml2o_dist.x: "
    (tmp_path / "run.log").write_text(f"{line}a worker was stopped by SIGSTOP\naborted\n")
    warned = Warned("2026-11-24 20:00:01", "WARNING", "a worker was stopped by SIGSTOP")
    assert read_log(tmp_path / "run.log") == RunLog((warned,), "")
