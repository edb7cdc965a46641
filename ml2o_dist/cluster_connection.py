"""Joining or starting the Ray cluster a command runs on."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from ml2o_dist.errors import UserError
from ml2o_dist.stopping import own_handlers_kept

PROBE_S = 5.0
"""How long a cluster may take to accept a connection; Ray itself would try for many minutes."""

DEFAULT_PORT = 6379
"""Where `ray start --head` listens."""


@contextmanager
def connected(address: str = "auto") -> Iterator[str]:
    """Connect to Ray for the time of a `with` block; yields a line that says to what.

    auto: the cluster of RAY_ADDRESS (a submitted job has it) or one running on this machine, else one is started
    here and ended with the block; local: always started here; anything else: that cluster.

    Raises:
        UserError: nothing answers at `address`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if named not in ("", "auto", "local"):
        _check_answers(named, "RAY_ADDRESS" if address == "auto" else "--address")
    if ray.is_initialized():
        if address not in ("auto", "local"):
            raise UserError(f"--address {address!r}: this process is connected to another Ray cluster already")
        yield "the Ray cluster of this process"
        return
    try:
        # None: RAY_ADDRESS, else a cluster that `ray start` began here, else a new one; never a stranger's ray.init().
        target = None if address == "auto" else address
        with own_handlers_kept():
            context = ray.init(address=target, include_dashboard=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--address {address!r}: no Ray cluster answers there ({_first_line(error)})") from error
    except BaseException:  # stopped when half of it was there
        ray.shutdown()
        raise
    try:
        total = ray.cluster_resources()
        yield f"{context.address_info['address']}: {total.get('CPU', 0):g} CPU, {total.get('GPU', 0):g} GPU"
    finally:
        ray.shutdown()


def _check_answers(address: str, source: str) -> None:
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        host, port = port, str(DEFAULT_PORT)
    if not (host and port.isdigit() and int(port) < 2**16):
        raise UserError(f"{source} {address!r} is not auto, local or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PROBE_S).close()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{source} {address!r}: no Ray cluster answers there ({reason})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
