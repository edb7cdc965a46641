"""Recognises what Ray raises when a worker is lost, and states the reason in a few words."""

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
"""Characters of Ray's own message that are shown when we have no shorter text."""

_SHORT = (
    ("low on memory", "Ray ended it: the node was out of memory"),
    ("node has died", "its node died"),
    ("worker process has died", "its process was killed or crashed"),
    ("actor is temporarily unavailable", "it does not answer any more"),
)
"""Parts of Ray's messages (2.60) and our short text for each; the first match counts."""


def reason(error: Exception) -> str:
    """Return in one short line why a worker was lost; Ray's message has paragraphs and terminal escape codes."""
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
