"""Pages in a real Chromium with the network off: nothing asked for, nothing wrong, nothing empty; tables that sort."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ml2o_dist.reporting.meta_train_page import page_sections, render_page
from ml2o_dist.reporting.run_record import RunRecord
from ml2o_dist.workflows.report import write_report
from tests.browser import browser
from tests.evaluation.synthetic import EVALUATION, HOSTILE, evaluation, row, suite
from tests.reporting.test_meta_train_page import whole

__all__ = ["browser", "whole"]  # fixtures

pytestmark = pytest.mark.long

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 812}
STRANGE = evaluation((row(HOSTILE, "fonseca", 0.5, role="learned"), row("mean+adam", "fonseca", 0.7)))
EVALUATIONS = {"mixed": EVALUATION, "suite": suite(), "strange": STRANGE}
PAGES = [*EVALUATIONS, "run", "strange run"]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory, whole: RunRecord) -> dict[str, str]:
    """Pages of evaluations and of runs, as files."""
    files = {}
    for name, shown in EVALUATIONS.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "evaluation.json").write_text(json.dumps(shown.to_json(curves=True), allow_nan=False))
        files[name] = Path(write_report(folder)["path"])
    strange = replace(whole, name=HOSTILE, comparison=STRANGE, unread={"run.log": [HOSTILE]})
    for name, run in {"run": whole, "strange run": strange}.items():
        files[name] = tmp_path_factory.mktemp("run") / "report.html"
        files[name].write_text(render_page(run, page_sections(run)))
    return {name: file.as_uri() for name, file in files.items()}


class Opened:
    """A page, and what it did that it should not."""

    def __init__(self, context: Any, address: str) -> None:
        self.page = context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda asked: asked.url != address and self.wrong.append(f"asked for {asked.url}"))
        context.set_offline(True)
        self.page.goto(address)

    def colours(self) -> int:
        """Count the colours of the whole page as it is shown."""
        picture = Image.open(io.BytesIO(self.page.screenshot(full_page=True))).convert("RGB")
        return len(picture.getcolors(2**24))


Open = Callable[..., Opened]


@pytest.fixture
def opened(browser: Any, addresses: dict[str, str]) -> Iterator[Open]:
    """Opens a page by its name with the network off; all are closed after the test."""
    contexts = []

    def opening(name: str, size: dict[str, int] = WIDE, scheme: str = "light") -> Opened:
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme))
        return Opened(contexts[-1], addresses[name])

    yield opening
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_and_legible(opened: Open, name: str, size: dict[str, int], scheme: str) -> None:
    shown = opened(name, size, scheme)
    assert shown.wrong == []
    figures = shown.page.eval_on_selector_all(
        "figure svg",
        """all => all.map(svg => [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height,
           [...svg.querySelectorAll('path, use')].filter(drawn => drawn.getBoundingClientRect().width
             + drawn.getBoundingClientRect().height > 1).length])""",
    )
    assert len(figures) >= 3
    for width, height, drawn in figures:
        assert width >= 200
        assert height >= 100
        assert drawn >= 10
    overflow = shown.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0
    smallest = shown.page.evaluate(
        """Math.min(...[...document.querySelectorAll('p, td, th, figcaption, li')].filter(e => e.innerText.trim())
           .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
    )
    assert smallest >= 12
    assert shown.colours() > 200
    background = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(background.removeprefix("rgb(").partition(",")[0])
    assert (red > 200) == (scheme == "light")


@pytest.mark.parametrize("name", ["mixed", "run"])
def test_tables_sort_by_click_and_by_keyboard(opened: Open, name: str) -> None:
    page = opened(name).page
    table = page.locator("table.sortable").first
    head = table.locator("th button").nth(1)

    def column() -> list[float]:
        cells = table.locator("tbody tr td:nth-child(2)")
        return [float(cells.nth(i).get_attribute("data-value") or "nan") for i in range(cells.count())]

    head.click()
    rising = column()
    assert len(rising) >= 3
    known = [value for value in rising if value == value]
    assert known == sorted(known)
    assert rising[: len(known)] == known, "what is not known is last"
    head.focus()
    page.keyboard.press("Enter")
    falling = column()
    assert falling[: len(known)] == sorted(known, reverse=True)
    assert table.locator("th").nth(1).get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize("name", ["strange", "strange run"])
def test_names_are_shown_and_run_nothing(opened: Open, name: str) -> None:
    shown = opened(name)
    assert HOSTILE in shown.page.locator("body").inner_text()
    for head in shown.page.locator("th button").all():
        head.click()
    assert shown.wrong == []
    assert shown.page.locator("script").count() == 1
