"""Changing files as damage or an attacker would, and watching what is done while they are read."""

from __future__ import annotations

import copy
import os
import random
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ml2o_dist.artifact_sources import load_artifact

MEMORY = 2**30
"""Bytes that reading may take beside what the process has."""


class Watch:
    """Notes what must not happen while a file of a folder is read: an audit hook, which Python never takes away."""

    _RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class",
             "socket.connect", "urllib.Request")  # fmt: skip

    def __init__(self) -> None:
        self.folders: tuple[str, ...] = ()
        self.seen: list[str] = []
        self._thread = 0
        self._libraries = tuple({os.path.realpath(each) for each in (sys.prefix, sys.base_prefix)})
        self._package = os.path.realpath(Path(load_artifact.__code__.co_filename).parent)
        sys.addaudithook(self._hear)

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Watch the `with` block; raise AssertionError at its end for what was seen."""
        self.seen, self._thread = [], threading.get_ident()
        self.folders = (os.path.realpath(folder), self._package, *self._libraries)
        try:
            yield
        finally:
            self.folders = ()
        assert not self.seen

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folders or threading.get_ident() != self._thread:
            return
        folders, self.folders = self.folders, ()  # what this does itself is not watched
        try:
            if event in self._RUNS:
                self.seen.append(f"{event} {args}")
            elif event == "open" and isinstance(args[0], str | bytes):
                path = os.path.realpath(os.fsdecode(args[0]))
                if not any(path == each or path.startswith(f"{each}/") for each in folders):
                    self.seen.append(f"open {path}")
            elif event == "exec" and not args[0].co_filename.startswith((*self._libraries, self._package, "<")):
                self.seen.append(f"exec {args[0].co_filename}")
        except ValueError:
            pass  # a name that no file can have
        finally:
            self.folders = folders


WATCH = Watch()


@contextmanager
def little_memory() -> Iterator[None]:
    """Let the process have no more than `MEMORY` bytes beside those that it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


TEXTS = (
    "", "x" * 5000, "\0", "a\nb", "\x1b[31mred", "<script>alert(1)</script>", "../secret", "../../etc/passwd",
    "/etc/passwd", "/dev/zero", "[bold]", "'; DROP TABLE", "é", "\u202e", "nan", "1e400", "null", "models:/x@y",
    "~nobody/x", "s3://bucket/x", "__class__", "ml2o_dist.rules.ml2o:ML2OState", "builtins:eval", "uint8", "cuda:99",
    "module", "tensor",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 10**6, 2**31, 2**63, -(2**63), 10**30, 10**39, 0.5, -0.0, 1e-320, 1e308,
    float("inf"),
    float("nan"), [], {}, [[]], [{}], {"": None}, [1, 2, 3], ["a"], {"kind": "tuple", "items": []}, {"format": 1},
)  # fmt: skip


def changed_value(value: Any, draw: random.Random) -> Any:
    """Return a copy of a JSON value in which one place is another value, gone, doubled or nested."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        holder: dict[str, Any] = {"it": value}
        parent, key = draw.choice(list(_places(holder)))
        what = draw.randrange(8)
        if what == 0 and parent is not holder:
            del parent[key]
        elif what == 1:
            deep: Any = parent[key]
            for _ in range(draw.choice((1, 3, 70))):
                deep = draw.choice(([deep], {"a": deep}))
            parent[key] = deep
        elif what == 2 and isinstance(parent[key], list) and parent[key]:
            parent[key] = parent[key] * draw.choice((2, 3))
        elif what == 3 and isinstance(parent, dict):
            parent[draw.choice(TEXTS)] = parent[key]
        elif what == 4 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = draw.choice(
                (-parent[key], parent[key] * 10, parent[key] + 1, str(parent[key]), [parent[key]])
            )
        elif what == 5:
            parent[key] = draw.choice(TEXTS)
        else:
            parent[key] = copy.deepcopy(draw.choice(VALUES))
        value = holder["it"]
    return value


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    for key in holder if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key])


SNIPPETS = (b"\0", b"\xff\xff", b"[" * 500, b"9" * 500, b"{}", b"\n", b"*a", b"&a ", b"<<: *a", b"!!int ''")


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """Return bytes in which some are flipped, cut off, repeated, or put in."""
    made = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(made) + 1)
        what = draw.randrange(6)
        if what == 0:
            del made[at:]
        elif what == 1:
            made[at:at] = made[at : at + draw.choice((1, 8, 100))]
        elif what == 2:
            made[at:at] = draw.choice(
                (b"\0", b"\xff\xff", b"[" * 500, b"9" * 500, b"{}", b"\n", b"*a", b"&a ", b"!!int ''")
            )
        elif what == 3:
            del made[at : at + draw.choice((1, 2, 30))]
        elif at < len(made):
            made[at] = draw.choice((made[at] ^ 1 << draw.randrange(8), 0, 255, draw.randrange(256)))
    return bytes(made)


def changed_tensors(tensors: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    """Return tensors of which one is of another shape or type, not finite, gone, or new."""
    made = dict(tensors)
    name = draw.choice(sorted(made))
    what = draw.randrange(7)
    if what == 0:
        del made[name]
    elif what == 1:
        made[draw.choice(TEXTS) or "x"] = made[name].clone()
    elif what == 2:
        made[name] = torch.zeros(draw.choice([(), (0,), (1,), (3, 0, 5), (1, 2, 3, 4)]))
    elif what == 3:
        made[name] = made[name].to(draw.choice((torch.bool, torch.int8, torch.int64, torch.float16, torch.float64)))
    elif what == 4 and made[name].is_floating_point():
        made[name] = made[name] * draw.choice((float("nan"), float("inf"), 1e30))
    elif what == 5:
        made[name] = made[name].flatten()
    else:
        made[name] = made[name].unsqueeze(0)
    return made
