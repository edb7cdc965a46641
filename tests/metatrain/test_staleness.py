"""Staleness: each meta-step runs under weights that so many updates are old, and stopping anywhere changes nothing."""

from __future__ import annotations

import pytest
import torch

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.metatrain.episode import run_episode
from ml2o_dist.metatrain.learner import Learner
from ml2o_dist.metatrain.schedule import training_items
from ml2o_dist.metatrain.trainer import Trainer
from tests.metatrain.executing import Cut, cut_after, digests, in_process, later
from tests.metatrain.settings import small


def with_old_weights(settings):
    """The weights after the meta-steps of `settings`, by a loop that keeps every version."""
    learner = Learner(settings)
    versions = [learner.weights]
    for step in range(settings.meta_steps):
        weights = versions[max(0, step - settings.staleness)]
        learner.update([run_episode(weights, item.spec) for item in training_items(settings, step, "cpu")])
        versions.append(learner.weights)
    return weights_sha256(learner.weights)


@pytest.mark.parametrize("staleness", [2, *(pytest.param(staleness, marks=pytest.mark.long) for staleness in (1, 5))])
def test_with_staleness_each_meta_step_runs_under_weights_that_many_updates_old(tmp_path, staleness):
    settings = small(staleness=staleness, meta_steps=7)
    order = []

    def begin(items, weights):
        order.append(("begun", items[0].key))

        def results():
            order.append(("awaited", items[0].key))
            return in_process(items, weights)

        return results

    trainer = Trainer(settings, tmp_path)
    trainer.run(begin)
    assert weights_sha256(trainer.learner.weights) == with_old_weights(settings)
    assert digests(trainer)[0] != with_old_weights(small(meta_steps=7))
    assert [row.get("lag") for row in trainer.progress.history] == [None, *(min(k, staleness) for k in range(7))]
    steps = [(what, key.meta_step) for what, key in order if key.purpose == "train"]
    for step in range(7):
        ahead = [number for what, number in steps[: steps.index(("awaited", step))] if what == "begun"]
        assert ahead == list(range(min(7, step + staleness + 1))), "all whose weights exist, and no others"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = Trainer(small(staleness=2, meta_steps=6), tmp_path_factory.mktemp("whole"))
    trainer.run(later(in_process))
    return trainer


@pytest.mark.parametrize(
    "calls", [1, *(pytest.param(calls, marks=pytest.mark.long) for calls in (2, 3, 4, 6, 7)), 5, 8]
)
def test_with_staleness_too_stopping_anywhere_changes_nothing(whole, tmp_path, calls):
    first, second = (Trainer(whole.settings, tmp_path) for _ in range(2))
    with pytest.raises(Cut):
        first.run(later(cut_after(calls)))
    first.save()
    second.resume()
    second.run(later(in_process))
    assert digests(second) == digests(whole)


def test_a_step_that_is_refused_leaves_the_versions_before_it(tmp_path):
    trainer = Trainer(small(staleness=2, meta_steps=4), tmp_path)
    trainer.run(later(in_process))
    learner = trainer.learner
    results = in_process(training_items(trainer.settings, 0, "cpu"), learner.weights)
    learner.restore(learner.tensors() | {"theta": torch.full_like(learner.tensors()["theta"], 3e38)}, learner.version)
    learner.settings = small(staleness=2, meta_steps=4, learner={"lr": 1e38, "final_lr": 1e38})  # the sum is no float32
    before = learner.tensors()
    with pytest.raises(ArithmeticError, match="would not be finite"):
        learner.update(results)
    after = learner.tensors()
    assert {name for name in before if name.startswith("earlier/")} == {"earlier/1", "earlier/2"}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert weights_sha256(learner.weights_of(3)) == weights_sha256(learner._named(before["earlier/1"]))
