"""ML2O as a torch optimizer: this package's rule applied to a user's parameters and losses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ml2o_dist.pretrained import PRETRAINED
from ml2o_dist.rules.base import Oracle, State, StepInfo, UpdateRule
from ml2o_dist.rules.saved_state import StateError, classes_of, modules_of, put_together, take_apart
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.torch_optim.buffers import ModuleBuffers
from ml2o_dist.torch_optim.closure_problem import ClosureProblem
from ml2o_dist.torch_optim.closures import Closure, ClosureBatch
from ml2o_dist.torch_optim.flat_parameters import FlatParameters
from ml2o_dist.torch_optim.learned_weights import LearnedWeights
from ml2o_dist.torch_optim.multiplied import multiplied
from ml2o_dist.torch_optim.notices import Notices, warn

Closures = Closure | Sequence[Closure]
"""One closure, or one for each part of a batch; their losses are averaged (gradient accumulation)."""


class ML2O(Optimizer):
    """A learned optimizer for several losses (Yang, Tang, Yang 2023), used like any torch optimizer:

        optimizer = ML2O(model.parameters())
        for batch in loader:
            optimizer.step(lambda: task_losses(model, batch))

    Each step calls the closure once, differentiates every loss separately (one forward, m backward passes), and moves
    every parameter by the learned rule: the iterates are those of `ml2o_dist.ML2ORule`. Do not call `backward` or
    `zero_grad`; the optimizer neither reads nor writes the parameters' `grad`.

    Requirements: m is the same at every step. A task without labels in a batch still needs a loss with a graph,
    `(output * 0).sum()`. Give samples without a label one before the loss, `torch.where(mask, label, 0)`, and set their
    loss to 0 after it, `torch.where(mask, loss, 0)`. Activation checkpoints need `use_reentrant=False`. Accelerate's
    wrapper passes on one closure only and drops the losses: call `optimizer.optimizer.step(closure, guard_closure)`
    there. Save `state_dict()` with `torch.save`: torch.distributed.checkpoint omits entries that it does not know.

    A parameter that no loss reaches in a step does not move, nor does a frozen one (`requires_grad=False`). A parameter
    that is unfrozen or added by `add_param_group` starts at that step. If no loss reaches a parameter in its first
    step, a warning names it, by its own name if the optimizer was given `model.named_parameters()`. If the forward pass
    writes parameters in place, as an embedding with `max_norm` does, the step starts from the written values.

    For float16 and bfloat16 parameters the master weights and all states are kept in float32. Parameters may be on
    several devices. The states are on the device of the first one and take 4 (3 m + 6 + 2 H (m + 1)) bytes for each
    number with H hidden units, 0.24 kB at m = 2 with the weights in the wheel (H = 8). The optimizer does not support
    parameters that several processes share by DistributedDataParallel: nothing averages the losses' gradients there.

    `param_groups` have:
        lr: multiplies the learned step, 1 by default. It is not a learning rate like Adam's: the rule adapts the length
            of its steps to the results of the last ones, so it makes up for a smaller `lr` after some tens of steps.
            Torch's schedulers work, except those that also set a momentum.
        weight_decay: d adds d |z|^2 / 2 in equal parts to the losses that depend on a parameter, which is the penalty
            of torch's Adam on their sum. `step` returns the losses without it.

    Attributes:
        steps: number of steps taken.
    """

    def __init__(
        self,
        params: Iterable[Any],
        weights: str | Path = PRETRAINED,
        *,
        lr: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        """Take parameters or parameter groups, as every torch optimizer does.

        Args:
            weights: the name of weights in the package; a run directory or a weights file; `initial` for the network
                before meta-training; or a URI or a registered version, `models:/NAME@ALIAS`, which are read at the
                first step.

        Raises:
            UserError: weights that are missing, altered or of a later version.
        """
        if isinstance(params, torch.nn.Module):
            raise UserError(f"{type(self).__name__} takes parameters, not a module: write model.parameters()")
        if not isinstance(weights, str | Path):
            hint = f"; a learning rate is written lr={weights!r}" if isinstance(weights, float | int) else ""
            raise UserError(f"weights {weights!r} must be a name or a file{hint}")
        _non_negative("lr", lr)
        _non_negative("weight_decay", weight_decay)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.steps = 0
        _warn_of_ranks(type(self).__name__)
        self._learned = LearnedWeights(str(weights))
        self._flat = FlatParameters()
        self._objectives = 0  # until the first step
        self._rule_state: State = None
        self._inspected: set[tuple[bool, ...]] = set()  # the sets of reached parameters whose graphs were searched
        self._notices = Notices(type(self).__name__)
        self._notices.learning_rates([_non_negative("lr", group["lr"]) for group in self.param_groups])

    def step(self, closure: Closures | None = None, guard_closure: Closures | None = None) -> Tensor:  # type: ignore[override]
        """Take one step; return the losses [m] where it started, detached.

        Args:
            closure: returns the m losses of one batch, with their graph: a list of scalars, or of vectors [B] with the
                losses of single samples, or one tensor [m] or [m, B], m up to 8. Every call within the step must use
                the same batch. Return one loss with its samples as a list of one vector: a tensor [B] would be B
                losses. A list of closures stands for one batch in parts; their losses are averaged.
            guard_closure: not for ML2O.

        Raises:
            UserError: losses that are neither scalars nor vectors, not finite, without a gradient, or more or fewer
                than before. The parameters are then unchanged.
        """
        if guard_closure is not None:
            raise UserError("ML2O has no guard, so that it takes no guard_closure: use GML2O")
        return self._stepped(closure, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the groups' settings and the optimizer's state as plain values and tensors, for torch.save."""
        place = {id(parameter): i for i, parameter in enumerate(self._every_parameter())}
        tree, tensors = take_apart(self._rule_state)
        saved: dict[str, Any] = super().state_dict()
        saved["ml2o"] = {
            "steps": self.steps,
            "weights_sha256": self._learned.digest if self.steps else "",
            "objectives": self._objectives,
            "order": [place[id(parameter)] for parameter in self._flat.parameters],
            "shapes": [list(parameter.shape) for parameter in self._flat.parameters],
            "precision": str(self._flat.dtype),
            "exact": self._flat.master_weights,
            "tree": json.dumps(tree),
            "tensors": tensors,
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a result of `state_dict`, with the same parameters in the same groups.

        Raises:
            UserError: the state is of another optimizer or other weights.
            ValueError: the state has other groups (raised by torch).
        """
        saved = state_dict.get("ml2o")
        if saved is None:
            raise UserError(f"the state dict is none of {type(self).__name__}: it has no entry 'ml2o'")
        _check_saved(saved)
        kinds = "ML2O, without a guard's memory", "GML2O, with a guard's memory"
        theirs = "accepted_steps" in saved
        if theirs != self._guarded:
            raise UserError(f"the state dict is of {kinds[theirs]}; this is {kinds[self._guarded].split(',')[0]}")
        if saved["steps"] and saved["weights_sha256"] != self._learned.digest:
            raise UserError(
                f"the state dict belongs to weights {saved['weights_sha256'][:12]}..., this optimizer has "
                f"{self._learned.digest[:12]}... ({self._learned.origin})"
            )
        every = self._every_parameter()
        for i, shape in zip(saved["order"], saved["shapes"], strict=True):
            if i < len(every) and list(every[i].shape) != shape:
                raise UserError(
                    f"the state dict has a parameter of shape {shape}, where this one has {list(every[i].shape)}"
                )
        flat = FlatParameters()
        there = [every[i] for i in saved["order"] if i < len(every)]
        flat.add(there, [self._name(parameter) for parameter in there])  # torch reports a missing one below
        if flat.parameters and saved["precision"] != str(flat.dtype):
            raise UserError(f"the state dict is in {saved['precision']}, the parameters here in {flat.dtype}")
        rule_state: State = None
        if saved["steps"]:
            device = flat.device
            flat.remember(None if saved["exact"] is None else saved["exact"].to(device))
            fresh = self._rule(None, flat).initial_state(1, saved["objectives"], flat.layout())
            tensors = {place: tensor.clone().to(device) for place, tensor in saved["tensors"].items()}
            try:
                rule_state = put_together(
                    json.loads(saved["tree"]), tensors, modules_of(fresh).__getitem__, classes_of(fresh)
                )
            except (StateError, json.JSONDecodeError, RecursionError) as error:
                raise UserError(
                    f"the state dict is not whole: {error}. torch.distributed.checkpoint fills in only what a new "
                    "optimizer has: use torch.save and torch.load"
                ) from error
        super().load_state_dict(state_dict)
        self.steps, self._objectives, self._rule_state = saved["steps"], saved["objectives"], rule_state
        self._flat = flat

    def __getstate__(self) -> dict[str, Any]:
        """Return the whole state, for `copy.deepcopy`; torch's own method omits attributes that it does not know."""
        return {**super().__getstate__(), **{name: vars(self)[name] for name in self._remembered}}

    @property
    def weights(self) -> str:
        """The weights' origin, as it was given."""
        return self._learned.origin

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}weights: {self.weights}\n)"

    _guarded = False

    _remembered: tuple[str, ...] = (
        "steps",
        "_learned",
        "_flat",
        "_objectives",
        "_rule_state",
        "_inspected",
        "_notices",
    )

    _new: Sequence[Tensor] = ()
    """Parameters that have not taken their first step."""

    _careful = True
    """Whether the next step checks the closures: true for the first step of this object and of new parameters."""

    _buffers: ModuleBuffers | None = None
    """Buffers that closure calls may change, set at the first step if a step calls the closure more than once."""

    def _stepped(self, closure: Closures | None, guard_closure: Closures | None) -> Tensor:
        if closure is None:
            raise UserError(_no_closure(type(self).__name__))
        self._take_in()
        training = ClosureBatch(closure, "closure")
        guard = None if guard_closure is None else ClosureBatch(guard_closure, "guard closure")
        if self._guarded and self._buffers is None:
            self._buffers = ModuleBuffers(self._flat.parameters)
        problem = ClosureProblem(
            self._flat, training, guard, self._decay(), fewest=self._fewest(), buffers=self._buffers
        )
        oracle = Oracle(problem, torch.default_generator)  # nothing draws from the generator
        with problem.step():
            batch = oracle.draw()
            point, jacobian, losses = problem.begin(self._inspected, careful=self._careful)
            self._check_objectives(problem.objectives)
            if self._careful and self._guarded:
                problem.check_repeats()
            multiplier = self._multiplier(problem.reached)
            rule = self._rule(multiplier, self._flat)
            state = self._rule_state
            if state is None:
                state = rule.initial_state(1, problem.objectives, problem.layout)
            moved, state = self._moved(rule, oracle, point, StepInfo(losses, jacobian, batch), state)
        self._rule_state = state
        self._flat.keep(moved)
        self._objectives = problem.objectives
        self.steps += 1
        self._notice(problem.reached, multiplier is None or bool(multiplier.any()), point, moved, jacobian)
        return problem.plain

    def _notice(self, reached: Sequence[bool], meant: bool, point: Tensor, moved: Tensor, jacobian: Tensor) -> None:
        """Warn about problems in a step; `meant`: whether some parameter should have moved."""
        new = {id(parameter) for parameter in self._new if parameter.requires_grad}
        pairs = zip(self._flat.parameters, reached, strict=True)
        self._new, self._careful = (), False
        self._notices.unreached(
            [f"{self._name(p)} {list(p.shape)}" for p, there in pairs if id(p) in new and not there]
        )
        if meant:
            self._notices.moved(not torch.equal(point, moved), jacobian)

    def _name(self, parameter: Tensor) -> str:
        """Return the parameter's name if the optimizer was given names, else its place in the groups."""
        for g, group in enumerate(self.param_groups):
            for i, each in enumerate(group["params"]):
                if each is parameter:
                    names = group.get("param_names")  # torch 2.6 and later take named_parameters()
                    return str(names[i]) if names else f"param_groups[{g}]['params'][{i}]"
        raise AssertionError

    def _rule(self, multiplier: Tensor | None, flat: FlatParameters) -> UpdateRule:
        """Return the rule for the parameters in `flat`, with its steps multiplied by `multiplier` [1, n]."""
        return multiplied(self._learned.rule(flat.device, flat.dtype), multiplier)

    def _fewest(self) -> int:
        """Return how many samples a batch must have."""
        return 1

    def _moved(
        self, rule: UpdateRule, oracle: Oracle, point: Tensor, seen: StepInfo, state: State
    ) -> tuple[Tensor, State]:
        moved, state = rule.propose(oracle, point, state, seen)
        self._check_moved(moved)
        return moved, state

    def _check_moved(self, moved: Tensor) -> None:
        if not bool(moved.isfinite().all()):
            step = f"step {self.steps + 1} of {type(self).__name__}"
            raise UserError(f"{step} leads to parameters that are not finite; no step was taken")

    def _check_objectives(self, objectives: int) -> None:
        if self._objectives and objectives != self._objectives:
            raise UserError(f"the closure returned {objectives} losses, in the steps before {self._objectives}")

    def _take_in(self) -> None:
        """Append parameters that newly require gradients to the layout."""
        known = {id(parameter) for parameter in self._flat.parameters}
        new = [p for p in self._every_parameter() if p.requires_grad and id(p) not in known]
        if new:
            before = len(self._flat.parameters)
            self._flat.add(new, [self._name(parameter) for parameter in new])
            self._new, self._careful, self._buffers = [*self._new, *new], True, None
        if not self._flat.parameters:
            raise UserError("no parameter of the optimizer requires a gradient")
        if new and self._rule_state is not None:
            self._rule_state = self._rule(None, self._flat).grown(self._rule_state, self._flat.layout(before))

    def _every_parameter(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _decay(self) -> Tensor | None:
        decays = self._of_each("weight_decay")
        return self._flat.spread(decays) if any(decays) else None

    def _multiplier(self, reached: Sequence[bool]) -> Tensor | None:
        """Return the factors of the steps [1, n]; None if all are 1."""
        factors = [lr if there else 0.0 for lr, there in zip(self._of_each("lr"), reached, strict=True)]
        return None if all(factor == 1 for factor in factors) else self._flat.spread(factors)

    def _of_each(self, key: str) -> list[float]:
        """Return the setting `key` of each parameter of the layout, from its group."""
        values: dict[int, float] = {}
        for group in self.param_groups:
            value = _non_negative(key, group[key])
            values |= {id(parameter): value for parameter in group["params"]}
        return [values[id(parameter)] for parameter in self._flat.parameters]


def _check_saved(saved: Any) -> None:
    """Raise UserError if the entry `ml2o` of a state dict lacks a value or has one of the wrong type."""
    kinds: dict[str, Any] = {
        "steps": int,
        "weights_sha256": str,
        "objectives": int,
        "order": list,
        "shapes": list,
        "precision": str,
        "exact": Tensor | None,
        "tree": str,
        "tensors": dict,
    }
    if not isinstance(saved, dict):
        raise UserError("the state dict is not whole: its entry 'ml2o' is no dictionary")
    if "accepted_steps" in saved:
        kinds["accepted_steps"] = int
    for name, kind in kinds.items():
        if name not in saved or not isinstance(saved[name], kind) or (kind is int and saved[name] < 0):
            raise UserError(f"the state dict is not whole: it lacks {name!r}, or has no such value there")
    if not all(isinstance(each, int) and each >= 0 for each in saved["order"]):
        raise UserError("the state dict is not whole: 'order' has other things than numbers of parameters")
    for tensor in (saved["exact"], *saved["tensors"].values()):
        if tensor is not None and not (isinstance(tensor, Tensor) and not bool(tensor.isnan().any())):
            raise UserError("the state dict is not whole: it has something else than tensors of numbers")


def _no_closure(name: str) -> str:
    return (
        f"{name}.step needs a closure that returns the losses: optimizer.step(lambda: [loss_1, loss_2]), without "
        "backward() and zero_grad(). A Trainer of Hugging Face calls it without one: override training_step, as "
        "examples/hugging_face_trainer.py does; torch.distributed.checkpoint does, too: save optimizer.state_dict()"
    )


def _warn_of_ranks(name: str) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            warn(
                f"{name} in one of {ranks} ranks: it does not average the losses' gradients over them, so that a model "
                "in DistributedDataParallel becomes another on each"
            )


def _non_negative(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise UserError(f"{name} {value!r} of a parameter group must be a finite number, 0 or more")
    return number
