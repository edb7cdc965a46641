"""Text from elsewhere: nothing in it acts on a terminal, a page or a Markdown table, and nothing of it is lost."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from ml2o_dist.cli.command import command
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.shown_text import ForeignTextConsole, headed, html, markdown, markdown_row, script_json, visible

HOSTILE = (
    "[/] [bold]x[/bold] \x1b[31mred\x1b]8;;http://evil\x07link\x1b]8;;\x07 \u202eabc\u2066 \x9b2J \b\r \udcff \x00"
)

ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal or a browser acts on instead of showing it."""

anything = st.text(st.characters(codec=None, exclude_categories=()), max_size=40)


def console() -> tuple[ForeignTextConsole, io.StringIO]:
    stream = io.StringIO()
    return ForeignTextConsole(file=stream, width=300, color_system=None), stream


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 漢 🙂", "plain ü 漢 🙂"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\r\nb\tc", "a\\x0d\\x0ab\\x09c"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("\udcff", "\\udcff"),
        ("\x9b", "\\x9b"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_control_and_format_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown


@given(anything)
def test_no_text_acts_on_a_terminal(text: str) -> None:
    assert not ACTING.search(visible(text))
    assert not re.search(r"[\n\t]", visible(text))
    assert not ACTING.search(visible(text, lines=True))


@pytest.mark.parametrize("printed", [HOSTILE, Text(HOSTILE), headed(HOSTILE, HOSTILE)], ids=["str", "Text", "headed"])
def test_a_console_prints_markup_and_controls_as_letters(printed: str | Text) -> None:
    lines, stream = console()
    lines.print(printed, soft_wrap=True)
    shown = stream.getvalue()
    assert "[/] [bold]x[/bold] \\x1b[31mred" in shown
    assert "\\u202eabc" in shown
    assert not ACTING.search(shown)


def test_a_table_of_a_console_shows_titles_heads_and_cells_as_letters() -> None:
    lines, stream = console()
    table = Table(HOSTILE, "b", title=HOSTILE)
    table.add_row(HOSTILE, Text(HOSTILE))
    lines.print(table)
    shown = stream.getvalue()
    assert shown.count("[bold]x[/bold]") == 4
    assert not ACTING.search(shown)


def test_a_path_keeps_what_stands_in_brackets() -> None:
    lines, stream = console()
    lines.print("run directory  /runs/[x]/[red]/[/]", soft_wrap=True)
    assert stream.getvalue() == "run directory  /runs/[x]/[red]/[/]\n"


def test_the_line_of_an_error_and_the_output_of_a_command_are_letters_too() -> None:
    import click

    @click.command()
    @command
    def broken(console: ForeignTextConsole) -> None:
        console.print(f"folder {HOSTILE}", soft_wrap=True)
        raise UserError(f"no file {HOSTILE}")

    result = CliRunner().invoke(broken)
    assert result.exit_code == 2
    assert "no file [/] [bold]x[/bold] \\x1b[31mred" in result.stderr
    assert "folder [/] [bold]x[/bold] \\x1b[31mred" in result.stdout
    assert not ACTING.search(result.stdout + result.stderr)


class _Read(HTMLParser):
    """What a browser would make of HTML: its elements, attributes and text."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@given(anything)
def test_html_shows_the_text_and_nothing_else(text: str) -> None:
    read = _Read(f'<p title="{html(text)}">{html(text)}</p>')
    assert read.tags == ["p"]
    assert read.text == visible(text, lines=True)
    assert read.attributes == [("title", visible(text, lines=True))]
    html(text).encode()


@given(st.dictionaries(anything, anything, max_size=3))
def test_json_in_a_script_is_the_value_and_ends_no_script(value: dict[str, str]) -> None:
    shown = script_json(value | {"x": "</script><!--<script>"})
    assert not set(shown) & set("<>&")
    assert json.loads(shown) == value | {"x": "</script><!--<script>"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("meta_loss 0.5 (best)", "meta_loss 0.5 (best)"),
        ("a|b", "a\\|b"),
        ("one\ntwo", "one two"),
        ("[l](http://evil)", "\\[l\\](http://evil)"),
        ("![i](http://evil)", "\\!\\[i\\](http://evil)"),
        (
            "<img src=x onerror=y> & `code` **b** _i_",
            "&lt;img src=x onerror=y&gt; &amp; \\`code\\` \\*\\*b\\*\\* \\_i\\_",
        ),
        ("a\\|b", "a\\\\\\|b"),
    ],
)
def test_markdown_shows_letters(text: str, shown: str) -> None:
    assert markdown(text) == shown


@given(st.lists(anything, min_size=1, max_size=4))
def test_a_row_of_a_markdown_table_has_as_many_cells_as_texts(texts: list[str]) -> None:
    row = markdown_row(markdown(text) for text in texts)
    assert "\n" not in row
    unescaped = re.sub(r"\\.", "", row)
    assert unescaped.count("|") == len(texts) + 1
    assert not re.search(r"[<>`\[]", unescaped)
