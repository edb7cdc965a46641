"""On a CUDA device: the same figures as on the CPU to rounding, and the same bits twice. Skipped without one."""

from __future__ import annotations

import dataclasses
import math
import os
import signal

import numpy as np
import pytest
import ray
import torch

from ml2o_dist.config import EstimatorSettings, FaultSettings, GuardSettings, RuleSettings
from ml2o_dist.metatrain.episode import EpisodeSpec, run_episode
from ml2o_dist.metatrain.pool import WorkerPool
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from tests.metatrain.executing import digests, in_process, later
from tests.metatrain.settings import small

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

RULES = {
    "default": RuleSettings(hidden=4),
    "controlled": RuleSettings(hidden=4, features="alignment", output="controlled"),
    "published": RuleSettings(hidden=4, features="log_sign", output="scaled", objectives="per_objective"),
    "guarded": RuleSettings(hidden=4, guard=GuardSettings(budget=1.0)),
    "guarded, torchjd": RuleSettings(hidden=4, guard=GuardSettings(fallback="mgda+adam@0.01", budget=1.0)),
}
PROBLEMS = ("fonseca", "quadratic[m=2,n=9,noise=0.1]", "multidigits[hidden=8]", "multidigits[net=cnn,channels=4-8]")


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """As in a rollout worker."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def weights(rule):
    """Of a network that does something."""
    source = torch.Generator().manual_seed(7)
    state = ML2ONetwork(rule).state_dict()
    return {name: tensor + 0.05 * torch.randn(tensor.shape, generator=source) for name, tensor in state.items()}


def episode(problem, rule, estimator, device, **more):
    spec = EpisodeSpec(ProblemSpec.parse(problem), 3, 8, 2, rule, estimator, device=device, **more)
    return run_episode(weights(rule), spec)


def agree(here, there):
    assert here.finite
    assert there.finite
    np.testing.assert_allclose(there.losses, here.losses, rtol=1e-3, atol=1e-4)
    assert math.isclose(here.meta_loss, there.meta_loss, rel_tol=1e-3, abs_tol=1e-4)
    cosine = here.gradient @ there.gradient / np.linalg.norm(here.gradient) / np.linalg.norm(there.gradient)
    assert cosine > 0.99


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", RULES)
def test_an_episode_and_its_replayed_gradient_agree_with_the_cpu_and_repeat_bit_for_bit(name, problem):
    runs = [episode(problem, RULES[name], EstimatorSettings(), d, record=True) for d in ("cpu", "cuda", "cuda")]
    agree(runs[0], runs[1])
    for field in dataclasses.fields(runs[1]):
        if field.name not in ("seconds", "trajectory"):
            assert np.array_equal(*(getattr(run, field.name) for run in runs[1:])), field.name


@pytest.mark.parametrize("kind", ["exact", "es"])
@pytest.mark.parametrize("problem", PROBLEMS[1:])
def test_the_other_estimators_agree_with_the_cpu(kind, problem):
    estimator = EstimatorSettings(kind=kind)
    agree(*(episode(problem, RULES["default"], estimator, device) for device in ("cpu", "cuda")))


def test_chosen_coordinates_and_chunks_agree_with_the_cpu():
    estimator = EstimatorSettings(coordinates=0.3)
    agree(*(episode(PROBLEMS[2], RULES["default"], estimator, device, unroll=3) for device in ("cpu", "cuda")))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_validation_episode_agrees_with_the_cpu(problem):
    here, there = (episode(problem, RULES["default"], None, device) for device in ("cpu", "cuda"))
    assert math.isclose(here.score, there.score, rel_tol=1e-3, abs_tol=1e-4)


@pytest.mark.timeout(240)
def test_workers_that_share_a_gpu_give_the_same_weights_whatever_their_number(cluster, tmp_path):
    found = set()
    for workers in (1, 3):
        resources = {"num_gpus": 0.3, "start_timeout_s": 120}
        settings = small(meta_steps=4, device="cuda", workers=workers, resources=resources)
        pool = WorkerPool(workers, settings.resources)
        trainer = Trainer(settings, tmp_path / str(workers))
        try:
            trainer.run(pool.begin)
        finally:
            pool.close()
        found.add(digests(trainer))
    assert len(found) == 1


@pytest.mark.timeout(240)
def test_rollouts_of_cpu_workers_are_replayed_on_the_gpu_whoever_is_killed(cluster, tmp_path):
    """backward: learner with learner.resources.num_gpus: the CPU's weights to rounding, the same bits after a kill."""
    learner = {"resources": {"num_gpus": 0.5}}
    settings = small(meta_steps=6, backward="learner", workers=2, learner=learner)
    calm = Trainer(small(meta_steps=6, backward="learner"), tmp_path / "cpu")
    calm.run(later(in_process))
    found = set()
    for name in ("calm", "killed"):
        pool = WorkerPool(2, settings.resources, FaultSettings(), learner=settings.learner)
        trainer = Trainer(settings, tmp_path / name)
        killed = []

        def on_row(step, row, name=name, pool=pool, killed=killed):
            if name == "killed" and "meta_loss" in row and step == 2:
                killed.append(ray.get(pool._replays._actor.where.remote())[0])
                os.kill(killed[0], signal.SIGKILL)

        try:
            trainer.run(pool.begin, on_row)
        finally:
            pool.close()
        assert pool.restarts == len(killed)
        for key, tensor in calm.learner.weights.items():
            torch.testing.assert_close(trainer.learner.weights[key], tensor, rtol=1e-3, atol=1e-5)
        found.add(digests(trainer))
    assert len(found) == 1
