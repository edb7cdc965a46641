"""The weights of a learned optimizer that is used as a torch optimizer, from any source."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.config import LearnedRuleSettings, RuleSettings
from ml2o_dist.rules.learned import LearnedRule, initial_weights, learned_rule
from ml2o_dist.runtime.remote_files import is_uri

UNTRAINED = "initial"
"""The name of the network before any meta-training: Adam on the sum of the losses."""


class LearnedWeights:
    """The weights, read at first use, or at once if no network access is needed."""

    def __init__(self, origin: str) -> None:
        """Raises UserError for a file that cannot be read."""
        self.origin = origin
        self._rules: dict[tuple[torch.device, torch.dtype], LearnedRule] = {}  # the last one used
        self._read: tuple[LearnedRuleSettings, Mapping[str, Tensor], str] | None = None
        if not (is_uri(origin) or origin.startswith("models:/")):
            self._contents()

    @property
    def settings(self) -> LearnedRuleSettings:
        """The rule's settings."""
        return self._contents()[0]

    @property
    def digest(self) -> str:
        """The weights' sha256."""
        return self._contents()[2]

    def rule(self, device: torch.device, dtype: torch.dtype) -> LearnedRule:
        """Return the rule, built once for a device and precision."""
        settings, weights, _ = self._contents()
        place = device, dtype
        if place not in self._rules:
            self._rules = {place: learned_rule(settings, weights, device, dtype)}
        return self._rules[place]

    def _contents(self) -> tuple[LearnedRuleSettings, Mapping[str, Tensor], str]:
        if self._read is None:
            if self.origin == UNTRAINED:
                settings: LearnedRuleSettings = RuleSettings()
                weights: Mapping[str, Tensor] = initial_weights(settings)
            else:
                artifact = load_artifact(self.origin)
                settings, weights = artifact.rule, artifact.weights
            self._read = settings, weights, weights_sha256(weights)
        return self._read
