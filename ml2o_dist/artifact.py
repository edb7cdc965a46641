"""A learned optimizer on disk: `weights.safetensors` beside `weights.json`, its card. Nothing here is pickled.

The card says which rule the weights belong to, where they come from, and three digests: of the tensors, of the
tensors' file and of the card itself. `read_artifact` refuses, by name, whatever does not agree with them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save as save_tensors
from torch import Tensor

from ml2o_dist.config import RULES, LearnedRuleSettings, rule_settings
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import expanded, replacing
from ml2o_dist.runtime.reading import MIB, one_line, parse_json, read_bytes
from ml2o_dist.runtime.reading_tensors import check_floats, parse_tensors

FORMAT = 1
"""Version of the layout. A reader refuses a newer one and reads every older one."""

WEIGHTS_FILE = "weights.safetensors"

WEIGHTS_LIMIT = 1024 * MIB
"""Most bytes of a file of weights: twice those of the largest network that `rule.hidden` allows."""

CARD_LIMIT = 4 * MIB
"""Most bytes of a card: a thousand times those of a usual one."""

_OWN_KEYS: dict[str, type] = {
    "format": int,
    "package_version": str,
    "created": str,
    "rule": dict,
    "parameters": int,
    "weights_sha256": str,
    "file_sha256": str,
    "provenance": dict,
    "card_sha256": str,
}
"""The keys that every card has, with their types."""


@dataclass(frozen=True)
class Artifact:
    """A learned optimizer as it was read or written.

    Attributes:
        weights: the tensors by name, on the CPU.
        rule: the settings of the rule that the weights belong to.
        card: everything in the JSON file; `card["provenance"]` is the writer's information about their origin.
        path: absolute path of the .safetensors file; one from a URI lies in the cache folder.
    """

    weights: dict[str, Tensor] = field(repr=False)
    rule: LearnedRuleSettings
    card: dict[str, Any] = field(repr=False)
    path: Path

    @property
    def weights_sha256(self) -> str:
        """The digest of the weights from `weights_sha256`."""
        return str(self.card["weights_sha256"])


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Return the sha256 over the tensors' names, shapes and bytes in name order.

    Every part is preceded by its length, so that no two different sets of tensors feed the digest the same bytes.
    Device, strides and the order of the mapping do not matter.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        for part in (name.encode(), repr(tuple(tensor.shape)).encode(), content):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def package_version() -> str:
    """Return the installed version of ml2o-dist; "" where it runs from a bare copy, as a cluster job may."""
    try:
        return version("ml2o-dist")
    except PackageNotFoundError:
        return ""


def save_artifact(
    path: Path | str, weights: Mapping[str, Tensor], rule: LearnedRuleSettings, card: Mapping[str, Any]
) -> Artifact:
    """Write `weights` and their card, each atomically, the card last: without it a reader refuses the weights.

    Args:
        path: a folder (made if there is none), or a file that ends in .safetensors.
        weights: the state dict of `rule`'s network.
        rule: the settings that rebuild the network.
        card: facts about the weights' origin (config hash, seed, meta-steps, problems ...), as JSON values;
            kept under `provenance`. JSON has no NaN and no infinity: such figures become null.

    Raises:
        UserError: the weights do not fit the rule, `card` is not JSON, or the files cannot be written.
    """
    file = _weights_file(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    _check_fit(tensors, rule, file)
    # A copy of each tensor: safetensors refuses tensors that share memory, as tied weights do.
    content = save_tensors({name: tensor.clone() for name, tensor in tensors.items()})
    full: dict[str, Any] = {
        "format": FORMAT,
        "package_version": package_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "rule": rule.model_dump(mode="json"),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "weights_sha256": weights_sha256(tensors),
        "file_sha256": hashlib.sha256(content).hexdigest(),
        "provenance": _finite(card),
    }
    try:
        full["card_sha256"] = _card_sha256(full)
    except (TypeError, ValueError) as error:
        raise UserError(f"the card of {str(file)!r} is not JSON: {error}") from error
    try:
        card_content = (json.dumps(full, indent=2, allow_nan=False) + "\n").encode()
        for target, written in ((file, content), (card_file(file), card_content)):
            with replacing(target) as stream:
                stream.write(written)
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be written: {error.strerror or error}") from error
    return Artifact(tensors, rule, json.loads(json.dumps(full)), file)


def read_artifact(path: Path | str) -> Artifact:
    """Read and verify a learned optimizer on this machine; `artifact_sources.load_artifact` takes names and URIs, too.

    Args:
        path: the .safetensors file, or the folder that holds `weights.safetensors`: a run directory, for one.

    Raises:
        UserError: a file is missing, altered, too large or no regular file, the format is newer, the tensors do not
            fit the card's rule, or a weight is not finite; the line names the file and what differs.
    """
    file = _weights_file(path)
    content = _read(file, "weights", WEIGHTS_LIMIT)
    beside = card_file(file)
    card = parse_card(beside, _read(beside, "card", CARD_LIMIT))
    found = hashlib.sha256(content).hexdigest()
    if found != card["file_sha256"]:
        raise UserError(
            f"{str(file)!r} was altered: its sha256 is {found[:12]}..., the card says {card['file_sha256'][:12]}..."
        )
    weights, _ = parse_tensors(content, f"weights file {str(file)!r}")
    found = weights_sha256(weights)
    if found != card["weights_sha256"]:
        said = card["weights_sha256"][:12]
        raise UserError(f"the tensors in {str(file)!r} have sha256 {found[:12]}..., the card says {said}...")
    try:
        rule = rule_settings(card["rule"])
    except UserError as error:
        raise UserError(f"{str(beside)!r}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in ("rule", *first["loc"]))
        raise UserError(f"{str(beside)!r}: {one_line(place)}: {one_line(first['msg'])}") from error
    _check_fit(weights, rule, file)
    check_floats(weights, f"weights file {str(file)!r}")
    return Artifact(weights, rule, card, file)


load_artifact = read_artifact
"""The name of `read_artifact` in models that older versions registered."""


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _weights_file(path: Path | str) -> Path:
    path = expanded(path).absolute()
    if path.suffix != ".safetensors" and os.path.isfile(path):
        raise UserError(f"weights {str(path)!r} are neither a .safetensors file nor a folder")
    return path if path.suffix == ".safetensors" else path / WEIGHTS_FILE


def card_file(file: Path) -> Path:
    return file.with_suffix(".json")


def _read(file: Path, what: str, limit: int) -> bytes:
    try:
        return read_bytes(file, f"{what} file", limit)
    except FileNotFoundError as error:
        if (file.parent / "pareto_set.yaml").is_file():
            raise UserError(
                f"{str(file.parent)!r} holds a Pareto set, not an optimizer: `ml2o pareto-set query`"
            ) from error
        unfinished = (file.parent / "checkpoints").is_dir()
        hint = f": the run is not finished, go on with: ml2o meta-train --run-dir {file.parent} --resume"
        raise UserError(f"{what} file {str(file)!r} is missing{hint if unfinished else ''}") from error


def parse_card(file: Path, content: bytes) -> dict[str, Any]:
    """Return the card if its own digest is right; raises UserError, which names `file`."""
    card = parse_json(content, f"card file {str(file)!r}", CARD_LIMIT, finite=True)
    if not isinstance(card, dict) or not isinstance(card.get("format"), int):
        raise UserError(f"card file {str(file)!r} is no card of ml2o_dist: it names no format")
    if card["format"] > FORMAT:
        raise UserError(
            f"{str(file)!r} has format {card['format']}, this ml2o_dist reads up to {FORMAT}: install a newer ml2o_dist"
        )
    missing = [key for key in _OWN_KEYS if key not in card]
    if missing:
        raise UserError(f"card file {str(file)!r} lacks {', '.join(missing)}")
    for key, kind in _OWN_KEYS.items():
        if type(card[key]) is not kind:
            raise UserError(f"card file {str(file)!r}: {key} is a {type(card[key]).__name__}, not a {kind.__name__}")
    for key in ("weights_sha256", "file_sha256", "card_sha256"):
        if not re.fullmatch("[0-9a-f]{64}", card[key]):
            raise UserError(f"card file {str(file)!r}: {key} is no sha256")
    if card["card_sha256"] != _card_sha256(card):
        raise UserError(f"card file {str(file)!r} was altered: its content does not agree with its card_sha256")
    return card


def _card_sha256(card: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in card.items() if key != "card_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _check_fit(weights: Mapping[str, Tensor], rule: LearnedRuleSettings, file: Path) -> None:
    expected = RULES[rule.kind].shapes(rule)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    misfit = f"the tensors of {str(file)!r} do not fit its rule settings"
    wanted = _sizes(expected)
    theirs = wanted | _sizes(found)
    differing = [f"{what} {theirs[what]}, not {size}" for what, size in wanted.items() if theirs[what] != size]
    if differing:
        misfit += f" ({'; '.join(differing)})"
    if missing or extra:
        parts = [f"without {', '.join(missing[:9])}"] * bool(missing)
        parts += [f"with {one_line(', '.join(extra[:9]))}"] * bool(extra)
        raise UserError(f"{misfit}: they come {' and '.join(parts)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{misfit}: {name} has shape {list(found[name])}, not {list(shape)}")


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return what tensor shapes imply about the settings `hidden`, `features`, `output` and `objectives`."""
    places = {
        "hidden": ("shared.weight_hh_l0", 1),
        "feature channels": ("specific.0.weight_ih_l0", 1),
        "outputs": ("head.weight", 0),
    }
    sizes = {what: shapes[name][i] for what, (name, i) in places.items() if i < len(shapes.get(name, ()))}
    return sizes | {"objective modules": len({name.split(".")[1] for name in shapes if name.startswith("specific.")})}
