"""Importances: what a score was made of comes first, what it does not depend on is near nothing, noise is called so."""

from __future__ import annotations

import math
import random

import pytest

from ml2o_dist.sweeping.importance import FEWEST, as_number, importance
from ml2o_dist.sweeping.record import SweepRecord
from ml2o_dist.sweeping.record_lines import Report
from ml2o_dist.sweeping.settings import Distribution
from ml2o_dist.sweeping.space import load_sweep

SPACE = (
    "space={learner.lr: {loguniform: [0.0001, 1]}, learner.ema: {uniform: [0, 0.9]},"
    " rule.output: {choice: [residual, controlled, scaled]}}"
)


def recorded(folder, score, trials):
    """A sweep whose trials' scores are a function of their values and of chance."""
    source, record = random.Random(3), SweepRecord(folder)
    for number in range(1, trials + 1):
        values = {
            "learner.lr": 10 ** source.uniform(-4, 0),
            "learner.ema": source.uniform(0, 0.9),
            "rule.output": source.choice(["residual", "controlled", "scaled"]),
        }
        record.begin(str(number), values)
        found = score(values, source)
        record.report(str(number), Report(4, found, found, 4, 1.0, values))
        record.end(str(number), "finished")
    return load_sweep(None, [SPACE]), record


def test_a_score_of_one_key_is_found_and_the_same_every_time(tmp_path):
    made = recorded(tmp_path, lambda values, _: abs(math.log10(values["learner.lr"]) + 2), 40)
    found = importance(*made)
    assert found.by_key[0].key == "learner.lr"
    assert found.by_key[0].loss > 5 * max(each.loss for each in found.by_key[1:])
    assert found.out_of_bag > 0.5
    assert importance(*made) == found


def test_a_score_of_a_list_is_found_whatever_the_order_of_the_list(tmp_path):
    worth = {"residual": 2.0, "controlled": 0.0, "scaled": 1.0}
    found = importance(*recorded(tmp_path, lambda values, _: worth[values["rule.output"]], 40))
    assert found.by_key[0].key == "rule.output"
    assert found.out_of_bag > 0.5


def test_a_trial_that_diverged_does_not_drown_the_others(tmp_path):
    def score(values, source):
        return 1e9 if values["learner.ema"] > 0.8 else values["learner.ema"]

    assert importance(*recorded(tmp_path, score, 40)).by_key[0].key == "learner.ema"


def test_of_noise_it_says_that_it_means_nothing(tmp_path):
    found = importance(*recorded(tmp_path, lambda _, source: source.random(), 30))
    assert found.out_of_bag <= 0.1
    if found.out_of_bag <= 0:
        assert "mean nothing" in found.caption


TOO_LITTLE = [(lambda values, _: values["learner.ema"], FEWEST - 1), (lambda *_: 1.0, 20), (lambda *_: math.inf, 20)]


@pytest.mark.parametrize(("score", "trials"), TOO_LITTLE)
def test_too_little_to_tell_is_said(tmp_path, score, trials):
    found = importance(*recorded(tmp_path, score, trials))
    assert found.by_key == ()
    assert f"it takes {FEWEST} trials" in found.caption


def test_values_as_numbers():
    assert as_number(Distribution(loguniform=(0.001, 1)), 0.01) == pytest.approx(-2)
    assert as_number(Distribution(randint=(1, 5)), 3) == 3.0
    assert as_number(Distribution(choice=([4], None, "x")), None) == 1.0
