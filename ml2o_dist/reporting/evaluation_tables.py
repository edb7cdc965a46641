"""An evaluation as tables: for the terminal and as Markdown. First the standings, then each problem."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ml2o_dist.evaluation.evaluated import Evaluation
from ml2o_dist.reporting.evaluation_captions import caption, row_terms, rows_lead, standing_terms, standings_lead
from ml2o_dist.reporting.evaluation_figures import (
    LOSS,
    OPTIMIZER,
    STAR,
    Shown,
    heading,
    note,
    ranked,
    ranked_standings,
    row_columns,
    row_figures,
    standing_columns,
    standing_figures,
    verdicts,
)
from ml2o_dist.runtime.shown_text import markdown, markdown_row, visible

WIDTH = 80
"""Width of the tables in characters; columns that do not fit go into a further table below."""
GAP = 2
"""Characters between two columns of a table."""
LONGEST_NAME = 24
"""An optimizer's name that is longer than this may be broken into lines."""

Rows = Sequence[tuple[str, Mapping[str, Shown]]]
"""The style and the figures of each row of a table."""


def evaluation_table(evaluation: Evaluation) -> Group:
    """Return tables for the terminal: the standings, then one for each problem, the lowest loss first.

    They fit in `WIDTH` columns. The best row is bold, meta-trained optimizers are red and marked with `>`.
    """
    roles = {row.optimizer: row.role for row in evaluation.rows}
    parts: list[Table | Text] = []
    if evaluation.standings:
        standings = ranked_standings(evaluation.standings)
        styled = [_styled(standing_figures(each), i, each.role) for i, each in enumerate(standings)]
        parts += [Text("Standings", style="bold underline")]
        parts += _tables(styled, standing_columns(standings))
    if said := caption(standings_lead(evaluation), standing_terms(evaluation)):
        parts += [Text(said, style="dim"), Text()]
    parts.append(Text(caption(rows_lead(evaluation), row_terms(evaluation)), style="dim"))
    for problem in evaluation.problems:
        rows = ranked(evaluation.rows_of(problem))
        styled = [_styled(row_figures(row), i, roles[row.optimizer]) for i, row in enumerate(rows)]
        parts += [Text(), Text(problem, style="bold underline")]
        parts += _tables(styled, row_columns(evaluation, rows))
        parts += [Text(f"  {line}") for line in verdicts(evaluation, problem)]
        parts += [Text(f"  * {row.label}: {note(row)}") for row in rows if note(row)]
    return Group(*parts)


def evaluation_markdown(evaluation: Evaluation) -> str:
    """Return the same as Markdown: a table of the standings, one of all problems, then the sentences and notes."""
    lines: list[str] = []
    if evaluation.standings:
        standings = ranked_standings(evaluation.standings)
        columns = standing_columns(standings)
        lines += _head(columns)
        for i, each in enumerate(standings):
            figures = standing_figures(each)
            lines.append(markdown_row([_label(figures, best=i == 0), *_cells(figures, columns[1:])]))
        lines.append("")
    if said := caption(standings_lead(evaluation), standing_terms(evaluation)):
        lines += [markdown(said), ""]
    lines += [markdown(caption(rows_lead(evaluation), row_terms(evaluation))), ""]
    columns = row_columns(evaluation, evaluation.rows) if evaluation.rows else [OPTIMIZER, LOSS]
    lines += _head(["problem", *columns])
    sentences = []
    for problem in evaluation.problems:
        rows = ranked(evaluation.rows_of(problem))
        for i, row in enumerate(rows):
            figures = row_figures(row)
            name = code(problem) if i == 0 else ""
            lines.append(markdown_row([name, _label(figures, best=i == 0), *_cells(figures, columns[1:])]))
        said_of = [
            *verdicts(evaluation, problem),
            *(f"{STAR[1:]} {row.label}: {note(row)}" for row in rows if note(row)),
        ]
        sentences += [f"- {code(problem)}: {markdown('; '.join(said_of))}"] if said_of else []
    return "\n".join([*lines, "", *sentences]).rstrip() + "\n"


def code(name: str) -> str:
    """Return a name as Markdown that shows it unchanged, also in a table."""
    shown = visible(name)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    room = " " if "`" in shown else ""
    return f"{fence}{room}{shown}{room}{fence}".replace("|", "\\|")


def _styled(figures: Mapping[str, Shown], place: int, role: str) -> tuple[str, Mapping[str, Shown]]:
    """Mark the best row and the learned ones."""
    name = figures[OPTIMIZER].text
    marked = Shown(("> " if role == "learned" else "  ") + name, name)
    styles = ["bold"] * (place == 0) + ["red"] * (role == "learned")
    return " ".join(styles), {**figures, OPTIMIZER: marked}


def _tables(rows: Rows, columns: Sequence[str]) -> list[Table | Text]:
    """Return the columns as one table, or as several of about equal width that each begin with the optimizer."""
    widths = {name: _width(name, [figures[name].text for _, figures in rows]) for name in columns}
    limit = WIDTH
    parts = _parts(widths, limit)
    while limit > 1 and len(narrower := _parts(widths, limit - 1)) == len(parts):
        parts, limit = narrower, limit - 1
    found: list[Table | Text] = []
    for i, part in enumerate(parts):
        found += [Text()] if i else []
        found.append(_table(rows, [OPTIMIZER, *part], widths))
    return found


def _parts(widths: Mapping[str, int], limit: int) -> list[list[str]]:
    """Split the columns after the first into parts that fit with it within `limit`; each part has at least one."""
    parts: list[list[str]] = [[]]
    for name in list(widths)[1:]:
        taken = widths[OPTIMIZER] + sum(widths[each] + GAP for each in (*parts[-1], name))
        if taken > limit and parts[-1]:
            parts.append([])
        parts[-1].append(name)
    return parts


def _table(rows: Rows, columns: Sequence[str], widths: Mapping[str, int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    room = WIDTH - sum(widths[name] + GAP for name in columns[1:])
    names = max(len(figures[OPTIMIZER].text) for _, figures in rows)
    table.add_column(OPTIMIZER, overflow="fold", width=max(widths[OPTIMIZER], min(room, names)))
    for name in columns[1:]:
        table.add_column("\n".join(filter(None, heading(name))), justify="right", overflow="fold", width=widths[name])
    for style, figures in rows:
        table.add_row(*(Text(figures[name].text) for name in columns), style=style)
    return table


def _width(name: str, cells: Sequence[str]) -> int:
    width = max(map(len, cells))
    return max(min(width, LONGEST_NAME) if name == OPTIMIZER else width, *map(len, heading(name)))


def _head(columns: Sequence[str]) -> list[str]:
    left = columns.index(OPTIMIZER) + 1
    return [markdown_row(columns), "|" + "---|" * left + "---:|" * (len(columns) - left)]


def _cells(figures: Mapping[str, Shown], columns: Sequence[str]) -> list[str]:
    return [markdown(figures[name].text) for name in columns]


def _label(figures: Mapping[str, Shown], *, best: bool) -> str:
    text = figures[OPTIMIZER].text
    shown = code(text.removesuffix(STAR)) + (STAR if text.endswith(STAR) else "")
    return f"**{shown}**" if best else shown
