"""HTML elements of a page. All text that comes from a run is escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml2o_dist.reporting.evaluation_figures import Shown, heading
from ml2o_dist.runtime import shown_text

LONGEST_LINE = 30
"""Characters of a name in a table that is not broken into lines."""


@dataclass(frozen=True)
class SortableRow:
    """A row of a sortable table: CSS classes, figures by column, and pictures before some figures, by column."""

    kind: str
    figures: Mapping[str, Shown]
    pictures: Mapping[str, str] = field(default_factory=dict)


def pairs(label: str, pairs: Iterable[tuple[str, Any]]) -> str:
    """Return a table of keys and values; a value that is not a string is shown as JSON."""
    rows = [
        ("", [key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]) for key, value in pairs
    ]
    return table(label, ["", ""], rows, "words")


def table(label: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """Return a table in a scrolling box; each row is (CSS classes, cells). All text is escaped."""
    head = "".join(f"<th scope=col>{text(name)}</th>" for name in columns) if any(columns) else ""
    body = "".join(
        f'<tr class="{kind_of_row}">{"".join(f"<td>{text(cell)}</td>" for cell in cells)}</tr>'
        for kind_of_row, cells in rows
    )
    box = f'<div class="scroll {kind}" role="region" tabindex="0" aria-label="{text(label)}">'
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f"{box}<table>{head}<tbody>{body}</tbody></table></div>"


def sortable_table(label: str, columns: Sequence[str], rows: Sequence[SortableRow]) -> str:
    """Return a table like that of `table` whose rows the page's script can sort by `Shown.value`."""
    head = "".join(f"<th scope=col>{_heading(name)}</th>" for name in columns)
    body = "".join(
        f'<tr class="{row.kind}">{"".join(_sortable_cell(row, name) for name in columns)}</tr>' for row in rows
    )
    box = f'<div class="scroll" role="region" tabindex="0" aria-label="{text(label)}">'
    return f'{box}<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _sortable_cell(row: SortableRow, name: str) -> str:
    shown = row.figures[name]
    long = ' class="long"' if len(shown.text) > LONGEST_LINE else ""
    return f'<td data-value="{text(_sort_key(shown))}"{long}>{row.pictures.get(name, "")}{text(shown.text)}</td>'


def _heading(name: str) -> str:
    first, last = heading(name)
    return " ".join(filter(None, (text(first).replace(" ", "&nbsp;"), text(last))))


def _sort_key(cell: Shown) -> str:
    if isinstance(cell.value, str):
        return cell.value
    return "" if math.isnan(cell.value) else repr(float(cell.value)).replace("inf", "Infinity")


def figure(caption_html: str, svg: str, kind: str = "") -> str:
    """Return a picture under its caption; the caption is HTML and is not escaped."""
    return f'<figure class="{kind}"><figcaption>{caption_html}</figcaption>{svg}</figure>'


def bar(share: float, colour: str) -> str:
    """Return a bar in a colour of the style sheet, as an <svg> element; `share` is its part of the full length."""
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{100 * share:.1f}" height="10" fill="var(--{colour})"/></svg>'
    )


def key(colour: str, what: str, line: int = 0) -> str:
    """Return an entry of a legend: a line in a colour of the style sheet, solid (0), dashed (1) or dotted (2)."""
    return f'<span class="key line-{line}" style="--key: var(--{colour})">{text(what)}</span>'


def missing(why: str) -> str:
    """Return the line that explains why something is missing; "" without a reason."""
    return f'<p class="missing">{text(why)}</p>' if why else ""


text = shown_text.html
"""Escapes text that comes from a run."""
