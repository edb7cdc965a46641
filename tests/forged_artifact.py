"""Changing an artifact's files as somebody might who wants it loaded nevertheless."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ml2o_dist.artifact import weights_sha256


def edit_card(folder: Path, change: Callable[[dict[str, Any]], object], consistent: bool = True) -> None:
    """Change the card; with `consistent` its own digest is made to agree, as a careful forger would."""
    file = folder / "weights.json"
    card = json.loads(file.read_text())
    change(card)
    if consistent:
        card.pop("card_sha256", None)
        card["card_sha256"] = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(card))


def replace_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write other tensors with every digest made to agree."""
    save_file(tensors, folder / "weights.safetensors")
    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    edit_card(folder, lambda card: card.update(file_sha256=digest, weights_sha256=weights_sha256(tensors)))


def flip_bit(file: Path, position: int) -> None:
    """Flip the lowest bit of one byte."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
