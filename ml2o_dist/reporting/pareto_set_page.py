"""A Pareto set as one HTML page with its dial: moving a preference shows the losses and accuracies to expect.

The page does not contain the network. Between the measured preferences it shows averages of their results, weighted
by distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml2o_dist.config_file import flat_settings
from ml2o_dist.paretoset.approaches import OURS
from ml2o_dist.paretoset.fronts import Front
from ml2o_dist.paretoset.results import ApproachResult, best_first, cells, columns
from ml2o_dist.paretoset.settings import ParetoSetSettings
from ml2o_dist.reporting.document import PageHead, Section, document, warnings_section
from ml2o_dist.reporting.html_templates import macros
from ml2o_dist.reporting.run_record import Record

WIDTH, HEIGHT, MARGIN = 420, 320, 46


@dataclass(frozen=True)
class SetPageRecord(Record):
    """The content of a Pareto set's folder; None or empty for what is missing (so far).

    Attributes:
        names: of the tasks.  results: of all approaches.  picture: the PNG of the fronts.
    """

    settings: ParetoSetSettings | None = None
    names: Sequence[str] = ()
    results: Sequence[ApproachResult] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    picture: bytes = b""


def set_page_sections(record: SetPageRecord) -> list[Section]:
    """Return the parts of the page in their order, each with its HTML or the reason why it has none."""
    return [_dial(record), _picture(record), _table(record), _configuration(record), warnings_section(record)]


def render_set(record: SetPageRecord, sections: Sequence[Section]) -> str:
    """Return the whole document."""
    ours = _ours(record)
    tiles = []
    if ours is not None:
        tiles = [("Hypervolume, test", f"{ours.hypervolume:.3f}"), ("Preferences measured", str(len(ours.rays)))]
        if ours.monotonicity is not None:
            tiles.append(("The dial helps its task in", f"{100 * ours.monotonicity:.0f} % of pairs"))
    state = "Finished." if record.results else f"Not finished{f'; {record.log.ended}' if record.log.ended else ''}."
    head = PageHead("Pareto set", record.name, record.path, state, tiles, record.unread_lines)
    return document(head, sections, script="dial" if ours is not None else "")


def _ours(record: SetPageRecord) -> Front | None:
    return next((r.fronts["test"] for r in record.results if r.approach == OURS and "test" in r.fronts), None)


def _dial(record: SetPageRecord) -> Section:
    title, front = "The dial", _ours(record)
    if front is None:
        return Section("dial", title, missing=record.why_not("fronts.json", "Nothing is trained yet."))
    data = {"rays": front.rays.tolist(), "losses": front.losses.tolist(), "accuracies": front.accuracies.tolist()}
    plane = None
    if len(record.names) == 2:
        plane, data["x"], data["y"] = _plane(front)
    return Section("dial", title, macros("pareto_set").dial(len(front.rays), record.names, plane, data))


def _plane(front: Front) -> tuple[dict[str, Any], list[float], list[float]]:
    """Return the content of the picture of a front of two tasks, and offset and slope of its axes."""
    xs, ys = front.losses.T.tolist()
    (x0, x1), (y0, y1) = _limits(xs), _limits(ys)
    slope_x, slope_y = (WIDTH - 2 * MARGIN) / (x1 - x0), -(HEIGHT - 2 * MARGIN) / (y1 - y0)
    at_x, at_y = MARGIN - slope_x * x0, HEIGHT - MARGIN - slope_y * y0
    order = sorted(range(len(xs)), key=lambda i: xs[i])
    drawn = {
        "width": WIDTH,
        "height": HEIGHT,
        "margin": MARGIN,
        "line": " ".join(f"{at_x + slope_x * xs[i]:.1f},{at_y + slope_y * ys[i]:.1f}" for i in order),
        "x": (f"{x0:.3g}", f"{x1:.3g}"),
        "y": (f"{y0:.3g}", f"{y1:.3g}"),
    }
    return drawn, [at_x, slope_x], [at_y, slope_y]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05
    return low - room, high + room


def _picture(record: SetPageRecord) -> Section:
    title = "Fronts"
    if not record.picture:
        return Section("fronts", title, missing=record.why_not("plots", "There is no picture yet."))
    return Section("fronts", title, macros("parts").image(record.picture, "test losses of all fronts"))


def _table(record: SetPageRecord) -> Section:
    title = "Approaches, on the test split"
    if not record.results:
        return Section("approaches", title, missing=record.why_not("fronts.json", "Nothing is trained yet."))
    rows = [("best" if r.approach == OURS else "", cells(r)) for r in best_first(record.results)]
    return Section("approaches", title, macros("pareto_set").approaches(title, columns(), rows))


def _configuration(record: SetPageRecord) -> Section:
    title = "Configuration"
    if record.settings is None:
        return Section("configuration", title, missing=record.why_not("pareto_set.yaml", "No pareto_set.yaml."))
    shown = [*flat_settings(record.settings).items(), *record.provenance.items()]
    return Section("configuration", title, macros("parts").pairs(title, [(key, str(value)) for key, value in shown]))
