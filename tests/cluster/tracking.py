"""The tracking server on a host of its own, started by the command of the compose file or of the manifest."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess

from tests.cluster.files import compose, manifest
from tests.cluster.hosts import Host, Network, until
from tests.tracking.postgres_server import PostgresServer

PASSWORD = "secret"


class TrackingServer:
    """MLflow over PostgreSQL, which is known to all hosts as `mlflow`.

    `how`: compose, or kubernetes. The volume for artifacts is a folder of the host.
    """

    def __init__(self, network: Network, how: str) -> None:
        self.host = network.host("mlflow", 9, aliases=["postgres"])
        self._command, variables = _from_compose() if how == "compose" else _from_manifest()
        self._variables = {name: value for name, value in variables.items() if name.startswith(("MLFLOW", "POSTGRES"))}
        store = re.fullmatch(r"\S+://(\w+):\S+@postgres:(\d+)/(\w+)", variables["MLFLOW_BACKEND_STORE_URI"])
        assert store is not None
        owner, port, database = store.groups()
        assert owner == database
        self._database = PostgresServer(self.host.enter, int(port), owner)
        network.names["postgres"] = "127.0.0.1"
        (self.host.folder / "hosts").write_text(f"127.0.0.1 localhost postgres\n{self.host.address} mlflow\n")
        self._command = [word.replace("=/mlartifacts", "=/home/mlartifacts") for word in self._command]
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
        answer: dict[str, object] = json.loads(host.sh(f"python -c {shlex.quote(whole)}").partition("ANSWER ")[2])
        return answer


def _from_compose() -> tuple[list[str], dict[str, str]]:
    service = compose({"POSTGRES_PASSWORD": PASSWORD})["services"]["mlflow"]
    return service["command"], service["environment"]


def _from_manifest() -> tuple[list[str], dict[str, str]]:
    (container,) = manifest("mlflow", "Deployment")["spec"]["template"]["spec"]["containers"]
    variables = {}
    for variable in container["env"]:
        value = variable.get("value", PASSWORD)  # the one without is of the Secret
        variables[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], value)
    return [*container["command"], *container["args"]], variables
