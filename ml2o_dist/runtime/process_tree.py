"""Finds the descendants of processes in /proc; without a /proc it finds none."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def descendants(pids: Iterable[int]) -> list[int]:
    """Return the descendants of the processes, parents before their children."""
    parents: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended meanwhile
            parents[int(file.parent.name)] = int(file.read_text(errors="replace").rpartition(")")[2].split()[1])
    known = list(pids)
    first = len(known)
    for pid in known:  # the list grows in the loop
        known += [child for child, parent in parents.items() if parent == pid]
    return known[first:]
