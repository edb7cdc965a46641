"""A run's figures as Ray metrics, tagged with the run's name; Prometheus scrapes them from the driver's node."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

from ml2o_dist.metatrain.history import SCHEMA

PREFIX = "ml2o_"

POOL_FIGURES = {
    "workers": "rollout workers that are up",
    "worker_restarts": "rollout workers that were replaced since the run began",
    "repeated_episodes": "episodes that were begun again since the run began",
}
"""The worker pool's additions to the figures of a meta-step."""


class RunGauges:
    """One gauge for each figure, each with the last value that was set."""

    def __init__(self, run: str) -> None:
        described = {field.name: field.metadata[b"description"].decode() for field in SCHEMA} | POOL_FIGURES
        self._gauges = {name: Gauge(PREFIX + name, what, ("run",)) for name, what in described.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def set(self, meta_step: int, figures: Mapping[str, float]) -> None:
        """Set the figures of a meta-step; a gauge without a new figure keeps its value."""
        for name, figure in {"meta_step": float(meta_step), **figures}.items():
            self._gauges[name].set(figure)
