"""The unit of work: one optimization trajectory of a rule, and what meta-training learns from it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ml2o_dist.config import EstimatorSettings, RuleSettings
from ml2o_dist.metatrain import metagradient
from ml2o_dist.metatrain.evolution import evolution_strategy
from ml2o_dist.metatrain.metagradient import Rollout
from ml2o_dist.metatrain.recorder import Trajectory, TrajectoryRecorder
from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec, Rescaled
from ml2o_dist.rules.base import Oracle, UpdateRule
from ml2o_dist.rules.gml2o import GuardedInfo, guarded
from ml2o_dist.rules.ml2o import ML2ORule
from ml2o_dist.seeding import derive_seed, generator

Weights = Mapping[str, Tensor]
"""A network's state dict; its floats are float32 on the CPU while they travel."""


@dataclass(frozen=True)
class EpisodeSpec:
    """Everything an episode depends on besides the weights.

    `seed` names all its randomness: the problem's coefficients, the starting points of the P `instances`, the batches
    and the chosen coordinates. `parameter_scale` is c of `Rescaled`. `estimator` None: no meta-gradient is wanted
    (validation). `record`: the trajectory comes back too; nothing else changes.
    """

    problem: ProblemSpec
    seed: int
    horizon: int
    instances: int
    rule: RuleSettings
    estimator: EstimatorSettings | None
    unroll: int = 0
    parameter_scale: float = 1.0
    device: str = "cpu"
    data_root: str = ""
    record: bool = False


@dataclass(frozen=True)
class EpisodeResult:
    """What comes back from an episode.

    Attributes:
        meta_loss: L of metagradient, or nan where there was no estimator.
        score: mean over the last tenth of the steps and the instances of l_t (log of the summed objectives where
            they are positive); what validation compares.
        gradient: the clipped meta-gradient, flat float32 in the order of the network's parameters; None where none
            was wanted or the episode was not finite.
        losses: mean over the instances, [K+1, m].
        finite: losses, and the gradient where one was wanted, are all finite.
        inner_steps: K * P.  seconds: wall time of the worker.
        error: what it raised, where it could not be run; "" otherwise.
        trajectory: what was asked for by `record`, finite or not; else None.
    """

    meta_loss: float
    score: float
    gradient: NDArray[np.float32] | None
    losses: NDArray[np.float32]
    finite: bool
    inner_steps: int
    seconds: float
    error: str = ""
    trajectory: Trajectory | None = None


def failed_episode(error: str) -> EpisodeResult:
    """Return what stands for an episode that raised `error` wherever it ran: nothing of it is used."""
    nothing = np.zeros((0, 0), dtype=np.float32)
    return EpisodeResult(math.nan, math.inf, None, nothing, finite=False, inner_steps=0, seconds=0.0, error=error)


def run_episode(weights: Weights, spec: EpisodeSpec) -> EpisodeResult:
    """Run K inner steps from fresh starting points; a pure function of its arguments (on one kind of device)."""
    began = time.perf_counter()
    device, estimator = torch.device(spec.device), spec.estimator
    context = ProblemContext(spec.instances, derive_seed("problem", spec.seed), device, data_root=spec.data_root)
    problem = spec.problem.build(context)
    if spec.parameter_scale != 1:
        problem = Rescaled(problem, spec.parameter_scale)
    start = problem.initial_parameters([derive_seed("start", spec.seed, i) for i in range(spec.instances)])
    recorder = TrajectoryRecorder() if spec.record else None
    kind = metagradient.meta_loss_kind(estimator or EstimatorSettings(), problem)
    loss, gradient, losses = _estimate(weights, spec, problem, start, kind, recorder)
    flat = None if gradient is None or estimator is None else _clipped(gradient, estimator.clip)
    finite = bool(losses.isfinite().all()) and (estimator is None or (flat is not None and bool(loss.isfinite())))
    tail = losses[-max(1, spec.horizon // 10) :]
    score = metagradient.step_losses(kind, tail, losses[0], problem.minima).mean().item()
    episodes = 2 * estimator.pairs if estimator is not None and estimator.kind == "es" else 1
    return EpisodeResult(
        meta_loss=loss.item(),
        score=score,
        gradient=flat.cpu().numpy() if finite and flat is not None else None,
        losses=losses.mean(dim=1).float().cpu().numpy(),
        finite=finite,
        inner_steps=episodes * spec.horizon * spec.instances,
        seconds=time.perf_counter() - began,
        trajectory=None if recorder is None else recorder.trajectory(),
    )


def _estimate(
    weights: Weights, spec: EpisodeSpec, problem: Problem, start: Tensor, kind: str, recorder: TrajectoryRecorder | None
) -> tuple[Tensor, list[Tensor] | None, Tensor]:
    """Return the meta-loss, its gradient in the order of the network's parameters, and the losses [K+1, P, m].

    The first two are nan and None where there is no estimator, or nothing finite to estimate from.
    """
    estimator, device = spec.estimator, problem.device
    network = ML2ORule.from_weights(spec.rule, weights, device).network
    oracle = Oracle(problem, generator("batches", spec.seed))
    if estimator is not None and estimator.kind == "exact":
        batches = [oracle.draw() for _ in range(spec.horizon + 1)]
        return metagradient.exact(network, problem, start, batches, estimator, recorder)
    if estimator is not None and estimator.kind == "es":
        recorders = iter([recorder])  # of the first trial

        def trial(theta: Tensor) -> Tensor:
            vector_to_parameters(theta.to(device), network.parameters())
            paired = Oracle(problem, generator("batches", spec.seed))
            rule = guarded(ML2ORule(network), spec.rule.guard)
            return roll_out(rule, paired, start, spec.horizon, None, next(recorders, None)).losses

        theta = parameters_to_vector(network.parameters()).detach().cpu()
        loss, gradient, losses = evolution_strategy(theta, trial, estimator, kind, problem.minima, spec.seed)
        return loss, [gradient], losses
    rule = guarded(ML2ORule(network), spec.rule.guard)
    chosen = None if estimator is None else _choose(problem, estimator.coordinates, spec.seed)
    rollout = roll_out(rule, oracle, start, spec.horizon, chosen, recorder)
    if estimator is None or not bool(rollout.losses.isfinite().all()):
        return torch.tensor(math.nan), None, rollout.losses
    return *metagradient.replay(network, rollout, estimator, kind, spec.unroll, problem.minima), rollout.losses


@torch.no_grad()
def roll_out(
    rule: UpdateRule,
    oracle: Oracle,
    start: Tensor,
    horizon: int,
    chosen: Tensor | None,
    recorder: TrajectoryRecorder | None = None,
) -> Rollout:
    """Take `horizon` steps from `start` [P, n] without an autograd graph, storing what replay needs.

    Args:
        rule: an `ML2ORule`, or `GML2O` around one.
        chosen: indices [P, S] of the coordinates whose gradients are kept, drawn before the rollout; None: keep none.
    """
    instances, dimension = start.shape
    objectives = oracle.problem.objectives
    index = start.new_zeros((instances, 0), dtype=torch.long) if chosen is None else chosen
    losses = start.new_empty((horizon + 1, instances, objectives))
    gradients = start.new_empty((horizon + 1, instances, objectives, index.shape[1]))
    agreement, accepted = start.new_empty((horizon, instances)), start.new_ones((horizon, instances))
    everywhere = index[:, None].expand(-1, objectives, -1)
    parameters, state = start, rule.initial_state(instances, objectives, dimension)
    for step in range(horizon):
        before = parameters
        parameters, state, info = rule.step(oracle, before, state)
        if recorder is not None:
            recorder.add(info.jacobian, info.losses, before, parameters)
        learned = state
        if isinstance(info, GuardedInfo):
            learned, accepted[step] = state.learned, info.accepted
        losses[step], agreement[step] = info.losses, learned.agreement.value
        torch.gather(info.jacobian, 2, everywhere, out=gradients[step])
    if chosen is None:
        losses[horizon] = oracle.losses(parameters, oracle.draw())
    else:
        jacobian, losses[horizon] = oracle.jacobian(parameters, oracle.draw())
        torch.gather(jacobian, 2, everywhere, out=gradients[horizon])
    return Rollout(losses, gradients, agreement, accepted, dimension / max(1, index.shape[1]))


def _choose(problem: Problem, share: float, seed: int) -> Tensor:
    """Draw the indices [P, S] of S = ceil(share * n) coordinates of each instance, without replacement."""
    count = max(1, min(problem.dimension, int(np.ceil(share * problem.dimension))))
    source = generator("coordinates", seed)
    rows = [torch.randperm(problem.dimension, generator=source)[:count] for _ in range(problem.instances)]
    return torch.stack(rows).sort(dim=1).values.to(problem.device)


def _clipped(gradient: list[Tensor], largest: float) -> Tensor | None:
    """Flatten to float32 with norm at most `largest`; None where an entry is not finite."""
    flat = torch.cat([part.flatten() for part in gradient]).float()
    norm = flat.double().norm()
    if not bool(norm.isfinite()):
        return None
    return flat.mul(min(1.0, largest / max(norm.item(), 1e-30)))
