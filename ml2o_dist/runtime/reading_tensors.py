"""Reads safetensors files that are not trusted: the header is checked before any tensor is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.reading import MIB, one_line, parse_json, read_bytes

HEADER_LIMIT = 16 * MIB
"""Most bytes of a header, which names each tensor: room for some hundred thousand tensors."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""The dtypes that are read. None of our files has floats of 8 bits or fewer."""

_LARGEST = 2**40
"""Limit for a tensor's elements (a dimension of 0 counts as 1) and for every offset."""

_MOST_DIMENSIONS = 16


def read_tensors(
    file: Path, what: str, limit: int, within: Path | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors in a safetensors file by name, on the CPU, and the texts in its header.

    Raises:
        FileNotFoundError: it is missing.
        UserError: as in `read_bytes` and `parse_tensors`.
    """
    return parse_tensors(read_bytes(file, what, limit, within), f"{what} {str(file)!r}")


def read_texts(file: Path, what: str, limit: int) -> dict[str, str]:
    """Return the texts in a safetensors file's header, without its tensors; raises what `read_tensors` does."""
    shown = f"{what} {str(file)!r}"
    length = int.from_bytes(read_bytes(file, what, limit, first=8), "little")
    if length > HEADER_LIMIT:
        raise UserError(f"{shown} is not a safetensors file: its header is not whole")
    return _texts(_header(read_bytes(file, what, limit, first=8 + length), shown), shown)


def parse_tensors(content: bytes, shown: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors in a safetensors file's content by name, on the CPU, and the texts in its header.

    Args:
        shown: what the content belongs to, for the message: "weights file '/runs/x/weights.safetensors'".

    Raises:
        UserError: the content is no safetensors file, is cut, or its header has sizes that do not match the data, or
            dtypes that are not read.
    """
    header = _header(content, shown)
    about = _texts(header, shown)
    for name, entry in header.items():
        _check_entry(name, entry, shown)
    try:
        return load(content), about
    except SafetensorError as error:
        raise UserError(f"{shown} is not a safetensors file: {one_line(error)}") from error


def check_floats(tensors: Mapping[str, Tensor], shown: str) -> None:
    """Raise UserError unless every tensor holds finite floats of 32 or 64 bits."""
    for name, tensor in tensors.items():
        if tensor.dtype.itemsize < 4 or not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{shown}: {one_line(name)} is of {kind}; weights are float32 or float64")
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{shown}: {one_line(name)} has values that are not finite (NaN or infinite)")


def _header(content: bytes, shown: str) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise UserError(f"{shown} is not a safetensors file, or it is cut: its header is not whole")
    header = parse_json(content[8 : 8 + length], f"{shown}, header,", HEADER_LIMIT)
    if not isinstance(header, dict):
        raise UserError(f"{shown} is not a safetensors file: its header is no JSON object")
    return header


def _texts(header: dict[str, Any], shown: str) -> dict[str, str]:
    """Remove the texts from a header and return them."""
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise UserError(f"{shown} is not a safetensors file: its header's texts are no texts")
    return about


def _check_entry(name: str, entry: Any, shown: str) -> None:
    """Raise UserError unless `entry` describes a tensor whose byte count matches its shape and dtype."""
    shown = f"{shown.removesuffix(':')}: tensor {one_line(name)!r}"
    about = entry if isinstance(entry, dict) else {}
    kind, shape, ends = about.get("dtype"), about.get("shape"), about.get("data_offsets")
    if not (isinstance(kind, str) and _whole(shape) and _whole(ends) and len(ends) == 2):
        raise UserError(f"{shown} has no dtype, shape and data_offsets in the header")
    if kind not in _BITS:
        raise UserError(f"{shown} is of {one_line(kind)} (allowed: {', '.join(_BITS)})")
    too_large = len(shape) > _MOST_DIMENSIONS or math.prod(max(1, size) for size in shape) > _LARGEST
    if too_large or math.prod(shape) * _BITS[kind] != 8 * (ends[1] - ends[0]):
        raise UserError(f"{shown} has the shape {one_line(shape)}, but {ends[1] - ends[0]} bytes")


def _whole(numbers: Any) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(
        isinstance(each, int) and not isinstance(each, bool) and 0 <= each <= _LARGEST for each in numbers
    )
