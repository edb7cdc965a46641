"""The lines of `trials.jsonl`: the kinds of line and their checks, since the file may come from anybody."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ml2o_dist.config_file import current_key
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.reading import MIB, parse_json

LINE_LIMIT = MIB // 4
"""Maximum bytes of a line. Lines that we write have some hundred."""

MOST_STEPS = 10**12
"""Upper bound on meta-steps and trial numbers, above any real run or sweep."""

State = Literal["running", "finished", "stopped", "failed"]
"""`stopped`: the scheduler stopped the trial before its last meta-step."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Beginning:
    """A trial runs (again), with these values of the search space by key."""

    number: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """A trial's report at one validation.

    Attributes:
        values: values of the search space by key at that time (population-based training changes them).
        validation: score of the weights at `meta_step`; `best_validation` is that of the best weights, which are kept
            and come from `best_meta_step`.
        seconds: time of meta-training so far.
    """

    meta_step: int
    validation: float
    best_validation: float
    best_meta_step: int
    seconds: float
    values: Mapping[str, Any]
    meta_loss: float | None = None


@dataclass(frozen=True)
class Copy:
    """A trial resumes from the checkpoint of trial `source` at meta-step `at`, with other values."""

    source: str
    at: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class End:
    """A trial has ended."""

    state: State
    error: str


Entry = Beginning | Report | Copy | End


def line_of(trial: str, entry: Entry) -> bytes:
    """Return the line of the file that records `entry` for a trial."""
    return json.dumps({"trial": trial, **asdict(entry)}).encode() + b"\n"


def entry_of(line: bytes) -> tuple[str, Entry]:
    """Return the trial and the entry of a line; raises UserError if the line has none of our formats.

    The message does not name the file.
    """
    found = parse_json(line, "it", LINE_LIMIT)
    if not isinstance(found, dict):
        raise UserError(f"it is not a JSON object but {type(found).__name__}")
    kind = next((kind for kind, key in _KEYS if key in found), End)
    keys = {"trial", *kind.__dataclass_fields__}
    given = {"meta_loss": None, **found} if kind is Report else found
    if wrong := sorted(given.keys() ^ keys):
        what = "has no" if wrong[0] in keys else "has an unknown key"
        raise UserError(f"it {what} {wrong[0][:40]!r}")
    for key, value in given.items():
        allowed, check = _CHECKS[key]
        if not check(value):
            shown = json.dumps(value)
            raise UserError(f"{key} must be {allowed}, not {shown if len(shown) <= 40 else shown[:37] + '...'}")
    if "values" in given:
        given = given | {"values": {current_key(key, warn=False): value for key, value in given["values"].items()}}
    trial: str = given.pop("trial")
    entry: Entry = kind(**given)
    return trial, entry


_KEYS: tuple[tuple[type[Any], str], ...] = ((Beginning, "number"), (Copy, "source"), (Report, "meta_step"))
"""The key that only this kind has, looked for in this order; the fourth kind has none of them."""


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_STEPS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_values(value: Any) -> bool:
    """Tell whether every value is plain JSON: infinities and NaN are neither JSON nor values of a space."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return isinstance(value, dict)


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "trial": ("letters, digits, - and _, at most 64", _is_id),
    "source": ("letters, digits, - and _, at most 64", _is_id),
    "number": ("a whole number from 1", lambda value: _is_count(value) and value > 0),
    "meta_step": ("a whole number from 0", _is_count),
    "at": ("a whole number from 0", _is_count),
    "best_meta_step": ("a whole number from -1", lambda value: value == -1 or _is_count(value)),
    "validation": ("a number", _is_number),
    "best_validation": ("a number", _is_number),
    "meta_loss": ("a number or null", lambda value: value is None or _is_number(value)),
    "seconds": ("a finite number from 0", lambda value: _is_number(value) and math.isfinite(value) and value >= 0),
    "values": ("an object of finite values", _is_values),
    "state": (" | ".join(get_args(State)), lambda value: value in get_args(State)),
    "error": ("text", lambda value: isinstance(value, str)),
}
