"""OptimizerSpec: picklable descriptions of update rules. A cell's worker builds the rule from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.config import GuardSettings, LearnedRuleSettings
from ml2o_dist.rules.adversaries import AdversaryRule
from ml2o_dist.rules.aggregated import AggregatedRule, parse_optimizer_name, takes_learning_rate
from ml2o_dist.rules.base import UpdateRule
from ml2o_dist.rules.guarded import guarded
from ml2o_dist.rules.learned import learned_rule
from ml2o_dist.rules.stochastic import DSSMG, SMG
from ml2o_dist.runtime.errors import UserError


class OptimizerSpec(Protocol):
    """An update rule that a cell can run: it can be pickled, and the worker builds the rule from it."""

    @property
    def label(self) -> str:
        """The name shown to a reader."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that determines the rule, as JSON values, without its name. Equal identities give equal rules."""

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule for problems of this device and precision."""


@dataclass(frozen=True)
class HandDesigned:
    """An aggregator with an optimizer at one learning rate; `lr` is None for an optimizer that takes none."""

    aggregator: str
    optimizer: str
    lr: float | None

    @classmethod
    def parse(cls, text: str, lr: float | None = None) -> HandDesigned:
        """Read `AGGREGATOR[+OPTIMIZER][@LR]`; `lr` is used if the text names no learning rate.

        Raises:
            UserError: an unknown name, or a learning rate that is missing or no positive number.
        """
        aggregator, optimizer, written = parse_optimizer_name(text)
        if not takes_learning_rate(optimizer):
            if written is not None:
                raise UserError(f"optimizer {text!r}: {optimizer} takes no learning rate")
            return cls(aggregator, optimizer, None)
        rate = lr if written is None else written
        if rate is None:
            raise UserError(f"optimizer {text!r} needs a learning rate: write {text}@0.01")
        return cls(aggregator, optimizer, rate)

    @property
    def label(self) -> str:
        """`AGGREGATOR+OPTIMIZER@LR`."""
        return f"{self.aggregator}+{self.optimizer}" + ("" if self.lr is None else f"@{self.lr:g}")

    @property
    def identity(self) -> Mapping[str, Any]:
        """Aggregator, optimizer and learning rate."""
        return {"hand_designed": asdict(self)}

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule; it takes device and precision from the Jacobians."""
        return AggregatedRule(self.aggregator, self.optimizer, self.lr)


@dataclass(frozen=True, eq=False)
class Learned:
    """A learned rule: its settings and weights (None: untrained). Equal only to itself."""

    label: str
    settings: LearnedRuleSettings
    weights: Mapping[str, Tensor] | None

    @property
    def identity(self) -> Mapping[str, Any]:
        """The settings, and the sha256 of the weights."""
        digest = None if self.weights is None else weights_sha256(self.weights)
        return {"learned": self.settings.model_dump(mode="json"), "weights_sha256": digest}

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule from the weights, under a guard if the settings have one."""
        return guarded(learned_rule(self.settings, self.weights, device, dtype), self.settings.guard)


@dataclass(frozen=True)
class Stochastic:
    """SMG or DSSMG, as `label` says (smg, dssmg), with steps that fall as (t + 1)^-p."""

    label: str
    p: float

    @property
    def identity(self) -> Mapping[str, Any]:
        """Name and decay."""
        return {"stochastic": asdict(self)}

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule; it takes device and precision from the Jacobians."""
        return DSSMG(self.p) if self.label == "dssmg" else SMG(self.p)


@dataclass(frozen=True)
class Adversary:
    """A deliberately bad rule, by its name in `rules/adversaries.py`."""

    label: str

    @property
    def identity(self) -> Mapping[str, Any]:
        """The name of the adversary."""
        return {"adversary": self.label}

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule; raises UserError for an unknown name."""
        return AdversaryRule(self.label)


@dataclass(frozen=True, eq=False)
class Guarded:
    """Another optimizer under GML2O's guard."""

    optimizer: OptimizerSpec
    guard: GuardSettings

    @property
    def label(self) -> str:
        """`gml2o:` and the label of the guarded optimizer."""
        return f"gml2o:{self.optimizer.label}"

    @property
    def identity(self) -> Mapping[str, Any]:
        """The identity of the guarded optimizer, and the guard's settings."""
        return {"guarded": self.optimizer.identity, "guard": self.guard.model_dump(mode="json")}

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the optimizer's rule under the guard; raises UserError for a wrong fallback."""
        return guarded(self.optimizer.rule(device, dtype), self.guard)
