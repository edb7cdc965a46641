"""The parts that a page is put together from; whatever comes from a run is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any


def pairs(label: str, pairs: Iterable[tuple[str, Any]]) -> str:
    """Return a table of keys and their values, as JSON where they are no text."""
    rows = [
        ("", [key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]) for key, value in pairs
    ]
    return table(label, ["", ""], rows, "words")


def table(label: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """Return a table in a box of its own that scrolls; each row comes with its CSS classes. Everything is escaped."""
    head = "".join(f"<th scope=col>{text(name)}</th>" for name in columns) if any(columns) else ""
    body = "".join(
        f'<tr class="{kind_of_row}">{"".join(f"<td>{text(cell)}</td>" for cell in cells)}</tr>'
        for kind_of_row, cells in rows
    )
    box = f'<div class="scroll {kind}" role="region" tabindex="0" aria-label="{text(label)}">'
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f"{box}<table>{head}<tbody>{body}</tbody></table></div>"


def figure(caption_html: str, svg: str, kind: str = "") -> str:
    """Return a picture under its caption, which is HTML already."""
    return f'<figure class="{kind}"><figcaption>{caption_html}</figcaption>{svg}</figure>'


def key(colour: str, what: str, line: int = 0) -> str:
    """Return an entry of a legend: a line of a colour of the style sheet, solid, dashed (1) or dotted (2)."""
    return f'<span class="key line-{line}" style="--key: var(--{colour})">{text(what)}</span>'


def missing(why: str) -> str:
    """Return the line that stands in place of what is not there."""
    return f'<p class="missing">{text(why)}</p>' if why else ""


def text(value: str) -> str:
    """Return `value` as HTML that shows it."""
    return html.escape(value)
