"""The schedule is a pure function of the settings and the key."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise

import pytest

from ml2o_dist.metatrain.schedule import horizon, recorded, training_items, validates, validation_items
from tests.metatrain.settings import TREE, small


def test_equal_settings_and_keys_give_equal_items_and_other_seeds_other_ones():
    one, two = training_items(small(), 3, "cpu"), training_items(small(workers=3), 3, "cpu")
    assert one == two
    assert training_items(small(seed=1), 3, "cpu") != one
    assert training_items(small(), 4, "cpu") != one
    assert len({item.spec.seed for item in one}) == len(one) == 4
    assert [item.key.slot for item in one] == [0, 1, 2, 3]


def test_items_survive_pickling_since_ray_sends_them():
    items = training_items(small(), 3, "cpu")
    assert pickle.loads(pickle.dumps(items)) == items


def test_the_horizon_depends_on_the_meta_step_alone():
    settings = small()
    for step in range(20):
        assert {item.spec.horizon for item in training_items(settings, step, "cpu")} == {horizon(settings, step)}
    assert {horizon(settings, step) for step in range(50)} == {5, 8}


def test_every_family_member_and_choice_is_drawn():
    texts = {str(item.spec.problem) for step in range(40) for item in training_items(small(), step, "cpu")}
    assert texts == {"fonseca"} | {f"quadratic[batch=4,m={m},n={n},noise=0.1]" for m in (2, 3) for n in (4, 6)}


def test_weights_drive_how_often_a_member_is_drawn():
    family = {
        "train": [{"problem": "fonseca", "weight": 9.0}, {"problem": "zdt1", "weight": 1.0}],
        "validation": ["fonseca"],
        "test": ["fonseca"],
    }
    names = [i.spec.problem.name for step in range(250) for i in training_items(small(family=family), step, "cpu")]
    assert 0.86 < names.count("fonseca") / len(names) < 0.94


def test_validation_uses_the_same_seeds_every_time_and_no_estimator():
    one, two = validation_items(small(), 0, "cpu"), validation_items(small(), 8, "cpu")
    assert [item.spec for item in one] == [item.spec for item in two]
    assert all(item.spec.estimator is None for item in one)
    assert not {i.spec.seed for i in one} & {i.spec.seed for i in training_items(small(), 0, "cpu")}


def test_when_weights_are_validated():
    settings = small(meta_steps=10)
    assert [step for step in range(11) if validates(settings, step)] == [0, 4, 8, 10]


def test_parameter_scales_are_log_uniform_and_absent_by_default():
    family = {**TREE["family"], "rescale": 4.0}
    drawn = [i.spec.parameter_scale for step in range(200) for i in training_items(small(family=family), step, "cpu")]
    logs = [math.log(scale) / math.log(4) for scale in drawn]
    assert -1 <= min(logs) < -0.95
    assert 0.95 < max(logs) <= 1
    assert abs(sum(logs) / len(logs)) < 0.08
    assert {item.spec.parameter_scale for item in training_items(small(), 0, "cpu")} == {1.0}
    assert {item.spec.parameter_scale for item in validation_items(small(family=family), 0, "cpu")} == {1.0}


def test_each_objective_of_a_training_problem_is_rescaled_and_none_of_a_validation_problem():
    family = {**TREE["family"], "objective_rescale": 8.0}
    settings = small(family=family)
    assert {item.spec.objective_rescale for item in training_items(settings, 0, "cpu")} == {8.0}
    assert {item.spec.objective_rescale for item in validation_items(settings, 0, "cpu")} == {1.0}


@pytest.mark.parametrize(("meta_steps", "kept"), [(1, 20), (7, 20), (20, 20), (21, 20), (1000, 20), (9, 2), (9, 1)])
def test_recorded_meta_steps_are_as_many_as_asked_for_and_evenly_spaced(meta_steps, kept):
    settings = small(meta_steps=meta_steps, slots=3, trajectories={"meta_steps": kept, "slots": 2})
    steps = [t for t in range(meta_steps) if recorded(settings, t, 0)]
    assert len(steps) == min(kept, meta_steps)
    assert steps[0] == 0
    assert steps[-1] == (meta_steps - 1 if min(kept, meta_steps) > 1 else 0)
    gaps = {after - before for before, after in pairwise(steps)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert [[item.spec.record for item in training_items(settings, t, "cpu")] for t in range(meta_steps)] == [
        [t in steps, t in steps, False] for t in range(meta_steps)
    ]


def test_nothing_is_recorded_of_validation_or_when_switched_off():
    settings = small()
    assert recorded(settings, 0, 0)
    assert not any(item.spec.record for t in (0, 4, 12) for item in validation_items(settings, t, "cpu"))
    off = small(trajectories={"meta_steps": 0})
    assert not any(recorded(off, t, slot) for t in range(12) for slot in range(4))


def test_keys_are_named_as_users_count_meta_steps():
    assert [str(item.key) for item in training_items(small(slots=2), 0, "cpu")] == [
        "meta-step 1 slot 0",
        "meta-step 1 slot 1",
    ]
    (validation,) = validation_items(small(), 4, "cpu")
    assert str(validation.key) == "validation at meta-step 4 slot 0", "as in metrics.parquet"
