"""A Ray cluster on hosts of our own, started by the commands of cluster/: in numbers smaller, in words the same."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.files import CLUSTER, CREDENTIALS, ROOT, launcher, manifest
from tests.cluster.hosts import Host, Network, until
from tests.cluster.kuberay import ray_start

CLIENT = "RAY_AUTH_MODE=token"  # what the README has a shell export
TOKEN = "0123456789abcdef" * 4
SOON = {  # a dead host is found in 3 seconds instead of 14
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
SMALL = ("--object-store-memory=100000000", "--memory=2000000000")


class RayCluster:
    """A head that takes no work, and workers of two CPUs, which come and go.

    `how`: kuberay, the commands that KubeRay makes of the manifests, with the environment of their containers; or
    onprem, the launcher's, but for the autoscaler, which has no machine to reach by ssh.

    `shared`: a folder that all hosts see where those files mount the volume of run directories.
    """

    def __init__(self, network: Network, how: str, shared: Path | None = None) -> None:
        self._network, self._how, self._shared = network, how, shared
        self.head = self._host("ml2o-head-svc", 1, head=True)
        self.workers: dict[int, Host] = {}
        self._start_ray(self.head, head=True)

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:8265"

    def add(self, number: int) -> Host:
        """Plug in a host and start Ray on it as a worker."""
        host = self._host(f"worker{number}", 10 + number, head=False)
        self.workers[number] = host
        self.start_worker(host)
        return host

    def start_worker(self, host: Host) -> None:
        self._start_ray(host, head=False)

    def end(self, number: int) -> None:
        """Cut the power of a worker."""
        self._network.end(self.workers.pop(number))

    def await_nodes(self, count: int) -> None:
        until(lambda: self.alive() == count, 120, self.logs)

    def logs(self) -> str:
        """Return what Ray's commands have printed on each host."""
        files = [self.head.folder / "ray.log", *(host.folder / "ray.log" for host in self.workers.values())]
        return "\n".join(f"{file}\n{file.read_text()[-2000:]}" for file in files if file.exists())

    def alive(self) -> int:
        """Return how many hosts Ray takes for alive, the head included."""
        return len([node for node in self.ask("list_nodes()") if node["state"] == "ALIVE"])

    def ask(self, expression: str) -> list[dict[str, object]]:
        """Return what an expression over ray.util.state gives, asked from the head."""
        script = (
            "import json; from dataclasses import asdict; from ray.util.state import *; "
            f"print('ANSWER', json.dumps([asdict(each) for each in {expression}], default=str))"
        )
        printed = self.head.sh(f"{CLIENT} python -c {shlex.quote(script)}")
        answer: list[dict[str, object]] = json.loads(printed.partition("ANSWER ")[2])
        return answer

    def submit(self, host: Host, *words: str, options: Sequence[str] = (), script: str = "meta_train.py") -> str:
        """Submit a job as the README says, and return what the submission and the job printed."""
        command = [
            "ray", "job", "submit", f"--address={self.dashboard}", "--runtime-env", CLUSTER / "runtime_env.yaml",
            "--working-dir", ROOT, *options, "--", "python", f"jobs/{script}", *words,
        ]  # fmt: skip
        return host.sh(f"{CLIENT} {shlex.join(map(str, command))}", timeout=500)

    def _host(self, name: str, number: int, *, head: bool) -> Host:
        environment = dict(SOON)
        if self._how == "kuberay":
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}  # authOptions' Secret
            (container,) = self._group(head)["template"]["spec"]["containers"]
            environment |= {variable["name"]: variable["value"] for variable in container.get("env", [])}
        host = self._network.host(name, number, environment=environment)
        if self._how == "onprem":
            for target in launcher("onprem")["file_mounts"]:
                file = host.folder / "home" / "ray" / target.removeprefix("~/")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text({"~/.ray/auth_token": TOKEN, "~/.mlflow/credentials": CREDENTIALS}[target])
            host.environment["RAY_HEAD_IP"] = f"{self._network.names['ml2o-head-svc']}"
        if self._how == "kuberay":
            (container,) = self._group(head)["template"]["spec"]["containers"]
            for path in (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "mlflow"):
                folder = host.folder / path.removeprefix("/")
                folder.mkdir(parents=True)
                (folder / "credentials").write_text(CREDENTIALS)
        if self._shared is not None:
            host.mount(self._shared, self._runs(head))
        return host

    def _group(self, head: bool) -> dict[str, dict]:
        spec = manifest("raycluster", "RayCluster")["spec"]
        return spec["headGroupSpec"] if head else spec["workerGroupSpecs"][0]

    def _runs(self, head: bool) -> str:
        """Return where containers of that kind of host have the volume of run directories."""
        if self._how == "onprem":
            (volume,) = re.findall(r"--volume \S+:(\S+)", " ".join(launcher("onprem")["docker"]["run_options"]))
            return str(volume)
        (container,) = self._group(head)["template"]["spec"]["containers"]
        (path,) = [volume["mountPath"] for volume in container["volumeMounts"] if volume["name"] == "runs"]
        return str(path)

    def _start_ray(self, host: Host, *, head: bool) -> None:
        """Start Ray; what it is smaller in comes last on the command line, where it counts."""
        smaller = [*SMALL, *([] if head else ["--num-cpus=2"])]
        if self._how == "kuberay":
            command = ray_start(self._group(head), "" if head else f"{self.head.name}:6379")
            process = host.start(["bash", "-c", shlex.join([*command, *smaller])], "ray.log")
            if head:
                until(lambda: self._answers(process), 120, lambda: (host.folder / "ray.log").read_text())
            return
        for line in launcher("onprem")[f"{'head' if head else 'worker'}_start_ray_commands"]:
            line = re.sub(r"--autoscaling-config=\S+", "", line)
            host.sh(f"{line} {shlex.join(smaller)}" if "ray start" in line else line)

    def _answers(self, process: subprocess.Popen[bytes]) -> bool:
        assert process.poll() is None, (self.head.folder / "ray.log").read_text()
        probe = (
            f"from ray.job_submission import JobSubmissionClient; JobSubmissionClient('{self.dashboard}').list_jobs()"
        )
        command = [*self.head.enter, "python", "-c", probe]
        environment = self.head.environment | {"RAY_AUTH_MODE": "token"}
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
