"""Reading tensors that are not trusted: headers that lie, kinds that are not read, and files that are cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.reading_tensors import check_floats, parse_tensors, read_tensors
from tests.wording import says

GOOD = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False]), "c": torch.zeros(0, 4)}


def forged(header: Any, content: bytes = b"") -> bytes:
    """Return a file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(save(GOOD, {"about": "me"}))
    tensors, about = read_tensors(tmp_path / "it", "weights file", 2**20)
    assert about == {"about": "me"}
    assert tensors.keys() == GOOD.keys()
    for name, tensor in GOOD.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


HOSTILE = {
    "nothing": (b"", "its header is not whole"),
    "seven bytes": (b"\0" * 7, "its header is not whole"),
    "a header of 2^63 bytes": (b"\xff" * 7 + b"\x7f" + b"{}", "its header is not whole"),
    "a header beyond the end": ((100).to_bytes(8, "little") + b"{}", "its header is not whole"),
    "no JSON": (forged(b"{'a': 1}"), "is not JSON"),
    "not UTF-8": (forged(b'{"\xff": 1}'), "is not JSON"),
    "a list": (forged([1]), "header ... no JSON object"),
    "deep": (forged(b"[" * 100_000), "nested ... 64 levels"),
    "texts that are numbers": (forged({"__metadata__": {"a": 1}}), "header's texts"),
    "texts that are a list": (forged({"__metadata__": ["a"]}), "header's texts"),
    "no entry": (forged({"a": 1}), "tensor 'a' ... no dtype, shape and data_offsets"),
    "no dtype": (forged(entry(dtype=None), bytes(8)), "tensor 'a' ... no dtype, shape and data_offsets"),
    "a dtype that is a list": (forged(entry(dtype=["F32"]), bytes(8)), "no dtype, shape and data_offsets"),
    "an unknown dtype": (forged(entry(dtype="F33"), bytes(8)), "is of F33 (allowed: BOOL, U8"),
    "8-bit floats": (forged(entry(dtype="F8_E4M3", shape=[8]), bytes(8)), "is of F8_E4M3 (allowed: BOOL, U8"),
    "a text as shape": (forged(entry(shape="2"), bytes(8)), "no dtype, shape and data_offsets"),
    "a fraction as shape": (forged(entry(shape=[2.0]), bytes(8)), "no dtype, shape and data_offsets"),
    "a negative shape": (forged(entry(shape=[-2]), bytes(8)), "no dtype, shape and data_offsets"),
    "a truth value as shape": (forged(entry(shape=[True, 2]), bytes(8)), "no dtype, shape and data_offsets"),
    "a huge shape": (forged(entry(shape=[10**12]), bytes(8)), "but 8 bytes"),
    "a shape that wraps around": (forged(entry(shape=[2**32, 2**32, 2]), bytes(8)), "but 8 bytes"),
    "an empty tensor of huge dimensions": (forged(entry(shape=[0, 2**30, 2**30], offsets=[0, 0])), "but 0 bytes"),
    "many dimensions": (forged(entry(shape=[1] * 99, offsets=[0, 4]), bytes(4)), "but 4 bytes"),
    "one offset": (forged(entry(offsets=[8]), bytes(8)), "no dtype, shape and data_offsets"),
    "offsets the wrong way": (forged(entry(offsets=[8, 0]), bytes(8)), "but -8 bytes"),
    "offsets beyond the end": (forged(entry(offsets=[8, 16]), bytes(8)), "is not a safetensors file"),
    "a name with an escape": (forged({"\x1b[31m": 1}), "tensor '\\\\x1b[31m' ... no dtype"),
    "cut": (save(GOOD)[:-4], "is not a safetensors file"),
    "with something behind": (save(GOOD) + b"x", "is not a safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_ends_in_one_line(kind: str) -> None:
    content, why = HOSTILE[kind]
    with pytest.raises(UserError) as caught:
        parse_tensors(content, "weights file 'x'")
    line = str(caught.value)
    assert line.startswith("weights file 'x'")
    assert says(line, why)
    assert line.isprintable()


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.ones(2, dtype=torch.int64), "a is of int64.*float32 or float64"),
        (torch.ones(2, dtype=torch.bool), "a is of bool; weights"),
        (torch.ones(2, dtype=torch.float16), "a is of float16; weights"),
        (torch.tensor([1.0, float("nan")]), "a .*not finite"),
        (torch.tensor([1.0, -float("inf")], dtype=torch.float64), "a .*not finite"),
    ],
)
def test_weights_are_finite_floats(tensor: torch.Tensor, why: str) -> None:
    check_floats({"b": torch.ones(2), "c": torch.ones(0, dtype=torch.float64)}, "it")
    with pytest.raises(UserError, match=why):
        check_floats({"b": torch.ones(2), "a": tensor}, "it")
