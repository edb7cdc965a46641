"""Reading what is not trusted: a regular file of bounded size, JSON and YAML of bounded size and depth.

Every file that the package reads may come from somebody else, or may be damaged. What cannot be read ends in one
`UserError` line that names the file; only a file that is missing raises FileNotFoundError, for callers to say what
that means. Nothing is unpickled here, and nothing is executed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ml2o_dist.errors import UserError

MIB = 2**20

JSON_LIMIT = 64 * MIB
"""Bytes of a JSON file: more than any that the package writes, some ten times."""

YAML_LIMIT = MIB // 4
"""Bytes of a YAML file. PyYAML reads some 100 kB a second."""

DEPTH = 64
"""How deep mappings and lists may be nested."""

YAML_NODES = 50_000
"""Values in a YAML document once its aliases are expanded."""

DIGITS = 40
"""Digits of an integer: beyond every count, seed and time in nanoseconds."""


def read_bytes(file: Path, what: str, limit: int, within: Path | None = None) -> bytes:
    """Return the contents of a regular file of at most `limit` bytes.

    Args:
        what: what the file is to the reader, for the message: "weights file", "card".
        within: a folder that the file must lie in once all links are followed.

    Raises:
        FileNotFoundError: it is missing.
        UserError: it is no regular file, is too large, lies outside `within`, or cannot be read.
    """
    shown = f"{what} {str(file)!r}"
    try:
        # A FIFO without a writer would block, and a device never ends.
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the name
        raise _unreadable(shown, error) from error
    try:
        with open(handle, "rb") as stream:
            about = os.fstat(stream.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise UserError(f"{shown} is not a regular file")
            if within is not None and not lies_within(file, within):
                raise UserError(f"{shown} is a link out of {str(within)!r}")
            if about.st_size > limit:
                raise _too_large(shown, limit)
            content = stream.read(limit + 1)
    except OSError as error:
        raise _unreadable(shown, error) from error
    if len(content) > limit:  # it grew meanwhile
        raise _too_large(shown, limit)
    return content


def lies_within(file: Path, folder: Path) -> bool:
    """Tell whether `file` lies in `folder` once all links are followed."""
    return file.resolve().is_relative_to(folder.resolve())


def read_json(file: Path, what: str, limit: int = JSON_LIMIT, within: Path | None = None) -> Any:
    """Return the value in a JSON file; raises as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(file, what, limit, within), f"{what} {str(file)!r}")


def read_json_object(file: Path, what: str, limit: int = JSON_LIMIT, within: Path | None = None) -> dict[str, Any]:
    """Return the object in a JSON file; raises as `read_json`, and UserError where it holds something else."""
    value = read_json(file, what, limit, within)
    if not isinstance(value, dict):
        raise UserError(f"{what} {str(file)!r} must hold a JSON object, not {type(value).__name__}")
    return value


def parse_json(text: bytes | str, shown: str, limit: int = JSON_LIMIT) -> Any:
    """Return the value of a JSON text.

    Args:
        shown: what the text is, for the message: "card '/runs/x/weights.json'".

    Raises:
        UserError: it is too long, no JSON or no UTF-8, nested deeper than `DEPTH`, or has an integer of more than
            `DIGITS` digits or half a character.
    """
    if len(text) > limit:
        raise _too_large(shown, limit)
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise UserError(f"{shown} is nested deeper than {DEPTH} levels") from None
    except ValueError as error:
        raise UserError(f"{shown} is not JSON: {_one_line(error)}") from error
    _check(value, shown)
    return value


def read_yaml(file: Path, what: str, within: Path | None = None) -> Any:
    """Return the value in a YAML file; raises as `read_bytes` and `parse_yaml`."""
    content = read_bytes(file, what, YAML_LIMIT, within)
    shown = f"{what} {str(file)!r}"
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown} is not UTF-8 text") from error
    return parse_yaml(text, shown)


def parse_yaml(text: str, shown: str) -> Any:
    """Return the value of a YAML text: plain values, lists and mappings, no objects.

    Raises:
        UserError: it is too long, no YAML, nested deeper than `DEPTH`, has a key twice, or becomes more than
            `YAML_NODES` values by its aliases.
    """
    if len(text) > YAML_LIMIT:
        raise _too_large(shown, YAML_LIMIT)
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded_nodes(node, shown, {}, 1)
        value = loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{shown} is nested deeper than {DEPTH} levels") from None
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # the last three: of dates and numbers
        raise UserError(f"{shown} is not YAML: {_one_line(error)}") from error
    finally:
        loader.dispose()
    _check(value, shown)
    return value


def _expanded_nodes(node: yaml.Node, shown: str, known: dict[int, int], depth: int) -> int:
    """Return how many values a node stands for with its aliases expanded, each node visited once; raise UserError."""
    if depth > DEPTH:
        raise UserError(f"{shown} is nested deeper than {DEPTH} levels")
    if id(node) in known:
        if not known[id(node)]:
            raise UserError(f"{shown} has an alias for what contains it")
        return known[id(node)]
    known[id(node)] = 0
    count = 1
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise UserError(f"{shown} has the key {key.value!r} twice")
            if isinstance(key, yaml.ScalarNode):
                names.add(key.value)
        parts = [part for pair in node.value for part in pair]
    else:
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
    for part in parts:
        count += _expanded_nodes(part, shown, known, depth + 1)
        if count > YAML_NODES:
            raise UserError(f"{shown} holds more than {YAML_NODES} values")
    known[id(node)] = count
    return count


def _check(value: Any, shown: str) -> None:
    """Raise UserError for nesting, integers and strings that would fail where the value is used or written."""
    level: list[Any] = [value]
    for _ in range(DEPTH + 1):
        if not level:
            return
        level = [part for each in level for part in _parts(each, shown)]
    raise UserError(f"{shown} is nested deeper than {DEPTH} levels")


def _parts(value: Any, shown: str) -> Iterator[Any]:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{shown} has half a character (a lone surrogate)") from error
    elif isinstance(value, int) and abs(value) >= 10**DIGITS:
        raise UserError(f"{shown} has an integer of more than {DIGITS} digits")
    elif isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value


def _integer(digits: str) -> int:
    if len(digits) > DIGITS + 1:  # one for a sign
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _too_large(shown: str, limit: int) -> UserError:
    size = f"{limit / MIB:g} MiB" if limit >= MIB else f"{limit / 1024:g} KiB"
    return UserError(f"{shown} is larger than {size}")


def _unreadable(shown: str, error: Exception) -> UserError:
    return UserError(f"{shown} cannot be read: {(error.strerror if isinstance(error, OSError) else '') or error}")
