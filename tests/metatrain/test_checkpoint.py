"""Checkpoints are whole or refused by the name of the file that is wrong."""

from __future__ import annotations

import json

import pytest
import torch

from ml2o_dist.metatrain import checkpoint as module
from ml2o_dist.metatrain.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)


def some(step=4):
    tensors = {"theta": torch.arange(6.0) + step, "best/head.bias": torch.tensor([1.0, step])}
    return Checkpoint(step, tensors, {"config": {"seed": 1}, "progress": {"history": [{"meta_step": 0.0}]}})


def test_round_trip(tmp_path):
    path = save_checkpoint(tmp_path, some(), keep=3)
    assert path.name == "step_000004"
    back = load_checkpoint(path)
    assert back.meta_step == 4
    assert back.state == some().state
    assert all(torch.equal(back.tensors[name], t) for name, t in some().tensors.items())


def test_the_newest_is_taken_and_only_so_many_are_kept(tmp_path):
    for step in (1, 2, 9, 10):
        save_checkpoint(tmp_path, some(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000009", "step_000010"]
    assert newest_checkpoint(tmp_path)[0].meta_step == 10


def test_a_refused_later_checkpoint_is_cleared_and_never_costs_the_new_one(tmp_path):
    save_checkpoint(tmp_path, some(1), keep=1)
    damaged = save_checkpoint(tmp_path, some(100), keep=1)
    (damaged / "state.json").write_text("{}")
    saved = save_checkpoint(tmp_path, some(95), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000095"]
    assert load_checkpoint(saved).meta_step == 95


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, some(), keep=3)
    changed = Checkpoint(4, {"theta": torch.zeros(1)}, {})
    save_checkpoint(tmp_path, changed, keep=3)
    assert list(load_checkpoint(tmp_path / "step_000004").tensors) == ["theta"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_a_damaged_file_is_refused_by_name_and_the_one_before_is_used(tmp_path, name, harm):
    save_checkpoint(tmp_path, some(3), keep=3)
    file = save_checkpoint(tmp_path, some(4), keep=3) / name
    content = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    elif harm == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    found, refused = newest_checkpoint(tmp_path)
    assert found.meta_step == 3
    assert len(refused) == 1
    blamed = {"manifest.json", "state.json", "tensors.safetensors"} if name == "manifest.json" else {name}
    assert any(f"step_000004/{each}" in refused[0] for each in blamed)


def test_a_newer_format_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, some(), keep=3)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: format 2, this version reads 1"):
        load_checkpoint(path)


@pytest.mark.parametrize("failing", ["_write", "flush_folder"])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_failure_while_saving_leaves_no_step_folder_that_would_be_taken(tmp_path, monkeypatch, failing, call):
    save_checkpoint(tmp_path, some(3), keep=3)
    calls = []
    real = getattr(module, failing)

    def fail(*args):
        calls.append(args)
        if len(calls) == call + 1:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(module, failing, fail)
    if failing == "flush_folder" and call == 2:
        save_checkpoint(tmp_path, some(4), keep=3)
        assert len(calls) == 2
        return
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, some(4), keep=3)
    found, refused = newest_checkpoint(tmp_path)
    assert found.meta_step in (3, 4)
    assert not refused
    assert not list(tmp_path.glob("tmp_*"))


def test_nothing_there(tmp_path):
    assert newest_checkpoint(tmp_path / "absent") == (None, [])
