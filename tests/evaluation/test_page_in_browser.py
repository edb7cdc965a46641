"""Pages in a real Chromium with the network off: nothing asked for, nothing wrong, nothing empty; tables that sort."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from ml2o_dist.evaluation.evaluated import Evaluation
from ml2o_dist.run_report import write_report
from tests.browser import browser
from tests.evaluation.synthetic import EVALUATION, HOSTILE, row, suite
from tests.evaluation.synthetic import evaluation as made

__all__ = ["browser"]  # a fixture

pytestmark = pytest.mark.long

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 812}
STRANGE = made((row(HOSTILE, "fonseca", 0.5, role="learned"), row("mean+adam", "fonseca", 0.7)))


class Opened:
    """A page, and what it did that it should not."""

    def __init__(self, browser: Any, folder: Path, evaluation: Evaluation, size: dict[str, int], scheme: str) -> None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation.to_json(curves=True), allow_nan=False))
        address = Path(write_report(folder)["path"]).as_uri()
        context = browser.new_context(viewport=size, color_scheme=scheme)
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
        from PIL import Image

        picture = Image.open(io.BytesIO(self.page.screenshot(full_page=True))).convert("RGB")
        return len(picture.getcolors(2**24))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("evaluation", [EVALUATION, suite(), STRANGE], ids=["mixed", "suite", "strange"])
def test_a_page_is_whole_and_legible(browser, tmp_path, evaluation, size, scheme):
    opened = Opened(browser, tmp_path, evaluation, size, scheme)
    assert opened.wrong == []
    figures = opened.page.eval_on_selector_all(
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
    overflow = opened.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0
    smallest = opened.page.evaluate(
        """Math.min(...[...document.querySelectorAll('p, td, th, figcaption, li')].filter(e => e.innerText.trim())
           .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
    )
    assert smallest >= 12
    assert opened.colours() > 200
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(background.removeprefix("rgb(").partition(",")[0])
    assert (red > 200) == (scheme == "light")


def test_tables_sort_by_click_and_by_keyboard(browser, tmp_path):
    page = Opened(browser, tmp_path, EVALUATION, WIDE, "light").page
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


def test_names_are_shown_and_run_nothing(browser, tmp_path):
    opened = Opened(browser, tmp_path, STRANGE, WIDE, "light")
    assert HOSTILE in opened.page.locator("body").inner_text()
    assert opened.wrong == []
    assert opened.page.locator("script").count() == 1
