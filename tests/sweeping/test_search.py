"""How Ray Tune is set up: what is drawn lies in the space, the same for a seed, and ASHA knows what was before."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.tune.schedulers import TrialScheduler
from ray.tune.search.variant_generator import generate_variants

from ml2o_dist.sweeping.search import RememberingAsha, _inside, longest, param_space, tune_config
from ml2o_dist.sweeping.space import as_values, load_sweep
from ml2o_dist.sweeping.trial import placement
from tests.sweeping.test_space import LR

SPACE = (
    "space={learner.lr: {loguniform: [0.001, 0.1]}, learner.ema: {uniform: [0.2, 0.4]}, slots: {randint: [2, 3]},"
    " rule.hidden: {lograndint: [2, 4]}, horizon: {choice: [[4], [4, 8]]}}"
)


def drawn(settings, count=200):
    """What Tune's variants of the space come to, as values."""
    import numpy as np

    state = np.random.RandomState(0)
    spec = {"config": param_space(settings)}
    return [as_values(settings, next(generate_variants(spec, random_state=state))[1]["config"]) for _ in range(count)]


def test_what_is_drawn_lies_in_the_space_with_both_ends_of_whole_numbers():
    rows = drawn(load_sweep(None, [SPACE]))
    assert all(0.001 <= row["learner.lr"] <= 0.1 and 0.2 <= row["learner.ema"] <= 0.4 for row in rows)
    assert {row["meta_batch_size"] for row in rows} == {2, 3}
    assert {row["rule.hidden"] for row in rows} == {2, 3, 4}
    assert {tuple(row["horizon"]) for row in rows} == {(4,), (4, 8)}
    below = sum(row["learner.lr"] < 0.01 for row in rows)
    assert 60 <= below <= 140  # half of a logarithmic interval is its lower decade


def test_a_grid_is_every_combination():
    settings = load_sweep(None, ["search=grid", "space={slots: {grid: [2, 3]}, learner.ema: {choice: [0, 0.5, 0.9]}}"])
    variants = [as_values(settings, spec["config"]) for _, spec in generate_variants({"config": param_space(settings)})]
    assert settings.count == len(variants) == 6
    assert {(v["meta_batch_size"], v["learner.ema"]) for v in variants} == {
        (s, e) for s in (2, 3) for e in (0, 0.5, 0.9)
    }


def test_what_pbt_has_changed_is_brought_back_into_its_interval():
    space = load_sweep(None, [SPACE]).space
    changed = {"learner.lr": 0.12, "learner.ema": 0.16, "meta_batch_size": 3.6, "rule.hidden": 1.6, "horizon": "[4]"}
    assert _inside(space, changed) == {
        "learner.lr": 0.1, "learner.ema": 0.2, "meta_batch_size": 3, "rule.hidden": 2, "horizon": "[4]"
    }  # fmt: skip


def asha(reports):
    scheduler = RememberingAsha(
        {id: dict(each) for id, each in reports.items()},
        time_attr="meta_step",
        max_t=16,
        grace_period=2,
        reduction_factor=2,
    )
    scheduler.set_search_properties("validation", "min")
    return scheduler


def result(step, score):
    return {"meta_step": step, "validation": score}


def test_asha_stops_the_worse_half_and_is_the_same_after_it_was_gone_on_with():
    """Four trials at the first rung; the fifth is judged against them whether this process saw them or not."""
    reports = {f"t{i}": [(0, 5.0), (2, float(i))] for i in range(4)}
    trials = {id: SimpleNamespace(trial_id=id) for id in [*reports, "new"]}
    seen, told = asha({}), asha(reports)
    for id, trial in trials.items():
        seen.on_trial_add(None, trial)
        told.on_trial_add(None, trial)
        for step, score in reports.get(id, []):
            seen.on_trial_result(None, trial, result(step, score))
    for score, decision in ((0.5, TrialScheduler.CONTINUE), (2.5, TrialScheduler.STOP)):
        copies = [cloudpickle.loads(cloudpickle.dumps(each)) for each in (seen, told)]
        assert [each.on_trial_result(None, trials["new"], result(2, score)) for each in copies] == [decision] * 2
    alone = asha({})
    alone.on_trial_add(None, trials["new"])
    assert alone.on_trial_result(None, trials["new"], result(2, 2.5)) == TrialScheduler.CONTINUE


def test_a_score_that_is_not_finite_is_the_worst():
    scheduler = asha({})
    decisions = {}
    for id, score in (("good", 1.0), ("better", 0.5), ("lost", math.inf)):
        trial = SimpleNamespace(trial_id=id)
        scheduler.on_trial_add(None, trial)
        decisions[id] = scheduler.on_trial_result(None, trial, result(2, score))
    assert decisions["lost"] == TrialScheduler.STOP
    assert decisions["better"] == TrialScheduler.CONTINUE


@pytest.mark.parametrize(("words", "steps"), [([], 20), (["space.meta_steps={randint: [10, 40]}"], 40)])
def test_no_trial_is_stopped_for_being_longer_than_the_base(words, steps):
    assert longest(load_sweep(None, [LR, *words])) == steps


def test_tune_is_told_how_many_trials_and_which_way_is_better():
    config = tune_config(load_sweep(None, [LR, "trials=7"]), [], lambda *_: None)
    assert (config.num_samples, config.metric, config.mode) == (7, "validation", "min")


@pytest.mark.parametrize("scheduler", ["none", "asha", "pbt"])
def test_tune_may_tell_every_scheduler_and_the_search_what_they_go_by(scheduler):
    config = tune_config(load_sweep(None, [LR, f"scheduler={scheduler}"]), [], lambda *_: None)
    for each in (config.scheduler, config.search_alg):
        space = {} if each is config.scheduler else {"config": {}}
        assert each.set_search_properties("validation", "min", **space)


@pytest.mark.parametrize(
    ("words", "bundles"),
    [
        (["meta_train.workers=2"], [{"CPU": 1}, {"CPU": 1}]),
        (["driver.num_cpus=0.5"], [{"CPU": 0.5}, {"CPU": 1}, {"CPU": 1}]),
        (["meta_train.workers=1", "meta_train.resources={num_cpus: 2, num_gpus: 0.5}"], [{"CPU": 2, "GPU": 0.5}]),
    ],
)
def test_the_placement_group_of_a_trial_has_its_driver_and_each_worker(words, bundles):
    settings = load_sweep(None, [LR, *words])
    group = placement(settings, settings.meta_train)
    assert [{kind: share for kind, share in bundle.items() if share} for bundle in group.bundles] == bundles
    assert group.strategy == "PACK"
