"""Estimates how long an item should take and how long it may, from the measured times of its kind."""

from __future__ import annotations

import math

from ml2o_dist.config import FaultSettings
from ml2o_dist.metatrain.episode import EpisodeResult
from ml2o_dist.metatrain.schedule import WorkItem


class Costs:
    """Seconds per inner step by kind: the problem, and whether a meta-gradient is asked for."""

    def __init__(self, faults: FaultSettings) -> None:
        self._faults = faults
        self._longest: dict[tuple[str, str], float] = {}

    def learn(self, item: WorkItem, result: EpisodeResult) -> None:
        """Record how long an item took. The longest time counts, so that deadlines never get shorter."""
        kind = _kind(item)
        self._longest[kind] = max(self._longest.get(kind, 0.0), result.seconds / _inner_steps(item))

    def expected(self, item: WorkItem) -> float:
        """Return the expected seconds; infinite for a kind that was not measured yet, so that it starts early."""
        return self._longest.get(_kind(item), math.inf) * _inner_steps(item)

    def allowed(self, item: WorkItem, overdue: int) -> float:
        """Return the seconds an item may take: a multiple of the expected, doubled each time it was `overdue`.

        A kind that was not measured yet gets `faults.first_deadline_s`, since other problems of its family may be a
        thousand times cheaper and say nothing about it.
        """
        faults, expected = self._faults, self.expected(item)
        known = max(faults.shortest_deadline_s, faults.deadline_factor * expected)
        return math.ldexp(known if math.isfinite(expected) else faults.first_deadline_s, overdue)


def _inner_steps(item: WorkItem) -> int:
    return item.spec.horizon * item.spec.instances


def _kind(item: WorkItem) -> tuple[str, str]:
    return str(item.spec.problem), item.key.purpose
