"""State dicts as files: ours are safetensors with JSON in the header; anybody's are read, and nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ml2o_dist.errors import UserError
from ml2o_dist.files import replacing


def read_state(file: str | Path) -> dict[str, Tensor]:
    """Read a state dict: .safetensors, or what torch.save wrote, of which nothing but tensors is unpickled.

    Raises:
        UserError: the file is missing, torn, or holds something else.
    """
    path = Path(file)
    try:
        if path.suffix == ".safetensors":
            found: dict[str, Tensor] = load_file(path)
            return found
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"weights file {str(path)!r} is missing") from error
    except Exception as error:  # what is no such file makes torch's unpickler raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"weights file {str(path)!r} cannot be read: {reason}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]  # as trainers write it
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"weights file {str(path)!r} holds no state dict: names and tensors are wanted")
    return dict(state)


def save_state(file: Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a state dict, whole or not at all, with JSON values beside it in the header; raises OSError."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with replacing(file) as stream:
        stream.write(save(tensors, {"ml2o_dist": json.dumps(about, sort_keys=True)}))


def about_state(file: Path) -> dict[str, Any]:
    """Return the JSON values that `save_state` wrote; {} where there is no such file, or another's."""
    try:
        with safe_open(file, "pt") as opened:
            about: dict[str, Any] = json.loads((opened.metadata() or {}).get("ml2o_dist", "{}"))
            return about
    except (OSError, SafetensorError, ValueError):
        return {}
