"""A PostgreSQL of a test's own: Debian's binaries, a temporary folder, loopback, a free port."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

USER = "postgres"
"""The system user that it runs as where we are root: it refuses to run as root."""


class PostgresServer:
    """Started at once; `uri` is of its empty database, without a password.

    `within`: words before each of its commands, for a host of their own (tests/cluster/hosts.py); `port`: 0 for a free
    one; `owner`: who its database belongs to and is named after, the superuser; `password`: which it asks the owner
    for, by SCRAM as the image of PostgreSQL does, or "" for nothing.
    """

    def __init__(self, within: Sequence[str] = (), port: int = 0, owner: str = USER, password: str = "") -> None:
        binaries = _binaries()
        self._as_user = [*within, *(["runuser", "-u", USER, "--"] if os.geteuid() == 0 else [])]
        self._folder = Path(tempfile.mkdtemp(prefix="ml2o-postgres-"))
        if os.geteuid() == 0:
            shutil.chown(self._folder, USER)
        port = port or _free_port()
        data = self._folder / "data"
        file = self._folder / "password"
        file.write_text(password)
        file.chmod(0o644)
        asked = ["-A", "scram-sha-256", f"--pwfile={file}"] if password else ["-A", "trust"]
        made = [*self._as_user, binaries / "initdb", "-D", data, "-U", owner, *asked, "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, cwd="/", timeout=120)
        command = [*self._as_user, binaries / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1",
                   "-k", self._folder, "-c", "fsync=off"]  # fmt: skip
        with open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", start_new_session=True)
        database = "postgres" if owner == USER else owner
        self.uri = f"postgresql+psycopg2://{owner}@127.0.0.1:{port}/{database}"
        limit = time.monotonic() + 60
        ready = [*within, binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        while subprocess.run(ready, check=False).returncode != 0:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < limit, (self._folder / "log").read_text()
            time.sleep(0.1)
        if owner != USER:
            made = [*self._as_user, binaries / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", owner, owner]
            known = os.environ | {"PGPASSWORD": password}
            subprocess.run(made, check=True, capture_output=True, cwd="/", timeout=60, env=known)

    def stop(self) -> None:
        """End it and all of its processes, and remove its folder."""
        os.killpg(self._process.pid, signal.SIGINT)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=30)
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _binaries() -> Path:
    """Return the folder of the newest server on this machine; skip the test where there is none, or no driver."""
    pytest.importorskip("psycopg2")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: int(file.parts[-3]))
    on_path = shutil.which("initdb")
    candidates = [*found, *([Path(on_path)] if on_path else [])]
    servers = [file.resolve().parent for file in candidates if (file.resolve().parent / "postgres").exists()]
    if not servers:
        pytest.skip("no PostgreSQL server on this machine (Debian's package: postgresql)")
    if os.geteuid() == 0 and shutil.which("runuser") is None:
        pytest.skip("PostgreSQL does not run as root, and there is no runuser")
    return servers[-1]
