"""Whether there is room for the workers that the settings ask for."""

from __future__ import annotations

from collections.abc import Mapping

import ray

from ml2o_dist.config import MetaTrainSettings, ResourceSettings
from ml2o_dist.errors import UserError


def check_capacity(workers: int, resources: ResourceSettings, total: Mapping[str, float], place: str) -> None:
    """Raise UserError where `place` has not the `total` of what `workers` need; a kind not in `total` is not known."""
    for kind, each in (("CPU", resources.num_cpus), ("GPU", resources.num_gpus)):
        have = total.get(kind, workers * each)
        if workers * each > have:
            raise UserError(
                f"workers={workers} needs {workers * each:g} {kind} ({each:g} each), {place} has {have:g}: "
                f"{workers * each - have:g} missing; lower workers or resources.num_{kind.lower()}s, or add nodes"
            )


def room_for_workers(settings: MetaTrainSettings, total: Mapping[str, float]) -> dict[str, float]:
    """Return what of `total` is left for workers, once the process that replays has its share (backward=learner)."""
    share = settings.learner.resources
    taken = {"CPU": share.num_cpus, "GPU": share.num_gpus} if settings.backward == "learner" else {}
    return {kind: have - taken.get(kind, 0.0) for kind, have in total.items()}


def cluster_total() -> dict[str, float]:
    """Return the CPUs and GPUs of the cluster that this process is connected to."""
    total = ray.cluster_resources()
    return {kind: total.get(kind, 0.0) for kind in ("CPU", "GPU")}


def free_room(resources: ResourceSettings) -> str:
    """Say what one worker needs and what the cluster has free."""
    need = f"{resources.num_cpus:g} CPU" + (f" and {resources.num_gpus:g} GPU" if resources.num_gpus else "")
    free = ray.available_resources()
    return f"each needs {need}, the cluster has {free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU free"
