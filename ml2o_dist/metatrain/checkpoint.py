"""Checkpoints, written atomically: tensors in safetensors, the rest in JSON, a manifest with every file's sha256.

A checkpoint is written into a temporary folder, flushed to the disk, and renamed to `step_NNNNNN`. A reader uses the
newest one whose files match its manifest. A valid checkpoint is never replaced, only removed once newer ones exist, so
the newest valid one is always the new one or the one before. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import flush_folder, flush_to_disk
from ml2o_dist.runtime.reading import JSON_LIMIT, MIB, parse_json, read_bytes
from ml2o_dist.runtime.reading_tensors import parse_tensors

FORMAT = 2
MANIFEST, TENSORS, STATE = "manifest.json", "tensors.safetensors", "state.json"

LIMITS = {TENSORS: 16 * 1024 * MIB, STATE: JSON_LIMIT}
"""Most bytes of each file in a manifest. With Adam's moments an expert's has three times its network's size."""
_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """The saved state after `meta_step` updates."""

    meta_step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointError(Exception):
    """A checkpoint that must not be used; the message names the file and what is wrong with it."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step_NNNNNN` atomically and remove all but the newest `keep` valid ones; return its path.

    A valid checkpoint of the same step is kept: a resume from it leads to the same weights, and replacing it would
    leave a moment without either. A damaged one is replaced.

    Raises:
        OSError: the disk is full or read-only; earlier checkpoints are unharmed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step_{checkpoint.meta_step:06d}"
    for left_over in folder.glob("tmp_*"):  # left by a process that was killed while it wrote
        _remove(left_over)
    if not _is_whole(target):
        _write_folder(target, checkpoint)
    every = _paths(folder)
    ours = every.index(target)  # later ones were refused when the run resumed from an earlier one
    kept = [target, *islice(filter(_is_whole, every[ours + 1 :]), keep - 1)]
    for path in every:
        if path not in kept:
            _remove(path)
    return target


def _write_folder(target: Path, checkpoint: Checkpoint) -> None:
    folder = target.parent
    temporary, damaged = folder / f"tmp_{checkpoint.meta_step:06d}", folder / "tmp_damaged"
    temporary.mkdir()
    try:
        files = {
            TENSORS: save({name: t.contiguous() for name, t in checkpoint.tensors.items()}),
            STATE: _json({"meta_step": checkpoint.meta_step, **checkpoint.state}),
        }
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        files[MANIFEST] = _json({"format": FORMAT, "sha256": hashes})
        for name, content in files.items():
            _write(temporary / name, content)
        flush_folder(temporary)
        if target.exists():
            target.rename(damaged)
        temporary.rename(target)
        flush_folder(folder)
        _remove(damaged)
    except BaseException:
        _remove(temporary)
        raise


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder; raises CheckpointError, naming the file, unless every hash in it holds."""
    manifest = _parsed(path / MANIFEST, _read(path / MANIFEST, MIB))
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: format {manifest.get('format')!r}, this version reads {FORMAT}")
    hashes = manifest.get("sha256")
    if not isinstance(hashes, dict):
        raise CheckpointError(f"{path / MANIFEST}: lists no sha256")
    contents = {}
    for name, limit in LIMITS.items():
        if name not in hashes:
            raise CheckpointError(f"{path / MANIFEST}: names no {name}")
        contents[name] = _read(path / name, limit)
        if hashlib.sha256(contents[name]).hexdigest() != hashes[name]:
            raise CheckpointError(f"{path / name}: its sha256 differs from the manifest's; the file was cut or altered")
    try:
        tensors, _ = parse_tensors(contents[TENSORS], f"{path / TENSORS}:")
    except UserError as error:
        raise CheckpointError(str(error)) from error
    state = _parsed(path / STATE, contents[STATE])
    meta_step = state.pop("meta_step", None)
    if type(meta_step) is not int or not 0 <= meta_step < 10**15:
        raise CheckpointError(f"{path / STATE}: its meta_step is no count")
    return Checkpoint(meta_step, tensors, state)


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint (None: there is none) and why each newer one was refused."""
    refused: list[str] = []
    for path in _paths(folder):
        try:
            return load_checkpoint(path), refused
        except CheckpointError as error:
            refused.append(str(error))
    return None, refused


def newest_manifest(folder: Path) -> Path | None:
    """Return the path of the newest checkpoint's manifest without checking it; None: there is none."""
    return next((path / MANIFEST for path in _paths(folder) if (path / MANIFEST).is_file()), None)


def _paths(folder: Path) -> list[Path]:
    """Return all paths with the name of a checkpoint, newest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def _is_whole(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _remove(path: Path) -> None:
    """Remove a folder or file if possible; a later save removes what is left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    try:
        value = parse_json(content, f"{path}:")
    except UserError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _read(path: Path, limit: int) -> bytes:
    try:
        return read_bytes(path, "file", limit, within=path.parent)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except UserError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'file {str(path)!r} ')}") from error


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        flush_to_disk(file)
