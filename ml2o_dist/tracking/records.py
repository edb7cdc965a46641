"""What a run tells MLflow, one record at a time, and each record as one line of text that shows when it was torn."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Point:
    """One value of one metric. MLflow stores equal points once, so that one sent twice by mistake does no harm."""

    key: str
    value: float
    step: int
    timestamp_ms: int


@dataclass(frozen=True)
class Params:
    """Settings of a run; MLflow never changes one that is there."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Tags:
    """Tags of a run, which may be set again."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Upload:
    """A file for the run's artifacts, into `folder` ("": the top)."""

    path: Path
    folder: str


@dataclass(frozen=True)
class Version:
    """The learned optimizer in folder `path`, to be registered as a version of `model`."""

    path: Path
    model: str
    description: str


@dataclass(frozen=True)
class End:
    """How the run ended, and when. Of no effect where more records follow: the run was gone on with."""

    status: Status
    timestamp_ms: int


Words = Params | Tags | Upload | Version | End
Record = Point | Words

_KINDS: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in (Point, Params, Tags, Upload, Version, End)}


def to_line(record: Record) -> bytes:
    """Return `record` as a line: the crc32 of what follows, the record as JSON, a newline."""
    assert is_dataclass(record)
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    text = json.dumps({"kind": type(record).__name__.lower(), **values}, default=str, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def from_line(line: bytes) -> Record | None:
    """Return the record in `line`; None where the line is not as `to_line` wrote it: cut short, or altered."""
    checksum, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text[:-1]):
        return None
    values = json.loads(text)
    kind = _KINDS.get(values.pop("kind"))
    if kind is None:  # written by a newer version
        return None
    if "path" in values:
        values["path"] = Path(values["path"])
    record: Record = kind(**values)
    return record
