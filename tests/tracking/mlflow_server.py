"""A real `mlflow server` over an sqlite file or another store, which can be killed and started again on its port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from tests.tracking.empty_store import new_store


class MlflowServer:
    """Not started at first: `uri` is then an address where nobody answers."""

    def __init__(self, folder: Path, store: str = "") -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store = store or new_store(folder, "server.db")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1",
                   "--port", str(self.port), "--backend-store-uri", self.store,
                   "--artifacts-destination", (self.folder / "artifacts").as_uri()]  # fmt: skip
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self.folder, start_new_session=True
            )
        limit = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except OSError:
                text = (self.folder / "server.log").read_text()
                assert self._process.poll() is None, text
                assert time.monotonic() < limit, text
                time.sleep(0.1)

    def signal(self, number: int) -> None:
        """Send a signal to the server and its workers: they are a process group of their own."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL it, if it runs."""
        if self._process is not None:
            with suppress(ProcessLookupError):  # it has ended by itself
                self.signal(signal.SIGKILL)
            self._process.wait(timeout=60)
            self._process = None
