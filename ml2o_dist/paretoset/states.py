"""State dicts as files: ours are safetensors with JSON in the header; others' are read, too. No code is unpickled."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import replacing
from ml2o_dist.runtime.reading import MIB, one_line, parse_json, read_bytes
from ml2o_dist.runtime.reading_tensors import read_tensors, read_texts

STATE_LIMIT = 16 * 1024 * MIB
"""Maximum bytes of a state dict, on disk and in memory: four times the largest trunk of the libraries."""


def read_state(file: str | Path) -> dict[str, Tensor]:
    """Read a state dict: .safetensors, or a file of torch.save, from which only tensors are unpickled.

    Raises:
        UserError: the file is missing, torn, too large, or holds something else.
    """
    path = Path(file)
    shown = f"weights file {str(path)!r}"
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path, "weights file", STATE_LIMIT)[0]
        content = read_bytes(path, "weights file", STATE_LIMIT)
    except FileNotFoundError as error:
        raise UserError(f"{shown} is missing") from error
    try:
        _check_archive(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # for other files torch's unpickler can raise any exception
        raise UserError(f"{shown} cannot be read: {one_line(error)[:200]}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]  # as trainers write it
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise UserError(f"{shown} holds no state dict: names and tensors are wanted")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise UserError(f"{shown} holds {one_line(name)!r}, which is no plain tensor (sparse, quantized or meta)")
    return {name: tensor.detach() for name, tensor in state.items()}


def _check_archive(content: bytes) -> None:
    """Raise UserError unless the file is an archive of torch.save whose parts have their declared sizes."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise UserError("it is no file of torch.save, or one of torch before 1.6: save it again")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise UserError("it is packed, which torch.save does not do")


def save_state(file: Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a state dict atomically, with JSON values in the header; raises OSError."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with replacing(file) as stream:
        stream.write(save(tensors, {"ml2o_dist": json.dumps(about, sort_keys=True)}))


def about_state(file: Path) -> dict[str, Any]:
    """Return the JSON values that `save_state` wrote; {} if the file is missing or was not written by it."""
    try:
        about = read_texts(file, "weights file", STATE_LIMIT)
        value = parse_json(about.get("ml2o_dist", "{}"), "its header")
    except (FileNotFoundError, UserError):
        return {}
    return value if isinstance(value, dict) else {}
