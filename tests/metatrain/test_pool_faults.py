"""Episodes that raise or hang: another worker runs them, or the run ends and says which."""

from __future__ import annotations

import math
import os
import re
import signal
from pathlib import Path

import pytest

from ml2o_dist.config import FaultSettings
from ml2o_dist.metatrain import pool as pool_module
from ml2o_dist.metatrain.episode import failed_episode, run_episode
from ml2o_dist.metatrain.schedule import training_items, validation_items
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.metatrain.worker import RolloutWorker
from ml2o_dist.metatrain.workers import PoolError
from tests.metatrain.executing import digests, equal, later
from tests.metatrain.processes import alive, until
from tests.metatrain.settings import small
from tests.wording import says


class Faulty(RolloutWorker):
    """A worker whose episodes can be made to raise or to hang: told by files, which every process sees."""

    folder: Path

    def run(self, weights, spec):
        name = f"{spec.seed}-{spec.estimator is None}"
        with open(self.folder / f"{name}.pids", "a") as file:
            file.write(f"{os.getpid()}\n")
        if (self.folder / f"{name}.always").exists():
            raise FloatingPointError("broken for good")
        for kind in ("once", "hang"):
            try:
                (self.folder / f"{name}.{kind}").unlink()
            except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
                continue
            if kind == "once":
                raise OSError("no space left on this node")
            while True:
                signal.pause()
        return super().run(weights, spec)


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """Workers of the class above; `order(item, what)` has the next run of `item` fail: once, always or hang."""

    class Here(Faulty):
        folder = tmp_path

    monkeypatch.setattr(pool_module, "RolloutWorker", Here)

    class Faults:
        def order(self, item, what):
            (tmp_path / f"{item.spec.seed}-{item.spec.estimator is None}.{what}").touch()

        def pids(self, item):
            return (tmp_path / f"{item.spec.seed}-{item.spec.estimator is None}.pids").read_text().split()

    return Faults()


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_an_error_in_an_episode_is_tried_once_more_on_another_worker(pool, faults, workers, caplog):
    items, weights = training_items(small(), 0, "cpu"), Trainer(small(), "unused").learner.weights
    faults.order(items[1], "once")
    made = pool(workers)
    results = made.run(items, weights)
    assert equal(results, [run_episode(weights, item.spec) for item in items])
    assert (made.restarts, made.repeated) == (0, 1)
    first, second = faults.pids(items[1])
    assert (first != second) == (workers == 2)
    assert "meta-step 1 slot 1" in caplog.text
    assert says(caplog.text, "OSError('no space left on this node')", "once more")


def test_an_error_that_comes_again_ends_the_run_and_names_the_key(pool, faults):
    items = training_items(small(), 0, "cpu")
    faults.order(items[2], "always")
    with pytest.raises(PoolError, match=r"^meta-step 1 slot 2 \(.*\) failed: FloatingPointError.*on_error=skip"):
        pool(1).run(items, Trainer(small(), "unused").learner.weights)


@pytest.mark.long
def test_or_is_skipped_and_counted(pool, faults, tmp_path):
    settings = small(meta_steps=2)
    bad = training_items(settings, 1, "cpu")[2]
    faults.order(bad, "always")
    trainer = Trainer(settings, tmp_path / "run")
    trainer.run(pool(1, faults=FaultSettings(on_error="skip")).begin)
    assert (trainer.progress.failed_episodes, trainer.progress.skipped_episodes) == (1, 1)
    assert [row.get("failed_episodes") for row in trainer.progress.history] == [None, 0.0, 1.0]
    assert len(faults.pids(bad)) == 2

    def without_it(items, weights):
        return [failed_episode("") if item == bad else run_episode(weights, item.spec) for item in items]

    again = Trainer(settings, tmp_path / "again")
    again.run(later(without_it))
    assert digests(again) == digests(trainer)


@pytest.mark.long
def test_a_validation_that_fails_is_never_the_best(pool, faults, tmp_path):
    settings = small(meta_steps=1, validation={"every": 1})
    faults.order(validation_items(settings, 1, "cpu")[0], "always")
    trainer = Trainer(settings, tmp_path / "run")
    with pytest.raises(PoolError, match=r"^validation at meta-step 0 slot 0"):
        trainer.run(pool(1).begin)
    trainer.run(pool(1, faults=FaultSettings(on_error="skip")).begin)
    assert trainer.progress.best_step == -1
    assert trainer.progress.history[-1]["validation"] == math.inf


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_a_hung_episode_runs_elsewhere_and_its_worker_is_ended(pool, faults, workers, caplog):
    items, weights = training_items(small(), 0, "cpu"), Trainer(small(), "unused").learner.weights
    made = pool(workers, faults=FaultSettings(shortest_deadline_s=12, first_deadline_s=12, deadline_factor=2))
    faults.order(items[3], "hang")
    results = made.run(items, weights)
    assert equal(results, [run_episode(weights, item.spec) for item in items])
    hung, other = faults.pids(items[3])
    if workers == 2:  # the other one has run it meanwhile: nobody has waited for the deadline
        assert (made.restarts, made.repeated) == (0, 0)
        until(lambda: made.run(items, weights) and made.restarts, 60)
    assert made.restarts == 1
    assert hung != other
    what = "backup task" if workers == 2 else "runs again"
    said = rf"meta-step 1 slot 3.* 12 s.*worker [12] \(pid {hung}\).*ended.*{what}"
    assert re.search(said, caplog.text)
    until(lambda: not alive(int(hung)))
