"""The errors that end a command: one that the user can correct, and a run that was stopped or cut short."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

LONGEST_NAME = 200
"""Characters of a wrong name that are shown."""


class UserError(ValueError):
    """A wrong argument, a wrong setting or missing input: one clear line, exit code 2, no traceback."""


class MissingData(UserError):
    """Image data that is not there."""


class Aborted(Exception):
    """A run could not go on; its state is in a checkpoint. Exit code 4."""


class Refused(Exception):
    """A gate refused something; the message says why. Exit code 5."""


class Incomplete(Exception):
    """A run finished, but a part of it failed; `answer` is the value it would have returned. Exit code 3."""

    def __init__(self, message: str, answer: dict[str, Any]) -> None:
        super().__init__(message)
        self.answer = answer


class Interrupted(Exception):
    """A signal asked a run to stop; its state is in a checkpoint. Exit code 128 + signal."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def unknown(kind: str, name: str, allowed: Iterable[str], *, extensible: bool = False) -> UserError:
    """Build the error for `name`, which is not among the `allowed` names of a `kind` of thing.

    The line names the kind, the value, the nearest valid name and what is allowed; for an `extensible` kind it also
    says how a plug-in is named.
    """
    names = sorted(allowed)
    listed = f"(allowed: {', '.join(names) or 'none'})" + ("; a plug-in's needs --plugin FILE.py" if extensible else "")
    if len(name) > LONGEST_NAME:  # no name is near, and the search takes a time that grows as the square of the length
        return UserError(f"unknown {kind} {f'{name[:LONGEST_NAME]}...'!r} {listed}")
    group = name[: name.rfind(".") + 1]
    if not all(each.startswith(group) for each in names):
        group = ""  # the dotted names do not share it, so it is part of what may be misspelt
    own, others = name.removeprefix(group), [each.removeprefix(group) for each in names]
    near = [match for text in (own, own.lower()) for match in difflib.get_close_matches(text, others, n=1, cutoff=0.5)]
    hint = f"; did you mean {group + near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {name!r}{hint} {listed}")
