"""A small sweep on hosts that share a folder, and the weights that its best trial must end at."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cluster.files import ROOT
from tests.cluster.hosts import Host
from tests.cluster.ray_cluster import RayCluster
from tests.cluster.training import Job, calm

SWEEP, BASE = ROOT / "tests" / "small_sweep.yaml", ROOT / "tests" / "small_sweep_base.yaml"
PROCESS = "ray::Implicit"  # how Ray names a trial's own


def calm_best(answered, folder, *overrides):
    """Return the weights at which a meta-training with the best trial's values ends, in one process, without Ray."""
    settings = [f"{key}={json.dumps(value)}" for key, value in answered["best"]["values"].items()]
    return calm(folder, *settings, *overrides, config=BASE)


def trials_on(host: Host) -> set[str]:
    """Return the trials that have begun or gone on there: Tune gives each a folder of its own on its host."""
    return {folder.name for folder in (host.folder / "ray").glob("session_*/artifacts/*/tune/working_dirs/*")}


class Sweep(Job):
    """A submitted sweep whose run directory is below `shared`."""

    def __init__(self, ray: RayCluster, shared: Path, *overrides: str) -> None:
        self._folder = shared / "runs" / "sweep"
        words = [word for each in overrides for word in ("--set", each)]
        command = ["--config", str(SWEEP), "--run-dir", "runs/sweep", *words]
        super().__init__(ray, self._folder / "run.log", *command, script="sweep.py")

    def reports(self) -> dict[str, list[int]]:
        """Return the meta-steps at which each trial has reported, in the order of the reports."""
        found: dict[str, list[int]] = {}
        file = self._folder / "trials.jsonl"
        for line in file.read_text().splitlines() if file.exists() else []:
            said = json.loads(line)
            if "meta_step" in said:
                found.setdefault(said["trial"], []).append(said["meta_step"])
        return found
