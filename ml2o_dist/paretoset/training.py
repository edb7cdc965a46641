"""Train a network that takes a preference by any update rule, with checkpoints.

The batch of a step depends only on the seed and the step's number, so that a training that was killed and resumed from
its newest checkpoint ends like one that was not killed.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ml2o_dist.metatrain.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from ml2o_dist.paretoset.preference_problem import PreferenceProblem
from ml2o_dist.rules.base import Oracle, UpdateRule
from ml2o_dist.rules.saved_state import StateError, check_alike, classes_of, modules_of, put_together, take_apart
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator


class Diverged(Exception):
    """Parameters that are no longer finite; the message says at which step."""


@dataclass(frozen=True, eq=False)
class Trained:
    """The result of a training, finished or stopped.

    Attributes:
        parameters: [1, n].  steps: how many were done.
        seconds: training time over all its starts, without evaluations between steps.
        failures: EPO's linear programs without a solution.
    """

    parameters: Tensor
    steps: int
    seconds: float
    failures: int


def train(
    problem: PreferenceProblem,
    rule: UpdateRule,
    *,
    steps: int,
    seed: int,
    folder: Path,
    fingerprint: Mapping[str, Any],
    final_lr: float = 1.0,
    checkpoint_every: int = 500,
    on_step: Callable[[int, Tensor, float], bool] = lambda step, parameters, seconds: True,
) -> Trained:
    """Take `steps` steps of `rule`, or those that remain after the newest checkpoint in `folder`.

    Args:
        fingerprint: JSON values that identify the training; checkpoints with other values are removed, not resumed.
        final_lr: the last step's length as a share of the rule's own; a cosine leads there.
        on_step: called after each step with (steps done, parameters [1, n], seconds so far); False ends the training
            there, with a checkpoint.

    Raises:
        Diverged: a parameter is not finite.
        OSError: a checkpoint cannot be written.
        UserError: the newest checkpoint is marked as this training's, but does not fit.
    """
    device = problem.device
    parameters = problem.initial_parameters([seed])
    state = rule.initial_state(1, problem.objectives, problem.layout)
    done, seconds = 0, 0.0
    identity = json.loads(json.dumps(dict(fingerprint)))
    saved, _ = newest_checkpoint(folder)
    if saved is not None and saved.state.get("fingerprint") != identity:
        for path in folder.glob("step_*"):  # a whole checkpoint is never replaced by one of the same step
            shutil.rmtree(path)
        saved = None
    if saved is not None:
        try:
            state = _rule_state(saved, state, device)
            done, seconds = saved.meta_step, _number(saved, "seconds")
            problem.scalarization.failures = int(_number(saved, "failures"))
            parameters = _taken(saved, "parameters", parameters)
            _load_buffers(problem, saved)
        except StateError as error:
            step = f"step_{saved.meta_step:06d}"
            raise UserError(f"checkpoint {str(folder / step)!r} cannot be gone on with: {error}") from error
    going = True
    while done < steps and going:
        began = time.perf_counter()
        oracle = Oracle(problem, generator("paretoset training", seed, done))
        moved, state, seen = rule.step(oracle, parameters, state)
        share = annealed(final_lr, done, steps)
        if share != 1:
            moved = parameters + share * (moved - parameters)
            everywhere = torch.ones(1, dtype=torch.bool, device=device)
            state = rule.overruled(state, seen, moved - parameters, everywhere)
        parameters = moved
        done += 1
        if not bool(parameters.isfinite().all()):
            raise Diverged(f"a parameter is not finite after step {done} of {steps}")
        seconds += time.perf_counter() - began
        going = on_step(done, parameters, seconds)
        if done % checkpoint_every == 0 or done == steps or not going:
            save_checkpoint(folder, _checkpoint(problem, parameters, state, done, seconds, identity), keep=2)
    return Trained(parameters, done, seconds, problem.scalarization.failures)


def annealed(final: float, step: int, steps: int) -> float:
    """Return the factor on the length of step number `step` from 0: a cosine from 1 down to `final` at the last."""
    return 1.0 if steps <= 1 else final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / (steps - 1)))


def _checkpoint(
    problem: PreferenceProblem,
    parameters: Tensor,
    state: Any,
    done: int,
    seconds: float,
    fingerprint: Mapping[str, Any],
) -> Checkpoint:
    tree, tensors = take_apart(state)
    saved = {f"rule{place}": tensor.cpu() for place, tensor in tensors.items()} | {"parameters": parameters.cpu()}
    if problem.model.moving_buffers:
        saved |= {f"buffer/{name}": buffer.clone().cpu() for name, buffer in problem.model.named_buffers()}
    rest = {
        "fingerprint": dict(fingerprint),
        "rule": tree,
        "seconds": seconds,
        "failures": problem.scalarization.failures,
    }
    return Checkpoint(done, saved, rest)


def _rule_state(saved: Checkpoint, fresh: Any, device: torch.device) -> Any:
    at = {place.removeprefix("rule"): t.to(device) for place, t in saved.tensors.items() if place[:4] == "rule"}
    state = put_together(saved.state.get("rule"), at, modules_of(fresh).__getitem__, classes_of(fresh))
    check_alike(state, fresh)
    return state


def _number(saved: Checkpoint, name: str) -> float:
    value = saved.state.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise StateError(f"its {name} is no number")
    return value


def _taken(saved: Checkpoint, name: str, like: Tensor) -> Tensor:
    found = saved.tensors.get(name)
    if found is None or found.shape != like.shape or found.dtype != like.dtype:
        raise StateError(f"it has no {name} of shape {list(like.shape)}")
    return found.to(like.device)


def _load_buffers(problem: PreferenceProblem, saved: Checkpoint) -> None:
    with torch.no_grad():
        for name, buffer in problem.model.named_buffers():
            if f"buffer/{name}" in saved.tensors:
                buffer.copy_(_taken(saved, f"buffer/{name}", buffer))
