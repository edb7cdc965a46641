"""The gate: who passes, who does not, and that chance alone does not promote."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from ml2o_dist.config import EvaluateSettings
from ml2o_dist.evaluation.evaluated import Evaluation, Row
from ml2o_dist.evaluation.gate import judge
from tests.wording import says

NAN = math.nan


def row(optimizer: str, problem: str, losses: Sequence[float]) -> Row:
    mean = float(np.mean(losses))
    return Row(
        optimizer=optimizer, label=optimizer, role="learned", problem=problem, steps=10, seeds=len(losses), failed=0,
        diverged=0, loss=mean, loss_standard_error=0.0, seed_losses=tuple(losses), loss_at_evaluations=mean,
        loss_at_time=mean, losses=(mean,), test_accuracy=None, criticality=0.0, criticality_standard_error=0.0,
        criticality_relative=0.0, acceptance=None, evaluations=1.0, ms_per_step=1.0, guard_share=None,
        conflicting=0.0, mean_cosine=0.0, front=None, learning_rate=None, tuning={}, note="",
    )  # fmt: skip


def evaluation(losses: dict[str, dict[str, Sequence[float]]], seeds: int = 10) -> Evaluation:
    rows = tuple(row(name, problem, each) for name, of in losses.items() for problem, each in of.items())
    return Evaluation(EvaluateSettings(seeds=seeds), "quick", "0", {}, (), rows, (), (), {})


def noisy(factor: float, seed: int, problems: int = 3, seeds: int = 10, spread: float = 0.02) -> dict[str, list[float]]:
    """Losses whose level belongs to problem and seed, times `factor` and noise of the optimizer's own."""
    own = np.random.default_rng(seed)
    level = np.exp(np.random.default_rng(99).normal(size=(problems, seeds)))
    losses = level * factor * np.exp(spread * own.normal(size=(problems, seeds)))
    return {f"p{i}": losses[i].tolist() for i in range(problems)}


@pytest.mark.parametrize(
    ("factor", "passed", "words"),
    [(0.95, True, "v2 is better than v1: 0.9"), (1.05, False, "v2 is worse than v1: 1.0"),
     (1.0, False, "v2 is not shown to be better than v1")],
)  # fmt: skip
def test_better_passes_and_worse_does_not(factor: float, passed: bool, words: str) -> None:
    found = judge(evaluation({"a": noisy(factor, 1), "b": noisy(1.0, 2)}), "a", "b", named="v2", over="v1")
    assert found.passed is passed
    assert found.reason.startswith(words)
    assert says(found.reason, "v1's loss", "quick", "3 problems", "10 paired seeds")
    assert found.ratio.low < factor < found.ratio.high
    assert "\n" not in found.reason


def test_the_first_must_beat_the_tuned_reference() -> None:
    losses = {"mean+adam": noisy(1.0, 2), "a": noisy(0.9, 1), "b": noisy(1.1, 3)}
    assert judge(evaluation(losses), "a", None, named="v1", over="tuned mean+adam").passed
    refused = judge(evaluation(losses), "b", None, named="v1", over="tuned mean+adam")
    assert not refused.passed
    assert "worse than tuned mean+adam" in refused.reason


def test_equal_ones_pass_rarely() -> None:
    passes = sum(
        judge(evaluation({"a": noisy(1.0, 2 * i), "b": noisy(1.0, 2 * i + 1)}), "a", "b", named="x", over="y").passed
        for i in range(100)
    )
    assert passes <= 8  # nominal 2.5


def test_a_candidate_that_diverges_is_worse() -> None:
    broken = {problem: [math.inf] * 10 for problem in noisy(1.0, 1)}
    found = judge(evaluation({"a": broken, "b": noisy(1.0, 2)}), "a", "b", named="v2", over="v1")
    assert not found.passed
    assert found.ratio.estimate == pytest.approx(1e6)
    once = noisy(0.9, 1)
    once["p0"][0] = math.inf
    assert judge(evaluation({"a": once, "b": noisy(1.0, 2)}), "a", "b", named="v2", over="v1").ratio.estimate < 1


def test_without_a_comparison_nobody_passes() -> None:
    one = {"a": {"p": [1.0]}, "b": {"p": [2.0]}}
    found = judge(evaluation(one, seeds=1), "a", "b", named="v2", over="v1")
    assert not found.passed
    assert "cannot be compared with v1" in found.reason
    negative = {"a": {"p": [-1.0, 2.0]}, "b": {"p": [2.0, 3.0]}}
    assert not judge(evaluation(negative, seeds=2), "a", "b", named="v2", over="v1").passed


def test_seeds_that_could_not_be_run_are_left_out_of_both() -> None:
    ours, theirs = noisy(0.9, 1), noisy(1.0, 2)
    ours["p0"][3] = NAN
    theirs["p1"][4] = NAN
    found = judge(evaluation({"a": ours, "b": theirs}), "a", "b", named="v2", over="v1")
    assert found.passed
    assert math.isfinite(found.ratio.high)
