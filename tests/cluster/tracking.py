"""The tracking server on a host of its own, started by the command of the compose file or of the manifest."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess

from tests.cluster.files import PASSWORDS, ROOT, mlflow_servers
from tests.cluster.hosts import Host, Network, until
from tests.tracking.postgres_server import PostgresServer

STORE = "postgresql+psycopg2://mlflow@postgres:5432/mlflow"
SCRIPT = "/home/ray/ml2o_dist/cluster/mlflow_server.sh"


class TrackingServer:
    """MLflow over PostgreSQL, which is known to all hosts as `mlflow`; both ask for their passwords.

    `how`: compose, or kubernetes. The volume for artifacts is a folder of the host.
    """

    def __init__(self, network: Network, how: str) -> None:
        self.host = network.host("mlflow", 9, aliases=["postgres"])
        secrets = self.host.folder / "home" / "secrets"
        secrets.mkdir()
        for name, password in PASSWORDS.items():
            (secrets / name).write_text(f"{password}\n")
        self._variables = {"MLFLOW_BACKEND_STORE_URI": STORE, "ML2O_SECRETS": "/home/secrets"}
        self._database = PostgresServer(self.host.enter, 5432, "mlflow", PASSWORDS["postgres-password"])
        network.names["postgres"] = "127.0.0.1"
        (self.host.folder / "hosts").write_text(f"127.0.0.1 localhost postgres\n{self.host.address} mlflow\n")
        here = {"=/mlartifacts": "=/home/mlartifacts", SCRIPT: str(ROOT / "cluster" / "mlflow_server.sh")}
        self._command = mlflow_servers()["compose without a name" if how == "compose" else how]
        for ours, theirs in here.items():
            self._command = [word.replace(ours, theirs) for word in self._command]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Return when it answers."""
        process = self._process = self.host.start(self._command, "mlflow.log", self._variables)

        def answers() -> bool:
            assert process.poll() is None, (self.host.folder / "mlflow.log").read_text()
            probe = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:5000/health', timeout=2)"
            command = [*self.host.enter, "python", "-c", probe]
            return subprocess.run(command, env=self.host.environment, capture_output=True, check=False).returncode == 0

        until(answers, 180, lambda: (self.host.folder / "mlflow.log").read_text())

    def kill(self) -> None:
        """SIGKILL it and its workers."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=30)

    def close(self) -> None:
        self._database.stop()

    def ask(self, host: Host, script: str) -> dict[str, object]:
        """Return the dictionary `answer` that a script with an MlflowClient `client` makes on another host."""
        whole = (
            "import json; from mlflow.tracking import MlflowClient; client = MlflowClient('http://mlflow:5000')\n"
            f"{script}\nprint('ANSWER', json.dumps(answer))"
        )
        known = f"MLFLOW_TRACKING_USERNAME=ml2o MLFLOW_TRACKING_PASSWORD={shlex.quote(PASSWORDS['mlflow-password'])}"
        printed = host.sh(f"{known} python -c {shlex.quote(whole)}")
        answer: dict[str, object] = json.loads(printed.partition("ANSWER ")[2])
        return answer
