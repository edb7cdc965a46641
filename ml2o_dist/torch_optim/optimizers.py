"""ML2O and GML2O as optimizers of torch: the rules of this package on a user's parameters and losses."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ml2o_dist.artifact import PRETRAINED
from ml2o_dist.config import GuardSettings
from ml2o_dist.config_file import checked
from ml2o_dist.errors import UserError
from ml2o_dist.rules.base import Oracle, State, StepInfo, UpdateRule
from ml2o_dist.rules.gml2o import GML2O as GuardedRule
from ml2o_dist.rules.gml2o import fallback_rule
from ml2o_dist.rules.saved_state import modules_of, put_together, take_apart
from ml2o_dist.torch_optim.closures import Closure, ClosureBatch, ClosureProblem
from ml2o_dist.torch_optim.layout import Layout
from ml2o_dist.torch_optim.learned_weights import LearnedWeights
from ml2o_dist.torch_optim.multiplied import multiplied

Closures = Closure | Sequence[Closure]
"""One closure, or those of the parts of a batch whose losses are averaged (gradient accumulation)."""


class ML2O(Optimizer):
    """A learned optimizer for several losses (Yang, Tang, Yang 2023), used as any optimizer of torch:

        optimizer = ML2O(model.parameters())
        for batch in loader:
            optimizer.step(lambda: task_losses(model, batch))

    Each step calls the closure once, differentiates every loss by itself (one forward, m backward passes), and moves
    every parameter as the learned rule says: the same iterates as `ml2o_dist.ML2ORule`. No `backward`, no `zero_grad`;
    the parameters' `grad` is neither read nor written.

    What it needs: m is the same at every step. A parameter that no loss reaches in a step stays where it is, a frozen
    one (`requires_grad=False`) too; one that is unfrozen, or comes by `add_param_group`, begins then. Parameters of
    float16 and bfloat16 keep their exact values and all states in float32. Parameters may lie on several devices; the
    states are on that of the first one, 4 (3 m + 6 + 2 H (m + 1)) bytes for each number with H hidden units, 0.24 kB
    at m = 2 with the weights in the wheel (H = 8). Not for parameters that several processes share by
    DistributedDataParallel: nothing averages the losses' gradients there.

    `param_groups` have:
        lr: multiplies the learned step, 1 by default. The rule adapts the length of its steps to what came of the last
            ones, so that a smaller `lr` is made up for after some tens of steps. Schedulers of torch work, but for
            those that also set a momentum.
        weight_decay: d adds d |z|^2 / 2 in equal parts to the losses that depend on a parameter, which is torch's
            Adam's penalty on their sum. `step` returns the losses without it.

    Attributes:
        steps: how many were taken.
        weights: whose, as they were given.
    """

    def __init__(
        self,
        params: Iterable[Any],
        weights: str | Path = PRETRAINED,
        *,
        lr: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        """Take parameters or groups of them, as every optimizer of torch does.

        Args:
            weights: those that come with the package, by name; a run directory or a weights file; `initial` for the
                network before meta-training; or, read at the first step, a URI or a registered version,
                `models:/NAME@ALIAS`.

        Raises:
            UserError: weights that are missing, altered or of a later version.
        """
        if isinstance(params, torch.nn.Module):
            raise UserError(f"{type(self).__name__} takes parameters, not a module: write model.parameters()")
        if not isinstance(weights, str | Path):
            hint = f"; a learning rate is written lr={weights!r}" if isinstance(weights, float | int) else ""
            raise UserError(f"weights {weights!r} must be a name or a file{hint}")
        _checked("lr", lr)
        _checked("weight_decay", weight_decay)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.steps = 0
        self.weights = str(weights)
        _warn_of_ranks(type(self).__name__)
        self._learned = LearnedWeights(str(weights))
        self._layout = Layout()
        self._objectives = 0  # until the first step
        self._rule_state: State = None

    def step(self, closure: Closures, guard_closure: Closures | None = None) -> Tensor:  # type: ignore[override]
        """Take one step; return the losses [m] where it started, detached.

        Args:
            closure: returns the m losses of one batch, with their graph: a list of scalars, or of vectors [B] with the
                losses of single samples, or one tensor [m] or [m, B]. Whenever it is called within the step it must
                use the same batch. One loss by its samples is a list of one vector: a tensor [B] would be B losses. A
                list of closures is one batch in parts, whose losses are averaged.
            guard_closure: not for ML2O.

        Raises:
            UserError: losses that are neither scalars nor vectors, not finite, without a gradient, or more or fewer
                than before. The parameters are then as they were.
        """
        if guard_closure is not None:
            raise UserError("ML2O has no guard, so that it takes no guard_closure: use GML2O")
        return self._stepped(closure, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the groups' settings and all that is remembered: plain values and tensors, as torch.save wants."""
        place = {id(parameter): i for i, parameter in enumerate(self._every_parameter())}
        tree, tensors = take_apart(self._rule_state)
        saved: dict[str, Any] = super().state_dict()
        saved["ml2o"] = {
            "steps": self.steps,
            "weights_sha256": self._learned.digest if self.steps else "",
            "objectives": self._objectives,
            "order": [place[id(parameter)] for parameter in self._layout.parameters],
            "shapes": [list(parameter.shape) for parameter in self._layout.parameters],
            "exact": self._layout.exact,
            "tree": json.dumps(tree),
            "tensors": tensors,
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, with the same parameters in the same groups.

        Raises:
            UserError: it is of another optimizer or of other weights; ValueError: of other groups (torch's).
        """
        saved = state_dict.get("ml2o")
        if saved is None:
            raise UserError(f"the state dict is none of {type(self).__name__}: it has no entry 'ml2o'")
        if saved["steps"] and saved["weights_sha256"] != self._learned.digest:
            raise UserError(
                f"the state dict belongs to weights {saved['weights_sha256'][:12]}..., this optimizer has "
                f"{self._learned.digest[:12]}... ({self._learned.origin})"
            )
        if "accepted_steps" in saved and not isinstance(self, GML2O):
            raise UserError("the state dict is of GML2O, with a guard's memory; this is ML2O")
        every = self._every_parameter()
        for i, shape in zip(saved["order"], saved["shapes"], strict=True):
            if i < len(every) and list(every[i].shape) != shape:
                raise UserError(
                    f"the state dict has a parameter of shape {shape}, where this one has {list(every[i].shape)}"
                )
        super().load_state_dict(state_dict)
        self.steps, self._objectives, self._rule_state = saved["steps"], saved["objectives"], None
        self._layout = Layout()
        if self.steps:
            self._layout.add([every[i] for i in saved["order"]])
            device = self._layout.device
            self._layout.remember(None if saved["exact"] is None else saved["exact"].to(device))
            fresh = self._rule(None).initial_state(1, self._objectives, self._layout.dimension)
            tensors = {place: tensor.clone().to(device) for place, tensor in saved["tensors"].items()}
            self._rule_state = put_together(json.loads(saved["tree"]), tensors, modules_of(fresh).__getitem__)

    def __getstate__(self) -> dict[str, Any]:
        """Return all of it, for `copy.deepcopy`; torch's own leaves out what it does not know."""
        return {**super().__getstate__(), **{name: vars(self)[name] for name in self._remembered}}

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}weights: {self.weights}\n)"

    _remembered: tuple[str, ...] = ("steps", "weights", "_learned", "_layout", "_objectives", "_rule_state")

    def _stepped(self, closure: Closures, guard_closure: Closures | None) -> Tensor:
        self._take_in()
        training = ClosureBatch(closure, "closure", traces=True)
        guard = None if guard_closure is None else ClosureBatch(guard_closure, "guard closure", traces=False)
        problem = ClosureProblem(self._layout, training, guard, self._decay(), self._fewest())
        oracle = Oracle(problem, torch.default_generator)  # which nothing draws from
        point, batch = self._layout.read(), oracle.draw()
        jacobian, losses = problem.jacobian(point, batch)
        self._check_objectives(problem.objectives)
        rule = self._rule(self._multiplier(problem.reached))
        if self._rule_state is None:
            self._rule_state = rule.initial_state(1, problem.objectives, problem.dimension)
        moved, self._rule_state = self._moved(rule, oracle, point, StepInfo(losses, jacobian, batch))
        self._layout.keep(moved)
        self._objectives = problem.objectives
        self.steps += 1
        return problem.plain

    def _rule(self, multiplier: Tensor | None) -> UpdateRule:
        """Return the rule, with its steps times `multiplier` [1, n]."""
        return multiplied(self._learned.rule(self._layout.device, self._layout.dtype), multiplier)

    def _fewest(self) -> int:
        """Return how many samples a batch must have."""
        return 1

    def _moved(self, rule: UpdateRule, oracle: Oracle, point: Tensor, seen: StepInfo) -> tuple[Tensor, State]:
        return rule.propose(oracle, point, self._rule_state, seen)

    def _check_objectives(self, objectives: int) -> None:
        if self._objectives and objectives != self._objectives:
            raise UserError(f"the closure returned {objectives} losses, in the steps before {self._objectives}")

    def _take_in(self) -> None:
        """Let parameters that are trained from now on into the layout, behind the others."""
        known = {id(parameter) for parameter in self._layout.parameters}
        new = [p for p in self._every_parameter() if p.requires_grad and id(p) not in known]
        if new:
            self._layout.add(new)
        if not self._layout.parameters:
            raise UserError("no parameter of the optimizer requires a gradient")
        if new and self._rule_state is not None:
            self._rule_state = self._rule(None).grown(self._rule_state, sum(p.numel() for p in new))

    def _every_parameter(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _decay(self) -> Tensor | None:
        decays = self._of_each("weight_decay")
        return self._layout.spread(decays) if any(decays) else None

    def _multiplier(self, reached: Sequence[bool]) -> Tensor | None:
        """Return what multiplies the steps [1, n]; None where that is 1 everywhere."""
        factors = [lr if there else 0.0 for lr, there in zip(self._of_each("lr"), reached, strict=True)]
        return None if all(factor == 1 for factor in factors) else self._layout.spread(factors)

    def _of_each(self, key: str) -> list[float]:
        """Return the setting that each parameter of the layout has in its group."""
        values: dict[int, float] = {}
        for group in self.param_groups:
            value = _checked(key, group[key])
            values |= {id(parameter): value for parameter in group["params"]}
        return [values[id(parameter)] for parameter in self._layout.parameters]


class GML2O(ML2O):
    """ML2O under a guard: a step that would be worse than that of a convergent rule, DSSMG, gives way to that one.

        optimizer = GML2O(model.parameters())
        for batch, guard_batch in pairs(loader):
            optimizer.step(lambda: task_losses(model, batch), lambda: task_losses(model, guard_batch))

    With two closures on independent batches that return the losses of single samples, vectors [B], every step passes
    the test of `rules/gml2o.py`, and its theorem holds: each objective is compared by the paired differences of the
    guard batch's samples, at the same dropout masks. The guard batch gives DSSMG's second gradient, too: neither
    candidate depends on it.

    **No theorem** covers the rest: with one closure both candidates are compared on the batch that the learned step
    was made from; with scalars they are compared by these, whatever their noise. `lr` multiplies both candidates:
    the bound stays for one factor that never grows and keeps above 0 (its C, which is alpha_t / gamma_t, falls with
    it), not for groups with factors of their own. A parameter that no loss reaches in a step counts as of factor 0.

    A step costs four forwards and m + 1 backward passes, the first one four forwards more. The two candidates'
    evaluations leave BatchNorm's moments as they were.

    Attributes:
        accepted_steps: how many of the `steps` were the learned rule's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        weights: str | Path = PRETRAINED,
        *,
        guard: GuardSettings | Mapping[str, Any] | None = None,
        lr: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        """Take what `ML2O` takes.

        Args:
            guard: settings as `GuardSettings` has them, `{"budget": 0}` for one; instead of those that the weights
                were meta-trained under, or else the default ones.

        Raises:
            UserError: as `ML2O`; settings that there are not; a guard that wants more than one batch in a step.
        """
        if isinstance(guard, Mapping):
            guard = checked(GuardSettings, guard)
        if guard is not None and (guard.batches != 1 or guard.growth):
            raise UserError(
                f"guard has batches {guard.batches} and growth {guard.growth:g}: a guard closure is one batch, so that "
                "batches=1 and growth=0 are allowed; make the batch larger instead"
            )
        super().__init__(params, weights, lr=lr, weight_decay=weight_decay)
        self.accepted_steps = 0
        self._guard = guard

    def step(self, closure: Closures, guard_closure: Closures | None = None) -> Tensor:  # type: ignore[override]
        """Take one step; return the losses [m] where it started, detached.

        Args:
            closure: as for `ML2O`; m is at least 2. It is called again in the first step, to find the fallback's size.
            guard_closure: the same on another batch.

        Raises:
            UserError: as `ML2O`; one loss only; vectors of too few samples to compare by.
        """
        return self._stepped(closure, guard_closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the groups' settings and all that is remembered: plain values and tensors, as torch.save wants."""
        saved = super().state_dict()
        saved["ml2o"]["accepted_steps"] = self.accepted_steps
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, with the same parameters in the same groups; raises as `ML2O`."""
        accepted = state_dict.get("ml2o", {"accepted_steps": 0}).get("accepted_steps")
        if accepted is None:
            raise UserError("the state dict is of ML2O, without a guard's memory; this is GML2O")
        super().load_state_dict(state_dict)
        self.accepted_steps = accepted

    _remembered = (*ML2O._remembered, "accepted_steps", "_guard")

    def _rule(self, multiplier: Tensor | None) -> GuardedRule:
        guard = self._guard_settings()
        return GuardedRule(super()._rule(multiplier), multiplied(fallback_rule(guard), multiplier), guard)

    def _guard_settings(self) -> GuardSettings:
        if self._guard:
            return self._guard
        return (self._learned.settings.guard or GuardSettings()).model_copy(update={"batches": 1, "growth": 0.0})

    def _fewest(self) -> int:
        return self._guard_settings().fewest_samples

    def _moved(self, rule: UpdateRule, oracle: Oracle, point: Tensor, seen: StepInfo) -> tuple[Tensor, State]:
        assert isinstance(rule, GuardedRule)
        moved, state, info = rule.choose(oracle, point, self._rule_state, seen)
        self.accepted_steps += int(info.accepted)
        return moved, state

    def _check_objectives(self, objectives: int) -> None:
        if objectives < 2:
            raise UserError("GML2O got one loss only, it guards several: return a list of losses, or use ML2O")
        super()._check_objectives(objectives)


def _warn_of_ranks(name: str) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            warnings.warn(
                f"{name} in one of {ranks} ranks: it does not average the losses' gradients over them, so that a model "
                "in DistributedDataParallel becomes another on each",
                stacklevel=3,
            )


def _checked(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise UserError(f"{name} {value!r} of a parameter group must be a finite number, 0 or more")
    return number
