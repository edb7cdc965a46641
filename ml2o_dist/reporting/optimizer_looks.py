"""The look of an optimizer: one colour, line and mark in all pictures of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ml2o_dist.evaluation.evaluated import Evaluation
from ml2o_dist.reporting.evaluation_figures import INITIAL
from ml2o_dist.reporting.html_templates import macros
from ml2o_dist.reporting.plots import MUTED, PAGE_COLOURS, PLAIN, STRONGS

LINES = {"-": "", "--": "5 2.5", ":": "1.5 2"}
"""Lines as matplotlib calls them, and their dashes in SVG."""
MARKS = ("s", "^", "D", "v", "P", "X", "<", ">")
"""There are more marks than colours: two optimizers of one colour differ in the mark, too."""
LONGEST_NAME = 40
"""Longest name in a picture, in characters."""


@dataclass(frozen=True)
class Look:
    """Colour, line and mark as matplotlib has them; `strong` ones are drawn on top, and thicker."""

    colour: str
    line: str
    mark: str
    strong: bool = False

    @property
    def width(self) -> float:
        """Width of the lines, in points."""
        return 2.4 if self.strong else 1.5

    def layer(self) -> int:
        """Return the z-order: learned optimizers are drawn on top, then the untrained network, then the others."""
        return 4 if self.strong else 3 if self.colour == PLAIN else 2


def optimizer_looks(evaluation: Evaluation) -> dict[str, Look]:
    """Return the look of each optimizer: learned ones strong, the untrained network plain, the others muted."""
    roles = {row.optimizer: row.role for row in evaluation.rows}
    learned = [name for name, role in roles.items() if role == "learned"]
    plain = [name for name, role in roles.items() if name == INITIAL and role == "other"]
    muted = [name for name in roles if name not in (*learned, *plain)]
    lines = tuple(LINES)
    looks = {
        name: Look(STRONGS[i % len(STRONGS)], lines[i % len(lines)], "o", strong=True) for i, name in enumerate(learned)
    }
    looks |= {name: Look(PLAIN, "--", "*") for name in plain}
    return looks | {
        name: Look(MUTED[i % len(MUTED)], lines[i // len(MUTED) % len(lines)], MARKS[i % len(MARKS)])
        for i, name in enumerate(muted)
    }


def short_name(name: str) -> str:
    """Return the name; if it is longer than `LONGEST_NAME` characters its middle is left out."""
    half = (LONGEST_NAME - 1) // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def swatch(look: Look) -> Markup:
    """Return a piece of the optimizer's line with its mark, as an <svg> element for the legend of a page."""
    from matplotlib.markers import MarkerStyle

    style = MarkerStyle(look.mark)
    outline = np.asarray(style.get_path().transformed(style.get_transform()).to_polygons()[0], dtype=float)
    points = "L".join(f"{17 + 8 * x:.1f} {7 - 8 * y:.1f}" for x, y in outline.tolist())
    shown = {"name": PAGE_COLOURS[look.colour], "width": look.width, "dashes": LINES[look.line]}
    return macros("parts").swatch(shown, points)  # type: ignore[no-any-return]
