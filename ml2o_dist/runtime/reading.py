"""Reads files that are not trusted: regular files of bounded size, JSON and YAML of bounded size and depth.

Every file that the package reads may come from somebody else, or may be damaged. A file that cannot be read raises a
`UserError` whose one line names it. Only a missing file raises FileNotFoundError, so that callers can say what that
means. Nothing is unpickled here, and nothing is executed. `reading_tensors` reads tensors, `reading_tables` tables.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from ml2o_dist.runtime.errors import UserError

Value = TypeVar("Value")

MIB = 2**20

JSON_LIMIT = 64 * MIB
"""Most bytes of a JSON file: some ten times as many as in any that the package writes."""

JSON_VALUES = 4_000_000
"""Most values in a JSON text: an empty list of three bytes becomes an object of sixty."""

YAML_LIMIT = MIB // 4
"""Most bytes of a YAML file. PyYAML reads some 100 kB a second."""

DEPTH = 64
"""How deep mappings and lists may be nested."""

YAML_NODES = 50_000
"""Most values in a YAML document once its aliases are expanded."""

DIGITS = 40
"""Most digits of an integer: more than any count, seed or time in nanoseconds has."""

_LONGEST_NUMBER = 1000
"""Most characters of a number in YAML: parsing `1:59:59:...` (base 60) takes a time that grows as their square."""


def read_bytes(file: Path, what: str, limit: int, within: Path | None = None, *, first: int | None = None) -> bytes:
    """Return the contents of a regular file of at most `limit` bytes.

    Args:
        what: what the file is to the reader, for the message: "weights file", "card".
        within: a folder that the file must lie in once all links are followed.
        first: return only so many bytes from its beginning; None: all.

    Raises:
        FileNotFoundError: it is missing.
        UserError: it is no regular file, is too large, lies outside `within`, or cannot be read.
    """
    shown = f"{what} {str(file)!r}"
    try:
        # Check before opening: opening a device may have an effect, and opening a FIFO would wait for a writer.
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise UserError(f"{shown} is not a regular file")
        if within is not None and not lies_within(file, within):
            raise UserError(f"{shown} is a link out of {str(within)!r}")
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with open(handle, "rb") as stream:
            about = os.fstat(handle)
            if not stat.S_ISREG(about.st_mode):  # the file was replaced meanwhile
                raise UserError(f"{shown} is not a regular file")
            if about.st_size > limit:
                raise _too_large(shown, limit)
            wanted = limit if first is None else min(first, limit)
            content = stream.read(min(about.st_size + 1, wanted))  # no more: Python allocates that many bytes first
            while len(content) < wanted and (more := stream.read(min(MIB, wanted - len(content)))):
                content += more  # the file grew meanwhile, or has no size, as in /proc
            if first is None and len(content) == limit and stream.read(1):
                raise _too_large(shown, limit)
    except FileNotFoundError:
        raise
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the name
        raise _unreadable(shown, error) from error
    return content


def lies_within(file: Path, folder: Path) -> bool:
    """Tell whether `file` lies in `folder` once all links are followed; False for broken links."""
    try:
        return file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # circular links, or a name that no file can have
        return False


def check_own_file(file: Path) -> None:
    """Raise UserError if `file`, to which we want to append, is a link, a FIFO or anything else than a file."""
    try:
        kind = file.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(kind):
        raise UserError(f"{file} cannot be written: it is a link, or no regular file")


def read_json(
    file: Path, what: str, limit: int = JSON_LIMIT, within: Path | None = None, *, finite: bool = False
) -> Any:
    """Return the value in a JSON file; raises what `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(file, what, limit, within), f"{what} {str(file)!r}", limit, finite=finite)


def read_json_object(
    file: Path, what: str, limit: int = JSON_LIMIT, within: Path | None = None, *, finite: bool = False
) -> dict[str, Any]:
    """Return the object in a JSON file; raises what `read_json` does, and UserError if it holds another value."""
    value = read_json(file, what, limit, within, finite=finite)
    if not isinstance(value, dict):
        raise UserError(f"{what} {str(file)!r} must hold a JSON object, not {type(value).__name__}")
    return value


def parse_json(text: bytes | str, shown: str, limit: int = JSON_LIMIT, *, finite: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        shown: what the text is, for the message: "card '/runs/x/weights.json'".
        finite: whether to refuse NaN and infinities, also numbers that are too large for a float.

    Raises:
        UserError: the text is too long, no JSON or no UTF-8, nested deeper than `DEPTH`, has a key twice, more than
            `JSON_VALUES` values, an integer of more than `DIGITS` digits or a lone surrogate.
    """
    if len(text) > limit:
        raise _too_large(shown, limit)
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if text.count(",") + text.count("[") + text.count("{") > JSON_VALUES:
            raise UserError(f"{shown} holds more than {JSON_VALUES} values")
        value = json.loads(text, parse_int=_integer, object_pairs_hook=_object)
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{shown} is nested deeper than {DEPTH} levels") from None
    except ValueError as error:
        raise UserError(f"{shown} is not JSON: {one_line(error)}") from error
    _check(value, shown, finite)
    return value


def validated(kind: TypeAdapter[Value], value: Any, shown: str) -> Value:
    """Return `value` validated as `kind`; raise UserError, which names the first wrong place."""
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        why = one_line(f"{place}: {first['msg']}" if place else first["msg"])
        raise UserError(f"{shown} cannot be used: {why}") from error


def read_yaml(file: Path, what: str, within: Path | None = None) -> Any:
    """Return the value in a YAML file; raises what `read_bytes` and `parse_yaml` do."""
    content = read_bytes(file, what, YAML_LIMIT, within)
    shown = f"{what} {str(file)!r}"
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown} is not UTF-8 text") from error
    return parse_yaml(text, shown)


def parse_yaml(text: str, shown: str) -> Any:
    """Return the value of a YAML text: null, truth values, numbers, texts, lists, and mappings with texts as keys.

    Each use of an alias gives a separate copy of its value.

    Raises:
        UserError: the text is too long, no YAML, nested deeper than `DEPTH`, has a key twice, expands to more than
            `YAML_NODES` values by its aliases, or holds another kind of value, such as a date.
    """
    if len(text) > YAML_LIMIT:
        raise _too_large(shown, YAML_LIMIT)
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded_nodes(node, shown, {}, 1)
        value = loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{shown} is nested deeper than {DEPTH} levels") from None
    except UserError:
        raise
    # PyYAML raises the last ones for invalid dates and numbers, and for tags on values of the wrong kind.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, LookupError, AttributeError) as error:
        raise UserError(f"{shown} is not YAML: {one_line(error)}") from error
    finally:
        if loader is not None:
            loader.dispose()
    _check(value, shown)
    return _plain(value, shown)


class _Loader(yaml.SafeLoader):
    """Stops at `DEPTH`, since PyYAML takes a time that grows as the square of the number of open brackets."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level > DEPTH:
            raise RecursionError
        super().fetch_flow_collection_start(TokenClass)


def _expanded_nodes(node: yaml.Node, shown: str, known: dict[int, int], depth: int) -> int:
    """Count the values of a node with its aliases expanded, visiting each node once; raise UserError over the limit."""
    if depth > DEPTH:
        raise UserError(f"{shown} is nested deeper than {DEPTH} levels")
    if id(node) in known:
        if not known[id(node)]:
            raise UserError(f"{shown} has an alias for what contains it")
        return known[id(node)]
    known[id(node)] = 0
    count = 1
    number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    if isinstance(node, yaml.ScalarNode) and number and len(node.value) > _LONGEST_NUMBER:
        raise UserError(f"{shown} has a number of {len(node.value)} characters")
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise UserError(f"{shown} has the key {key.value[:100]!r} twice")
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


def _check(value: Any, shown: str, finite: bool = False) -> None:
    """Raise UserError for nesting, numbers and strings that would fail later when the value is used or written."""
    level: list[Any] = [value]
    for _ in range(DEPTH + 1):
        if not level:
            return
        level = [part for each in level for part in _parts(each, shown, finite)]
    raise UserError(f"{shown} is nested deeper than {DEPTH} levels")


def _parts(value: Any, shown: str, finite: bool) -> Iterator[Any]:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{shown} has half a character (a lone surrogate)") from error
    elif isinstance(value, int) and abs(value) >= 10**DIGITS:
        raise UserError(f"{shown} has an integer of more than {DIGITS} digits")
    elif finite and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{shown} has a number that is not finite")
    elif isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value


def _plain(value: Any, shown: str) -> Any:
    """Return a copy in which nothing is shared, so that a change to one alias's value does not change the others."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_plain(each, shown) for each in value]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                kind = type(key).__name__
                raise UserError(f"{shown} has the key {one_line(repr(key))}, a {kind}: write it in quotes, as a text")
        return {key: _plain(each, shown) for key, each in value.items()}
    raise UserError(f"{shown} has a {type(value).__name__} in it; where it is meant as a text, write it in quotes")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; refuse a duplicate key, for which two readers might use different values."""
    whole = dict(pairs)
    if len(whole) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"it has the key {twice[:100]!r} twice")
    return whole


def _integer(digits: str) -> int:
    if len(digits) > DIGITS + 1:  # the 1 is for a sign
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def one_line(words: object) -> str:
    """Return at most 300 characters of an error's message, or of other text, as one line without control characters."""
    line = " ".join(str(words).split())[:300]
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in line
    )


def _too_large(shown: str, limit: int) -> UserError:
    size = f"{limit / MIB:g} MiB" if limit >= MIB else f"{limit / 1024:g} KiB" if limit >= 1024 else f"{limit} bytes"
    return UserError(f"{shown} is larger than {size}")


def _unreadable(shown: str, error: Exception) -> UserError:
    return UserError(f"{shown} cannot be read: {(error.strerror if isinstance(error, OSError) else '') or error}")
