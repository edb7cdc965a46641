"""Read the optimizers that a user names, before anything is run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ml2o_dist.artifact_sources import load_artifact, located
from ml2o_dist.config import EvaluateSettings, GuardSettings
from ml2o_dist.evaluation.evaluated import Role
from ml2o_dist.evaluation.optimizer_specs import Adversary, Guarded, HandDesigned, Learned, OptimizerSpec, Stochastic
from ml2o_dist.evaluation.optimizer_words import GUARD, REGISTRY, is_hand_designed, unknown_optimizer
from ml2o_dist.pretrained import shipped_names
from ml2o_dist.rules.adversaries import ADVERSARIES
from ml2o_dist.rules.aggregated import parse_optimizer_name, takes_learning_rate
from ml2o_dist.rules.card_guard import admitted
from ml2o_dist.runtime.files import home_folder

log = logging.getLogger(__name__)


Resolve = Callable[[str], Path]
"""Returns the local weights file of `models:/NAME@ALIAS`."""


@dataclass(frozen=True, eq=False)
class Entrant:
    """An optimizer that a user named, ready to be run.

    Attributes:
        name: as written.
        optimizer: returns the spec for a learning rate: the tuned one if `tuned`, else None.
        tuned: whether its learning rate is to be tuned.
        learning_rate: the one in the name; None if it is tuned or takes none.
    """

    name: str
    optimizer: Callable[[float | None], OptimizerSpec]
    role: Role = "other"
    tuned: bool = False
    learning_rate: float | None = None


def parse_optimizers(settings: EvaluateSettings, resolve: Resolve) -> list[Entrant]:
    """Read `settings.baselines`, then `settings.optimizers`, each once; weights are loaded and checked.

    `pretrained`, `initial`, the adversaries of rules/adversaries.py, `dssmg`, `smg`,
    `AGGREGATOR[+sgd|+momentum|+adam][@LR]`, `models:/NAME@ALIAS` or `models:/NAME/VERSION`, a weights file or a run
    directory (looked for as `artifact_sources.located` says, or a URI); each of them also as `gml2o:NAME`, under the
    guard of `settings.guard`. A learned optimizer that was meta-trained under a guard keeps every setting of it that is
    no looser than the default guard's; `gml2o:` replaces that guard.

    Raises:
        UserError: an unknown name (the nearest valid one is given), weights that cannot be read, or a name that is not
            available.
    """
    names = dict.fromkeys((*settings.baselines, *settings.optimizers))
    entrants = [_entrant(text, settings, resolve) for text in names]
    return [replace(each, role="baseline") if each.name in settings.baselines else each for each in entrants]


def _entrant(text: str, settings: EvaluateSettings, resolve: Resolve) -> Entrant:
    name = text.removeprefix(GUARD)
    guard = settings.guard if text.startswith(GUARD) else None
    if name == "initial":
        return _always(text, Learned(name, settings.rule, None), guard)
    if name in ADVERSARIES:
        return _always(text, Adversary(name), guard)
    if name in ("dssmg", "smg"):
        return _always(text, Stochastic(name, settings.guard.p), guard)
    if name in shipped_names():
        return _learned(text, name, name, guard)
    if name.startswith(REGISTRY):
        return _learned(text, name, resolve(name), guard)
    if is_hand_designed(name):
        _, optimizer, lr = parse_optimizer_name(name)
        tuned = lr is None and takes_learning_rate(optimizer)
        return Entrant(text, partial(_hand_designed, name, guard), tuned=tuned, learning_rate=lr)
    if "/" in name or name.endswith(".safetensors") or (name and (home_folder() / name).exists()):
        return _learned(text, name, located(name), guard)
    raise unknown_optimizer(text)


def _always(text: str, optimizer: OptimizerSpec, guard: GuardSettings | None) -> Entrant:
    entered = optimizer if guard is None else Guarded(optimizer, guard)
    return Entrant(text, lambda lr: entered)


def _learned(text: str, label: str, path: Path | str, guard: GuardSettings | None) -> Entrant:
    found = load_artifact(path)
    theirs, refused = (None, "") if guard is not None else admitted(found.rule.guard, label)
    if refused:
        log.warning(refused)
    rule = found.rule.model_copy(update={"guard": theirs})
    return replace(_always(text, Learned(label, rule, found.weights), guard), role="learned")


def _hand_designed(name: str, guard: GuardSettings | None, lr: float | None) -> OptimizerSpec:
    optimizer = HandDesigned.parse(name, lr)
    return optimizer if guard is None else Guarded(optimizer, guard)
