"""A Pareto set on disk: one safetensors file with the start, the experts and the routers, and JSON in its header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.paretoset.fitted_states import State
from ml2o_dist.paretoset.fronts import MOST_TASKS
from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.networks import MultiHead, build_multi_head
from ml2o_dist.paretoset.settings import NetworkSettings
from ml2o_dist.paretoset.states import save_state
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.reading import MIB, parse_json, validated
from ml2o_dist.runtime.reading_tensors import read_tensors

FILE = "pareto_set.safetensors"
FORMAT = 1

SET_LIMIT = 32 * 1024 * MIB
"""Maximum bytes of a set: a start and some experts, each a network of any size."""


@dataclass(frozen=True)
class SetCard:
    """The description stored in a saved set.

    Attributes:
        tasks: the task set's name.  names, classes, side: its tasks and images.
        mean, deviation: moments of each task's training pixels, in grey levels, by which images are standardised.
        network, modules, scale, seed: the settings that the fusion is built with.
        front: rays, losses and accuracies on the test split, as JSON values.
    """

    tasks: str
    names: Annotated[tuple[str, ...], Field(min_length=2, max_length=MOST_TASKS)]
    classes: tuple[Annotated[int, Field(ge=1, le=10_000)], ...]
    side: Annotated[int, Field(ge=1, le=1024)]
    mean: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    deviation: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]
    network: NetworkSettings
    modules: Annotated[str, Field(max_length=200)]
    scale: Annotated[float, Field(allow_inf_nan=False)]
    seed: int
    front: dict[str, Any]


_CARD = TypeAdapter(SetCard)


@dataclass(frozen=True, eq=False)
class SavedSet:
    """A set that was read back: the fusion with its trained routers, and the card."""

    fusion: Fusion
    card: SetCard
    weights_sha256: str


def save_set(file: Path, card: SetCard, start: State, experts: Sequence[State], routers: Mapping[str, Tensor]) -> str:
    """Write a set atomically; return the sha256 over its tensors. Raises OSError."""
    tensors = {f"start/{name}": tensor for name, tensor in start.items()}
    for t, expert in enumerate(experts):
        tensors |= {f"expert_{t + 1}/{name}": tensor for name, tensor in expert.items()}
    tensors |= {f"routers/{name}": tensor for name, tensor in routers.items()}
    digest = weights_sha256(tensors)
    about = {**vars(card), "network": card.network.model_dump(), "format": FORMAT, "weights_sha256": digest}
    about["card_sha256"] = _digest(about)
    save_state(file, tensors, about)
    return digest


def load_set(place: Path | str) -> SavedSet:
    """Read a set from its file, or from the run directory that has one.

    Raises:
        UserError: the file is missing, torn, altered, of a later version, or no Pareto set.
    """
    place = Path(place)
    file = place / FILE if place.is_dir() else place
    shown = f"Pareto set {str(file)!r}"
    try:
        tensors, texts = read_tensors(file, "Pareto set", SET_LIMIT)
    except FileNotFoundError as error:
        raise UserError(
            f"{place} holds no Pareto set: {file.name} is missing (is `ml2o pareto-set train` finished?)"
        ) from error
    except UserError as error:
        why = str(error).removeprefix(f"{shown} ").removeprefix("cannot be read: ")
        raise UserError(f"{shown} cannot be read: {why}") from error
    about = parse_json(texts.get("ml2o_dist", "{}"), f"{shown}, header,", finite=True)
    card = _card(file, about)
    if weights_sha256(tensors) != about["weights_sha256"]:
        raise UserError(f"{shown} was altered: its tensors do not agree with its weights_sha256")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = tensor
    names = ["start", *(f"expert_{t + 1}" for t in range(len(card.names))), "routers"]
    if parts.keys() != set(names):
        raise UserError(f"{shown} cannot be used: it has other parts than {', '.join(names)}")
    start, *experts, routers = (parts[name] for name in names)  # a file has its tensors in an order of its own
    network = set_network(card)
    fusion = Fusion(network, start, experts, modules=card.modules, heads=network.head_names, scale=card.scale)
    if {name: (t.shape, t.dtype) for name, t in routers.items()} != {
        name: (t.shape, t.dtype) for name, t in fusion.routers.state_dict().items()
    } or not all(bool(tensor.isfinite().all()) for tensor in routers.values()):
        raise UserError(f"{shown} cannot be used: its routers are those of another network, or not finite")
    fusion.routers.load_state_dict(routers)
    return SavedSet(fusion.eval(), card, str(about["weights_sha256"]))


def set_network(card: SetCard) -> MultiHead:
    """Build the plain network of a set; its initial values are not used."""
    rest = card.network.model_dump()
    name = rest.pop("name")
    return build_multi_head(name, side=card.side, classes=card.classes, seed=card.seed, pretrained=False, **rest)


def standardised(card: SetCard, images: Tensor, task: int) -> Tensor:
    """Return grey images [B, H, W], levels 0..255, in the form that the networks need for a task: [B, 1, H, W]."""
    groups = len(card.mean)
    g = task if groups == len(card.names) else 0
    return ((images.to(torch.float32) - card.mean[g]) / card.deviation[g]).unsqueeze(1)


def save_plain(file: Path, network: nn.Module, card: SetCard, preference: Sequence[float]) -> None:
    """Write the state dict of an exported network, with its description in the header; raises OSError."""
    about = {
        "tasks": card.tasks,
        "names": card.names,
        "classes": card.classes,
        "side": card.side,
        "mean": card.mean,
        "deviation": card.deviation,
        "network": card.network.model_dump(),
        "preference": list(preference),
    }
    save_state(file, network.state_dict(), about)


def _card(file: Path, about: Any) -> SetCard:
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise UserError(f"{str(file)!r} is no Pareto set of ml2o_dist: its header names no format")
    if about["format"] > FORMAT:
        raise UserError(
            f"{str(file)!r} has format {about['format']}, this ml2o_dist reads up to {FORMAT}: install a newer one"
        )
    own = {key: value for key, value in about.items() if key != "card_sha256"}
    if _digest(own) != about.get("card_sha256"):
        raise UserError(f"Pareto set {str(file)!r} was altered: its header does not agree with its card_sha256")
    shown = f"Pareto set {str(file)!r}"
    card = validated(_CARD, {key: own[key] for key in SetCard.__dataclass_fields__ if key in own}, shown)
    groups = {1, len(card.names)}
    if len(card.classes) != len(card.names) or len(card.mean) not in groups or len(card.deviation) != len(card.mean):
        raise UserError(f"{shown} cannot be used: its names, classes, means and deviations are not as many")
    if not isinstance(own.get("weights_sha256"), str):
        raise UserError(f"{shown} cannot be used: it has no weights_sha256")
    return card


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
