"""Waiting for what processes do, and whether they are there."""

from __future__ import annotations

import time

import ray


def until(done, seconds=20):
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit
        ray.wait([ray.put(0)], timeout=0.1)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return False
