"""The page of an evaluation: every figure once, tables that can be sorted, whole without its script."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace

import pytest
from markupsafe import Markup

from ml2o_dist.config import EvaluateSettings
from ml2o_dist.evaluation.evaluated import Evaluation, FailedCell
from ml2o_dist.reporting.document import policy
from ml2o_dist.reporting.evaluation_figures import ranked, row_columns, row_figures
from ml2o_dist.reporting.evaluation_page import evaluation_page_sections, evaluation_sections, render_evaluation
from ml2o_dist.reporting.html_templates import SortableRow, macros, script
from ml2o_dist.reporting.run_record import EvaluationRecord
from ml2o_dist.rundir.log import RunLog, Warned
from tests.evaluation.synthetic import CURVED, DIGITS, EVALUATION, HOSTILE, MANY, evaluation, failed, row
from tests.reporting.test_meta_train_page import Page


def rendered(shown: Evaluation | None, **changes: object) -> tuple[str, Page]:
    settings = None if shown is None else shown.settings
    record = replace(EvaluationRecord("bench", "/runs/bench", evaluation=shown, settings=settings), **changes)
    text = render_evaluation(record, evaluation_page_sections(record))
    return text, Page(text)


@pytest.fixture(scope="module")
def whole() -> tuple[str, Page]:
    return rendered(EVALUATION, log=RunLog((Warned("2026-11-24 20:00:00", "WARNING", "a worker died"),)))


def tables(text: str) -> dict[str, tuple[list[str], list[list[tuple[str, str]]]]]:
    """Of each sortable table by its label: the heads, and (data-value, text) of each cell of each row."""
    found = {}
    for label, body in re.findall(r'aria-label="([^"]*)"><table class="sortable">(.*?)</table>', text):
        heads = [re.sub(r"<.*?>", "", head).replace("\u00a0", " ") for head in re.findall(r"<th.*?>(.*?)</th>", body)]
        rows = re.findall(r"<tr class=.*?>(.*?)</tr>", body)
        cells = [re.findall(r'<td data-value="(.*?)".*?>(.*?)</td>', each) for each in rows]
        found[label] = heads, [[(value, re.sub(r"<.*?>", "", cell)) for value, cell in each] for each in cells]
    return found


def test_all_parts_are_there(whole: tuple[str, Page]) -> None:
    text, page = whole
    assert re.findall(r'<section id="([^"]*)">', text) == [
        "comparison", "learning-curves", "profile", "end-points", "time", "acceptance", "configuration", "origin",
        "warnings",
    ]  # fmt: skip
    for said in [
        "Evaluation bench Finished.",
        "Problems 3",
        "Optimizers 6, 2 learned",
        "Paired seeds 3",
        "Runs 39, 2 diverged, 0 failed",
        "Best mean+adam, the reference",
        "Time 2 min 38 s",
        "learned is 0.667 of mgda+adam@0.1: better",
        "* mgda+adam@0.1: best learning rate 0.1 is at the edge of the grid",
        "ratio loss / the reference's",
        "All 36 settings" if len(EvaluateSettings.model_fields) == 18 else "settings",
        "sha256 of digits " + "cd" * 32,
        "5c" * 32,
        "git commit 0c0ffee0c0ff",
        "a worker died",
    ]:
        assert said in page.text, said


def test_each_table_has_its_rows_in_their_order_with_what_they_are_sorted_by(whole: tuple[str, Page]) -> None:
    found = tables(whole[0])
    assert list(found) == ["Standings", DIGITS, MANY, CURVED, *(f"Time on {p}" for p in (DIGITS, MANY, CURVED))]
    for problem in (DIGITS, MANY, CURVED):
        rows = EVALUATION.rows_of(problem)
        heads, cells = found[problem]
        assert heads == row_columns(EVALUATION, rows)
        for each, shown in zip(ranked(rows), cells, strict=True):
            assert [text for _, text in shown] == [row_figures(each)[name].text for name in heads]
    heads, cells = found[DIGITS]
    assert [row[heads.index("loss by steps")][0] for row in cells] == ["0.5", "0.55", "0.75", "0.8", "1.0", "Infinity"]
    assert [row[heads.index("guard %")][0] for row in cells] == ["", "37.5", "", "", "", ""]
    assert found[f"Time on {DIGITS}"][1][-1] == [("gml2o:learned", "gml2o:learned"), ("2.5", "2.50"), ("3.0", "3.00")]


def test_the_best_and_the_learned_rows_are_marked(whole: tuple[str, Page]) -> None:
    kinds = [attributes["class"] for tag, attributes in whole[1].tags if tag == "tr" and "class" in attributes]
    assert kinds.count("best learned") == 2, "on two problems"
    assert kinds.count("best") == 2, "on one, and in the standings"


def test_the_policy_allows_this_script_and_no_other(whole: tuple[str, Page]) -> None:
    text, page = whole
    (found,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
    (told,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert found == script("sort_tables")
    assert told == policy([found])
    assert dict(part.strip().split(" ", 1) for part in told.split(";"))["script-src"] == f"'sha256-{digest}'"
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.count("button") == 0, "heads become buttons where the script runs"


def test_every_optimizer_has_one_colour_in_all_sections(whole: tuple[str, Page]) -> None:
    swatches = re.findall(r'<svg class="swatch".*?fill="var\(--([\w-]+)\)"/></svg>([^<]*)<', whole[0])
    by_name: dict[str, set[str]] = {}
    for colour, name in swatches:
        by_name.setdefault(name.split("@")[0].removesuffix(" *"), set()).add(colour)
    assert by_name == {
        "learned": {"strong-0"}, "gml2o:learned": {"strong-1"}, "initial": {"ink"}, "mean+adam": {"muted-0"},
        "mgda+adam": {"muted-1"}, "mean+sgd": {"muted-2"},
    }  # fmt: skip
    assert not re.search(r"#[0-9a-f]{6}", whole[0].split("</style>")[1]), "a colour that the scheme cannot change"


def test_it_asks_for_nothing_and_its_references_have_targets(whole: tuple[str, Page]) -> None:
    text, page = whole
    assert "http://" not in text
    assert "https://" not in text
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text)) <= set(identities)
    defined = set(re.findall(r"--([\w-]+):", text))
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= defined


def test_sections_without_anything_to_show_are_left_out() -> None:
    one = evaluation([row("mgda+adam", "p", 1.0, objectives=1)])
    sections = evaluation_sections(one)
    assert [section.name for section in sections] == ["comparison", "learning-curves", "profile", "time"]
    assert (
        "No standings: the reference mean+adam is not among the optimizers (add --optimizer mean+adam)."
        in sections[0].body
    )


def test_failed_runs_are_listed_with_their_cause() -> None:
    failures = [FailedCell("mean+adam", "p", 2, 0.1, HOSTILE), FailedCell("mgda+adam", "p", None, 0.5, "no memory")]
    shown = evaluation([failed(row("mean+adam", "p", 1.0)), row("mgda+adam", "p", 1.0)], failures=failures)
    _, page = rendered(shown)
    assert f"mean+adam p 2 {HOSTILE}" in page.text
    assert "mgda+adam p tuning no memory" in page.text
    assert "* mean+adam: 3 of 3 cells failed" in page.text
    assert "3, 0 diverged, 2 failed" in page.text


def test_without_results_it_says_so() -> None:
    _, page = rendered(None)
    assert "No results yet: they are written when the evaluation is done." in page.text
    unread = {"evaluation.json": ["evaluation.json cannot be read: it is torn"]}
    _, page = rendered(None, unread=unread)
    assert page.text.count("it is torn") == 3, "at the top, and where results and hashes are missed"
    _, page = rendered(evaluation([]))
    assert "No results: no run was finished." in page.text


def test_everything_of_a_user_s_is_escaped() -> None:
    rows = [
        replace(each, optimizer=HOSTILE, problem=HOSTILE, label=HOSTILE, note=HOSTILE) for each in EVALUATION.rows[-1:]
    ]
    shown = replace(evaluation(rows, reference=HOSTILE, about=HOSTILE), suite=HOSTILE, data_sha256={HOSTILE: HOSTILE})
    text, page = rendered(shown, name=HOSTILE, path=HOSTILE, log=RunLog((Warned(HOSTILE, HOSTILE, HOSTILE),)))
    assert page.count("script") == text.count("<script") == 1
    assert page.text.count(HOSTILE) > 20


def test_read_back_it_makes_the_same_page(whole: tuple[str, Page]) -> None:
    again = Evaluation.from_json(json.loads(json.dumps(EVALUATION.to_json(curves=True))))
    assert rendered(again)[0].split('<section id="warnings"')[0] == whole[0].split('<section id="warnings"')[0]


def test_a_table_sorts_what_is_not_known_by_nothing() -> None:
    figures = {
        name: row_figures(replace(EVALUATION.rows[0], ms_per_step=math.nan))[name] for name in ("optimizer", "ms/step")
    }
    row = SortableRow("", figures, {"optimizer": Markup("<b></b>")})
    table = macros("parts").sortable_table("t", ["optimizer", "ms/step"], [row])
    assert '<td data-value="mean+adam@0.01"><b></b>mean+adam@0.01</td><td data-value="">-</td>' in table
