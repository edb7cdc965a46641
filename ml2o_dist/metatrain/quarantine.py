"""Hosts on which workers are lost again and again: put aside for a time, then tried again."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable

LOSSES = 3
"""A host is put aside when so many of its workers were lost within `PERIOD_S`: one or two may be anybody's bad luck."""

PERIOD_S = 600.0
"""For how long a loss counts. A host is tried again when the oldest of its last losses is that old; one more within the
rest of that time, and it is put aside again."""


class Quarantine:
    """Which hosts are to be avoided, by their losses so far."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._losses: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=LOSSES))

    def lost(self, host: str) -> bool:
        """Note that a worker was lost on `host`; tell whether it is put aside by this."""
        before = host in self.avoided()
        self._losses[host].append(self._clock())
        return host in self.avoided() and not before

    def avoided(self) -> list[str]:
        """Return the hosts that are put aside now."""
        oldest = self._clock() - PERIOD_S
        return [host for host, times in self._losses.items() if len(times) == LOSSES and times[0] > oldest]
