"""Tables say what the comparison holds."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from ml2o_dist.evaluation.benchmark import Comparison
from ml2o_dist.evaluation.report import comparison_markdown, comparison_table
from tests.evaluation.comparisons import COMPARISON, DIGITS, MANY, row


def printed(comparison: Comparison, width: int = 100) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(comparison_table(comparison))
    return out.getvalue().splitlines()


def test_the_table_fits_and_says_it_all() -> None:
    lines = printed(COMPARISON)
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for said in [
        "multidigits[hidden=40,net=mlp]",
        "0.5000 ± 0.012",
        "0.250 / 0.250",
        "91.2 / 91.2 %",
        "60 + 120",
        "2 of 3 diverged",
        "learned - mgda+adam@0.1: better by more than one standard error (-0.250 ± 0.050, ratio 0.667)",
        "learned - initial: better",
        "* mgda+adam@0.1: best learning rate 0.1 is at the edge of the grid",
        "0.140 … 0.140 (5)",
        "worse by more than one standard error (+0.500 ± -, ratio 3.500)",
        "best learning rate of 0.001, 0.01, 0.1 on 1 other seed.",
    ]:
        assert said in text, said
    assert "nan" not in text
    assert "inf" not in text


def test_the_learned_row_is_marked_and_the_best_is_bold() -> None:
    lines = printed(COMPARISON)
    assert [line.split()[1] for line in lines if line.lstrip().startswith(">")] == ["learned", "learned"]
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=True, color_system="standard").print(comparison_table(COMPARISON))
    coloured = [line for line in out.getvalue().splitlines() if " ± " in line and "ratio" not in line]
    bold = ["\x1b[1" in line for line in coloured if "mean ±" not in line]
    assert bold == [True, False, False, True, False]


def test_three_objectives_with_accuracies_still_fit() -> None:
    rows = (row("learned", 123.4, objectives=3), row("pcgrad+momentum", 0.0123, lr=0.003, objectives=3))
    wide = replace(DIGITS, rows=rows)
    lines = printed(replace(COMPARISON, problems=(wide,)))
    assert max(map(len, lines)) <= 100
    assert any("60 + 180" in line for line in lines)


def test_markdown_is_one_table_with_a_row_per_row() -> None:
    lines = comparison_markdown(COMPARISON).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(DIGITS.rows) + len(MANY.rows)
    assert len({line.count("|") for line in table}) == 1
    assert "**`learned`**" in table[2]
    assert table[2].startswith("| `multidigits[hidden=40,net=mlp]` |")
    assert "`mgda+adam@0.1` *" in table[3]
    assert [line.partition("`: ")[0] for line in lines if line.startswith("- ")] == [
        "- `multidigits[hidden=40,net=mlp]",
        "- `quadratic[m=5]",
    ]
