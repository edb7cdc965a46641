"""Quarantine for hosts that repeatedly lose workers: avoided for a time, then tried again."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable

LOSSES = 3
"""A host enters quarantine when so many of its workers are lost within `PERIOD_S`; one or two may be chance."""

PERIOD_S = 600.0
"""Seconds for which a loss counts. A host is tried again when the oldest of its last losses is that old. If another
loss follows while the other ones still count, the host enters quarantine again."""


class Quarantine:
    """Tracks the losses of each host and which hosts to avoid."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._losses: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=LOSSES))

    def lost(self, host: str) -> bool:
        """Record that `host` lost a worker; tell whether this puts it into quarantine."""
        before = host in self.avoided()
        self._losses[host].append(self._clock())
        return host in self.avoided() and not before

    def avoided(self) -> list[str]:
        """Return the hosts now in quarantine."""
        oldest = self._clock() - PERIOD_S
        return [host for host, times in self._losses.items() if len(times) == LOSSES and times[0] > oldest]
