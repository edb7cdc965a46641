"""Checks that the cluster has room for the workers that the settings ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import ray

from ml2o_dist.config import MetaTrainSettings, ResourceSettings
from ml2o_dist.runtime.errors import UserError


def check_capacity(workers: int, resources: ResourceSettings, total: Mapping[str, float], place: str) -> None:
    """Raise UserError if the `total` of `place` is less than `workers` need; kinds not in `total` are not checked."""
    for kind, each in (("CPU", resources.num_cpus), ("GPU", resources.num_gpus), *resources.custom.items()):
        have = total.get(kind, workers * each)
        if workers * each > have:
            raise UserError(
                f"workers={workers} needs {workers * each:g} {kind} ({each:g} each), {place} has {have:g}: "
                f"{workers * each - have:g} missing; lower workers or {_setting(kind)}, or add nodes"
            )


def check_labels(labels: Mapping[str, str], setting: str) -> None:
    """Raise UserError if no node of the cluster has the `labels` that `setting` asks for, by Ray's rules."""
    nodes = [node["Labels"] for node in ray.nodes() if node["Alive"]]
    if not any(has_labels(node, labels) for node in nodes):
        wanted = ", ".join(f"{name}={value}" for name, value in labels.items())
        known = {f"{name}={node[name]}" for node in nodes for name in labels if name in node}
        raise UserError(
            f"no node of the cluster has the labels that {setting} asks for: {wanted} (there are: "
            f"{', '.join(sorted(known)) or 'no such labels'}); change {setting}, or add nodes"
        )


def has_labels(node: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Tell whether a node's labels match: each name asks for VALUE, in(VALUE, ...), or either of them after a !."""
    for name, asked in labels.items():
        values = asked.removeprefix("!")
        if values.startswith("in("):
            allowed = [value.strip() for value in values.removeprefix("in(").removesuffix(")").split(",")]
        else:
            allowed = [values]
        if (node.get(name) in allowed) == asked.startswith("!"):
            return False
    return True


def room_for_workers(settings: MetaTrainSettings, total: Mapping[str, float]) -> dict[str, float]:
    """Return `total` less the share of the process that replays (with backward=learner)."""
    share = settings.learner.resources
    taken = {"CPU": share.num_cpus, "GPU": share.num_gpus, **share.custom} if settings.backward == "learner" else {}
    return {kind: have - taken.get(kind, 0.0) for kind, have in total.items()}


def cluster_total(custom: Iterable[str] = ()) -> dict[str, float]:
    """Return the CPUs, GPUs and `custom` resources of the cluster that this process is connected to."""
    total = ray.cluster_resources()
    return {kind: total.get(kind, 0.0) for kind in ("CPU", "GPU", *custom)}


def free_room(resources: ResourceSettings) -> str:
    """Say what one worker needs and what the cluster has free."""
    shares = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.custom}
    need = " and ".join(f"{each:g} {kind}" for kind, each in shares.items() if each or kind == "CPU")
    if resources.labels:
        need += f" on a node labelled {', '.join(f'{name}={value}' for name, value in resources.labels.items())}"
    free = ray.available_resources()
    return f"each needs {need}, the cluster has {free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU free"


def _setting(kind: str) -> str:
    return f"resources.num_{kind.lower()}s" if kind in ("CPU", "GPU") else f"resources.custom.{kind}"
