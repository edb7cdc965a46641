"""The loop without Ray: learning happens, and stopping anywhere changes nothing."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from ml2o_dist.artifact import save_artifact, weights_sha256
from ml2o_dist.metatrain.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from ml2o_dist.metatrain.schedule import training_items, validation_items
from ml2o_dist.metatrain.trainer import Trainer, TrainingError
from ml2o_dist.rules.base import Oracle
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from ml2o_dist.runtime.errors import UserError
from tests.metatrain.executing import Cut, cut_after, digests, in_process, later
from tests.metatrain.faulty_disk import FaultyDisk, Killed
from tests.metatrain.settings import small
from tests.wording import says


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    trainer = Trainer(small(), tmp_path_factory.mktemp("calm"))
    trainer.run(later(in_process))
    return trainer


def test_training_changes_every_tensor_of_the_network(calm):
    start = ML2ONetwork(calm.settings.rule).state_dict()
    for name, tensor in calm.learner.weights.items():
        assert not torch.equal(tensor, start[name]), name
        assert bool(tensor.isfinite().all())


@pytest.mark.parametrize("kind", ["replay", "exact"])
@pytest.mark.parametrize(
    "rule",
    [
        {"output": "controlled", "features": "alignment"},
        {"output": "scaled", "features": "log_sign", "objectives": "per_objective", "count": 2},
    ],
)
def test_nor_does_any_tensor_of_the_other_forms_stay_as_it_was(tmp_path, rule, kind):
    train = [{"problem": "quadratic[n=4,noise=0.1,batch=4]"}]
    settings = small(meta_steps=3, rule=rule, estimator={"kind": kind}, family={"train": train})
    trainer = Trainer(settings, tmp_path)
    start = trainer.learner.weights
    trainer.run(later(in_process))
    assert not [name for name, tensor in trainer.learner.weights.items() if torch.equal(tensor, start[name])]


def test_the_meta_loss_falls(tmp_path):
    """On the same episodes, before against after: an LSTM that was never registered would change nothing."""
    settings = small(meta_steps=30, validation={"every": 30}, learner={"lr": 0.02})
    trainer = Trainer(settings, tmp_path)
    fresh = [item for step in range(100, 106) for item in training_items(settings, step, "cpu")]
    before = [r.meta_loss for r in in_process(fresh, trainer.learner.weights)]
    trainer.run(later(in_process))
    after = [r.meta_loss for r in in_process(fresh, trainer.learner.weights)]
    assert sum(after) / len(after) < sum(before) / len(before) - 0.05
    assert sum(a < b for a, b in zip(after, before, strict=True)) > 0.8 * len(after)


def test_it_goes_on_from_the_weights_that_begin_names(calm, tmp_path):
    saved = save_artifact(tmp_path / "before", calm.learner.weights, calm.settings.rule, {})
    settings = small(begin=str(saved.path), meta_steps=4, learner={"ema": 0.9})
    trainer = Trainer(settings, tmp_path / "after")
    trainer.begin()
    for weights in (trainer.learner.weights, trainer.learner.averaged_weights, trainer.best_weights):
        assert weights_sha256(weights) == saved.weights_sha256
    scores = [r.score for r in in_process(validation_items(settings, 0, "cpu"), calm.learner.weights)]
    trainer.run(later(in_process))
    history = trainer.progress.history
    assert next(iter(history))["validation"] == pytest.approx(sum(scores) / len(scores))
    assert weights_sha256(trainer.learner.weights) != saved.weights_sha256
    again = Trainer(settings, tmp_path / "after")
    saved.path.unlink()  # a run that is gone on with has no need of them
    again.resume()
    assert digests(again) == digests(trainer)
    assert again.progress.begun_from == saved.weights_sha256


def test_weights_of_another_rule_are_refused_with_the_settings_that_they_need(tmp_path):
    trainer = Trainer(small(begin="pretrained"), tmp_path)
    with pytest.raises(UserError, match=r"init_from=pretrained: .*rule\.features=alignment .*rule\.hidden=8"):
        trainer.begin()
    with pytest.raises(UserError, match="is missing"):
        Trainer(small(begin=str(tmp_path / "none")), tmp_path).begin()


def test_the_best_validated_weights_are_kept(calm):
    rows = [row for row in calm.progress.history if "validation" in row]
    assert [row["meta_step"] for row in rows] == [0, 4, 8, 12]
    best = min(rows, key=lambda row: row["validation"])
    assert (calm.progress.best_score, calm.progress.best_step) == (best["validation"], best["meta_step"])
    assert calm.progress.best_score < rows[0]["validation"]


@pytest.mark.parametrize("calls", [6, *(pytest.param(calls, marks=pytest.mark.long) for calls in (0, 3, 9, 12, 14))])
def test_cut_anywhere_and_resumed_ends_at_the_same_weights(calm, tmp_path, calls):
    """16 calls in all: 12 meta-steps and 4 validations."""
    first = Trainer(small(), tmp_path)
    with pytest.raises(Cut):
        first.run(later(cut_after(calls)))
    first.save()
    second = Trainer(small(), tmp_path)
    assert second.resume() == []
    with pytest.raises(Cut):
        second.run(later(cut_after(1)))
    second.save()
    third = Trainer(small(workers=2), tmp_path)
    third.resume()
    third.run(later(in_process))
    assert digests(third) == digests(calm)
    names = ("meta_step", "meta_loss", "validation")
    assert [[r.get(n) for n in names] for r in third.progress.history] == [
        [r.get(n) for n in names] for r in calm.progress.history
    ]


@pytest.mark.long
@pytest.mark.parametrize("how", ["killed after", "killed in mid-write"])
def test_killed_at_any_file_operation_of_a_checkpoint_and_resumed_ends_at_the_same_weights(tmp_path, monkeypatch, how):
    settings = small(meta_steps=3, checkpoint_every=1, keep_checkpoints=2, slots=2, horizon=2, validation={"every": 2})

    def run_on(disk, trainer):
        def struck(*args):
            with disk.active():
                return save_checkpoint(*args)

        with monkeypatch.context() as patch:
            patch.setattr("ml2o_dist.metatrain.trainer.save_checkpoint", struck)
            trainer.run(later(in_process))

    calm, disk = Trainer(settings, tmp_path / "calm"), FaultyDisk()
    run_on(disk, calm)
    assert disk.done.count("rename") == 4, "at 0, before anything is computed, and after each meta-step"
    resumed = 0
    for at in range(len(disk.done)):
        first, second = (Trainer(settings, tmp_path / str(at)) for _ in range(2))
        with pytest.raises(Killed):
            run_on(FaultyDisk(at, how), first)
        if newest_checkpoint(first.run_dir / "checkpoints")[0] is not None:
            assert second.resume() == []
            resumed += 1
        second.run(later(in_process))
        assert digests(second) == digests(calm), (at, disk.done[at])
    assert resumed > len(disk.done) // 2


def failing_saves(monkeypatch, numbers):
    """Let the saves of a checkpoint with these numbers, from 1, fail for want of space."""
    calls = []

    def save(*args):
        calls.append(args)
        if len(calls) in numbers:
            raise OSError(28, "No space left on device")
        return save_checkpoint(*args)

    monkeypatch.setattr("ml2o_dist.metatrain.trainer.save_checkpoint", save)
    return calls


def test_a_checkpoint_that_cannot_be_written_is_warned_of_once_and_the_next_one_tried(
    calm, tmp_path, monkeypatch, caplog
):
    calls, saved = failing_saves(monkeypatch, {3, 4, 6}), []
    trainer = Trainer(small(checkpoint_every=2), tmp_path, on_saved=lambda: saved.append(trainer.learner.version))
    trainer.run(later(in_process))
    assert digests(trainer) == digests(calm)
    assert [checkpoint.meta_step for _, checkpoint, _ in calls] == [0, 2, 4, 6, 8, 10, 12]
    assert saved == [0, 2, 8, 12]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2, "once for steps 4 and 6, once for step 10"
    assert says(warnings[0], "no checkpoint", str(tmp_path), "meta-step 4", "No space left on device")


def test_the_time_of_all_processes_is_in_the_checkpoint(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("ml2o_dist.metatrain.trainer.time.monotonic", lambda: now[0])

    def slow(items, weights):
        now[0] += 7.0
        return in_process(items, weights)

    def cut_off(items, weights):
        if items[0].key.meta_step >= 2:
            raise Cut
        return slow(items, weights)

    settings = small(meta_steps=4, validation={"every": 4}, checkpoint_every=1)
    first = Trainer(settings, tmp_path)
    with pytest.raises(Cut):
        first.run(later(cut_off))
    now[0] += 5.0
    first.save()  # there already
    now[0] += 5000.0
    second = Trainer(settings, tmp_path)
    second.resume()
    now[0] += 60.0  # Ray starts
    second.run(later(slow))
    state = newest_checkpoint(tmp_path / "checkpoints")[0].state["progress"]
    assert state["seconds"] == 6 * 7.0, "four meta-steps and two validations"


def test_the_last_checkpoint_must_be_written(tmp_path, monkeypatch):
    failing_saves(monkeypatch, {3})
    trainer = Trainer(small(meta_steps=4, checkpoint_every=2), tmp_path)
    with pytest.raises(OSError, match="No space left"):
        trainer.run(later(in_process))
    trainer.save()
    assert newest_checkpoint(tmp_path / "checkpoints")[0].meta_step == 4


def test_metrics_are_written_with_one_row_for_each_meta_step(calm):
    table = pq.read_table(calm.run_dir / "metrics.parquet").to_pydict()
    assert table["meta_step"] == list(range(13))
    assert all(math.isfinite(value) for value in table["meta_loss"][1:])
    assert table["inner_steps_per_s"][0] is None


def test_resume_refuses_another_configuration_and_an_empty_folder(calm, tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        Trainer(small(), tmp_path).resume()
    with pytest.raises(UserError, match=r"another configuration.*learner\.lr.*0\.5.*0\.01"):
        Trainer(small(learner={"lr": 0.5}), calm.run_dir).resume()


def test_episodes_that_are_not_finite_are_skipped_counted_and_survived(tmp_path):
    def spoiled(items, weights):
        results = in_process(items, weights)
        training = items[0].key.purpose == "train"
        return [replace(r, gradient=None, finite=False, meta_loss=math.nan) if training and i == 1 else r
                for i, r in enumerate(results)]  # fmt: skip

    trainer = Trainer(small(meta_steps=3), tmp_path)
    trainer.run(later(spoiled))
    assert trainer.progress.skipped_episodes == 3
    assert all(bool(t.isfinite().all()) for t in trainer.learner.weights.values())


def test_a_validation_that_diverges_is_never_the_best(tmp_path):
    def diverging(items, weights):
        results = in_process(items, weights)
        if items[0].key.purpose == "validate" and items[0].key.meta_step > 0:
            return [replace(r, finite=False, score=-100.0) for r in results]
        return results

    trainer = Trainer(small(), tmp_path)
    trainer.run(later(diverging))
    assert trainer.progress.best_step == 0
    assert trainer.progress.history[-1]["validation"] == math.inf


OVERFLOWS = "multidigits[hidden=4,batch=8,init=1e30]"  # its logits are infinite, its losses inf - inf


def check_that_others_go_on(trainer, name):
    """Slots of the sound problem go on training; nothing of the other's gets into the weights."""
    trainer.run(later(in_process))
    steps = trainer.settings.meta_steps
    items = [item for step in range(steps) for item in training_items(trainer.settings, step, "cpu")]
    spoiled = sum(item.spec.problem.name == name for item in items)
    assert 0 < spoiled < len(items)
    assert trainer.progress.skipped_episodes == spoiled
    assert trainer.progress.failed_episodes == 0
    assert all(bool(t.isfinite().all()) for t in trainer.learner.weights.values())
    assert all(math.isfinite(row["meta_loss"]) for row in list(trainer.progress.history)[1:])


@pytest.mark.parametrize("kind", ["replay", "exact"])
def test_episodes_whose_losses_overflow_are_left_out(tmp_path, kind):
    train = [{"problem": "quadratic[n=4]"}, {"problem": OVERFLOWS}]
    settings = small(meta_steps=6, slots=6, estimator={"kind": kind}, family={"train": train})
    check_that_others_go_on(Trainer(settings, tmp_path), "multidigits")


@pytest.mark.parametrize(
    "value", [math.nan, *(pytest.param(value, marks=pytest.mark.long) for value in (math.inf, -math.inf))]
)
def test_so_are_episodes_with_one_gradient_entry_that_is_not_finite(tmp_path, monkeypatch, value):
    real = Oracle.jacobian

    def spoiling(oracle, parameters, batch):
        jacobian, losses = real(oracle, parameters, batch)
        if oracle.problem.dimension == 2 and oracle.backwards == 3 * oracle.problem.objectives:
            jacobian[0, 0, 1] = value
        return jacobian, losses

    monkeypatch.setattr(Oracle, "jacobian", spoiling)
    train = [{"problem": "quadratic[n=4]"}, {"problem": "cagrad_toy"}]
    check_that_others_go_on(Trainer(small(meta_steps=6, slots=6, family={"train": train}), tmp_path), "cagrad_toy")


def test_ten_meta_steps_without_a_usable_episode_end_the_run(tmp_path):
    settings = small(meta_steps=40, family={"train": [{"problem": OVERFLOWS}]})
    trainer = Trainer(settings, tmp_path)
    with pytest.raises(TrainingError, match=r"no episode.*last 10 meta-steps.*finite meta-gradient"):
        trainer.run(later(in_process))
    assert trainer.learner.version == 9
    trainer.save()
    again = Trainer(settings, tmp_path)
    again.resume()
    assert again.progress.skipped_episodes == 9 * 4
    assert again.progress.best_step == 0


def test_a_run_that_is_killed_before_its_first_meta_step_can_be_resumed(calm, tmp_path):
    def killed(items, weights):
        raise Cut

    with pytest.raises(Cut):
        Trainer(small(), tmp_path).run(later(killed))
    second = Trainer(small(), tmp_path)
    second.resume()
    assert second.learner.version == 0
    second.run(later(in_process))
    assert digests(second) == digests(calm)


FORGED = {
    "no progress": (lambda t, s: s.pop("progress"), "progress"),
    "progress of texts": (lambda t, s: s["progress"].update(inner_steps="many"), "inner_steps.*type"),
    "progress of more": (lambda t, s: s["progress"].update(more=1), "progress"),
    "hashes that are numbers": (lambda t, s: s["progress"].update(data_sha256={"a": 1}), "data_sha256.*type"),
    "no configuration": (lambda t, s: s.pop("config"), "configuration.*checkpoints/step_000012.*settings"),
    "a configuration that is a list": (lambda t, s: s.update(config=[]), "settings.*dictionary"),
    "no weights": (lambda t, s: t.pop("theta"), "lacks.*theta"),
    "one weight for all": (lambda t, s: t.update(theta=torch.zeros(1)), r"theta.*shape \[1\], not \["),
    "weights of nothing": (lambda t, s: t.update(average=t["average"] * math.nan), "average.*not finite"),
    "whole numbers": (lambda t, s: t.update(exp_avg=t["exp_avg"].long()), "exp_avg.*int64"),
    "two numbers of steps": (lambda t, s: t.update(adam_step=torch.zeros(2)), "adam_step.*shape"),
    "other best weights": (lambda t, s: t.update({"best/x": torch.zeros(1)}), "tensors.*rule"),
    "no best weights": (lambda t, s: t.pop("best/head.bias"), "lacks.*best/head.bias"),
    "a history of one column": (lambda t, s: t.pop("history/meta_step"), "history.*length"),
    "a history of two lengths": (
        lambda t, s: t.update({"history/meta_loss": torch.zeros(1, dtype=torch.float64)}),
        "history.*length",
    ),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_checkpoint_with_something_else_in_it_is_one_line(kind, calm, tmp_path):
    change, why = FORGED[kind]
    whole, _ = newest_checkpoint(calm.run_dir / "checkpoints")
    tensors, state = dict(whole.tensors), copy.deepcopy(whole.state)
    change(tensors, state)
    save_checkpoint(tmp_path / "checkpoints", Checkpoint(whole.meta_step, tensors, state), keep=1)
    again = Trainer(calm.settings, tmp_path)
    before = digests(again)
    with pytest.raises(UserError, match=why) as caught:
        again.resume()
    assert len(str(caught.value).splitlines()) == 1
    assert digests(again) == before, "nothing was taken over"
