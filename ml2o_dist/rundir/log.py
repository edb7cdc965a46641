"""Reads a run's log for its warnings and for how the run last ended."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from ml2o_dist.runtime.reading import MIB, read_bytes

FORM = "%(asctime)s %(levelname)s %(name)s: %(message)s"
BEGUN = "this process begins the run, or goes on with it"
"""The first line that each process writes to the log; earlier lines are from other processes."""
COMPARISON_FAILED = "the comparison failed"

LOG_LIMIT = 256 * MIB
"""Most bytes of a log: enough for a line each second for a month."""
MOST_WARNINGS = 1000
"""How many warnings are shown: the newest ones."""

_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\S* ([A-Z]+) \S+: (.*)")
_END = re.compile(rf"stopped by \w+|aborted|{COMPARISON_FAILED}.*")


@dataclass(frozen=True)
class Warned:
    """One line of a run's log."""

    time: str
    level: str
    message: str


@dataclass(frozen=True)
class RunLog:
    """The useful part of a log.

    Attributes:
        warnings: lines at WARNING or above, from all processes, the newest last.
        ended: how the last process ended, if it said so: "stopped by SIGINT", "aborted", "the comparison failed: ...".
    """

    warnings: tuple[Warned, ...] = ()
    ended: str = ""


def read_log(file: Path) -> RunLog:
    """Read a log in the format of `written_to` in directory.py.

    Raises:
        FileNotFoundError: there is none.  UserError: it is no regular file, too large, or a link out of its folder.
    """
    warnings: deque[Warned] = deque(maxlen=MOST_WARNINGS)
    ended = ""
    for line in read_bytes(file, "log", LOG_LIMIT, file.parent).decode(errors="replace").splitlines():
        match = _LINE.fullmatch(line)
        if match is None:  # a line of a traceback
            continue
        warned = Warned(*match.groups())
        if warned.level in ("WARNING", "ERROR", "CRITICAL"):
            warnings.append(warned)
        if warned.message == BEGUN:
            ended = ""
        elif end := _END.match(warned.message):
            ended = end.group()
    return RunLog(tuple(warnings), ended)
