"""GML2O, the guarded rule, as a torch optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ml2o_dist.config import GuardSettings
from ml2o_dist.config_file import checked
from ml2o_dist.pretrained import PRETRAINED
from ml2o_dist.rules.base import Oracle, State, StepInfo, UpdateRule
from ml2o_dist.rules.card_guard import admitted
from ml2o_dist.rules.guarded import GuardedRule, fallback_rule
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.torch_optim.flat_parameters import FlatParameters
from ml2o_dist.torch_optim.ml2o import ML2O, Closures
from ml2o_dist.torch_optim.multiplied import multiplied
from ml2o_dist.torch_optim.notices import warn


class GML2O(ML2O):
    """ML2O under a guard: a step that would be worse than that of a convergent rule, DSSMG, is replaced by the latter.

        optimizer = GML2O(model.parameters())
        for batch, guard_batch in pairs(loader):
            optimizer.step(lambda: task_losses(model, batch), lambda: task_losses(model, guard_batch))

    With two closures on independent batches that return the losses of single samples, vectors [B], every step passes
    the test of `rules/guarded.py`, and its theorem holds: each objective is compared by the paired differences of the
    guard batch's samples, at the same dropout masks. The guard batch also gives DSSMG's second gradient; neither
    candidate depends on it.

    **No theorem** covers the other cases. With one closure, both candidates are compared on the batch that the learned
    step was made from. With scalar losses, the scalars are compared, whatever their noise. `lr` multiplies both
    candidates. The bound still holds for one factor that never grows and stays above 0 (the bound's C, which is
    alpha_t / gamma_t, falls with it), but not if groups have different factors. A parameter that no loss reaches in a
    step counts as having the factor 0.

    A step costs four forwards and m + 1 backward passes. The first step costs up to eight more forwards: it finds the
    size of the fallback's steps and checks that a closure gives the same losses when it is called again. A closure that
    does not is refused, for example one that draws a new batch or uses its own `torch.Generator`. Buffers of modules
    (BatchNorm's moments) change only as by one call of the training closure, whatever the guard calls.

    GML2O warns once if fewer than 3 of the last 50 learned steps passed the guard.

    Attributes:
        accepted_steps: how many of the `steps` used the learned candidate.
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
        """Take the arguments of `ML2O` and a guard.

        Args:
            guard: settings of `GuardSettings`, for example `{"budget": 0}`. By default the guard is the one that the
                weights were meta-trained under; settings looser than the default guard's are replaced by those.

        Raises:
            UserError: as `ML2O`; unknown settings; a guard that wants more than one batch in a step.
        """
        if isinstance(guard, Mapping):
            guard = checked(GuardSettings, guard)
        if not isinstance(guard, GuardSettings | None):
            raise UserError(
                f"guard {guard!r} must be settings, such as guard={{'budget': 0}}, GuardSettings(...) or None"
            )
        if guard is not None and (guard.batches != 1 or guard.growth):
            raise UserError(
                f"guard has batches {guard.batches} and growth {guard.growth:g}: a guard closure is one batch, so that "
                "batches=1 and growth=0 are allowed; make the batch larger instead"
            )
        super().__init__(params, weights, lr=lr, weight_decay=weight_decay)
        self.accepted_steps = 0
        self._guard = guard
        self._card_guard: GuardSettings | None = None  # the guard from the weights' card, read with them

    def step(self, closure: Closures | None = None, guard_closure: Closures | None = None) -> Tensor:  # type: ignore[override]
        """Take one step; return the losses [m] where it started, detached.

        Args:
            closure: as for `ML2O`; m is at least 2. The first step calls it again, to find the fallback's step size.
            guard_closure: the same on another batch.

        Raises:
            UserError: as `ML2O`; one loss only; vectors of too few samples to compare by.
        """
        return self._stepped(closure, guard_closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the groups' settings and the optimizer's state as plain values and tensors, for torch.save."""
        saved = super().state_dict()
        saved["ml2o"]["accepted_steps"] = self.accepted_steps
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a result of `state_dict`, with the same parameters in the same groups; raises as `ML2O`."""
        super().load_state_dict(state_dict)
        self.accepted_steps = state_dict["ml2o"]["accepted_steps"]

    _guarded = True

    _remembered = (*ML2O._remembered, "accepted_steps", "_guard", "_card_guard")

    def _rule(self, multiplier: Tensor | None, flat: FlatParameters) -> GuardedRule:
        guard = self._guard_settings()
        return GuardedRule(super()._rule(multiplier, flat), multiplied(fallback_rule(guard), multiplier), guard)

    def _guard_settings(self) -> GuardSettings:
        if self._guard:
            return self._guard
        if self._card_guard is None:
            asked, refused = admitted(self._learned.settings.guard, self.weights)
            if refused:
                warn(refused)
            self._card_guard = (asked or GuardSettings()).model_copy(update={"batches": 1, "growth": 0.0})
        return self._card_guard

    def _fewest(self) -> int:
        return self._guard_settings().fewest_samples

    def _moved(
        self, rule: UpdateRule, oracle: Oracle, point: Tensor, seen: StepInfo, state: State
    ) -> tuple[Tensor, State]:
        assert isinstance(rule, GuardedRule)
        moved, state, info = rule.choose(oracle, point, state, seen)
        self._check_moved(moved)
        accepted = bool(info.accepted)
        self.accepted_steps += accepted
        if info.checked:
            worse = [] if accepted else (~(info.learned_losses <= info.fallback_losses))[0].tolist()
            self._notices.decided(accepted, worse)
        return moved, state

    def _check_objectives(self, objectives: int) -> None:
        if objectives < 2:
            raise UserError("GML2O got one loss only, it guards several: return a list of losses, or use ML2O")
        super()._check_objectives(objectives)
