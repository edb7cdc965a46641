"""What counts as a failure of a trial: what is raised in it, not the loss of its process."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import ray.cloudpickle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.sweeping.record import SweepRecord
from ml2o_dist.sweeping.space import load_sweep
from ml2o_dist.sweeping.tuning import Watcher, _remove_state, run_trials
from tests.test_sweep import CONFIG
from tests.wording import says

DIED = ActorDiedError()
AWAY = ActorUnavailableError("the actor is temporarily unavailable", None)
PREEMPTED = RayActorError(preempted=True)
RAISED = ValueError("no")

SAMPLED = {"learner.lr": 0.01, "rule.hidden": "2"}  # as Tune has it


@pytest.fixture
def failures(tmp_path):
    """How many failures Tune has of a trial after each of these errors, all but preemptions counted by it before."""

    def count(errors, max_restarts=20):
        settings = load_sweep(CONFIG, [f"meta_train.resources.max_restarts={max_restarts}"])
        record = SweepRecord(tmp_path)
        watcher = Watcher(settings, record, None, None, lambda: False)
        metadata = SimpleNamespace(num_failures=0, invalidate_cache=lambda: None)
        file = str(tmp_path / "error.pkl")
        trial = SimpleNamespace(trial_id="a", config=SAMPLED, run_metadata=metadata, pickled_error_file=file)
        counts = []
        for error in errors:
            (tmp_path / "error.pkl").write_bytes(ray.cloudpickle.dumps(error))
            metadata.num_failures += error is not PREEMPTED
            watcher.on_trial_recover(0, [trial], trial)
            counts.append(metadata.num_failures)
        assert record.trials["a"].state == "running"
        return counts

    return count


def test_only_what_was_raised_in_the_trial_counts(failures):
    assert failures([DIED, AWAY, PREEMPTED, RAISED, DIED]) == [0, 0, 0, 1, 1]


def test_a_trial_that_loses_its_process_again_and_again_comes_to_its_end(failures):
    assert failures([DIED] * 4, max_restarts=2) == [0, 0, 1, 2]


def test_a_trial_that_is_lost_for_good_before_its_process_was_up_is_recorded_as_failed(tmp_path):
    record, told = SweepRecord(tmp_path), []
    runs = SimpleNamespace(
        begin=lambda *_: None, tag=lambda id, tags: told.append(tags), end=lambda id, status: told.append(status)
    )
    display = SimpleNamespace(update=lambda *_: None)
    watcher = Watcher(load_sweep(CONFIG, []), record, runs, display, lambda: False)
    (tmp_path / "error.txt").write_text("its host died\n")
    trial = SimpleNamespace(trial_id="a", config=SAMPLED, status="ERROR", error_file=str(tmp_path / "error.txt"))
    watcher.on_trial_error(0, [trial], trial)
    assert (record.trials["a"].state, record.trials["a"].error) == ("failed", "its host died")
    assert told == [{"state": "failed", "error": "its host died"}, "FAILED"]


def test_the_log_says_why_a_trial_goes_on_elsewhere(failures, caplog):
    failures([AWAY])
    assert says(caplog.text, "trial 1", "lost", "not answer", "newest checkpoint")


def test_tune_is_left_no_pickle_to_look_into_when_the_sweep_ends(tmp_path):
    watcher = Watcher(load_sweep(CONFIG, []), SweepRecord(tmp_path), None, None, lambda: False)
    trials = [SimpleNamespace(run_metadata=SimpleNamespace(pickled_error_filename="error.pkl")) for _ in range(2)]
    watcher.on_experiment_end(trials)
    assert [trial.run_metadata.pickled_error_filename for trial in trials] == [None, None]


def test_a_stop_waits_until_tune_has_a_trial(tmp_path):
    """Without any it would read the state that lies in its folder, wherever that came from."""
    watcher = Watcher(load_sweep(CONFIG, []), SweepRecord(tmp_path), None, None, lambda: True)
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        watcher.on_step_begin(0, [])
        assert received == []
        watcher.on_step_begin(1, [SimpleNamespace(trial_id="a")])
        assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_tune_leaves_of_its_state_is_removed_and_nothing_else(tmp_path):
    state = ("tuner.pkl", "trainable.pkl", "experiment_state-2026-11-30_11-00-00.json", "a_00000/error.pkl",
             "basic-variant-state-2026-11-30_11-00-00.json")  # fmt: skip
    kept = ("a_00000/checkpoint_000000/state.json", "a_00000/error.txt", "notes.json")
    for name in (*state, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    _remove_state(tmp_path)
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()) == sorted(kept)


def test_nothing_behind_a_link_is_removed(tmp_path):
    elsewhere, place = tmp_path / "models", tmp_path / "run" / "tune"
    elsewhere.mkdir()
    (elsewhere / "mine.pkl").write_bytes(b"x")
    place.mkdir(parents=True)
    (place / "a_00000").symlink_to(elsewhere)
    _remove_state(place)
    assert (elsewhere / "mine.pkl").exists()
    place = tmp_path / "other" / "tune"
    place.parent.mkdir()
    place.symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"^{place} .*link.* {place.parent}$"):
        run_trials(load_sweep(CONFIG, []), place.parent, [], None)
    assert (elsewhere / "mine.pkl").exists()
