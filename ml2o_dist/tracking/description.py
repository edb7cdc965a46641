"""The description of a registered version: lines that training wrote first, then a line for each suite."""

from __future__ import annotations

from collections.abc import Collection

LIMIT = 5000
"""Maximum characters of a description in MLflow; with more, PostgreSQL refuses the whole version (MLflow 3.17)."""

CUT = "[the rest is cut off]"


def within_limit(text: str, kept: Collection[str] = ()) -> str:
    """Return `text`, shortened from its end until MLflow can store it; the lines in `kept` are not cut."""
    if len(text) <= LIMIT:
        return text
    lines = [line for line in text.splitlines() if line != CUT]
    loose = [i for i, line in enumerate(lines) if line not in kept]
    end = len(lines)
    while loose and (excess := len("\n".join([*lines, CUT])) - LIMIT) > 0:
        end = loose.pop()
        shortened = lines[end][:-excess]
        lines[end : end + 1] = [shortened] if shortened else []
        end += bool(shortened)
    lines.insert(end, CUT)
    return "\n".join(lines)[:LIMIT]


def with_suite_line(text: str, suite: str, line: str, suites: Collection[str]) -> str:
    """Return the description `text` with `suite: line` in place of that suite's line, or appended.

    Args:
        suites: other suites that have lines in `text`; these lines are not cut when the text is too long.
    """
    said = f"{suite}: {line}"
    lines = text.splitlines()
    before = [i for i, each in enumerate(lines) if each.startswith(f"{suite}: ")]
    if before:
        lines[before[0]] = said
        lines = [each for i, each in enumerate(lines) if i not in before[1:]]
    else:
        lines.append(said)
    kept = [each for each in lines if any(each.startswith(f"{name}: ") for name in (*suites, suite))]
    return within_limit("\n".join(lines), kept)
