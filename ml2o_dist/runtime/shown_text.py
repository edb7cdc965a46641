"""Text that others wrote, made safe for where it is shown: a terminal, an HTML page, a Markdown table.

Names, tags, titles, paths and messages come from files, servers and command lines that are not trusted. Their content
is shown literally: it moves no cursor, reverses no text, opens no link and becomes no markup.
"""

from __future__ import annotations

import html as html_escapes
import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories: control and format characters (ESC, bidi overrides), lone surrogates, line separators."""


_MARKS = re.compile(r"[\\`*{}\[\]#!|~]|(?<!\w)_|_(?!\w)")
"""The characters that are markup in Markdown; a `_` within a word is not."""


def visible(text: str, *, lines: bool = False) -> str:
    r"""Return `text` with every control and format character as an escape: `\x1b`, `\u202e`.

    Args:
        lines: whether to keep line breaks and tabs; otherwise they are escaped too.
    """
    if text.isascii() and text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        _escape(each) if each not in kept and unicodedata.category(each) in _UNSEEN else each for each in text
    )


def html(text: str) -> str:
    """Return `text` as HTML shows it, as content or in a quoted attribute; line breaks stay."""
    return html_escapes.escape(visible(text, lines=True))


def script_json(value: Any) -> str:
    """Return `value` as JSON for a <script> element of an HTML page; no text in it can close the element."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def markdown(text: str) -> str:
    """Return `text` escaped for Markdown and its tables: one line without HTML or emphasis; bare URLs stay links."""
    return _MARKS.sub(r"\\\g<0>", html_escapes.escape(visible(" ".join(text.split())), quote=False))


def markdown_row(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table; the cells are Markdown already."""
    return f"| {' | '.join(cells)} |"


def headed(head: str, text: str, style: str = "yellow") -> Text:
    """Return a line whose first words have a style."""
    return Text.assemble((head, style), " ", text)


class ForeignTextConsole(Console):
    """A console that prints strings as they are: `[bold]` is no markup, and control characters are escaped.

    Styles come as `style=...` or as `rich.text.Text`, whose control characters are escaped, too.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as it will be printed."""
        return super().render_str(visible(text, lines=True), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of what is printed."""
        if isinstance(renderable, Text) and (shown := visible(renderable.plain, lines=True)) != renderable.plain:
            layout = {name: getattr(renderable, name) for name in ("style", "justify", "overflow", "no_wrap", "end")}
            renderable = Text(shown, **layout)  # this drops the styles of its parts
        return super().render(renderable, options)


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
