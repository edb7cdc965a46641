"""Reading what is not trusted: each hostile or damaged file ends in one line that names it, soon, in little memory."""

from __future__ import annotations

import os
import socket
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from ml2o_dist.runtime.errors import UserError, unknown
from ml2o_dist.runtime.reading import (
    DEPTH,
    YAML_NODES,
    lies_within,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_json_object,
    read_yaml,
)
from tests.wording import says

LIMIT = 1000


def refused(read: Callable[[], object]) -> str:
    """Return the line that reading ends with; it must be one, and come within two seconds."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        read()
    assert time.monotonic() - began < 2
    line = str(caught.value)
    assert all(each.isprintable() for each in line)
    assert len(line) < 1000
    return line


def fifo(place: Path) -> Path:
    os.mkfifo(place / "it")
    return place / "it"


def listening(place: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(place)  # a socket's name is short
        server.bind("it")
        os.chdir(here)
    return place / "it"


def circle(place: Path) -> Path:
    (place / "it").symlink_to(place / "it")
    return place / "it"


def large(place: Path) -> Path:
    with (place / "it").open("wb") as stream:
        stream.truncate(2**40)  # takes no room on the disk
    return place / "it"


def below_a_file(place: Path) -> Path:
    (place / "file").touch()
    return place / "file" / "it"


NO_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "fifo": (fifo, "regular file"),
    "folder": (lambda place: place, "regular file"),
    "socket": (listening, "regular file"),
    "zeros": (lambda place: Path("/dev/zero"), "regular file"),
    "terminal": (lambda place: Path("/dev/tty"), "regular file"),
    "circle": (circle, "cannot be read ... Too many levels of symbolic links"),
    "below a file": (below_a_file, "cannot be read ... Not a directory"),
    "nul": (lambda place: place / "a\0b", "cannot be read ... null byte"),
    "surrogate": (lambda place: place / "a\ud800b", "cannot be read"),
    "300 characters": (lambda place: place / ("a" * 300), "cannot be read ... File name too long"),
    "1 TiB": (large, "is larger than 1000 bytes"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_named_and_nothing_hangs(kind: str, tmp_path: Path) -> None:
    make, why = NO_FILES[kind]
    file = make(tmp_path)
    for read in (read_bytes, read_json, read_json_object):
        line = refused(partial(read, file, "card", LIMIT))
        assert line.startswith(f"card {str(file)!r} ")
        assert says(line, why)


def test_a_file_without_a_size_is_cut_at_the_limit() -> None:
    """The files in /proc say that they have no bytes."""
    assert Path("/proc/kallsyms").stat().st_size == 0
    line = refused(lambda: read_bytes(Path("/proc/kallsyms"), "card", LIMIT))
    assert says(line, "card '/proc/kallsyms'", "larger than 1000 bytes")


def test_what_is_missing_is_left_to_the_caller(tmp_path: Path) -> None:
    for missing in (tmp_path / "none", tmp_path / "none" / "none"):
        with pytest.raises(FileNotFoundError):
            read_bytes(missing, "card", LIMIT)


def test_a_file_of_the_limit_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b"x" * LIMIT)
    assert read_bytes(tmp_path / "it", "card", LIMIT) == b"x" * LIMIT
    (tmp_path / "it").write_bytes(b"x" * (LIMIT + 1))
    assert refused(lambda: read_bytes(tmp_path / "it", "card", LIMIT)).endswith("is larger than 1000 bytes")


def test_links_lead_out_of_no_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (inside / "own").write_text("own")
    (inside / "near").symlink_to("own")
    (inside / "far").symlink_to(outside / "secret")
    (inside / "folder").symlink_to(outside)
    (tmp_path / "way").symlink_to(inside)
    for name in ("own", "near"):
        assert read_bytes(inside / name, "card", LIMIT, within=inside) == b"own"
        assert read_bytes(tmp_path / "way" / name, "card", LIMIT, within=tmp_path / "way") == b"own"
        assert lies_within(inside / name, inside)
    for file in (inside / "far", inside / "folder" / "secret", inside / ".." / "outside" / "secret"):
        line = refused(partial(read_bytes, file, "card", LIMIT, within=inside))
        assert says(line, f"card {str(file)!r}", "link", repr(str(inside)))
    assert not lies_within(circle(tmp_path), tmp_path)
    assert not lies_within(tmp_path / "a\0b", tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"a": [1, -2.5, null, true, "\\u00e9"]}', {"a": [1, -2.5, None, True, "é"]}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        ("9" * 40, 10**40 - 1),
        ("-" + "9" * 40, 1 - 10**40),
        ("[" * DEPTH + "]" * DEPTH, None),
        ("-Infinity", float("-inf")),
        ("1e400", float("inf")),
    ],
)
def test_json_that_is_whole_is_read(text: bytes | str, value: Any) -> None:
    assert value is None or parse_json(text, "it") == value
    parse_json(text, "it")


HOSTILE_JSON: dict[str, tuple[bytes | str, str]] = {
    "empty": (b"", "is not JSON"),
    "torn": (b'{"a": [1, 2', "is not JSON"),
    "two": (b"{} {}", "is not JSON"),
    "not UTF-8": (b'{"a": "\xff\xfe"}', "is not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not JSON"),
    "nul": (b"\0" * 20, "is not JSON"),
    "65 lists": ("[" * (DEPTH + 1) + "1" + "]" * (DEPTH + 1), f"nested ... {DEPTH} levels"),
    "endless lists": ("[" * 500_000, f"nested ... {DEPTH} levels"),
    "endless objects": ('{"a":' * 500_000, f"nested ... {DEPTH} levels"),
    "41 digits": ("9" * 41, "40 digits"),
    "a million digits": ("1" * 1_000_000, "is not JSON ... 1000000 digits"),
    "half a character": ('{"a": "\\ud800"}', "half a character"),
    "half a character in a key": ('{"\\udfff": 1}', "half a character"),
    "half a character in bytes": (b'"\xed\xa0\x80"', "is not JSON"),
    "a key twice": ('{"a": 1, "b": 2, "a": 3}', "is not JSON ... 'a' twice"),
    "20 million lists": ("[" + "[]," * 20_000_000 + "[]]", "4000000 values"),
    "large": (" " * 70_000_000, "is larger than 64 MiB"),
}


@pytest.mark.parametrize("kind", HOSTILE_JSON)
def test_hostile_json_ends_in_one_line(kind: str) -> None:
    text, why = HOSTILE_JSON[kind]
    line = refused(lambda: parse_json(text, "card 'x'"))
    assert line.startswith("card 'x' ")
    assert says(line, why)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1e400", "[-1e999]"])
def test_numbers_that_are_not_finite_are_refused_where_they_are_asked_to_be(text: str, tmp_path: Path) -> None:
    parse_json(text, "it")
    assert refused(lambda: parse_json(text, "it", finite=True)).endswith("not finite")
    (tmp_path / "it").write_text(text)
    assert refused(lambda: read_json(tmp_path / "it", "card", finite=True)).endswith("that is not finite")


def test_an_object_is_an_object(tmp_path: Path) -> None:
    (tmp_path / "it").write_text("[1]")
    assert refused(lambda: read_json_object(tmp_path / "it", "card")).endswith("JSON object, not list")


def aliases(levels: int, width: int, form: str) -> str:
    """Return a text in which each level holds the one before it `width` times."""
    lines = ["a0: &a0 {k0: 1, k1: 1, k2: 1}"]
    for level in range(1, levels):
        parts = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} {form.format(parts)}")
    return "\n".join(lines)


HOSTILE_YAML = {
    "torn": ("a: [1", "is not YAML"),
    "nul": ("a: \0", "is not YAML"),
    "escape": ("a: \x1b[31m", "is not YAML"),
    "half a character": ("a: \ud800", "is not YAML"),
    "half a character, escaped": ('a: "\\ud800"', "half a character"),
    "two documents": ("a: 1\n---\na: 2", "is not YAML"),
    "a thousand million": (aliases(10, 9, "[{}]"), f"{YAML_NODES} values"),
    "a thousand million merged": (aliases(10, 9, "{{<<: [{}]}}"), f"{YAML_NODES} values"),
    "what holds itself": ("a: &a [*a]", "alias"),
    "what merges itself": ("a: &a {<<: *a, b: 1}", "alias"),
    "deep lists": ("[" * 5000, f"nested ... {DEPTH} levels"),
    "deep lists that end": ("[" * 70 + "]" * 70, f"nested ... {DEPTH} levels"),
    "deep mappings": ("{a: " * 5000, f"nested ... {DEPTH} levels"),
    "deep by aliases": (aliases(80, 1, "[{}]"), f"nested ... {DEPTH} levels"),
    "a key twice": ("a: 1\nb: 2\na: 3", "key 'a' twice"),
    "a key twice, in quotes": ("a: 1\n'a': 3", "key 'a' twice"),
    "41 digits": ("a: " + "9" * 41, "40 digits"),
    "digits": ("a: " + "9" * 5000, "a number of 5000 characters"),
    "hexadecimal": ("a: 0x" + "f" * 200_000, "a number of 200002 characters"),
    "to the base 60": ("a: 1" + ":59" * 60_000, "a number of 180001 characters"),
    "to the base 60, with a point": ("a: 1" + ":59" * 60_000 + ".0", "a number of 180003 characters"),
    "no such day": ("a: 2001-02-30", "is not YAML ... day is out of range"),
    "no such hour": ("a: 2001-01-01 99:00:00", "is not YAML ... hour must be in"),
    "a day": ("a: 2001-02-03", "date ... in quotes"),
    "bytes": ("a: !!binary aGFsbG8=", "has a bytes in it"),
    "a set": ("a: !!set {b, c}", "has a set in it"),
    "pairs": ("a: !!pairs [b: 1]", "has a tuple in it"),
    "a number as key": ("1: a", "key 1, ... int ... in quotes"),
    "a truth value as key": ("a: {on: 1}", "key True, ... bool ... in quotes"),
    "a list as key": ("? [a]\n: b", "is not YAML"),
    "an integer of nothing": ("a: !!int ''", "is not YAML"),
    "a float of nothing": ("a: !!float ''", "is not YAML"),
    "no truth value": ("a: !!bool maybe", "is not YAML"),
    "no time": ("a: !!timestamp soon", "is not YAML"),
    "no integer": ("a: 0b_", "is not YAML"),
    "an object": ("a: !!python/object/apply:os.system ['touch /tmp/touched']", "is not YAML"),
    "a name": ("a: !!python/name:os.system ''", "is not YAML"),
    "a module": ("a: !!python/module:antigravity ''", "is not YAML"),
    "a tag of one's own": ("a: !mine {b: 1}", "is not YAML"),
    "large": ("a: " + "x" * 300_000, "is larger than 256 KiB"),
}


@pytest.mark.parametrize("kind", HOSTILE_YAML)
def test_hostile_yaml_ends_in_one_line(kind: str) -> None:
    text, why = HOSTILE_YAML[kind]
    line = refused(lambda: parse_yaml(text, "config file 'x'"))
    assert line.startswith("config file 'x' ")
    assert says(line, why)


@pytest.mark.parametrize("kind", ["a thousand million", "a thousand million merged", "deep by aliases"])
def test_a_bomb_takes_little_memory(kind: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            parse_yaml(HOSTILE_YAML[kind][0], "it")
        with pytest.raises(UserError):
            parse_json(HOSTILE_JSON["20 million lists"][0], "it")
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_yaml_that_is_whole_is_read_as_pyyaml_reads_it(tmp_path: Path) -> None:
    text = "a: &x {b: [1, 2.5, null, true, 'é', 1e-3, .inf], c: 0x10}\nd: {<<: *x, e: *x}\n"
    (tmp_path / "it").write_text(text)
    value = read_yaml(tmp_path / "it", "config file")
    assert value == yaml.safe_load(text)
    value["a"]["c"] = 17
    assert value["d"]["c"] == value["d"]["e"]["c"] == 16, "an alias is a value of its own"
    assert value["d"]["b"] is not value["a"]["b"]
    assert parse_yaml("", "it") is None


def test_a_yaml_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b"a: \xff")
    assert refused(lambda: read_yaml(tmp_path / "it", "config file")).endswith("is not UTF-8 text")
    os.mkfifo(tmp_path / "fifo")
    assert refused(lambda: read_yaml(tmp_path / "fifo", "config file")).endswith("regular file")


def test_a_long_wrong_name_is_answered_soon() -> None:
    began = time.monotonic()
    line = str(unknown("setting", "ab" * 100_000, ["ab" * 20, "c"]))
    assert time.monotonic() - began < 1
    assert len(line) < 400
