"""A rollout as a record batch: nothing changes on the way, nothing is copied, and what it holds is written on it."""

from __future__ import annotations

import io
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
import torch

from ml2o_dist.config import EstimatorSettings, GuardSettings, RuleSettings
from ml2o_dist.metatrain.episode import EpisodeSpec, replay_episode, replayed, roll_out_episode, run_episode
from ml2o_dist.metatrain.rollout_record import read_rollout, rollout_batch
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork

RULE = RuleSettings(hidden=4)
CONTROLLED = RuleSettings(hidden=4, features="alignment", output="controlled")
CASES = {
    "one instance": ("quadratic[m=2,n=6]", RULE, EstimatorSettings(), 1),
    "m = 1, n = 1": ("quadratic[m=1,n=1,condition=1]", RULE, EstimatorSettings(), 1),
    "instances, m = 3, chosen": ("quadratic[m=3,n=10,noise=0.1]", RULE, EstimatorSettings(coordinates=0.4), 3),
    "m = 5": ("quadratic[m=5,n=7]", RULE, EstimatorSettings(gamma=1), 2),
    "known minima": ("quadratic[m=2,n=6]", RULE, EstimatorSettings(meta_loss="log_gap"), 2),
    "guarded": ("fonseca", RuleSettings(hidden=4, guard=GuardSettings(budget=1.0)), EstimatorSettings(), 2),
    "controlled": (
        "fonseca",
        RuleSettings(hidden=4, features="alignment", output="controlled"),
        EstimatorSettings(),
        2,
    ),
}


def weights(rule):
    source = torch.Generator().manual_seed(3)
    return {
        name: t + 0.05 * torch.randn(t.shape, generator=source) for name, t in ML2ONetwork(rule).state_dict().items()
    }


def spec_of(case):
    problem, rule, estimator, instances = CASES[case]
    return EpisodeSpec(ProblemSpec.parse(problem), 5, 7, instances, rule, estimator)


@pytest.mark.parametrize("case", CASES)
def test_an_episode_in_two_parts_is_the_episode(case):
    spec = spec_of(case)
    whole = run_episode(weights(spec.rule), spec)
    half, replayable = roll_out_episode(weights(spec.rule), spec)
    assert half.gradient is None
    batch = rollout_batch(replayable)
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, batch.schema) as writer:
        writer.write_batch(batch)
    (sent,) = pa.ipc.open_stream(stream.getvalue())
    both = replayed(half, *replay_episode(weights(spec.rule), spec, read_rollout(sent, "cpu")))
    np.testing.assert_allclose(both.gradient, whole.gradient, rtol=1e-6, atol=1e-9)
    assert both.meta_loss == pytest.approx(whole.meta_loss, rel=1e-6)
    for field in fields(whole):
        if field.name not in ("gradient", "meta_loss", "seconds"):
            assert np.array_equal(getattr(both, field.name), getattr(whole, field.name)), field.name


def test_the_tensors_are_the_batch_s_own_memory_and_its_size_is_as_documented():
    spec = spec_of("instances, m = 3, chosen")
    _, replayable = roll_out_episode(weights(spec.rule), spec)
    batch = rollout_batch(replayable)
    points, instances, objectives, coordinates = replayable.rollout.gradients.shape
    assert batch.num_rows == points == spec.horizon + 1
    record = replayable.rollout.record
    assert {name: tensor.shape for name, tensor in record.items()} == dict.fromkeys(record, (points - 1, instances))
    assert batch.nbytes == points * 4 * instances * (objectives * (1 + coordinates) + 1 + len(record))
    read = read_rollout(batch, "cpu")
    assert read.rollout.gradients.data_ptr() == batch["gradients"].flatten().buffers()[1].address
    assert torch.equal(read.rollout.gradients, replayable.rollout.gradients)
    assert read.rollout.scale == replayable.rollout.scale
    assert all(len(field.metadata[b"description"]) > 20 for field in batch.schema)


def test_losses_that_are_not_finite_leave_nothing_to_replay():
    spec = EpisodeSpec(ProblemSpec.parse("quadratic[m=2,n=4]"), 1, 5, 1, RuleSettings(lr=1e30), EstimatorSettings())
    result, replayable = roll_out_episode(ML2ONetwork(spec.rule).state_dict(), spec)
    assert replayable is None
    assert not result.finite
