"""The records that a run sends to MLflow, and their form as lines of text in which a torn line is detected."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""The range of values that MLflow's databases can store."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Point:
    """One value of one metric. MLflow stores equal points once, so that one sent twice by mistake does no harm."""

    key: str
    value: float
    step: Int64
    timestamp_ms: Int64


@dataclass(frozen=True)
class Params:
    """Settings of a run; MLflow never changes an existing one."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Tags:
    """Tags of a run, which may be set again."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Upload:
    """A file for the run's artifacts, into `folder` ("": the top)."""

    path: Path
    folder: Annotated[str, Field(pattern=r"^([\w-]+(/[\w-]+)*)?$")]


@dataclass(frozen=True)
class Version:
    """The learned optimizer in folder `path`, to be registered as a version of `model`."""

    path: Path
    model: str
    description: str


@dataclass(frozen=True)
class End:
    """How the run ended, and when. It has no effect if more records follow, since the run was then resumed."""

    status: Status
    timestamp_ms: Int64


Words = Params | Tags | Upload | Version | End
Record = Point | Words

_OBJECT = TypeAdapter(dict[str, Any])

_KINDS: dict[str, TypeAdapter[Any]] = {
    kind.__name__.lower(): TypeAdapter(kind) for kind in (Point, Params, Tags, Upload, Version, End)
}


def to_line(record: Record) -> bytes:
    """Return `record` as a line: the crc32 of the rest, the record as JSON, a newline."""
    assert is_dataclass(record)
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    text = json.dumps({"kind": type(record).__name__.lower(), **values}, default=str, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def from_line(line: bytes) -> Record | None:
    """Return the record in `line`; None if the line is not as `to_line` wrote it: cut short, altered or forged."""
    checksum, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text[:-1]):
        return None
    try:
        values = _OBJECT.validate_json(text)  # bounds nesting and digits, in a tenth of `reading.parse_json`'s time
        kind = _KINDS.get(str(values.pop("kind", "")))
        if kind is None:  # written by a newer version, or not by this package
            return None
        record: Record = kind.validate_python(values)
    except ValueError:  # bad JSON, or a value of the wrong type
        return None
    return record
