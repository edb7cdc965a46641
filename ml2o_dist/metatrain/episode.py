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

from ml2o_dist.config import ESTIMATORS, EstimatorSettings, LearnedRuleSettings
from ml2o_dist.metatrain.estimators.base import Episode
from ml2o_dist.metatrain.estimators.replay import choose, replay
from ml2o_dist.metatrain.meta_loss import step_losses
from ml2o_dist.metatrain.recorder import Trajectory, TrajectoryRecorder
from ml2o_dist.plugins import Carrying
from ml2o_dist.problems import ProblemContext, ProblemSpec, Rescaled
from ml2o_dist.rules.learned import LearnedRule, Rollout, Weights, learned_rule
from ml2o_dist.runtime.seeding import derive_seed


@dataclass(frozen=True)
class EpisodeSpec(Carrying):
    """Everything an episode depends on besides the weights.

    `seed` names all randomness of the episode: the problem's coefficients, the starting points of the P `instances`,
    the batches, the chosen coordinates, and the s of `Rescaled` for each objective, between 1 / `objective_rescale`
    and `objective_rescale`. `parameter_scale` is the c of `Rescaled`. With `estimator` None no meta-gradient is
    computed (validation). With `record` the result also has the trajectory; nothing else changes.
    """

    problem: ProblemSpec
    seed: int
    horizon: int
    instances: int
    rule: LearnedRuleSettings
    estimator: EstimatorSettings | None
    unroll: int = 0
    parameter_scale: float = 1.0
    objective_rescale: float = 1.0
    device: str = "cpu"
    data_root: str = ""
    record: bool = False


@dataclass(frozen=True)
class EpisodeResult:
    """The result of an episode.

    Attributes:
        meta_loss: L of meta_loss; nan without an estimator or before the replay.
        score: mean over the last tenth of the steps and the instances of l_t (log of the summed objectives where
            they are positive); what validation compares.
        gradient: the clipped meta-gradient, flat float32 in the order of the rule's meta-parameters; None where none
            was wanted or the episode was not finite.
        losses: mean over the instances, [K+1, m].
        finite: whether the losses, and the gradient if one was wanted, are all finite.
        inner_steps: K * P.  seconds: wall time of the worker.
        error: what the episode raised if it failed; "" otherwise.
        trajectory: the trajectory, finite or not, if `record` asked for it; else None.
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
    """Return a placeholder for an episode that raised `error` on every worker; none of its values are used."""
    nothing = np.zeros((0, 0), dtype=np.float32)
    return EpisodeResult(math.nan, math.inf, None, nothing, finite=False, inner_steps=0, seconds=0.0, error=error)


@dataclass(frozen=True)
class Replayable:
    """The data that replay needs besides the weights and settings; `minima` [P, m] are for `log_gap`."""

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
    episode = _begin(weights, spec)
    found = ESTIMATORS[estimator.kind](episode)
    gradient = _clipped(found.gradient, episode.rule, estimator.clip)
    result = _result(episode, found.losses, began, found.episodes)
    return replayed(result, found.meta_loss.item(), gradient)


def roll_out_episode(weights: Weights, spec: EpisodeSpec) -> tuple[EpisodeResult, Replayable | None]:
    """Run the rollout of an episode whose estimator is replay or none; return what its replay needs.

    The second value is None if there is nothing to replay: no estimator, or losses that are not finite. The result has
    no meta-loss and no gradient yet.
    """
    began = time.perf_counter()
    episode, estimator = _begin(weights, spec), spec.estimator
    chosen = None if estimator is None else choose(episode.problem, estimator.coordinates, spec.seed)
    rollout = episode.roll_out(episode.rule, chosen, episode.recorder)
    result = _result(episode, rollout.losses, began)
    if estimator is None or not result.finite:
        return result, None
    return result, Replayable(rollout, episode.meta_loss, episode.problem.minima)


def replay_episode(
    weights: Weights, spec: EpisodeSpec, replayable: Replayable
) -> tuple[float, NDArray[np.float32] | None]:
    """Return the meta-loss and the clipped meta-gradient (None if not finite), on the rollout's device."""
    estimator, rollout = spec.estimator, replayable.rollout
    assert estimator is not None
    rule = learned_rule(spec.rule, weights, rollout.losses.device)
    loss, gradient = replay(rule, rollout, estimator, replayable.kind, spec.unroll, replayable.minima)
    return loss.item(), _clipped(gradient, rule, estimator.clip)


def replayed(result: EpisodeResult, meta_loss: float, gradient: NDArray[np.float32] | None) -> EpisodeResult:
    """Return the result with its meta-loss and, if everything is finite, its gradient."""
    finite = result.finite and gradient is not None and math.isfinite(meta_loss)
    return replace(result, meta_loss=meta_loss, gradient=gradient if finite else None, finite=finite)


def log_uniform(largest: float, seed: int) -> float:
    """Draw a number between 1 / largest and largest from `seed`, log-uniformly."""
    place = derive_seed("parameter scale", seed) / 2**63
    return math.exp((2 * place - 1) * math.log(largest))


def _begin(weights: Weights, spec: EpisodeSpec) -> Episode:
    """Return the episode: its problem, its starting points [P, n] and its rule."""
    context = ProblemContext(
        spec.instances, derive_seed("problem", spec.seed), torch.device(spec.device), data_root=spec.data_root
    )
    problem = spec.problem.build(context)
    if spec.parameter_scale != 1 or spec.objective_rescale != 1:
        seeds = [derive_seed("objective scale", spec.seed, j) for j in range(problem.objectives)]
        scales = [log_uniform(spec.objective_rescale, seed) for seed in seeds]
        problem = Rescaled(problem, spec.parameter_scale, scales)
    start = problem.initial_parameters([derive_seed("start", spec.seed, i) for i in range(spec.instances)])
    return Episode(
        learned_rule(spec.rule, weights, problem.device),
        spec.rule.guard,
        problem,
        start,
        spec.horizon,
        spec.estimator or EstimatorSettings(),
        spec.unroll,
        spec.seed,
        TrajectoryRecorder() if spec.record else None,
    )


def _result(episode: Episode, losses: Tensor, began: float, episodes: int = 1) -> EpisodeResult:
    """Return the result of an episode with losses [K+1, P, m], without meta-loss and gradient."""
    tail = losses[-max(1, episode.horizon // 10) :]
    return EpisodeResult(
        meta_loss=math.nan,
        score=step_losses(episode.meta_loss, tail, losses[0], episode.problem.minima).mean().item(),
        gradient=None,
        losses=losses.mean(dim=1).float().cpu().numpy(),
        finite=bool(losses.isfinite().all()),
        inner_steps=episodes * episode.horizon * len(episode.start),
        seconds=time.perf_counter() - began,
        trajectory=None if episode.recorder is None else episode.recorder.trajectory(),
    )


def _clipped(gradient: Mapping[str, Tensor], rule: LearnedRule, largest: float) -> NDArray[np.float32] | None:
    """Flatten to float32, in the rule's order, with norm at most `largest`; None where an entry is not finite."""
    flat = torch.cat([gradient[name].flatten() for name in rule.meta_parameters]).float()
    norm = flat.double().norm()
    if not bool(norm.isfinite()):
        return None
    return flat.mul(min(1.0, largest / max(norm.item(), 1e-30))).cpu().numpy()
