"""A page as one self-contained HTML document; a script sorts its tables."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ml2o_dist.reporting import html_templates
from ml2o_dist.reporting.run_record import Record


def policy(scripts: Iterable[str]) -> str:
    """Return the Content-Security-Policy: the page may load nothing, and run nothing but these scripts."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"


EMPTY = Markup("")

MOST_WARNINGS = 100
"""Number of warnings shown, the newest ones."""


@dataclass(frozen=True)
class Section:
    """A part of the page; if it has nothing to show, `missing` tells why."""

    name: str
    title: str
    body: Markup = EMPTY
    missing: str = ""


@dataclass(frozen=True)
class PageHead:
    """The head of a page, above its sections.

    Attributes:
        kind: what the page shows, say "Meta-training run".  name: its name.  path: the folder it was read from.
        state: its state, in a sentence.
        tiles: (label, value) of the most important figures.
        unread: a line for each file that cannot be read.
    """

    kind: str
    name: str
    path: str
    state: str
    tiles: Sequence[tuple[str, str]] = ()
    unread: Sequence[str] = ()


def document(head: PageHead, sections: Sequence[Section], script: str = "") -> str:
    """Return the whole document; `script` names a further script of the page."""
    scripts = [html_templates.script(name) for name in ("sort_tables", script) if name]
    return html_templates.page(head=head, sections=sections, scripts=scripts, policy=policy(scripts))


def warnings_section(record: Record) -> Section:
    """Return the newest warnings of a log."""
    title, warnings, parts = "Warnings", record.log.warnings, html_templates.macros("parts")
    if not warnings:
        return Section("warnings", title, missing=record.why_not("run.log", "None in run.log."))
    newest = warnings[-MOST_WARNINGS:]
    rows = [("", [each.time, each.level, each.message]) for each in newest]
    left_out = len(warnings) - len(newest)
    said = f"The newest {len(newest)}; {left_out} older ones are in run.log."
    listed = parts.table(title, ["time", "level", "message"], rows, "words tall")
    return Section("warnings", title, parts.paragraphs([said] if left_out else []) + listed)


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
