"""State dicts as files: anybody's are read, nothing but tensors is unpickled, and what is none is one line."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ml2o_dist.paretoset.states import about_state, read_state, save_state
from ml2o_dist.runtime.errors import UserError

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}


class Runs:
    """What runs code where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.place / 'touched'}",)


def packed(place: Path) -> bytes:
    """Return the archive of a state dict whose parts are compressed: zeros become a thousandth."""
    torch.save({"a": torch.zeros(10_000_000)}, place / "plain.pt")
    made = io.BytesIO()
    with zipfile.ZipFile(place / "plain.pt") as archive, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as other:
        for part in archive.infolist():
            other.writestr(part.filename, archive.read(part))
    return made.getvalue()


def saved(value: Any, **settings: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **settings)
    return stream.getvalue()


@pytest.mark.parametrize("value", [STATE, {"state_dict": STATE}, {"epoch": 3, "state_dict": STATE}])
def test_a_state_dict_of_torch_is_read(value: Any, tmp_path: Path) -> None:
    (tmp_path / "it.pt").write_bytes(saved(value))
    found = read_state(tmp_path / "it.pt")
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "code": (lambda place: saved({"a": Runs(place)}), "cannot be read"),
    "a plain pickle": (lambda place: pickle.dumps({"a": Runs(place)}), "torch.save"),
    "of an old torch": (
        lambda place: saved(STATE, _use_new_zipfile_serialization=False),
        "torch before 1.6",
    ),
    "packed": (packed, "packed"),
    "cut": (lambda place: saved(STATE)[:-100], "cannot be read"),
    "empty": (lambda place: b"", "cannot be read"),
    "a list": (lambda place: saved([1, 2]), "holds no state dict"),
    "numbers as names": (lambda place: saved({1: torch.ones(1)}), "holds no state dict"),
    "texts": (lambda place: saved({"a": "b"}), "holds no state dict"),
    "a sparse tensor": (lambda place: saved({"a": torch.eye(3).to_sparse()}), "plain tensor"),
    "a meta tensor": (lambda place: saved({"a": torch.empty(10**12, device="meta")}), "plain tensor"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_state_dict_is_one_line_and_runs_nothing(kind: str, tmp_path: Path) -> None:
    make, why = HOSTILE[kind]
    (tmp_path / "it.pt").write_bytes(make(tmp_path))
    with pytest.raises(UserError, match=why) as caught:
        read_state(tmp_path / "it.pt")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["it.pt", "it.safetensors"])
def test_what_is_no_regular_file_does_not_hang(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is not a regular file"):
        read_state(tmp_path / name)
    assert about_state(tmp_path / name) == {}


def test_what_stands_beside_a_state_is_read_without_its_tensors(tmp_path: Path) -> None:
    save_state(tmp_path / "it.safetensors", STATE, {"stage": {"a": 1}})
    with (tmp_path / "it.safetensors").open("r+b") as stream:
        stream.truncate((tmp_path / "it.safetensors").stat().st_size - 8)
    assert about_state(tmp_path / "it.safetensors") == {"stage": {"a": 1}}
    with pytest.raises(UserError, match="is not a safetensors file"):
        read_state(tmp_path / "it.safetensors")
    for text in ("[1]", "{", "[" * 100_000):
        save_file(STATE, tmp_path / "it.safetensors", {"ml2o_dist": text})
        assert about_state(tmp_path / "it.safetensors") == {}
