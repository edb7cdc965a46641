"""HTML from the Jinja2 templates in `templates/`; all text in it is escaped."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ml2o_dist.reporting.evaluation_figures import Shown, heading
from ml2o_dist.runtime.shown_text import script_json, visible

FOLDER = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class SortableRow:
    """A row of a sortable table: CSS classes, figures by column, and pictures that stand before some of them."""

    kind: str
    figures: Mapping[str, Shown]
    pictures: Mapping[str, Markup] = field(default_factory=dict)


def macros(template: str) -> Any:
    """Return the macros of `templates/{template}.html` as attributes: functions that return Markup."""
    return _environment.get_template(f"{template}.html").module


def page(**content: Any) -> str:
    """Return a whole page."""
    return _environment.get_template("page.html").render(content)


def script(name: str) -> Markup:
    """Return a script of the package, as it stands in a page."""
    return Markup("\n" + (FOLDER / f"{name}.js").read_text())  # ours, so it needs no escape


def _visible(value: Any) -> Any:
    """Return text without control and format characters; Markup and numbers as they are."""
    return visible(value, lines=True) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _sort_key(shown: Shown) -> str:
    if isinstance(shown.value, str):
        return shown.value
    return "" if math.isnan(shown.value) else repr(float(shown.value)).replace("inf", "Infinity")


_environment = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, finalize=_visible
)
_environment.filters.update(
    base64=lambda content: base64.b64encode(content).decode(),
    heading=heading,
    json_unless_text=lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
    script_json=lambda value: Markup(script_json(value)),
    sort_key=_sort_key,
)
