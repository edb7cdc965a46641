"""A worker that is lost: what Ray raises then, and why, in a few words."""

from __future__ import annotations

import re

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    WorkerCrashedError,
)

LOST = (RayActorError, ObjectLostError, OwnerDiedError, WorkerCrashedError, OutOfMemoryError, NodeDiedError)
"""What Ray raises when a result died with its worker or node."""

LONGEST_REASON = 120
"""Characters of Ray's own words that are shown where we know no shorter ones."""

_SHORT = (
    ("low on memory", "Ray ended it: the node was out of memory"),
    ("node has died", "its node died"),
    ("worker process has died", "its process was killed or crashed"),
    ("actor is temporarily unavailable", "it does not answer any more"),
)
"""What a text of Ray's (2.60) contains, and what it comes to; the first that fits."""


def reason(error: Exception) -> str:
    """Return in one short line why a worker was lost; Ray tells it in paragraphs, with a terminal's escape codes."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    if isinstance(error, OutOfMemoryError):
        return _SHORT[0][1]
    if isinstance(error, NodeDiedError):
        return _SHORT[1][1]
    if not getattr(error, "_actor_init_failed", False):  # else the text is the traceback of an error of ours
        for part, words in _SHORT:
            if part in text:
                return words
    last = text.splitlines()[-1].strip() if text else type(error).__name__
    return last if len(last) <= LONGEST_REASON else f"{last[:LONGEST_REASON]}..."
