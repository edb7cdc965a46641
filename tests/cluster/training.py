"""A small meta-training on hosts of our own, the weights that it must end at, and what it may leave behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.config_file import load_settings
from ml2o_dist.metatrain.trainer import Trainer
from tests.cluster.files import ROOT
from tests.cluster.hosts import until
from tests.cluster.ray_cluster import RayCluster
from tests.metatrain.executing import in_process, later

CONFIG = ROOT / "tests" / "small_run.yaml"
HOME = "home/ray/ml2o"  # ML2O_HOME of runtime_env.yaml, in a host's folder


def calm(folder, *overrides, config=CONFIG):
    """Return the weights that the run ends at in one process, without Ray."""
    trainer = Trainer(load_settings(config, [*overrides, "device=cpu"]), folder)
    trainer.run(later(in_process))
    return weights_sha256(trainer.best_weights)


def held(ray):
    """Return the objects that somebody refers to, but for what Ray's own agent keeps of a job that it has started."""

    def owner(each):
        (host,) = [host for host in (ray.head, *ray.workers.values()) if host.address == each["ip"]]
        return host.sh(f"cat /proc/{each['pid']}/cmdline").strip("\0")

    return [(owner(each), each) for each in ray.ask("list_objects()") if owner(each) != "ray::DashboardAgent"]


def leaves_nothing(ray):
    """Assert that Ray holds no living actor and no object, and that its hosts are empty once it is stopped."""
    assert ray.ask("list_actors(filters=[('state', '!=', 'DEAD')])") == []
    until(lambda: held(ray) == [], 60, lambda: held(ray))
    for host in [ray.head, *ray.workers.values()]:
        assert not [line for line in host.command_lines() if "ray::RolloutWorker" in line]
        host.sh("ray stop")
        until(lambda host=host: not host.command_lines(), 30, lambda host=host: host.command_lines())


class Job:
    """A submitted job, in a thread of its own; `log` is the file that it writes on the head."""

    def __init__(self, ray: RayCluster, log: Path, *words: str, script: str) -> None:
        self._ray, self._log, self._words, self._script = ray, log, [*words, "--json"], script
        self._printed: list[str] = []
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._printed.append(self._ray.submit(self._ray.head, *self._words, script=self._script))
        except BaseException as error:
            self._failed.append(error)

    def await_that(self, done: Callable[[], bool]) -> None:
        """Wait for something that must come before the job's end."""
        until(lambda: done() or not self._thread.is_alive(), 300, self._ray.logs)
        assert done(), self._failed

    @property
    def goes_on(self) -> bool:
        return self._thread.is_alive()

    def printed(self) -> str:
        """Wait for the end; return what `ray job submit` printed, the job's own words among it."""
        self._thread.join(timeout=500)
        assert not self._thread.is_alive()
        print(self.log())  # shown where a test fails
        assert not self._failed, self._failed
        return self._printed[0]

    def answer(self) -> dict[str, Any]:
        """Wait for the end; return what `--json` printed."""
        return answer(self.printed())

    def log(self) -> str:
        return self._log.read_text()


class Training(Job):
    """A submitted meta-training."""

    def __init__(self, ray: RayCluster, *overrides: str) -> None:
        folder = ray.head.folder / HOME / "runs" / "job"
        self._checkpoints = folder / "checkpoints"
        words = [word for each in overrides for word in ("--set", each)]
        command = ["--config", str(CONFIG), "--run-dir", "runs/job", *words]
        super().__init__(ray, folder / "run.log", *command, script="meta_train.py")

    def await_step(self, step: int) -> None:
        """Wait for a meta-step's checkpoint."""
        self.await_that((self._checkpoints / f"step_{step:06d}").exists)


def answer(printed: str) -> dict[str, Any]:
    """Return what `--json` printed, among the words of `ray job submit`."""
    (line,) = [line for line in printed.splitlines() if line.startswith('{"run_dir"')]
    found: dict[str, Any] = json.loads(line)
    return found
