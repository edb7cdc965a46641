"""What can be run in a cell: values that can be pickled, and build their rule where they are run."""

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


class Contestant(Protocol):
    """What can be run in a cell: it can be pickled, and builds its rule where it is run."""

    @property
    def label(self) -> str:
        """Its name to a reader."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What makes it what it is, whatever it is called, as JSON values: equal ones give equal rules."""

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule for problems of this device and precision."""


@dataclass(frozen=True)
class HandDesigned:
    """An aggregator with an optimizer at one learning rate, or one that has none."""

    aggregator: str
    optimizer: str
    lr: float | None

    @classmethod
    def parse(cls, text: str, lr: float | None = None) -> HandDesigned:
        """Read `AGGREGATOR[+OPTIMIZER][@LR]`; `lr` serves where the text names none.

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
        """Build the rule; it follows the device and precision of the Jacobians it meets."""
        return AggregatedRule(self.aggregator, self.optimizer, self.lr)


@dataclass(frozen=True, eq=False)
class Learned:
    """A learned rule: its settings and weights (None: as it is before training). Equal only to itself."""

    label: str
    settings: LearnedRuleSettings
    weights: Mapping[str, Tensor] | None

    @property
    def identity(self) -> Mapping[str, Any]:
        """The settings, and the sha256 of the weights."""
        digest = None if self.weights is None else weights_sha256(self.weights)
        return {"learned": self.settings.model_dump(mode="json"), "weights_sha256": digest}

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule from the weights, under its guard where the settings have one."""
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
        """Build the rule; it follows the device and precision of the Jacobians it meets."""
        return DSSMG(self.p) if self.label == "dssmg" else SMG(self.p)


@dataclass(frozen=True)
class Adversary:
    """A rule that no one should follow, by its name in `rules/adversaries.py`."""

    label: str

    @property
    def identity(self) -> Mapping[str, Any]:
        """Its name."""
        return {"adversary": self.label}

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule; raises UserError for an unknown name."""
        return AdversaryRule(self.label)


@dataclass(frozen=True, eq=False)
class Guarded:
    """Another contestant under GML2O's guard."""

    contestant: Contestant
    guard: GuardSettings

    @property
    def label(self) -> str:
        """`gml2o:` and the other's label."""
        return f"gml2o:{self.contestant.label}"

    @property
    def identity(self) -> Mapping[str, Any]:
        """The other's, and the guard's settings."""
        return {"guarded": self.contestant.identity, "guard": self.guard.model_dump(mode="json")}

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the other's rule under the guard; raises UserError for a wrong fallback."""
        return guarded(self.contestant.rule(device, dtype), self.guard)
