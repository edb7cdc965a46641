"""The page of a run: well-formed, self-contained, escaped, and it says what is missing."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.config_file import load_settings
from ml2o_dist.metatrain.schedule import training_items
from ml2o_dist.metatrain.trajectories import episodes_table
from ml2o_dist.reporting.document import Section
from ml2o_dist.reporting.meta_train_page import page_sections, render_page
from ml2o_dist.reporting.run_record import RunRecord
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from ml2o_dist.rundir.log import RunLog, Warned
from tests.evaluation.synthetic import DIGITS_ROWS, HOSTILE, evaluation
from tests.metatrain.executing import in_process
from tests.metatrain.settings import small

HISTORY = [
    {
        "meta_step": k,
        "meta_loss": math.nan if k == 3 else 2 - k / 20,
        "gradient_norm": 0.5,
        "learning_rate": 0.01,
        "validation": 1.2345 - k / 100 if k % 10 == 0 else None,
        "inner_steps_per_s": 100.0 + k,
        "skipped_episodes": float(k == 3),
    }
    for k in range(21)
]
CARD = {
    "weights_sha256": "ab" * 32,
    "parameters": 1035,
    "provenance": {"git": "0123456789ab", "mlflow_run": "the-mlflow-run", "data_sha256": {"digits": "cd" * 32}},
}
VOID = {"meta", "br", "link", "img", "input", "hr"}


COMPARISON = evaluation(DIGITS_ROWS)


class Page(HTMLParser):
    """Checks that every tag is closed in order, and collects what is in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open, f"<{tag}/> outside SVG"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def trajectories(settings: MetaTrainSettings):
    weights = ML2ONetwork(settings.rule).state_dict()
    recorded = []
    for step in range(settings.meta_steps):
        items = training_items(settings, step, "cpu")
        recorded += [(i, r.trajectory) for i, r in zip(items, in_process(items, weights), strict=True) if i.spec.record]
    return episodes_table(recorded)


@pytest.fixture(scope="module")
def whole() -> RunRecord:
    settings = small(meta_steps=20, trajectories={"meta_steps": 5})
    warnings = [Warned("2026-11-24 20:00:00", "WARNING", f"a worker died {i}") for i in range(103)]
    return RunRecord(
        name="first", path="/runs/first", settings=settings, history=HISTORY, comparison=COMPARISON, card=CARD,
        trajectories=trajectories(settings), log=RunLog(tuple(warnings)),
    )  # fmt: skip


def rendered(record: RunRecord) -> tuple[str, Page]:
    text = render_page(record, page_sections(record))
    return text, Page(text)


@pytest.fixture(scope="module")
def page_of_whole(whole) -> tuple[list[Section], str, Page]:
    sections = page_sections(whole)
    text = render_page(whole, sections)
    return sections, text, Page(text)


def test_a_whole_run_shows_everything(page_of_whole):
    sections, _, page = page_of_whole
    assert [s.name for s in sections if s.body] == [
        "curves", "comparison", "learning-curves", "profile", "end-points", "time", "acceptance", "trajectories",
        "configuration", "origin", "warnings",
    ]  # fmt: skip
    assert not any(s.missing for s in sections)
    # six curves; learning curves, profile, end points, guard; five panels of trajectories for each of two problems
    assert page.count("figure") == 6 + 4 + 10
    for said in [
        "Finished after 20 of 20 meta-steps.",
        "1.0345 at meta-step 20",
        "Meta-loss of the rollouts (lower is better) (1 of 21 not finite, left out)",
        "every meta-step draws its horizon and its problems anew",
        "0.5000 ± 0.012",
        "95.0 / 94.0",
        "2 of 3 diverged",
        "learned is 0.667 of mgda+adam@0.1: better by more than one standard error",
        "Against the best baseline better on 1, level on 0 of 1",
        "All 5 recorded problems",
        "rule.hidden 4",
        "ab" * 32,
        "0123456789ab",
        "the-mlflow-run",
        "sha256 of digits " + "cd" * 32,
        "The newest 100; 3 older ones are in run.log.",
        "WARNING a worker died 102",
    ]:
        assert said in page.text, said
    assert "a worker died 2 " not in page.text


def test_validation_comes_first_and_is_marked_as_what_to_look_at(page_of_whole):
    body = next(s.body for s in page_of_whole[0] if s.name == "curves")
    assert body.count('<figure class="main">') == 1
    first = body[body.index("<figure") :]
    assert first.startswith('<figure class="main"><figcaption>Look here: validation')


def tiles(record):
    text = render_page(record, [])
    return dict(re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", text))


def test_time_and_what_went_wrong_on_the_way_are_on_the_page(whole):
    progress = {"seconds": 2105.4, "worker_restarts": 3, "repeated_episodes": 5}
    compared = replace(COMPARISON, seconds=158.0)
    shown = tiles(replace(whole, progress=progress, comparison=compared))
    assert shown["Time"] == "37 min 43 s (35 min 05 s meta-training, 2 min 38 s comparison)"
    assert shown["Workers replaced"] == "3"
    assert shown["Episodes run again"] == "5"
    assert shown["Episodes skipped"] == "1 (0 failed, 1 not finite)"
    failed = [{**row, "skipped_episodes": 2, "failed_episodes": 1} for row in HISTORY[1:3]]
    shown = tiles(replace(whole, history=failed, comparison=None, progress={"seconds": 7384.0}))
    assert shown["Time"] == "2 h 03 min of meta-training"
    assert shown["Episodes skipped"] == "4 (2 failed, 2 not finite)"
    assert "Workers replaced" not in shown, "a checkpoint of before does not say"
    shown = tiles(replace(whole, history=[{"meta_step": 0, "validation": 0.5}]))
    assert shown["Best validation"] == "0.5000 at meta-step 0, the untrained network"
    calm = [{**row, "skipped_episodes": 0} for row in HISTORY]
    shown = tiles(replace(whole, history=calm, progress={"worker_restarts": 0, "repeated_episodes": 0}))
    assert (shown["Episodes skipped"], shown["Episodes run again"], shown["Workers replaced"]) == ("0", "0", "0")
    assert "Time" not in shown


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        ("stopped by SIGINT", "the run was stopped by SIGINT before its end. To make it: ml2o meta-train --run-dir"),
        ("the comparison failed: ValueError: no", "it failed: ValueError: no; run.log has more."),
        ("aborted", "the run was aborted before its end."),
        ("", "it is being made, or its process was killed"),
    ],
)
def test_why_there_is_no_comparison_is_said_as_far_as_it_is_known(ended, said):
    done = RunRecord("u", "/runs/a b", settings=small(), checkpoint_step=12, card=CARD, log=RunLog((), ended))
    (missing,) = [s.missing for s in page_sections(done) if s.name == "comparison"]
    assert missing.startswith(f"No comparison: {said}")
    assert missing.endswith("ml2o meta-train --run-dir '/runs/a b' --resume")
    asked = replace(done, settings=small(compare=False))
    assert "it was not asked for (compare=false)" in {s.name: s.missing for s in page_sections(asked)}["comparison"]
    early = replace(done, card=None)
    assert "it is made when meta-training is done" in {s.name: s.missing for s in page_sections(early)}["comparison"]
    assert f"meta-step 12 of 12 at the last checkpoint{'; ' if ended else ''}{ended}." in rendered(early)[1].text


def configuration(record):
    return next(s.body for s in page_sections(record) if s.name == "configuration")


def test_of_a_run_without_options_no_setting_is_said_to_differ():
    body = configuration(RunRecord("u", "/runs/u", settings=load_settings(None, ["data.root=/data", "device=cpu"])))
    first, every = body.split("<details>")
    assert first.strip() == "<p>Nothing differs from the embedded default.</p>"
    assert "rule.features" in every
    first, _ = configuration(RunRecord("u", "/runs/u", settings=load_settings(None, ["seed=7"]))).split("<details>")
    assert "What differs from the embedded default." in first
    assert first.count("<tr") == 1
    assert "seed" in first


def test_only_what_differs_from_the_defaults_comes_first(page_of_whole):
    body = next(s.body for s in page_of_whole[0] if s.name == "configuration")
    first, every = body.split("<details>")
    assert "learner.lr" in first
    assert "learner.clip" not in first
    assert "learner.clip" in every
    assert "family.test" in first


@pytest.mark.parametrize("empty", [True, False])
def test_nothing_is_asked_for_outside_the_page(page_of_whole, empty):
    text, page = rendered(RunRecord("first", "/runs/first")) if empty else page_of_whole[1:]
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img", "image", "form")
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"):
            assert (attributes.get(name) or "#").startswith("#"), attributes
        assert not any(name.startswith("on") for name in attributes)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert text.count("<script") == page.count("script") == 1
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]


def test_identities_are_unique_and_every_reference_has_its_target(page_of_whole):
    _, text, page = page_of_whole
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text)) <= set(identities)


def test_light_and_dark_and_a_phone_s_width_are_provided_for(page_of_whole):
    _, text, page = page_of_whole
    assert "prefers-color-scheme: dark" in text
    assert any(a.get("name") == "viewport" and "width=device-width" in a["content"] for _, a in page.tags)
    defined = set(re.findall(r"--([\w-]+):", text))
    assert set(re.findall(r"var\(--([\w-]+)", text)) <= defined
    scrolls = [a for _, a in page.tags if "scroll" in (a.get("class") or "").split()]
    assert len(scrolls) == page.count("table")


def test_an_unfinished_run_says_what_is_missing():
    early = RunRecord("u", "/runs/u", settings=load_settings())
    _, page = rendered(early)
    missing = {s.name: s.missing for s in page_sections(early) if s.missing}
    assert set(missing) == {"curves", "comparison", "trajectories", "origin", "warnings"}
    assert all(why in page.text for why in missing.values())
    assert "Not finished: no checkpoint has been written yet." in page.text
    later = replace(early, history=HISTORY[:12], progress={"tracking_run": "the-mlflow-run", "data_sha256": {}})
    _, page = rendered(later)
    assert "Not finished: meta-step 11 of 20 at the last checkpoint." in page.text
    assert "the-mlflow-run" in page.text
    assert page.count("figure") == 6


def test_settings_that_switch_a_part_off_are_named():
    settings = small(compare=False, trajectories={"meta_steps": 0})
    missing = {s.name: s.missing for s in page_sections(RunRecord("u", "/runs/u", settings=settings))}
    assert "compare=false" in missing["comparison"]
    assert "trajectories.meta_steps=0" in missing["trajectories"]


def test_everything_of_a_user_s_is_escaped(whole):
    evil = HOSTILE
    rows = [replace(each, optimizer=evil, problem=evil, label=evil, note=evil) for each in DIGITS_ROWS[:1]]
    table = whole.trajectories.filter(pc.equal(pc.list_value_length(whole.trajectories["losses"]), 2))
    column = table.schema.get_field_index("problem")
    renamed = table.set_column(column, table.schema.field(column), pa.array([evil] * len(table)).dictionary_encode())
    record = replace(
        whole, name=evil, path=evil, comparison=evaluation(rows, reference=evil), trajectories=renamed,
        log=RunLog((Warned(evil, evil, evil),), evil), unread={evil: [evil]},
        card={"weights_sha256": evil, "provenance": {"git": evil}},
    )  # fmt: skip
    text, page = rendered(record)
    assert page.count("script") == text.count("<script") == 1
    assert page.text.count(evil) > 20
