"""A page as one self-contained HTML document; a script sorts its tables."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ml2o_dist.reporting.elements import missing, table, text
from ml2o_dist.reporting.run_record import Record
from ml2o_dist.reporting.style import STYLE

SCRIPT = """
for (const head of document.querySelectorAll('table.sortable th')) {
  const button = document.createElement('button');
  button.type = 'button';
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener('click', () => {
    const up = head.getAttribute('aria-sort') !== 'ascending';
    for (const other of head.parentNode.children) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const column = head.cellIndex, body = head.closest('table').tBodies[0];
    const value = (row) => row.cells[column].dataset.value;
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === '' || y === '') return (x === '') - (y === '');
      const numbers = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? numbers : -numbers;
    };
    body.append(...[...body.rows].sort(order));
  });
}
"""
"""Script that turns the heads of a sortable table into buttons. It sorts by the cells' data-value; "" is always last.
Without the script the page is complete, but its tables cannot be sorted."""


def policy(scripts: Iterable[str]) -> str:
    """Return the Content-Security-Policy: the page may load nothing, and run nothing but these scripts."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"


MOST_WARNINGS = 100
"""Number of warnings shown, the newest ones."""


@dataclass(frozen=True)
class Section:
    """A part of the page; if it has nothing to show, `missing` tells why."""

    name: str
    title: str
    body: str = ""
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
    """Return the whole document; `script` is one of the page's own."""
    scripts = [each for each in (SCRIPT, script) if each]
    links = "".join(f'<a href="#{s.name}">{text(s.title)}</a>' for s in sections)
    unread = "".join(f'<p class="alert">{text(line)}</p>' for line in head.unread)
    parts = "".join(
        f'<section id="{s.name}"><h2>{text(s.title)}</h2>{missing(s.missing)}{s.body}</section>' for s in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(scripts)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(head.name)}: {text(head.kind.lower())}</title><style>{STYLE}</style></head><body>"
        f'<header><p class="kind">{text(head.kind)}</p><h1>{text(head.name)}</h1><p>{text(head.state)}</p>'
        f"{unread}{_tiles(head.tiles)}<nav>{links}</nav></header><main>{parts}</main>"
        f"<footer>Made by ml2o report from {text(head.path)}</footer>"
        f"{''.join(f'<script>{each}</script>' for each in scripts)}</body></html>\n"
    )


def warnings_section(record: Record) -> Section:
    """Return the newest warnings of a log."""
    title, warnings = "Warnings", record.log.warnings
    if not warnings:
        return Section("warnings", title, missing=record.why_not("run.log", "None in run.log."))
    newest = warnings[-MOST_WARNINGS:]
    rows = [("", [each.time, each.level, each.message]) for each in newest]
    left_out = len(warnings) - len(newest)
    said = f"<p>The newest {len(newest)}; {left_out} older ones are in run.log.</p>" if left_out else ""
    return Section("warnings", title, said + table(title, ["time", "level", "message"], rows, "words tall"))


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _tiles(tiles: Iterable[tuple[str, str]]) -> str:
    shown = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in tiles)
    return f"<dl class=tiles>{shown}</dl>" if shown else ""
