"""The one error a user can mend, and how it names the nearest valid word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong words, a wrong setting or missing input: one clear line, exit code 2, no traceback."""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """Build the error for `name`, which is not among the `allowed` names of a `kind` of thing.

    The line names the kind, the value, the nearest valid name and what is allowed.
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {name!r}{hint} (allowed: {', '.join(names) or 'none'})")
