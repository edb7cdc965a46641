"""A Pareto set as one HTML page with its dial: moving a preference shows the losses and accuracies to expect.

The page does not contain the network. Between the measured preferences it shows averages of their results, weighted
by distance.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ml2o_dist.config_file import flat_settings
from ml2o_dist.paretoset.approaches import OURS
from ml2o_dist.paretoset.fronts import Front
from ml2o_dist.paretoset.results import ApproachResult, best_first, cells, columns
from ml2o_dist.paretoset.settings import ParetoSetSettings
from ml2o_dist.reporting.document import PageHead, Section, document, warnings_section
from ml2o_dist.reporting.elements import pairs, table, text
from ml2o_dist.reporting.run_record import Record
from ml2o_dist.runtime.shown_text import script_json

DIAL = """
const data = JSON.parse(document.getElementById('front').textContent);
const dials = [...document.querySelectorAll('input.dial')];
const shown = (t, what) => document.getElementById(what + '-' + t);
const point = document.getElementById('dial-point');
function expected(r) {
  let total = 0;
  const sum = {losses: r.map(() => 0), accuracies: r.map(() => 0)};
  for (const [i, ray] of data.rays.entries()) {
    const distance = ray.reduce((d, x, t) => d + (x - r[t]) ** 2, 0);
    const weight = 1 / (distance + 1e-9) ** 2;
    total += weight;
    for (const key in sum) data[key][i].forEach((x, t) => { sum[key][t] += weight * x; });
  }
  for (const key in sum) sum[key] = sum[key].map((x) => x / total);
  return sum;
}
function turn(moved) {
  const values = dials.map((dial) => Number(dial.value));
  if (moved !== undefined) {
    const rest = 1 - values[moved];
    const others = values.reduce((s, x, t) => t === moved ? s : s + x, 0);
    values.forEach((x, t) => {
      if (t !== moved) values[t] = others > 0 ? x * rest / others : rest / (values.length - 1);
    });
    dials.forEach((dial, t) => { dial.value = values[t]; });
  }
  const total = values.reduce((s, x) => s + x, 0);
  const r = values.map((x) => x / total);
  const now = expected(r);
  r.forEach((x, t) => {
    shown(t, 'preference').textContent = x.toFixed(2);
    shown(t, 'loss').textContent = now.losses[t].toFixed(4);
    shown(t, 'accuracy').textContent = now.accuracies[t].toFixed(4);
  });
  if (point) {
    point.setAttribute('cx', data.x[0] + data.x[1] * now.losses[0]);
    point.setAttribute('cy', data.y[0] + data.y[1] * now.losses[1]);
  }
}
dials.forEach((dial, t) => dial.addEventListener('input', () => turn(t)));
turn();
"""
"""Script of the dial. When one preference moves, the others share the rest in their proportion."""

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
    return document(head, sections, script=DIAL if ours is not None else "")


def _ours(record: SetPageRecord) -> Front | None:
    return next((r.fronts["test"] for r in record.results if r.approach == OURS and "test" in r.fronts), None)


def _dial(record: SetPageRecord) -> Section:
    title, front = "The dial", _ours(record)
    if front is None:
        return Section("dial", title, missing=record.why_not("fronts.json", "Nothing is trained yet."))
    even = 1 / len(record.names)
    rows = "".join(
        f"<tr><th scope=row>{text(name)}</th>"
        f'<td><input class=dial type=range min=0 max=1 step=0.01 value="{even:.4f}" aria-label="preference, '
        f'{text(name)}"></td><td id="preference-{t}"></td><td id="loss-{t}"></td><td id="accuracy-{t}"></td></tr>'
        for t, name in enumerate(record.names)
    )
    head = "<tr><th>task<th>preference<th><th>test loss<th>test accuracy</tr>"
    data = {"rays": front.rays.tolist(), "losses": front.losses.tolist(), "accuracies": front.accuracies.tolist()}
    plane = ""
    if len(record.names) == 2:
        plane, data["x"], data["y"] = _plane(record, front)
    note = (
        f"<p>Expected from the {len(front.rays)} preferences that were measured; between them it is their average, "
        "weighted by distance. <code>ml2o pareto-set query</code> gives the network itself, and measures it.</p>"
    )
    return Section(
        "dial",
        title,
        f'{note}<table class="words">{head}{rows}</table>{plane}'
        f'<script type="application/json" id="front">{script_json(data)}</script>',
    )


def _plane(record: SetPageRecord, front: Front) -> tuple[str, list[float], list[float]]:
    """Return the picture of a front of two tasks, and offset and slope of its axes."""
    xs, ys = front.losses.T.tolist()
    (x0, x1), (y0, y1) = _limits(xs), _limits(ys)
    slope_x, slope_y = (WIDTH - 2 * MARGIN) / (x1 - x0), -(HEIGHT - 2 * MARGIN) / (y1 - y0)
    at_x, at_y = MARGIN - slope_x * x0, HEIGHT - MARGIN - slope_y * y0
    order = sorted(range(len(xs)), key=lambda i: xs[i])
    line = " ".join(f"{at_x + slope_x * xs[i]:.1f},{at_y + slope_y * ys[i]:.1f}" for i in order)
    first, second = (text(name) for name in record.names)
    svg = (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="test losses of the front, and the dial\'s point">'
        f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        f'<polyline points="{MARGIN},{MARGIN} {MARGIN},{HEIGHT - MARGIN} {WIDTH - MARGIN},{HEIGHT - MARGIN}" '
        f'fill="none" stroke="currentColor"/>'
        f'<g fill="currentColor" font-size="11"><text x="{MARGIN}" y="{HEIGHT - MARGIN + 15}">{x0:.3g}</text>'
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - MARGIN + 15}" text-anchor="end">{x1:.3g}</text>'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">test loss, {first}</text>'
        f'<text x="{MARGIN - 5}" y="{HEIGHT - MARGIN}" text-anchor="end">{y0:.3g}</text>'
        f'<text x="{MARGIN - 5}" y="{MARGIN + 8}" text-anchor="end">{y1:.3g}</text>'
        f'<text x="8" y="{MARGIN - 14}">test loss, {second}</text></g>'
        '<circle id="dial-point" r="7" fill="#c8102e"/></svg></figure>'
    )
    return svg, [at_x, slope_x], [at_y, slope_y]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05
    return low - room, high + room


def _picture(record: SetPageRecord) -> Section:
    title = "Fronts"
    if not record.picture:
        return Section("fronts", title, missing=record.why_not("plots", "There is no picture yet."))
    data = base64.b64encode(record.picture).decode()
    return Section(
        "fronts", title, f'<figure><img alt="test losses of all fronts" src="data:image/png;base64,{data}"></figure>'
    )


def _table(record: SetPageRecord) -> Section:
    title = "Approaches, on the test split"
    if not record.results:
        return Section("approaches", title, missing=record.why_not("fronts.json", "Nothing is trained yet."))
    rows = [("best" if r.approach == OURS else "", cells(r)) for r in best_first(record.results)]
    note = (
        "<p>Hypervolume up to a loss of 2 in each task; IGD+ to the best of all points; monotonicity: how often more "
        "preference for a task means less loss of it; even: at the preference nearest to even.</p>"
    )
    return Section("approaches", title, note + table(title, columns(), rows))


def _configuration(record: SetPageRecord) -> Section:
    title = "Configuration"
    if record.settings is None:
        return Section("configuration", title, missing=record.why_not("pareto_set.yaml", "No pareto_set.yaml."))
    shown = [*flat_settings(record.settings).items(), *record.provenance.items()]
    return Section("configuration", title, pairs(title, [(key, str(value)) for key, value in shown]))
