"""Checkpoints are whole or refused by the name of the file that is wrong."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch

from ml2o_dist.metatrain.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from tests.crossed import crossed
from tests.metatrain.faulty_disk import HOWS, FaultyDisk, Killed


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


def test_a_whole_step_is_left_alone_and_a_damaged_one_replaced(tmp_path):
    path = save_checkpoint(tmp_path, some(), keep=3)
    other = Checkpoint(4, {"theta": torch.zeros(1)}, {})
    save_checkpoint(tmp_path, other, keep=3)
    assert torch.equal(load_checkpoint(path).tensors["theta"], some().tensors["theta"])
    (path / "state.json").write_text("{}")
    save_checkpoint(tmp_path, other, keep=3)
    assert list(load_checkpoint(path).tensors) == ["theta"]
    assert [p.name for p in tmp_path.iterdir()] == ["step_000004"]


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(tmp_path):
    save_checkpoint(tmp_path, some(3), keep=2)
    damaged = save_checkpoint(tmp_path, some(4), keep=2)
    (damaged / "manifest.json").unlink()
    save_checkpoint(tmp_path, some(6), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000003", "step_000006"]


FILES = ("tensors.safetensors", "state.json", "manifest.json")


def refused_for(folder, *blamed):
    """Assert that step 4 is refused in one line by the name of one of the files, and that step 3 is used."""
    found, refused = newest_checkpoint(folder)
    assert found.meta_step == 3
    (line,) = refused
    assert any(f"{folder}/step_000004/{name}: " in line for name in blamed), line
    return line


@pytest.fixture
def two(tmp_path):
    """A folder with steps 3 and 4."""
    save_checkpoint(tmp_path, some(3), keep=3)
    save_checkpoint(tmp_path, some(4), keep=3)
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_a_folder_is_refused_by_name(two, name):
    file = two / "step_000004" / name
    file.unlink()
    assert "No such file" in refused_for(two, name)
    file.mkdir()
    assert "is not a regular file" in refused_for(two, name)
    assert load_checkpoint(save_checkpoint(two, some(4), keep=3)).meta_step == 4


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_by_name_wherever_it_was_cut(two, name):
    file = two / "step_000004" / name
    content = file.read_bytes()
    for length in {0, 1, 8, len(content) // 2, len(content) - 1}:
        file.write_bytes(content[:length])
        refused_for(two, name)
    file.write_bytes(content + b"\0")
    refused_for(two, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.long)])
def test_any_bit_that_flipped_is_refused_by_name(two, name, bits):
    """One bit of every byte, or each: of the manifest too, which has no hash of its own."""
    file = two / "step_000004" / name
    content = file.read_bytes()
    blamed = FILES if name == "manifest.json" else (name,)
    for position in range(len(content)):
        for bit in range(8) if bits == 8 else (position % 8,):
            file.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
            found, (line,) = newest_checkpoint(two)
            assert found.meta_step == 3, (position, bit)
            named = any(f"step_000004/{each}: " in line for each in blamed)
            assert named or (name == "manifest.json" and "step_000004/" in line), line  # a name in it, flipped
    file.write_bytes(content)
    assert newest_checkpoint(two)[0].meta_step == 4


def test_a_file_in_the_place_of_the_folder_is_refused_and_replaced(tmp_path):
    save_checkpoint(tmp_path, some(3), keep=3)
    (tmp_path / "step_000004").write_text("")
    assert "Not a directory" in refused_for(tmp_path, "manifest.json")
    save_checkpoint(tmp_path, some(4), keep=3)
    assert newest_checkpoint(tmp_path)[0].meta_step == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000003", "step_000004"]


def test_a_newer_format_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, some(), keep=3)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 3}))
    with pytest.raises(CheckpointError, match=r"manifest\.json.*format 3.* 2"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content", ['{"format": 1}', '{"format": 1, "sha256": []}', "[]", '{"format": 1, "sha256": {}}']
)
def test_a_manifest_that_lists_nothing_is_refused(two, content):
    (two / "step_000004" / "manifest.json").write_text(content)
    refused_for(two, "manifest.json")


SITUATIONS = ("new", "damaged", "left over", "again")


def situation(folder, kind):
    """Steps 1 to 3, 2 soon one too many; perhaps a damaged or a whole step 4, or what a dead process left."""
    for step in (1, 2, 3):
        save_checkpoint(folder, some(step), keep=2)
    if kind == "damaged":
        (save_checkpoint(folder, some(4), keep=3) / "state.json").write_text("{}")
    elif kind == "again":
        save_checkpoint(folder, some(4), keep=3)
    elif kind == "left over":
        (folder / "tmp_000004").mkdir()
        (folder / "tmp_000004" / "state.json").write_text("{")


@crossed("kind, how", SITUATIONS, HOWS)
def test_a_save_struck_at_any_file_operation_leaves_the_new_checkpoint_or_the_one_before(tmp_path, kind, how):
    """A counting pass finds the operations, then each one in turn is struck in a folder of its own."""
    situation(tmp_path / "calm", kind)
    with FaultyDisk().active() as disk:
        save_checkpoint(tmp_path / "calm", some(4), keep=2)
    written = set() if kind == "again" else {"open wb", "write", "fsync", "rename"}
    assert written | {"mkdir", "unlink", "rmdir"} <= set(disk.done)
    outcomes = set()
    for at in range(len(disk.done)):
        folder = tmp_path / str(at)
        situation(folder, kind)
        raised = None
        with FaultyDisk(at, how).active():
            try:
                save_checkpoint(folder, some(4), keep=2)
            except (OSError, Killed) as error:
                raised = error
        found, refused = newest_checkpoint(folder)
        assert found.meta_step in (3, 4), (at, disk.done[at])
        assert torch.equal(found.tensors["theta"], some(found.meta_step).tensors["theta"])
        assert kind == "damaged" or not refused
        assert found.meta_step == 4 or raised is not None, "a save that did not raise did not save either"
        outcomes.add(found.meta_step)

        save_checkpoint(folder, some(5), keep=2)
        assert newest_checkpoint(folder)[0].meta_step == 5
        assert [p.name for p in sorted(folder.iterdir())] == [f"step_{found.meta_step:06d}", "step_000005"]
    assert outcomes == ({4} if kind == "again" else {3, 4})


def test_nothing_there(tmp_path):
    assert newest_checkpoint(tmp_path / "absent") == (None, [])


def forge(path, tensors=None, state=None, hashes=None):
    """Write other content into a checkpoint, with a manifest that agrees."""
    if tensors is not None:
        (path / "tensors.safetensors").write_bytes(tensors)
    if state is not None:
        (path / "state.json").write_bytes(state)
    found = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES[:2]}
    (path / "manifest.json").write_text(json.dumps({"format": 2, "sha256": found | (hashes or {})}))


@pytest.mark.parametrize(
    ("content", "blamed", "why"),
    [
        ({"state": b"[]"}, "state.json", "not a JSON object"),
        ({"state": b"[" * 100_000}, "state.json", "64 levels"),
        ({"state": b"{}"}, "state.json", "its meta_step is no count"),
        ({"state": b'{"meta_step": "4"}'}, "state.json", "its meta_step is no count"),
        ({"state": b'{"meta_step": -1}'}, "state.json", "its meta_step is no count"),
        ({"state": b'{"meta_step": true}'}, "state.json", "its meta_step is no count"),
        ({"state": b'{"meta_step": 4, "x": ' + b"9" * 5000 + b"}"}, "state.json", "an integer of 5000 digits"),
        ({"tensors": b"\xff" * 8 + b"{}"}, "tensors.safetensors", "its header is not whole"),
        ({"tensors": b"\x02" + bytes(7) + b"[]"}, "tensors.safetensors", "no JSON object"),
    ],
    ids=range(9),
)
def test_a_forged_checkpoint_is_refused_by_what_is_wrong(two, content, blamed, why):
    forge(two / "step_000004", **content)
    assert why in refused_for(two, blamed)


def test_a_manifest_names_no_file_of_elsewhere(two):
    """What it lists besides is not opened: a FIFO would hang, and another folder's file is nobody's business."""
    os.mkfifo(two / "fifo")
    forge(two / "step_000004", hashes={"../fifo": "0", "/dev/zero": "0"})
    assert newest_checkpoint(two)[0].meta_step == 4


def test_a_link_out_of_a_checkpoint_and_a_fifo_in_it_are_refused(two):
    for name in FILES:
        file = two / "step_000004" / name
        content = file.read_bytes()
        file.rename(two / name)
        file.symlink_to(two / name)
        assert "is a link out of" in refused_for(two, name)
        file.unlink()
        os.mkfifo(file)
        assert "is not a regular file" in refused_for(two, name)
        file.unlink()
        file.write_bytes(content)
    assert newest_checkpoint(two)[0].meta_step == 4
