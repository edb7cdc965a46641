"""Joins or starts the Ray cluster that a command runs on."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import ray

from ml2o_dist.runtime.errors import Aborted, UserError
from ml2o_dist.runtime.files import private_folder
from ml2o_dist.runtime.ray_internals import ray_internal
from ml2o_dist.runtime.stopping import own_handlers_kept, sigterm_kept_from_children

PROBE_S = 5.0
"""Seconds that a cluster may take to accept a connection; Ray itself would try for many minutes."""

DEFAULT_PORT = 6379
"""The port on which `ray start --head` listens."""

SOCKET_LIMIT = 107
"""Most bytes of a Unix socket's path on Linux."""

MARK = "ML2O_RAY"
"""The environment variable that marks the processes of a Ray that we started."""

log = logging.getLogger(__name__)


@contextmanager
def connected(address: str = "auto") -> Iterator[str]:
    """Connect to Ray for the time of a `with` block; yield a line that names the cluster.

    auto: the cluster of RAY_ADDRESS (a submitted job has it) or one running on this machine; if there is none, a new
    one that ends with the block. local: always a new one. Anything else: the cluster at that address.

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
    if address == "local" or (named in ("", "auto") and not _running_here()):
        _check_temporary_folder()
    mark = uuid4().hex
    try:
        # None: RAY_ADDRESS, else a cluster that `ray start` began here, else a new one; never a stranger's ray.init().
        target = None if address == "auto" else address
        try:
            try:
                context = _init(target, mark)
            except (ConnectionError, ValueError, RuntimeError):
                raise
            except Exception as error:  # a plain Exception: its processes were not up in half a minute (Ray 2.60)
                log.warning("Ray did not start: %s; once more, as on a busy machine", _first_line(error))
                _end(mark)
                context = _init(target, mark)
        except UserError:
            raise
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"--address {address!r}: no Ray cluster answers there ({_first_line(error)})") from error
        except Exception as error:
            raise UserError(f"Ray did not start, twice; the machine is too busy: {_first_line(error)}") from error
        total = ray.cluster_resources()
        yield f"{context.address_info['address']}: {total.get('CPU', 0):g} CPU, {total.get('GPU', 0):g} GPU"
    finally:
        _end(mark)


def _running_here() -> bool:
    """Tell whether `ray start` has begun a cluster on this machine that `ray.init` would join."""
    with ray_internal("ray._private.services.find_bootstrap_address"):  # no public name has what ray.init looks for
        from ray._private.services import find_bootstrap_address

        return bool(find_bootstrap_address(None))


class RayEnded(Aborted):
    """The Ray that this process started has ended; the work so far is kept and can be resumed."""


def check_own_ray() -> None:
    """Raise RayEnded if this process started Ray and the raylet was killed or crashed.

    Call it about every second: once the raylet has been dead for some seconds, any call of Ray ends the process without
    a message (Ray 2.60). For a cluster that this process joined, it cannot tell.
    """
    with ray_internal("ray._private.worker._global_node"):
        from ray._private import worker

        node = worker._global_node
        if node is not None and any(kind == "raylet" for kind, _ in node.dead_processes()):
            raise RayEnded("Ray has ended: its raylet was killed or has crashed")


def _check_temporary_folder() -> None:
    """Raise UserError if the socket paths of a Ray started here would be too long."""
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), None)
    if variable is None:
        return
    folder = os.environ[variable]
    below = f"/ray/session_2000-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    length, most = len(os.fsencode(folder)), SOCKET_LIMIT - len(below)
    if length > most:
        raise UserError(
            f"{variable}={folder} is too long for Ray's sockets below it: it has {length} bytes, at most {most} fit "
            f"into a socket's {SOCKET_LIMIT}; set RAY_TMPDIR to a shorter one, such as /tmp"
        )


def _init(target: str | None, mark: str) -> Any:
    with (
        own_handlers_kept(),
        one_start_at_a_time(),
        _marked(mark),
        sigterm_kept_from_children(),  # timeout, systemd and scancel signal all processes; Ray must end after us
        _ended_at_once(),
    ):
        return ray.init(
            address=target,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=log.isEnabledFor(logging.DEBUG),  # Ray logs paragraphs on a dead worker; ours are shorter
        )


def _end(mark: str) -> None:
    """End a Ray that we started, and its agents, which notice only after a minute that their raylet has ended.

    Its processes are looked up before it ends: their children are then still known as theirs.
    """
    begun = _begun(mark)
    with _ended_at_once():
        ray.shutdown()
    for process in begun | _begun(mark):  # an agent may have started meanwhile
        with suppress(psutil.Error):  # it has ended; psutil checks that its pid is not another process by now
            process.kill()


def _begun(mark: str) -> set[psutil.Process]:
    """Return the processes that carry `mark` and their descendants.

    The descendants are needed since Ray's agents overwrite their environment with their names.
    """
    begun: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is another user's
            if process not in begun and process.environ().get(MARK) == mark:
                begun |= {process, *process.children(recursive=True)}
    return begun


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """Make Ray end its processes by SIGKILL: they block SIGTERM, and Ray would wait a second for each of them."""
    terminate = subprocess.Popen.terminate
    subprocess.Popen.terminate = subprocess.Popen.kill  # type: ignore[method-assign]
    try:
        yield
    finally:
        subprocess.Popen.terminate = terminate  # type: ignore[method-assign]


@contextmanager
def one_start_at_a_time() -> Iterator[None]:
    """Run one such `with` block at a time for this user on this machine; wait for the others.

    Two Rays that start at once take each other's ports: each looks for free ports and listens on them only later (Ray
    2.60). The lock file is in a folder that only this user can write to. In a shared folder another user could put a
    link in its place, which would make us open some other file of this user.

    Raises:
        UserError: another user has created that folder.
    """
    folder = Path(tempfile.gettempdir()) / f"ml2o-{os.getuid()}"
    try:
        handle = os.open(
            private_folder(folder) / "ray-start.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{str(folder)!r} cannot hold the lock of Ray's start: {reason}; set TMPDIR") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # the kernel releases it when the process ends in any way
        yield
    finally:
        os.close(handle)


@contextmanager
def _marked(mark: str) -> Iterator[None]:
    """Put `mark` into the environment of every process that starts in the `with` block, and of its descendants."""
    os.environ[MARK] = mark
    try:
        yield
    finally:
        del os.environ[MARK]


def own_capacity(address: str) -> dict[str, float]:
    """Return the resources that a new Ray would have at `address`; {} if Ray runs there or they are not known.

    These are an upper limit: Ray counts the machine's CPUs, or a container's if it has fewer.
    """
    if ray.is_initialized() or os.environ.get("RAY_OVERRIDE_RESOURCES"):
        return {}
    begun = address == "auto" and (os.environ.get("RAY_ADDRESS") or _running_here())
    count = os.cpu_count()
    return {"CPU": float(count)} if address in ("auto", "local") and not begun and count else {}


def _check_answers(address: str, source: str) -> None:
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        host, port = port, str(DEFAULT_PORT)
    if not (host and port.isdigit() and int(port) < 2**16):
        raise UserError(f"{source} {address!r} is not auto, local or HOST:PORT")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PROBE_S) as probe:
            speaks = os.environ.get("RAY_USE_TLS", "0") != "0" or _speaks_http2(probe)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{source} {address!r}: no Ray cluster answers there ({reason})") from error
    if not speaks:
        raise UserError(f"{source} {address!r}: what answers there is no Ray cluster (its port is {DEFAULT_PORT})")


def _speaks_http2(probe: socket.socket) -> bool:
    """Tell whether the peer is a gRPC server, as Ray is: both sides begin with a SETTINGS frame (RFC 9113, 3.4).

    With any other server, Ray would wait for minutes and log its own messages.
    """
    settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    probe.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
    return probe.recv(4)[3:] == settings[3:4]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
