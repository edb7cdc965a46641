"""Checks of the settings of a Pareto set before anything is trained."""

from __future__ import annotations

from pathlib import Path

from ml2o_dist.config import DataSettings, EvaluateSettings
from ml2o_dist.config_file import flat_settings, read_settings
from ml2o_dist.evaluation.optimizer_names import Resolve, parse_optimizers
from ml2o_dist.evaluation.optimizer_specs import Guarded, HandDesigned, Learned, OptimizerSpec, Stochastic
from ml2o_dist.paretoset.conditioned import ConditionedInput, WeightLine
from ml2o_dist.paretoset.experts import network_of
from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.scalarization import Scalarization
from ml2o_dist.paretoset.settings import SETTINGS, ParetoSetSettings
from ml2o_dist.paretoset.states import read_state
from ml2o_dist.paretoset.tasks import TaskSet
from ml2o_dist.problems.image_files import data_folder
from ml2o_dist.rundir.kinds import check_kind
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import home_folder

OPERATIONAL = ("comparators", "resources", "data", "tracking")
"""Keys that a resumed run may change, besides checkpoint_every and max_failures."""


def resolved(settings: ParetoSetSettings) -> ParetoSetSettings:
    """Resolve settings that depend on this process, as for a meta-training."""
    device = "cuda" if settings.resources.num_gpus > 0 else "cpu"
    return settings.model_copy(
        update={
            "data": DataSettings(root=str(data_folder(settings.data.root))),
            "device": device if settings.device == "auto" else settings.device,
        }
    )


def check_place(folder: Path, settings: ParetoSetSettings, resume: bool) -> None:
    """Raise UserError if the folder holds something else, or this run without a request to resume it."""
    if not (folder / SETTINGS).exists():
        check_kind(folder, "a Pareto set")
        if resume:
            raise UserError(f"nothing to resume: {folder} holds no {SETTINGS}")
        return
    difference = _difference(settings, read_settings(ParetoSetSettings, folder / SETTINGS, (), within=folder))
    if difference:
        other = "leave it out to go on, or choose" if resume else "choose"
        raise UserError(f"{folder} holds a Pareto set of other settings ({difference}); {other} another --run-dir")
    if not resume:
        raise UserError(f"{folder} holds this Pareto set; add --resume to go on, or choose another --run-dir")


def _difference(ours: ParetoSetSettings, theirs: ParetoSetSettings) -> str:
    left, right = flat_settings(ours), flat_settings(theirs)
    for key in sorted(left.keys() | right.keys()):
        free = key.split(".")[0] in OPERATIONAL or key.split(".")[-1] in ("checkpoint_every", "max_failures")
        if not free and left.get(key) != right.get(key):
            return f"{key} is {left.get(key)!r} here and {right.get(key)!r} there"
    return ""


def router_trainer(settings: ParetoSetSettings, resolve: Resolve) -> OptimizerSpec:
    """Return the optimizer of the routers; raises UserError if its name is incomplete or does not suit the loss."""
    name = settings.routers.optimizer
    (entrant,) = parse_optimizers(EvaluateSettings(optimizers=(name,)), resolve)
    if entrant.tuned:
        raise UserError(f"routers.optimizer {name!r} needs a learning rate: write {name}@0.01")
    optimizer = entrant.optimizer(None)
    guarded = isinstance(optimizer, Guarded | Stochastic) or (
        isinstance(optimizer, Learned) and optimizer.settings.guard is not None
    )
    looks_back = isinstance(optimizer, HandDesigned) and optimizer.aggregator == "famo"
    if (guarded or looks_back) and not Scalarization(settings.routers.loss).constant:
        raise UserError(
            f"routers.loss {settings.routers.loss!r} has other weights at every point, so that {name} cannot compare "
            "two points by it: use routers.loss=ls, or another optimizer"
        )
    return optimizer


def check_network(settings: ParetoSetSettings, tasks: TaskSet) -> None:
    """Raise UserError before any training if network, files, modules or comparators do not fit."""
    network = network_of(tasks, settings.network, settings.seed)
    if settings.experts.files:
        if len(settings.experts.files) != tasks.count + 1:
            raise UserError(
                f"experts.files must name the start and {tasks.count} experts of task set {settings.tasks!r}, "
                f"not {len(settings.experts.files)} files"
            )
        start, *experts = [read_state(home_folder() / file) for file in settings.experts.files]
    else:
        start = network.state_dict()
        experts = [start] * tasks.count
    Fusion(network, start, experts, modules=settings.modules, heads=network.head_names)
    if "cosmos" in settings.comparators:
        ConditionedInput(network, tasks.count, settings.seed)
    if {"pamal", "phn-ls", "phn-epo"} & set(settings.comparators):
        WeightLine(network, [])
