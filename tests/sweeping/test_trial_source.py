"""Which trials Tune is given: those of a sweep that was killed and those of a calm one are the same."""

from __future__ import annotations

import pytest
from ray.tune.experiment import Experiment

from ml2o_dist.metatrain.checkpoint import Checkpoint, save_checkpoint
from ml2o_dist.sweeping.search import param_space
from ml2o_dist.sweeping.space import as_sampled, as_values, load_sweep
from ml2o_dist.sweeping.trial_source import Earlier, OptunaSuggestions, TrialSource, drawn_number
from tests.test_sweep import CONFIG


def source(settings, folder, earlier=()):
    given = TrialSource(settings, earlier)
    samples = 1 if settings.search == "grid" else settings.count
    experiment = Experiment(
        "tune", run=lambda sampled: None, config=param_space(settings), num_samples=samples, storage_path=str(folder)
    )
    given.add_configurations([experiment])
    return given


def all_of(given):
    trials = []
    while (trial := given.next_trial()) is not None:
        trials.append(trial)
    assert given.is_finished()
    return trials


def earlier(settings, trial, *, id=None, ended=False, checkpoint=None, scores=None, newest=-1):
    values = as_values(settings, trial.config)
    step = max(scores) if scores else -1
    return Earlier(id or trial.trial_id, values, ended, scores or {}, checkpoint, step, newest)


GRID = "space={slots: {grid: [2, 3, 4]}, horizon: {choice: [[4], [8]]}}"


@pytest.mark.parametrize("words", [["trials=6"], ["search=grid", "trials=null", GRID]])
def test_what_is_not_on_record_is_drawn_as_if_nothing_had_been_killed(tmp_path, words):
    settings = load_sweep(CONFIG, words)
    calm = all_of(source(settings, tmp_path))
    assert [drawn_number(trial.trial_id) for trial in calm] == list(range(6))
    begun = [calm[4], calm[1], calm[2]]
    known = [earlier(settings, trial, ended=trial is calm[1]) for trial in begun]
    again = all_of(source(settings, tmp_path, known))
    assert [trial.trial_id for trial in again[:3]] == [trial.trial_id for trial in (calm[1], calm[4], calm[2])]
    assert [drawn_number(trial.trial_id) for trial in again[3:]] == [0, 3, 5]
    configs = {drawn_number(trial.trial_id): trial.config for trial in again}
    assert configs == {drawn_number(trial.trial_id): trial.config for trial in calm}
    assert [trial.status for trial in again[:2]] == ["TERMINATED", "PENDING"]


def test_a_trial_stands_where_it_stood(tmp_path):
    settings = load_sweep(CONFIG, [])
    (drawn, *_) = all_of(source(settings, tmp_path))
    folder = save_checkpoint(tmp_path, Checkpoint(2, {}, {}), keep=1)
    changed = {key: as_sampled(settings.space[key], 0.05 if key == "learner.lr" else 4) for key in settings.space}
    drawn.config = changed
    known = earlier(settings, drawn, id="x_00000", checkpoint=folder, scores={0: 3.0, 2: 2.0}, newest=7)
    (trial, *_) = all_of(source(settings, tmp_path, [known]))
    assert (trial.trial_id, str(trial), trial.config) == ("x_00000", "x_00000", changed)
    assert trial.storage.trial_dir_name == "x_00000"
    assert trial.checkpoint.path == str(folder)
    assert trial.latest_checkpoint_result.metrics["meta_step"] == 2
    assert trial.latest_checkpoint_result.metrics["validation"] == 2.0
    trial.storage._update_checkpoint_index({})
    assert trial.storage.checkpoint_dir_name == "checkpoint_000008"  # none that is there is written over


def test_no_more_trials_at_a_time_than_are_asked_for(tmp_path):
    settings = load_sweep(CONFIG, ["trials=4", "max_concurrent=2"])
    given = source(settings, tmp_path)
    first, second = given.next_trial(), given.next_trial()
    assert given.next_trial() is None
    assert not given.is_finished()
    first.set_status("TERMINATED")
    assert given.next_trial() is not None
    assert given.next_trial() is None
    second.set_status("ERROR")
    assert given.next_trial() is not None
    given.set_finished()
    assert given.is_finished()


def scored(values):
    return abs(values["learner.lr"] - 0.03) + (values["rule.hidden"] != 4)


def test_optuna_goes_on_as_if_it_had_not_been_killed(tmp_path):
    """One trial at a time; the third process begins after twelve trials, beyond those that Optuna draws at random."""
    settings = load_sweep(CONFIG, ["search=optuna", "trials=16", "max_concurrent=1"])

    def run(given, count):
        done = []
        while len(done) < count and (trial := given.next_trial()) is not None:
            values = as_values(settings, trial.config)
            if not trial.is_finished():
                trial.set_status("TERMINATED")
                given.on_trial_complete(trial.trial_id, {"validation": scored(values)})
            done.append(trial)
        return done

    calm = run(source(settings, tmp_path), 99)
    assert len(calm) == 16
    assert len({trial.config["learner.lr"] for trial in calm}) == 16
    known = [
        earlier(settings, trial, ended=True, scores={4: scored(as_values(settings, trial.config))})
        for trial in calm[:12]
    ]
    again = run(source(settings, tmp_path, known), 99)
    assert [trial.config for trial in again] == [trial.config for trial in calm]


def test_optuna_is_told_of_trials_that_went_on_and_of_those_that_failed(tmp_path):
    settings = load_sweep(CONFIG, ["search=optuna", "trials=3"])
    asking = OptunaSuggestions(settings, [])
    first = asking.ask("a", 0)
    asking.tell("a", first, None)
    asking.tell("of before", {"learner.lr": 0.02, "rule.hidden": "2"}, 1.5)
    asking.tell("lost", {"learner.lr": 0.02, "rule.hidden": "4"}, float("nan"))
    trials = asking._study.get_trials()
    assert [(trial.state.name, trial.value) for trial in trials] == [("FAIL", None), ("COMPLETE", 1.5), ("FAIL", None)]
    assert trials[1].params == {"learner.lr": 0.02, "rule.hidden": "2"}
