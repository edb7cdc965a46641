"""What a sweep goes on from: the record and the checkpoints, wherever its folder is, whatever else lies in it."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from ml2o_dist.metatrain.checkpoint import Checkpoint, save_checkpoint
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.sweeping.record import SweepRecord
from ml2o_dist.sweeping.record_lines import Report
from ml2o_dist.sweeping.space import load_sweep
from ml2o_dist.sweeping.taking_up import checkpoint_of, take_up
from tests.test_sweep import CONFIG
from tests.wording import says

VALUES = {"learner.lr": 0.01, "rule.hidden": 2}


def settings(*overrides):
    return load_sweep(CONFIG, ["trials=5", *overrides])


class Sweep:
    """A folder as a sweep leaves it: reports on record, and for each a checkpoint unless it is left out."""

    def __init__(self, folder):
        self.folder = folder
        self.record = SweepRecord(folder)

    def begin(self, id, values=VALUES):
        self.record.begin(id, values)

    def say(self, id, step, score=1.0, values=VALUES, checkpoint=True, recorded=True):
        if checkpoint:
            place = self.folder / "tune" / id
            count = len(list(place.glob("checkpoint_*")))
            saved = save_checkpoint(place / "new", Checkpoint(step, {"x": torch.ones(1)}, {}), keep=1)
            saved.rename(place / f"checkpoint_{count:06d}")
            shutil.rmtree(place / "new")
        if recorded:
            self.record.report(id, Report(step, score, score, step, 1.0, values))

    def cut(self, id, number):
        (self.folder / "tune" / id / f"checkpoint_{number:06d}" / "tensors.safetensors").write_bytes(b"")

    def taken_up(self, *overrides):
        self.record = SweepRecord(self.folder)
        return {each.id: each for each in take_up(settings(*overrides), self.folder, self.record)}


@pytest.fixture
def sweep(tmp_path):
    sweep = Sweep(tmp_path)
    for number in range(3):
        sweep.begin(f"a_0000{number}")
    for step in (0, 2):
        sweep.say("a_00000", step)
    return sweep


def test_a_trial_goes_on_from_the_newest_checkpoint_that_is_on_record(sweep):
    sweep.say("a_00000", 4, recorded=False)  # killed before it was told: it is made again
    found = sweep.taken_up("meta_train.meta_steps=8")
    assert found["a_00000"].checkpoint == sweep.folder / "tune" / "a_00000" / "checkpoint_000001"
    assert (found["a_00000"].meta_step, found["a_00000"].newest, found["a_00000"].ended) == (2, 2, False)
    assert (found["a_00001"].checkpoint, found["a_00001"].newest) == (None, -1)


def test_what_was_said_after_a_checkpoint_that_is_cut_is_dropped(sweep, caplog):
    sweep.cut("a_00000", 1)
    found = sweep.taken_up("meta_train.meta_steps=8")
    assert (found["a_00000"].meta_step, found["a_00000"].newest) == (0, 1)
    assert list(SweepRecord(sweep.folder).trials["a_00000"].reports) == [0]
    assert "tensors.safetensors" in caplog.text


def test_the_folder_may_be_elsewhere_by_then(sweep, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "b"
    shutil.move(sweep.folder, elsewhere)
    sweep.folder = elsewhere
    assert sweep.taken_up()["a_00000"].checkpoint == elsewhere / "tune" / "a_00000" / "checkpoint_000001"


def test_links_out_of_the_folder_are_not_followed(sweep, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "b"
    shutil.move(sweep.folder / "tune" / "a_00000", elsewhere)
    (sweep.folder / "tune" / "a_00000").symlink_to(elsewhere)
    assert sweep.taken_up()["a_00000"].checkpoint is None


def test_a_trial_that_had_come_to_its_end_has_ended(sweep):
    sweep.say("a_00000", 4)
    sweep.record.end("a_00001", "failed", "no")
    found = sweep.taken_up()
    assert {id: each.ended for id, each in found.items()} == {"a_00000": True, "a_00001": False, "a_00002": False}
    assert SweepRecord(sweep.folder).trials["a_00000"].state == "finished"


def test_a_trial_that_asha_had_stopped_does_not_run_on(sweep):
    """Killed when the report was on record, and the end that the scheduler gave the trial was not yet."""
    asha = ["scheduler=asha", "asha={grace: 2, reduction: 2}", "meta_train.meta_steps=8"]
    for id, score in (("a_00001", 0.5), ("a_00002", 2.0)):
        sweep.say(id, 2, score)
    found = sweep.taken_up(*asha)
    assert {id: each.ended for id, each in found.items()} == {"a_00000": False, "a_00001": False, "a_00002": True}
    assert SweepRecord(sweep.folder).trials["a_00002"].state == "stopped"
    assert not any(each.ended for each in sweep.taken_up(*asha).values() if each.id != "a_00002")


def test_asha_is_shown_the_reports_in_the_order_in_which_they_came(sweep):
    """The better trial came last: none of them was stopped, whatever the order of their names."""
    for id, score in (("a_00002", 0.9), ("a_00001", 0.5)):
        sweep.say(id, 2, score)
    found = sweep.taken_up("scheduler=asha", "asha={grace: 2, reduction: 2}", "meta_train.meta_steps=8")
    assert not any(each.ended for each in found.values())


def test_a_trial_goes_on_from_the_weights_that_it_was_given(sweep, caplog):
    pbt = ["space={learner.lr: {loguniform: [0.001, 0.1]}}", "scheduler=pbt", "meta_train.meta_steps=8"]
    mine, given = {"learner.lr": 0.01}, {"learner.lr": 0.05}
    for id in ("a_00000", "a_00001", "a_00002"):
        sweep.begin(id, mine)
    for step in (0, 2, 4):
        sweep.say("a_00000", step, values=mine)
        sweep.say("a_00001", step, values=mine)
    sweep.record.copy("a_00001", "a_00000", 2, given)
    found = sweep.taken_up(*pbt)["a_00001"]
    donor = sweep.folder / "tune" / "a_00000"
    steps = {name: load_step(donor / name) for name in sorted(each.name for each in donor.iterdir())}
    assert steps[found.checkpoint.name] == 2
    assert (found.checkpoint.parent, found.meta_step, found.values) == (donor, 2, given)
    for number in range(len(steps)):
        sweep.cut("a_00000", number)
    assert sweep.taken_up(*pbt)["a_00001"].checkpoint.parent.name == "a_00001"
    assert "own weights" in caplog.text


def load_step(folder):
    from ml2o_dist.metatrain.checkpoint import load_checkpoint

    return load_checkpoint(folder).meta_step


def test_the_best_ones_checkpoint_is_that_of_its_last_report(sweep):
    sweep.say("a_00000", 4, recorded=False)
    trial = sweep.record.trials["a_00000"]
    assert checkpoint_of(sweep.folder, trial).name == "checkpoint_000001"
    sweep.cut("a_00000", 1)
    assert checkpoint_of(sweep.folder, trial).name == "checkpoint_000002"  # who loads it is told what is wrong
    assert checkpoint_of(sweep.folder, sweep.record.trials["a_00001"]).name == "checkpoint_000000"


@pytest.mark.parametrize(
    ("id", "values", "why"),
    [
        ("a_00005", VALUES, "'a_00005' ... trials 0 to 4"),
        ("b", VALUES, "'b' ... trials"),
        ("b_00000", VALUES, "two ... same"),
        ("a_00003", {"learner.lr": 0.01}, "trial 4 ... learner.lr"),
        ("a_00003", VALUES | {"x": 1}, "trial 4 ... learner.lr, rule.hidden, x"),
        ("a_00003", VALUES | {"rule.hidden": 3}, "trial 4 ... rule.hidden=3"),
        ("a_00003", VALUES | {"learner.lr": 0.2}, "trial 4 ... learner.lr=0.2"),
        ("a_00003", VALUES | {"learner.lr": True}, "trial 4 ... learner.lr=true"),
        ("a_00003", VALUES | {"learner.lr": "0.01"}, 'trial 4 ... learner.lr="0.01"'),
        ("a_00003", VALUES | {"learner.lr": [0.01]}, "trial 4 ... learner.lr="),
    ],
)
def test_a_record_of_another_sweep_is_refused_in_one_line(sweep, id, values, why):
    sweep.begin(id, values)
    with pytest.raises(UserError) as refused:
        sweep.taken_up()
    said = str(refused.value)
    assert says(said, f"{sweep.folder}/trials.jsonl", "not of this sweep")
    assert says(said, why)
    assert said.endswith("--run-dir")


def test_more_trials_than_the_sweep_has_are_refused(sweep):
    with pytest.raises(UserError, match=r"3 trials.* 2"):
        sweep.taken_up("trials=2")


def test_a_score_that_is_not_finite_is_taken_up(sweep):
    sweep.say("a_00001", 0, math.nan)
    assert math.isnan(sweep.taken_up()["a_00001"].scores[0])
