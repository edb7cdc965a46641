"""PBT without Ray's processes: exchanges in step, the same wherever it was killed, and no waiting for the failed."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
from ray import cloudpickle, tune
from ray.tune.schedulers import TrialScheduler

from ml2o_dist.sweeping.population import LockstepPbt

EVERY, INTERVAL, LAST = 1, 2, 7


class FakeTrial:
    """What PBT touches of a trial of Tune's; its checkpoint is its result."""

    def __init__(self, trial_id, config, checkpoint=None):
        self.trial_id, self.config, self.status, self.experiment_tag = trial_id, config, "PENDING", ""
        manager = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
        manager._latest_checkpoint_result = checkpoint and SimpleNamespace(checkpoint=checkpoint, metrics=checkpoint)
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager, invalidate_cache=lambda: None)
        self.temporary_state = SimpleNamespace(saving_to=None)

    @property
    def latest_checkpoint_result(self):
        return self.run_metadata.checkpoint_manager._latest_checkpoint_result

    @property
    def checkpoint(self):
        return self.latest_checkpoint_result and self.latest_checkpoint_result.checkpoint

    def is_finished(self):
        return self.status in ("TERMINATED", "ERROR")

    def set_status(self, status):
        self.status = status

    def set_config(self, config):
        self.config = config

    def set_experiment_tag(self, tag):
        self.experiment_tag = tag

    def train(self):
        """One validation further, to a loss that depends on the whole way there; returns the result."""
        before = self.checkpoint or {"meta_step": -EVERY, "validation": float(self.trial_id[-1])}
        step = before["meta_step"] + EVERY
        result = {"meta_step": step, "validation": 0.8 * before["validation"] + self.config["lr"] * (1 + step)}
        self.run_metadata.checkpoint_manager._latest_checkpoint_result = SimpleNamespace(
            checkpoint=result, metrics=result
        )
        return result


class Population:
    """Some trials and their scheduler: what Tune's controller does with them, one report at a time."""

    def __init__(self, trials, recorded=None):
        self.search_alg = None
        self.trials, self.copies = [], []

        def copy(id, source, step, sampled):
            self.copies.append((id, source, step, dict(sampled)))

        self.scheduler = LockstepPbt(
            recorded or {},
            seed=3,
            on_copy=copy,
            time_attr="meta_step",
            metric="validation",
            mode="min",
            perturbation_interval=INTERVAL,
            hyperparam_mutations={"lr": tune.loguniform(1e-3, 1)},
            quantile_fraction=0.5,
        )
        for trial in trials:
            self.trials.append(trial)
            self.scheduler.on_trial_add(self, trial)

    def get_trials(self):
        return self.trials

    def pause_trial(self, trial, should_checkpoint):
        trial.status = "PAUSED"

    def _schedule_trial_save(self, trial, result):
        return trial.checkpoint

    def reports(self, record, fails=lambda trial: False):
        """Let trials report; yield each and its checkpoint before, when `record` has it by trial and meta-step."""
        while (trial := self.scheduler.choose_trial_to_run(self)) is not None:
            trial.status = "RUNNING"
            while trial.status == "RUNNING":
                if fails(trial):
                    trial.status = "ERROR"
                    break
                before, rate, result = trial.checkpoint, trial.config["lr"], trial.train()
                record[trial.trial_id, result["meta_step"]] = rate, result["validation"]
                if result["meta_step"] == LAST:
                    trial.status = "TERMINATED"
                elif self.scheduler.on_trial_result(self, trial, result) != TrialScheduler.CONTINUE:
                    trial.status = "PAUSED"
                yield trial, before

    def run(self, **how):
        """Run to the end; return the record."""
        record = {}
        list(self.reports(record, **how))
        return record


def fresh(prefix="a"):
    return [FakeTrial(f"{prefix}_{number}", {"lr": 0.01 * 4**number}) for number in range(4)]


def test_the_worse_half_goes_on_from_the_better_ones_checkpoints_and_no_meta_step_is_left_out():
    record = Population(fresh()).run()
    assert sorted(record) == [(f"a_{number}", step) for number in range(4) for step in range(LAST + 1)]
    for step in range(0, LAST):
        exchange = step > 0 and step % INTERVAL == 0
        here = {id: record[id, step] for id, at in record if at == step}
        better = sorted(here, key=lambda id: here[id][1])[:2]
        for id, (rate, score) in here.items():
            new_rate, new_score = record[id, step + 1]
            if not exchange or id in better:
                assert (new_rate, new_score) == (rate, 0.8 * score + rate * (2 + step))
            else:
                assert new_rate != rate
                assert new_score in [0.8 * here[other][1] + new_rate * (2 + step) for other in better]


def test_what_is_drawn_depends_on_the_trials_numbers_not_on_their_names():
    one, other = (Population(fresh(name)).run() for name in ("a", "b"))
    assert {("a" + id[1:], step): each for (id, step), each in other.items()} == one


def scores(record):
    return {id: {step: score for (of, step), (_, score) in record.items() if of == id} for id, _ in record}


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("count", range(1, 4 * (LAST + 1)))
def test_wherever_it_is_killed_the_outcome_is_the_same(count, lag):
    """With `lag` Tune had not noted the last checkpoint that it was told of: that report is made again."""
    record, killed = {}, Population(fresh())
    told, before = list(islice(killed.reports(record), count))[-1]
    gone_on = []
    for trial in reversed(killed.trials):  # Tune orders them anew
        own = trial.checkpoint and record[trial.trial_id, trial.checkpoint["meta_step"]][1]
        copied = own is not None and trial.checkpoint["validation"] != own  # is noted at once
        late = lag and trial is told and not copied
        gone_on.append(FakeTrial(trial.trial_id, trial.config, before if late else trial.checkpoint))
        if trial.is_finished() and not late:
            gone_on[-1].status = trial.status
    again = Population(gone_on, scores(record))
    list(again.reports(record))
    assert record == Population(fresh()).run()


def last_steps(record):
    return {id: max(step for of, step in record if of == id) for id, _ in record}


def test_a_trial_that_has_failed_is_waited_for_no_more_and_joins_the_others_when_it_is_tried_again():
    def fails(trial):
        return trial.trial_id == "a_2" and trial.checkpoint is not None and trial.checkpoint["meta_step"] == 1

    population = Population(fresh())
    record = population.run(fails=fails)
    assert last_steps(record) == {"a_0": LAST, "a_1": LAST, "a_2": 1, "a_3": LAST}
    killed = Population(fresh())  # when the others are beyond the first exchange
    record = {}
    list(islice(killed.reports(record, fails=fails), 14))
    again = Population([FakeTrial(each.trial_id, each.config, each.checkpoint) for each in killed.trials])
    list(again.reports(record))
    assert sorted(record) == [(f"a_{number}", step) for number in range(4) for step in range(LAST + 1)]


def test_a_trial_that_is_tried_again_keeps_its_place():
    population, record = Population(fresh()), {}
    trial, _ = list(islice(population.reports(record), 14))[-1]
    trial.status = "PENDING"
    population.scheduler.on_trial_add(population, trial)  # as Tune does
    list(population.reports(record))
    assert record == Population(fresh()).run()


def test_each_copy_is_told_with_whose_checkpoint_and_the_values_that_follow():
    population = Population(fresh())
    record, told = {}, []
    for _ in population.reports(record):
        told.append(len(population.copies))
    assert told[10:13] == [0, 2, 2]  # all of an exchange, before anything follows from it
    for id, source, step, sampled in population.copies:
        assert record[id, step + 1] == (sampled["lr"], 0.8 * record[source, step][1] + sampled["lr"] * (2 + step))


def test_it_can_be_pickled_as_tune_does_with_a_sweep_that_begins():
    scheduler = cloudpickle.loads(cloudpickle.dumps(Population([]).scheduler))
    assert scheduler.choose_trial_to_run(Population([])) is None
