"""What can be run in a cell: values that have a label, can be pickled, and build their rule where they are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ml2o_dist.config import GuardSettings, RuleSettings
from ml2o_dist.errors import UserError
from ml2o_dist.rules.adversaries import AdversaryRule
from ml2o_dist.rules.aggregated import AggregatedRule, parse_optimizer_name
from ml2o_dist.rules.base import UpdateRule
from ml2o_dist.rules.gml2o import guarded
from ml2o_dist.rules.ml2o import ML2ORule
from ml2o_dist.rules.stochastic import DSSMG, SMG


class Contestant(Protocol):
    """What can be run in a cell: it has a label, can be pickled, and builds its rule where it is run."""

    @property
    def label(self) -> str:
        """Its name in the results."""

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule for problems of this device and precision."""


@dataclass(frozen=True)
class HandDesigned:
    """A torchjd aggregator with a classical optimizer at one learning rate."""

    aggregator: str
    optimizer: str
    lr: float

    @classmethod
    def parse(cls, text: str, lr: float | None = None) -> HandDesigned:
        """Read `AGGREGATOR[+OPTIMIZER][@LR]`; `lr` serves where the text names none.

        Raises:
            UserError: an unknown name, or a learning rate that is missing or no positive number.
        """
        aggregator, optimizer, written = parse_optimizer_name(text)
        rate = lr if written is None else written
        if rate is None:
            raise UserError(f"optimizer {text!r} needs a learning rate: write {text}@0.01")
        return cls(aggregator, optimizer, rate)

    @property
    def label(self) -> str:
        """`AGGREGATOR+OPTIMIZER@LR`."""
        return f"{self.aggregator}+{self.optimizer}@{self.lr:g}"

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule; it follows the device and precision of the Jacobians it meets."""
        return AggregatedRule(self.aggregator, self.optimizer, self.lr)


@dataclass(frozen=True, eq=False)
class Learned:
    """An ML2O network: its settings and weights (None: as it is before training). Equal only to itself."""

    label: str
    settings: RuleSettings
    weights: Mapping[str, Tensor] | None

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule from the weights, under its guard where the settings have one."""
        return guarded(ML2ORule.from_weights(self.settings, self.weights, device, dtype), self.settings.guard)


@dataclass(frozen=True)
class Stochastic:
    """SMG or DSSMG, as `label` says (smg, dssmg), with steps that fall as (t + 1)^-p."""

    label: str
    p: float

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule; it follows the device and precision of the Jacobians it meets."""
        return DSSMG(self.p) if self.label == "dssmg" else SMG(self.p)


@dataclass(frozen=True)
class Adversary:
    """A rule that no one should follow, by its name in `rules/adversaries.py`."""

    label: str

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

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the other's rule under the guard; raises UserError for a wrong fallback."""
        return guarded(self.contestant.rule(device, dtype), self.guard)
