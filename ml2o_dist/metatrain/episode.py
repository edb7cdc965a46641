"""The unit of work: one optimization trajectory of a rule, and what meta-training learns from it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

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
from ml2o_dist.metatrain.second_order import exact
from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec, Rescaled
from ml2o_dist.rules.base import Oracle, UpdateRule
from ml2o_dist.rules.coordinatewise.rule import ML2ORule
from ml2o_dist.rules.gml2o import GuardedInfo, guarded
from ml2o_dist.seeding import derive_seed, generator

Weights = Mapping[str, Tensor]
"""A network's state dict; its floats are float32 on the CPU while they travel."""


@dataclass(frozen=True)
class EpisodeSpec:
    """Everything an episode depends on besides the weights.

    `seed` names all its randomness: the problem's coefficients, the starting points of the P `instances`, the batches,
    the chosen coordinates, and s of `Rescaled` for each objective, from 1 / `objective_rescale` to that.
    `parameter_scale` is its c. `estimator` None: no meta-gradient is wanted (validation). `record`: the trajectory
    comes back too; nothing else changes.
    """

    problem: ProblemSpec
    seed: int
    horizon: int
    instances: int
    rule: RuleSettings
    estimator: EstimatorSettings | None
    unroll: int = 0
    parameter_scale: float = 1.0
    objective_rescale: float = 1.0
    device: str = "cpu"
    data_root: str = ""
    record: bool = False


@dataclass(frozen=True)
class EpisodeResult:
    """What comes back from an episode.

    Attributes:
        meta_loss: L of metagradient, or nan where there was no estimator, or no replay yet.
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


@dataclass(frozen=True)
class Replayable:
    """What replay needs of an episode besides its weights and settings; `minima` [P, m] are those of `log_gap`."""

    rollout: Rollout
    kind: str
    minima: Tensor | None


def run_episode(weights: Weights, spec: EpisodeSpec) -> EpisodeResult:
    """Run K inner steps from fresh starting points; a pure function of its arguments (on one kind of device)."""
    began = time.perf_counter()
    estimator = spec.estimator
    if estimator is None or estimator.kind == "replay":
        result, replayable = roll_out_episode(weights, spec)
        if replayable is not None:
            result = replayed(result, *replay_episode(weights, spec, replayable))
        return replace(result, seconds=time.perf_counter() - began)
    problem, start = _begin(spec)
    recorder = TrajectoryRecorder() if spec.record else None
    kind = metagradient.meta_loss_kind(estimator, problem)
    loss, gradient, losses = _estimate(weights, spec, problem, start, kind, recorder)
    flat = _clipped(gradient, estimator.clip)
    episodes = 2 * estimator.pairs if estimator.kind == "es" else 1
    result = _result(spec, problem, losses, recorder, began, episodes)
    return replayed(result, loss.item(), None if flat is None else flat.cpu().numpy())


def roll_out_episode(weights: Weights, spec: EpisodeSpec) -> tuple[EpisodeResult, Replayable | None]:
    """Run the first part of an episode whose estimator is replay or none; return what the second part needs.

    That is None where nothing is to be replayed: no estimator, or losses that are not finite. The result has no
    meta-loss and no gradient yet.
    """
    began = time.perf_counter()
    problem, start = _begin(spec)
    rule = guarded(ML2ORule.from_weights(spec.rule, weights, problem.device), spec.rule.guard)
    recorder = TrajectoryRecorder() if spec.record else None
    estimator = spec.estimator
    chosen = None if estimator is None else _choose(problem, estimator.coordinates, spec.seed)
    oracle = Oracle(problem, generator("batches", spec.seed))
    rollout = roll_out(rule, oracle, start, spec.horizon, chosen, recorder)
    result = _result(spec, problem, rollout.losses, recorder, began)
    if estimator is None or not result.finite:
        return result, None
    return result, Replayable(rollout, metagradient.meta_loss_kind(estimator, problem), problem.minima)


def replay_episode(
    weights: Weights, spec: EpisodeSpec, replayable: Replayable
) -> tuple[float, NDArray[np.float32] | None]:
    """Return the meta-loss and the clipped meta-gradient, where the rollout's tensors lie; None if it is not finite."""
    estimator, rollout = spec.estimator, replayable.rollout
    assert estimator is not None
    network = ML2ORule.from_weights(spec.rule, weights, rollout.losses.device).network
    loss, gradient = metagradient.replay(network, rollout, estimator, replayable.kind, spec.unroll, replayable.minima)
    flat = _clipped(gradient, estimator.clip)
    return loss.item(), None if flat is None else flat.cpu().numpy()


def replayed(result: EpisodeResult, meta_loss: float, gradient: NDArray[np.float32] | None) -> EpisodeResult:
    """Return the result with its meta-loss and, where everything is finite, its gradient."""
    finite = result.finite and gradient is not None and math.isfinite(meta_loss)
    return replace(result, meta_loss=meta_loss, gradient=gradient if finite else None, finite=finite)


def log_uniform(largest: float, seed: int) -> float:
    """Return the number between 1 / largest and largest that `seed` names, log-uniform over the seeds."""
    place = derive_seed("parameter scale", seed) / 2**63
    return math.exp((2 * place - 1) * math.log(largest))


def _begin(spec: EpisodeSpec) -> tuple[Problem, Tensor]:
    """Return the problem and its starting points [P, n]."""
    context = ProblemContext(
        spec.instances, derive_seed("problem", spec.seed), torch.device(spec.device), data_root=spec.data_root
    )
    problem = spec.problem.build(context)
    if spec.parameter_scale != 1 or spec.objective_rescale != 1:
        seeds = [derive_seed("objective scale", spec.seed, j) for j in range(problem.objectives)]
        scales = [log_uniform(spec.objective_rescale, seed) for seed in seeds]
        problem = Rescaled(problem, spec.parameter_scale, scales)
    return problem, problem.initial_parameters([derive_seed("start", spec.seed, i) for i in range(spec.instances)])


def _result(
    spec: EpisodeSpec,
    problem: Problem,
    losses: Tensor,
    recorder: TrajectoryRecorder | None,
    began: float,
    episodes: int = 1,
) -> EpisodeResult:
    """Return what losses [K+1, P, m] say of an episode, without meta-loss and gradient."""
    kind = metagradient.meta_loss_kind(spec.estimator or EstimatorSettings(), problem)
    tail = losses[-max(1, spec.horizon // 10) :]
    return EpisodeResult(
        meta_loss=math.nan,
        score=metagradient.step_losses(kind, tail, losses[0], problem.minima).mean().item(),
        gradient=None,
        losses=losses.mean(dim=1).float().cpu().numpy(),
        finite=bool(losses.isfinite().all()),
        inner_steps=episodes * spec.horizon * spec.instances,
        seconds=time.perf_counter() - began,
        trajectory=None if recorder is None else recorder.trajectory(),
    )


def _estimate(
    weights: Weights, spec: EpisodeSpec, problem: Problem, start: Tensor, kind: str, recorder: TrajectoryRecorder | None
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the meta-loss, its gradient in the order of the network's parameters, and the losses [K+1, P, m]."""
    estimator, device = spec.estimator, problem.device
    assert estimator is not None
    network = ML2ORule.from_weights(spec.rule, weights, device).network
    if estimator.kind == "exact":
        oracle = Oracle(problem, generator("batches", spec.seed))
        batches = [oracle.draw() for _ in range(spec.horizon + 1)]
        return exact(network, problem, start, batches, estimator, recorder)
    recorders = iter([recorder])  # of the first trial

    def trial(theta: Tensor) -> Tensor:
        vector_to_parameters(theta.to(device), network.parameters())
        paired = Oracle(problem, generator("batches", spec.seed))
        rule = guarded(ML2ORule(network), spec.rule.guard)
        return roll_out(rule, paired, start, spec.horizon, None, next(recorders, None)).losses

    theta = parameters_to_vector(network.parameters()).detach().cpu()
    loss, gradient, losses = evolution_strategy(theta, trial, estimator, kind, problem.minima, spec.seed)
    return loss, [gradient], losses


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
    agreement, total, accepted = start.new_ones((3, horizon, instances))
    everywhere = index[:, None].expand(-1, objectives, -1)
    parameters, state = start, rule.initial_state(instances, objectives, oracle.problem.layout)
    for step in range(horizon):
        before = parameters
        parameters, state, info = rule.step(oracle, before, state)
        if recorder is not None:
            recorder.add(info.jacobian, info.losses, before, parameters)
        learned = state
        if isinstance(info, GuardedInfo):
            learned, accepted[step] = state.learned, info.accepted
        losses[step], agreement[step], total[step] = info.losses, learned.agreement.value, learned.agreement.total
        torch.gather(info.jacobian, 2, everywhere, out=gradients[step])
    if chosen is None:
        losses[horizon] = oracle.losses(parameters, oracle.draw())
    else:
        jacobian, losses[horizon] = oracle.jacobian(parameters, oracle.draw())
        torch.gather(jacobian, 2, everywhere, out=gradients[horizon])
    unit = torch.where(learned.unit > 0, learned.unit, 1.0)  # 0 where all gradients are
    return Rollout(losses, gradients, agreement, total, accepted, unit, dimension / max(1, index.shape[1]))


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
