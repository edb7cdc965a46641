"""One promotion at a time: a lock that holds across processes and machines which share a tracking store.

MLflow offers one atomic operation that can serve: creating a registered model, whose name is the primary key of a
table. The lock of a model is therefore a registered model `<model>.lock` without versions. The process that creates it
holds the lock, a process whose creation fails waits, and the holder deletes it when done. This works for every store:
sqlite, PostgreSQL or MySQL, directly or behind a `mlflow server`.

A process that is killed leaves its lock behind. A lock is normally held for the second that a few writes take, so a
waiting process breaks one that is older than `STALE_S`. To do so it holds the lock's own lock, `<model>.lock.lock`, so
that no two processes break it one after the other. A holder that was only paused for so long finds, before it writes
(`PromotionLock.confirm`), that the lock has another token, and writes nothing.

Limits. The check and the write that follows are not atomic in MLflow: a holder that is paused exactly between them,
for longer than `STALE_S`, writes nevertheless. The age of a lock is the difference of the store's timestamps on it and
on the breaker's own lock. Behind a server these come from one clock; a database that is opened directly takes the
clocks of its clients, which must agree to within some 50 s. A store that reads from a lagging replica gives no lock.
"""

from __future__ import annotations

import getpass
import logging
import os
import random
import re
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.names import LOCK_SUFFIX
from ml2o_dist.tracking.store import answering, connect, one_line, redacted

STALE_S = 60.0
"""Seconds after which a lock is considered left behind by a killed process."""

WAIT_S = 20.0
"""Seconds to wait for a lock: many times the second that it is normally held."""

_PAUSE_S = 0.1
"""Seconds between two checks of a lock, which only read because sqlite allows one writer at a time."""

_STALE_AFTER_S = 2.0
"""Seconds of waiting before the first check of a lock's age, and between two checks."""

_DESCRIPTION = "Lock {token} of {owner}; held while aliases are written, see ml2o_dist.tracking.promotion_lock."
"""The description names the holder; MLflow reads tags after the row, when the lock may be gone or another's."""

_log = logging.getLogger("ml2o_dist.tracking")


class LockLost(UserError):
    """The lock was considered a killed process's and broken, so its former holder must not write."""


@dataclass(frozen=True)
class PromotionLock:
    """A held lock.

    Attributes:
        name: the name of the registered model that serves as the lock.
        token: tells this lock from another process's.
        created_ms: the store's timestamp of its creation.
    """

    client: Any
    name: str
    token: str
    created_ms: int

    def confirm(self) -> None:
        """Raise LockLost unless the lock is still this one."""
        holder = _holder(self.client, self.name)
        if holder is None or holder.token != self.token:
            raise LockLost(
                f"the lock {self.name!r} was broken after {STALE_S:.0f} s, because this process held it for longer; "
                "nothing was written: try again"
            )


@contextmanager
def promotion_lock(uri: str, model: str) -> Iterator[PromotionLock]:
    """Hold the lock of `model` during the `with` block, and release it however the block ends; it is not reentrant.

    Raises:
        UserError: somebody holds it for longer than `WAIT_S` (the line says who, since when, and how to remove it),
            or the store does not answer.
    """
    with answering(uri):
        client = connect(uri)
    with _held(client, uri, model + LOCK_SUFFIX, time.monotonic() + WAIT_S) as lock:
        yield lock


def this_user() -> str:
    """Return `user@host` of this process."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


@dataclass(frozen=True)
class _Holder:
    token: str
    owner: str
    created_ms: int


@contextmanager
def _held(client: Any, uri: str, name: str, limit: float) -> Iterator[PromotionLock]:
    token = uuid.uuid4().hex
    try:
        with answering(uri):
            created_ms = _acquire(client, uri, name, token, limit)
        yield PromotionLock(client, name, token, created_ms)
    finally:
        _release(client, name, token)


def _acquire(client: Any, uri: str, name: str, token: str, limit: float) -> int:
    """Acquire the lock; return the store's creation time in ms. `limit` is a time of this process's clock."""
    look = time.monotonic() + _STALE_AFTER_S
    while True:
        holder = _holder(client, name)
        if holder is None:
            created = _create(client, name, token)
            if created is not None:
                return created
        elif holder.token == token:  # our first request created it, its answer was lost, MLflow retried
            return holder.created_ms
        elif time.monotonic() > limit:
            raise _busy(uri, name, holder)
        elif time.monotonic() > look:
            _break_if_stale(client, uri, name, limit)
            look = time.monotonic() + _STALE_AFTER_S
        time.sleep(_PAUSE_S * random.uniform(0.5, 1.5))


def _break_if_stale(client: Any, uri: str, name: str, limit: float) -> None:
    with _held(client, uri, name + LOCK_SUFFIX, limit) as breaker:
        holder = _holder(client, name)
        if holder is None or breaker.created_ms - holder.created_ms <= STALE_S * 1000:
            return
        breaker.confirm()
        _log.warning("the lock %r of %s, made at %s, is broken", name, holder.owner, _shown(holder.created_ms))
        client.delete_registered_model(name)


def _holder(client: Any, name: str) -> _Holder | None:
    from mlflow.exceptions import MlflowException

    try:
        lock = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    said = re.fullmatch(_DESCRIPTION.format(token="([0-9a-f]+)", owner="(.*)"), lock.description or "")
    if said is None:
        raise UserError(f"the registered model {name!r} is no lock: give it another name")
    return _Holder(said[1], said[2], int(lock.creation_timestamp))


def _create(client: Any, name: str, token: str) -> int | None:
    """Create the lock; return the store's creation time, or None if another process was quicker."""
    from mlflow.exceptions import MlflowException

    try:
        lock = client.create_registered_model(
            name,
            description=_DESCRIPTION.format(token=token, owner=f"{this_user()}, process {os.getpid()}"),
        )
    except MlflowException as error:
        # Second code: MLflow looks up the existing lock for its error message, but it has been released by then.
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
            raise
        return None
    return int(lock.creation_timestamp)


def _release(client: Any, name: str, token: str) -> None:
    try:
        holder = _holder(client, name)
        if holder is not None and holder.token == token:
            client.delete_registered_model(name)
    except UserError:  # the registered model is not a lock
        return
    except Exception as error:  # keep the block's outcome; a lock that is left is broken later
        _log.warning("the lock %r is not released, and is broken after %.0f s: %s", name, STALE_S, one_line(error))


def _busy(uri: str, name: str, holder: _Holder) -> UserError:
    shown = redacted(uri)
    return UserError(
        f"the lock {name!r} at {shown} is held by {holder.owner} since {_shown(holder.created_ms)}, waited "
        f"{WAIT_S:.0f} s for it; that of a killed process is broken after {STALE_S:.0f} s, or remove it by hand: "
        f'python -c "import mlflow; mlflow.MlflowClient({shown!r}, {shown!r}).delete_registered_model({name!r})"'
    )


def _shown(created_ms: int) -> str:
    return datetime.fromtimestamp(created_ms / 1000, UTC).isoformat(timespec="seconds")
