"""What the work costs: how long an item should take, and how long it may, by what its kind took so far."""

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
        """Take in what an item took. The longest counts: a slow moment must not shorten anybody's deadline."""
        kind = _kind(item)
        self._longest[kind] = max(self._longest.get(kind, 0.0), result.seconds / _inner_steps(item))

    def expected(self, item: WorkItem) -> float:
        """Return the expected seconds; those of an unknown kind are infinite, so that it starts early."""
        return self._longest.get(_kind(item), math.inf) * _inner_steps(item)

    def allowed(self, item: WorkItem, overdue: int) -> float:
        """Return the seconds an item may take that was overdue so often: a multiple of the expected, doubled each time.

        A kind that was not measured yet has `faults.first_deadline_s`, since others of its family may be a thousand
        times cheaper.
        """
        faults, expected = self._faults, self.expected(item)
        known = max(faults.shortest_deadline_s, faults.deadline_factor * expected)
        return math.ldexp(known if math.isfinite(expected) else faults.first_deadline_s, overdue)


def _inner_steps(item: WorkItem) -> int:
    return item.spec.horizon * item.spec.instances


def _kind(item: WorkItem) -> tuple[str, str]:
    return str(item.spec.problem), item.key.purpose
