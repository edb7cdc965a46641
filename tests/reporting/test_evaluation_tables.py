"""Tables say what the evaluation holds, in 80 columns, the lowest loss first."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from ml2o_dist.evaluation.evaluated import Evaluation, Front
from ml2o_dist.evaluation.statistics import Interval
from ml2o_dist.reporting.evaluation_figures import row_columns, row_figures
from ml2o_dist.reporting.evaluation_tables import code, evaluation_markdown, evaluation_table
from tests.evaluation.synthetic import (
    CURVED,
    CURVED_ROWS,
    DIGITS,
    DIGITS_ROWS,
    EVALUATION,
    HOSTILE,
    MANY,
    evaluation,
    failed,
    row,
    suite,
)


def printed(shown: Evaluation, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(evaluation_table(shown))
    return out.getvalue().splitlines()


def block(shown: Evaluation, title: str) -> list[str]:
    """The lines below a title, up to the next problem's."""
    lines = [line.rstrip() for line in printed(shown)]
    titles = ["Standings", *shown.problems]
    begin = lines.index(title)
    return lines[begin + 1 : next((i for i in range(begin + 1, len(lines)) if lines[i] in titles), None)]


def names(lines: list[str]) -> list[str]:
    """The first words of the rows of the first table."""
    rule = next(i for i, line in enumerate(lines) if line.startswith("──"))
    rows = lines[rule + 1 : lines.index("", rule)]
    return [row.removeprefix("> ").split()[0] for row in rows]


def test_standings_come_first_the_lowest_ratio_on_top_and_learned_ones_are_marked() -> None:
    lines = printed(EVALUATION)
    assert lines[0].rstrip() == "Standings"
    found = block(EVALUATION, "Standings")
    ratios = {each.optimizer: each.ratio.estimate for each in EVALUATION.standings}
    assert names(found) == sorted(ratios, key=lambda name: ratios[name])
    text = "\n".join(found)
    assert "> learned" in text
    assert "> initial" not in text
    for said in [
        "1.000 [0.9000, 1.100]",
        "83 [70, 92]",
        "+0.0",
        "-1.2",
        "mean+adam on the same seeds, over 3 problems",
    ]:
        assert said in text, said


@pytest.mark.parametrize("shown", [EVALUATION, suite()], ids=["small", "suite"])
def test_it_fits_in_80_columns_and_cuts_nothing_off(shown: Evaluation) -> None:
    lines = printed(shown)
    assert max(map(len, lines)) <= 80
    for problem in shown.problems:
        rows = shown.rows_of(problem)
        text = " ".join(block(shown, problem))
        for each in rows:
            figures = row_figures(each)
            for column in row_columns(shown, rows):
                assert figures[column].text in text, (problem, column)
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"\n. nan ", "", "\n".join(lines))), (
        "but for an optimizer of that name"
    )


def test_rows_are_sorted_by_loss_with_what_diverged_or_failed_last() -> None:
    assert names(block(EVALUATION, DIGITS)) == [
        "learned", "gml2o:learned", "mgda+adam@0.1", "mean+adam@0.01", "initial", "mean+sgd@1e+06"
    ]  # fmt: skip
    rows = (failed(row("a", "p", 0.1)), *(replace(each, problem="p") for each in DIGITS_ROWS))
    assert names(block(evaluation(rows), "p"))[-2:] == ["mean+sgd@1e+06", "a"]


def test_every_figure_of_a_row_is_there() -> None:
    text = " ".join(" ".join(block(EVALUATION, DIGITS)).split())
    for said in [
        "> learned 0.5000 ± 0.012 0.5500 0.6000",
        "0.250 / 0.250 95.0 / 94.0 0.250 ± 0.062",
        "> gml2o:learned 2.50 180 62 38",
        "2 of 3 diverged",
        "* mgda+adam@0.1: best learning rate 0.1 is at the edge of the grid",
    ]:
        assert said in text, said
    curved = " ".join(" ".join(block(EVALUATION, CURVED)).split())
    assert "0.5000 of 0.6000 0.0400 -0.0800 1 of 3" in curved
    assert "0.0400 … 0.0400 (5)" in " ".join(block(EVALUATION, MANY))


def test_the_best_row_is_bold_and_learned_rows_are_red() -> None:
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=True, color_system="standard").print(evaluation_table(EVALUATION))
    lines = out.getvalue().splitlines()
    start = next(i for i, line in enumerate(lines) if DIGITS in line)
    styles = {
        name: (match.group(1) if (match := re.match(r"\x1b\[([\d;]*)m", line)) else "")
        for line in lines[start + 4 : start + 10]
        for name in [re.sub(r"\x1b\[[\d;]*m|> ", "", line).split()[0]]
    }
    assert styles == {
        "learned": "1;31", "gml2o:learned": "31", "mgda+adam@0.1": "", "mean+adam@0.01": "", "initial": "",
        "mean+sgd@1e+06": "",
    }  # fmt: skip


def test_columns_without_anything_to_show_are_left_out() -> None:
    plain = evaluation([row("mean+adam", "p", 0.5, objectives=1), row("mgda+adam", "p", 0.7, objectives=1)])
    text = "\n".join(block(plain, "p"))
    for name in ["objective", "accuracy", "accepted", "guard", "hypervolume", "outside"]:
        assert name not in text, name
    assert "by" in text
    text = "\n".join(printed(plain))
    for name in ["hypervolume", "accepted", "test accuracy"]:
        assert name not in text.lower(), "the caption explains what is not there"


def test_without_the_reference_there_are_no_standings_and_it_is_said_why() -> None:
    shown = evaluation([row("mgda+adam", "p", 0.5), row("learned", "p", 0.4, role="learned")])
    text = "\n".join(printed(shown))
    assert "Standings" not in text
    said = "No standings: the reference mean+adam is not among the optimizers (add --optimizer mean+adam)."
    assert said in " ".join(text.split())
    assert "by evals" not in text.lower()
    assert "by time" not in text.lower()
    assert "No standings" in evaluation_markdown(shown)


def test_an_evaluation_without_rows_is_no_error() -> None:
    empty = evaluation([])
    assert printed(empty)
    assert evaluation_markdown(empty).count("\n| ") == 1, "the head of a table alone"


def test_one_seed_has_no_standard_error() -> None:
    text = "\n".join(printed(evaluation([row("mean+adam", "p", 0.5, seeds=1), row("learned", "p", 0.4, seeds=1)])))
    assert "0.5000 ± -" in text
    assert "1 paired seed," in text


def test_standings_that_are_not_of_all_problems_say_so() -> None:
    some = replace(
        EVALUATION,
        standings=tuple(
            replace(each, problems=2, speedup=math.nan, ratio=Interval(math.nan, math.nan, math.nan))
            for each in EVALUATION.standings
        ),
    )
    text = " ".join(" ".join(printed(some)).split())
    assert "over 2 problems of 3 (the other losses are not positive by construction)" in text
    found = block(some, "Standings")
    ranks = {each.optimizer: each.mean_rank for each in some.standings}
    assert names(found) == sorted(ranks, key=lambda name: ranks[name]), "without ratios ranks decide"
    assert "speedup" not in " ".join(found[: found.index("optimizer") if "optimizer" in found else 12])


def test_a_problem_with_its_own_steps_is_written_as_it_was() -> None:
    assert MANY.endswith("@120")
    assert MANY in [line.rstrip() for line in printed(EVALUATION)]
    assert "60 steps (N on a problem written PROBLEM@N)" in " ".join(printed(EVALUATION))


def test_markdown_has_a_table_of_the_standings_and_one_of_all_rows() -> None:
    lines = evaluation_markdown(EVALUATION).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    standings, rows = tables[: 2 + len(EVALUATION.standings)], tables[2 + len(EVALUATION.standings) :]
    assert len(rows) == 2 + len(EVALUATION.rows)
    for table in (standings, rows):
        assert len({line.count("|") for line in table}) == 1
    assert standings[0].startswith("| optimizer | ratio | to best |")
    assert f"| `{DIGITS}` | **`learned`** | 0.5000 ± 0.012 | 0.5500 | 0.6000 |" in "\n".join(rows)
    assert "| `mgda+adam@0.1` * |" in "\n".join(rows)
    assert [line.partition("`: ")[0] for line in lines if line.startswith("- ")] == [
        f"- `{problem}" for problem in (DIGITS, MANY, CURVED)
    ]


def test_no_name_leaves_its_cell_or_becomes_html() -> None:
    evil = HOSTILE + "|`"
    rows = [replace(each, optimizer=evil, label=evil, problem=evil, note=evil) for each in CURVED_ROWS[:1]]
    text = evaluation_markdown(evaluation(rows, reference=evil))
    tables = [line for line in text.splitlines() if line.startswith("|")]
    for table in (tables[:3], tables[3:]):
        assert len({re.sub(r"\\\|", "", line).count("|") for line in table}) == 1
    outside = re.sub(r"``.*?[^`]``(?!`)", "", text)
    assert "<script" not in outside
    assert code("a|b") == "`a\\|b`"
    assert code("a`b") == "`` a`b ``"


def test_a_front_without_a_finite_figure_shows_none() -> None:
    far = [replace(each, front=Front(0.0, 0.6, 3, math.inf, math.nan)) for each in CURVED_ROWS]
    text = " ".join(" ".join(block(evaluation(far), CURVED)).split())
    assert "0.000 of 0.6000 3 of 3" in text
    assert "IGD+" not in text
