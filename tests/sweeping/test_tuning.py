"""What counts as a failure of a trial: what is raised in it, not the loss of its process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray.cloudpickle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

from ml2o_dist.sweeping.record import SweepRecord
from ml2o_dist.sweeping.space import load_sweep
from ml2o_dist.sweeping.tuning import Watcher
from tests.test_sweep import CONFIG

DIED = ActorDiedError()
AWAY = ActorUnavailableError("the actor is temporarily unavailable", None)
PREEMPTED = RayActorError(preempted=True)
RAISED = ValueError("no")


@pytest.fixture
def failures(tmp_path):
    """How many failures Tune has of a trial after each of these errors, all but preemptions counted by it before."""

    def count(errors, max_restarts=20):
        settings = load_sweep(CONFIG, [f"meta_train.resources.max_restarts={max_restarts}"])
        record = SweepRecord(tmp_path)
        record.begin("a", {})
        watcher = Watcher(settings, record, None, None, lambda: False, lambda ids: None)
        metadata = SimpleNamespace(num_failures=0, invalidate_cache=lambda: None)
        trial = SimpleNamespace(trial_id="a", run_metadata=metadata, pickled_error_file=str(tmp_path / "error.pkl"))
        counts = []
        for error in errors:
            (tmp_path / "error.pkl").write_bytes(ray.cloudpickle.dumps(error))
            metadata.num_failures += error is not PREEMPTED
            watcher.on_trial_recover(0, [trial], trial)
            counts.append(metadata.num_failures)
        return counts

    return count


def test_only_what_was_raised_in_the_trial_counts(failures):
    assert failures([DIED, AWAY, PREEMPTED, RAISED, DIED]) == [0, 0, 0, 1, 1]


def test_a_trial_that_loses_its_process_again_and_again_comes_to_its_end(failures):
    assert failures([DIED] * 4, max_restarts=2) == [0, 0, 1, 2]


def test_the_log_says_why_a_trial_goes_on_elsewhere(failures, caplog):
    failures([AWAY])
    assert "trial 1 is lost: it does not answer any more; it goes on from its newest checkpoint" in caplog.text
