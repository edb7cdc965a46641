"""Tables say what the comparison holds; pictures are drawn from it."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from ml2o_dist.evaluation import report
from ml2o_dist.evaluation.benchmark import Comparison, ProblemComparison, Row, Versus
from ml2o_dist.evaluation.report import comparison_markdown, comparison_table, plot_comparison, plot_meta_loss
from ml2o_dist.evaluation.statistics import PairedDifference

STEPS = 60


def row(name: str, loss: float, *, lr: float | None = None, objectives: int = 2, **changes: object) -> Row:
    curve = tuple(loss * (1 + 3 * math.exp(-k / 10)) for k in range(STEPS))
    made = Row(
        optimizer=name,
        label=name if lr is None else f"{name}@{lr:g}",
        baseline=lr is not None,
        loss=loss,
        standard_error=0.0123,
        seed_losses=(loss - 0.01, loss, loss + 0.01),
        objectives=(loss / objectives,) * objectives,
        test={"test_accuracy": (0.912,) * objectives},
        ms_per_step=1.5,
        forwards=STEPS,
        backwards=STEPS * objectives,
        diverged=0,
        curve=curve,
        curve_error=(0.02,) * STEPS,
        tuning={},
        note="",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def versus(reference: str, mean: float, error: float, ratio: float) -> Versus:
    difference = PairedDifference(mean, error, 3)
    return Versus(reference, difference, ratio, difference.no_worse_within_one_se, difference.verdict)


EDGE = row("mgda+adam", 0.75, lr=0.1, note="best learning rate 0.1 is at the edge of the grid")
LOST = row(
    "mean+sgd",
    math.inf,
    lr=1e6,
    standard_error=math.nan,
    objectives=2,
    diverged=2,
    curve=(4.0, 1e30) + (math.nan,) * (STEPS - 2),
)
DIGITS = ProblemComparison(
    "multidigits[hidden=40,net=mlp]",
    (row("learned", 0.5), EDGE, row("initial", 1.0), LOST),
    EDGE.label,
    versus(EDGE.label, -0.25, 0.05, 0.667),
    versus("initial", -0.5, 0.05, 0.5),
)
MANY = ProblemComparison(
    "quadratic[m=5]",
    (row("mean+adam", 0.2, lr=0.01, test={}, objectives=5), row("learned", 0.7, test={}, objectives=5)),
    "mean+adam@0.01",
    versus("mean+adam@0.01", 0.5, math.nan, 3.5),
    None,
)
COMPARISON = Comparison(STEPS, 3, 1, (0.001, 0.01, 0.1), (DIGITS, MANY))


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


def strong_pixels(path: Path) -> int:
    """How many pixels have the colour of the learned rule."""
    image = matplotlib.image.imread(path)[:, :, :3]
    strong = np.array([int(report.STRONG[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return int((np.abs(image - strong).max(axis=2) < 0.02).sum())


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_learning_curves_are_drawn(tmp_path: Path, count: int) -> None:
    path = tmp_path / "plots" / "curves.png"
    plot_comparison(replace(COMPARISON, problems=(DIGITS, MANY, DIGITS, MANY, DIGITS)[:count]), path)
    # in every panel the learned curve crosses most of it: more than 100 pixels wide, several high
    assert strong_pixels(path) > 500 * count


def test_a_comparison_without_the_learned_rule_has_nothing_in_its_colour(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plot_comparison(replace(COMPARISON, problems=(replace(DIGITS, rows=DIGITS.rows[1:3]),)), path)
    assert strong_pixels(path) == 0


def test_curves_that_are_negative_or_all_diverged_are_drawn(tmp_path: Path) -> None:
    below = tuple(1 - k / 10 for k in range(STEPS))
    negative = replace(MANY, rows=tuple(replace(r, curve=below) for r in MANY.rows))
    lost = replace(DIGITS, rows=(replace(LOST, curve=(math.nan,) * STEPS),))
    path = tmp_path / "curves.png"
    plot_comparison(replace(COMPARISON, problems=(negative, lost)), path)
    assert strong_pixels(path) > 500


def test_a_diverged_run_does_not_set_the_scale() -> None:
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    report._finish_panel(panel, DIGITS, STEPS)
    low, high = panel.get_ylim()
    assert panel.get_yscale() == "log"
    assert 0 < low < 0.6
    assert 4 * 0.9 < high < 10


def test_the_meta_loss_is_drawn(tmp_path: Path) -> None:
    history = [
        {"meta_step": k, "meta_loss": math.nan if k == 3 else 2 - k / 20, "validation": 1.0 if k % 10 == 9 else None}
        for k in range(30)
    ]
    plot_meta_loss(history, tmp_path / "meta.png")
    with_both = strong_pixels(tmp_path / "meta.png")
    plot_meta_loss([{**entry, "validation": None} for entry in history], tmp_path / "meta.png")
    with_one = strong_pixels(tmp_path / "meta.png")
    plot_meta_loss([], tmp_path / "meta.png")
    assert with_both > with_one > strong_pixels(tmp_path / "meta.png") == 0


def test_drawing_does_not_load_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from ml2o_dist.evaluation.report import plot_meta_loss\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plot_meta_loss([{'meta_step': 0, 'meta_loss': 1.0, 'validation': None}], Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.png")], check=True, timeout=120)
