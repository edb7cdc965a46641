"""Files of a finished Pareto set in its folder: the set, and the fronts as JSON, table and picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.paretoset.approaches import OURS
from ml2o_dist.paretoset.experts import network_of
from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.results import ApproachResult, markdown
from ml2o_dist.paretoset.saved_set import FILE, SetCard, save_set
from ml2o_dist.paretoset.settings import FRONTS, PICTURE, TABLE, ParetoSetSettings
from ml2o_dist.paretoset.states import read_state
from ml2o_dist.paretoset.tasks import TaskSet
from ml2o_dist.reporting.pareto_set_plots import plot_fronts
from ml2o_dist.runtime.files import replacing


def save_results(
    settings: ParetoSetSettings,
    tasks: TaskSet,
    folder: Path,
    files: Sequence[str],
    results: Sequence[ApproachResult],
    git: str | None,
) -> str:
    """Write the set, the fronts and their pictures into `folder`; return the sha256 over the set's tensors.

    `files` are the states of start and experts. Raises OSError.
    """
    newest, _ = newest_checkpoint(folder / "training" / OURS)
    start, *experts = [read_state(file) for file in files]
    network = network_of(tasks, settings.network, settings.seed)
    fusion = Fusion(
        network,
        start,
        experts,
        modules=settings.modules,
        heads=network.head_names,
        scale=settings.scale,
        begin=settings.routers.begin,
        seed=settings.seed,
    )
    if newest is not None:  # none if routers.steps is 0
        nn.utils.vector_to_parameters(newest.tensors["parameters"][0], fusion.routers.parameters())
    ours = next(result for result in results if result.approach == OURS)
    card = SetCard(
        tasks=settings.tasks,
        names=tasks.names,
        classes=tasks.classes,
        side=tasks.side,
        mean=tasks.mean,
        deviation=tasks.deviation,
        network=settings.network,
        modules=settings.modules,
        scale=settings.scale,
        seed=settings.seed,
        front=ours.fronts["test"].to_json(),
    )
    digest = save_set(folder / FILE, card, start, experts, fusion.routers.state_dict())
    about = {"tasks": tasks.names, "data_sha256": tasks.sha256, "git": git}
    fronts = about | {"approaches": [result.to_json() for result in results]}
    contents = {FRONTS: json.dumps(fronts) + "\n", TABLE: markdown(results, f"Fronts of {settings.tasks}")}
    for name, content in contents.items():
        with replacing(folder / name) as stream:
            stream.write(content.encode())
    plot_fronts(results, tasks.names, folder / PICTURE)
    return digest
