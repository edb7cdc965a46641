"""One run as one HTML page that asks for nothing outside itself: curves, comparison, trajectories, configuration."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.config_file import changed_settings, flat_settings
from ml2o_dist.evaluation.benchmark import INITIAL, LEARNED, Comparison, ProblemComparison
from ml2o_dist.evaluation.page_style import STYLE
from ml2o_dist.evaluation.plots import (
    HISTORY_CAPTION,
    PAGE_COLOURS,
    draw_history,
    draw_learning_curves,
    inline_svg,
    is_finite,
    optimizer_colours,
)
from ml2o_dist.evaluation.report import OPTIMIZER, caption, is_contestant, notes, row_figures, shown_columns, verdicts
from ml2o_dist.evaluation.trajectory_plots import CAPTION, stages, trajectory_panels
from ml2o_dist.metatrain.trajectories import RecordedProblem, recorded_problems

CURVES = {
    "validation": "Look here: validation (lower is better)",
    "meta_loss": "Meta-loss of the rollouts (lower is better)",
    "gradient_norm": "Norm of the meta-gradient, before clipping",
    "learning_rate": "Meta-learning rate",
    "inner_steps_per_s": "Inner steps per second",
    "skipped_episodes": "Episodes skipped because they were not finite",
}
"""The curves of a run by key of its history, what to look at first."""

MOST_PROBLEMS = 2
"""Problems whose trajectories are drawn: those recorded at the most meta-steps."""
MOST_WARNINGS = 100
"""The newest ones that are shown."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The browser is told, too, that the page may load nothing."""


@dataclass(frozen=True)
class Warned:
    """One line of a run's log."""

    time: str
    level: str
    message: str


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run; what is not there (yet) is None or empty.

    Attributes:
        name: of the run.  path: of its folder, or its URI.
        history: a mapping for each meta-step, as in metrics.parquet.
        card: of the weights, as artifact.py writes it.
        checkpoint_step: of the newest checkpoint that holds.  progress: what it says besides.
        trajectories: rows as `read_trajectories` returns them.
        unread: by name in the run's folder, what cannot be read of it and why, a line for each file.
    """

    name: str
    path: str
    settings: MetaTrainSettings | None = None
    history: Sequence[Mapping[str, Any]] = ()
    comparison: Comparison | None = None
    card: Mapping[str, Any] | None = None
    checkpoint_step: int | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    trajectories: pa.Table | None = None
    warnings: Sequence[Warned] = ()
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def meta_steps(self) -> int | None:
        """Meta-steps done, as far as metrics or a checkpoint say; None where neither is there."""
        written = [row["meta_step"] for row in self.history]
        return max(written) if written else self.checkpoint_step

    @property
    def unread_lines(self) -> list[str]:
        """What cannot be read, line by line."""
        return [line for lines in self.unread.values() for line in lines]

    def why_not(self, name: str, otherwise: str) -> str:
        """Say why there is nothing of the file or folder `name`: it cannot be read, or `otherwise`."""
        lines = self.unread.get(name, ())
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        return f"{lines[0]}{more}" if lines else otherwise


@dataclass(frozen=True)
class Section:
    """A part of the page; where something is not there to be shown, `missing` says why."""

    name: str
    title: str
    body: str = ""
    missing: str = ""


def page_sections(record: RunRecord) -> list[Section]:
    """Return the parts of the page in their order, each with its HTML or with why there is none."""
    return [
        _curves(record),
        _comparison(record),
        _trajectories(record),
        _configuration(record),
        _origin(record),
        _warnings(record),
    ]


def render_page(record: RunRecord, sections: Sequence[Section]) -> str:
    """Return the whole document."""
    links = "".join(f'<a href="#{s.name}">{_text(s.title)}</a>' for s in sections)
    unread = "".join(f'<p class="alert">{_text(line)}</p>' for line in record.unread_lines)
    parts = "".join(
        f'<section id="{s.name}"><h2>{_text(s.title)}</h2>{_missing(s.missing)}{s.body}</section>' for s in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(record.name)}: meta-training</title><style>{STYLE}</style></head><body>"
        f'<header><p class="kind">Meta-training run</p><h1>{_text(record.name)}</h1><p>{_text(_state(record))}</p>'
        f"{unread}{_summary(record)}<nav>{links}</nav></header><main>{parts}</main>"
        f"<footer>Made by ml2o report from {_text(record.path)}</footer></body></html>\n"
    )


def _state(record: RunRecord) -> str:
    done = record.meta_steps
    steps = "" if done is None else f"{done}{f' of {record.settings.meta_steps}' if record.settings else ''}"
    if record.card is not None:
        return f"Finished after {steps} meta-steps." if steps else "Finished."
    state = "Not known to be finished" if "weights.json" in record.unread else "Not finished"
    if steps:
        return f"{state}: meta-step {steps} at the last checkpoint."
    return f"{state}{'' if record.unread else ': no checkpoint has been written yet'}."


def _summary(record: RunRecord) -> str:
    tiles: list[tuple[str, str]] = []
    scores = [(row["validation"], row["meta_step"]) for row in record.history if is_finite(row.get("validation"))]
    if scores:
        score, step = min(scores)
        tiles.append(("Best validation", f"{score:.4f} at meta-step {step:.0f}"))
    speeds = [row["inner_steps_per_s"] for row in record.history if is_finite(row.get("inner_steps_per_s"))]
    if speeds:
        tiles.append(("Inner steps per second, median", f"{sorted(speeds)[len(speeds) // 2]:,.0f}"))
        skipped = sum(row.get("skipped_episodes") or 0 for row in record.history)
        tiles.append(("Episodes skipped", f"{skipped:.0f}"))
    if record.comparison is not None:
        said = [p.versus_baseline.verdict for p in record.comparison.problems if p.versus_baseline is not None]
        if said:
            better = sum(verdict.startswith("better") for verdict in said)
            level = sum(verdict.startswith("no worse") for verdict in said)
            tiles.append(("Against the best tuned baseline", f"better on {better}, level on {level} of {len(said)}"))
    return f"<dl class=tiles>{''.join(f'<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>' for k, v in tiles)}</dl>"


def _curves(record: RunRecord) -> Section:
    title = "Curves"
    if not record.history:
        return Section(
            "curves",
            title,
            missing=record.why_not("metrics.parquet", "No metrics yet: they are written with each checkpoint."),
        )
    pictures = []
    for key, what in CURVES.items():
        given = [row[key] for row in record.history if row.get(key) is not None]
        lost = sum(not is_finite(value) for value in given)
        left_out = f" ({lost} of {len(given)} not finite, left out)" if lost else ""
        svg = inline_svg(partial(draw_history, history=record.history, key=key), what, f"curve-{key}")
        pictures.append(_figure(_text(what + left_out), svg, "main" if key == "validation" else ""))
    keys = _key("strong", "average, or the figure itself") + _key("muted-0", "each meta-step")
    body = f'<p>{_text(HISTORY_CAPTION)}</p><p class="keys">{keys}</p><div class="grid">{"".join(pictures)}</div>'
    return Section("curves", title, body)


def _comparison(record: RunRecord) -> Section:
    title = "Comparison"
    comparison = record.comparison
    if comparison is None:
        switched_off = record.settings is not None and not record.settings.compare
        why = "it is made when meta-training is done" if record.card is None else "if it failed, run.log says why"
        why = "compare=false" if switched_off else why
        return Section("comparison", title, missing=record.why_not("comparison.json", f"No comparison: {why}."))
    colours = optimizer_colours(comparison)
    shown = {row.optimizer for problem in comparison.problems for row in problem.rows}
    keys = "".join(
        _key(PAGE_COLOURS[colour], name, line=int(name == INITIAL)) for name, colour in colours.items() if name in shown
    )
    parts = []
    for i, problem in enumerate(comparison.problems):
        draw = partial(draw_learning_curves, problem=problem, colours=colours, steps=comparison.steps)
        svg = inline_svg(draw, f"Learning curves on {problem.problem}", f"comparison-{i}")
        said = "".join(f"<li>{_text(line)}</li>" for line in verdicts(problem) + notes(problem))
        parts.append(
            f'<article><h3>{_text(problem.problem)}</h3><div class="beside">'
            f"{_figure('Summed loss on the step&#39;s batch, over steps', svg)}"
            f"<div>{_rows_table(problem)}<ul>{said}</ul></div></div></article>"
        )
    return Section(
        "comparison", title, f'<p>{_text(caption(comparison))}</p><p class="keys">{keys}</p>{"".join(parts)}'
    )


def _rows_table(problem: ProblemComparison) -> str:
    columns = shown_columns(problem)
    rows = []
    for i, row in enumerate(problem.rows):
        cells = row_figures(row) | {OPTIMIZER: row.label + (" *" if row.note else "")}
        kind = " ".join(["best"] * (i == 0) + ["learned"] * is_contestant(row, LEARNED))
        rows.append((kind, [cells[name] for name in columns]))
    return _table(f"Results on {problem.problem}", columns, rows)


def _trajectories(record: RunRecord) -> Section:
    title, table = "Trajectories", record.trajectories
    if table is None:
        none = record.settings is not None and record.settings.trajectories.meta_steps == 0
        why = "trajectories.meta_steps=0" if none else "no file is written yet"
        return Section("trajectories", title, missing=record.why_not("trajectories", f"No trajectories: {why}."))
    problems = recorded_problems(table)
    most = sorted(problems, key=lambda each: (-len(each.meta_steps), -each.episodes, each.problem))[:MOST_PROBLEMS]
    body = (
        "<p>Recorded training episodes of the problems met most often, one trajectory for each instance. "
        f"{_text(CAPTION)}</p>"
    )
    names = table["problem"].cast(pa.string())
    for i, each in enumerate(most):
        body += _problem_trajectories(each, table.filter(pc.equal(names, each.problem)), f"trajectory-{i}")
    rows = [
        ("", [each.problem, str(each.objectives), str(each.episodes), str(len(each.meta_steps)), str(each.inner_steps)])
        for each in problems
    ]
    columns = ["problem", "objectives", "episodes", "meta-steps", "inner steps"]
    listed = _table("Recorded problems", columns, rows)
    body += f"<details><summary>All {len(problems)} recorded problems</summary>{listed}</details>"
    return Section("trajectories", title, body)


def _problem_trajectories(recorded: RecordedProblem, table: pa.Table, identity: str) -> str:
    parts = stages(table)
    keys = "".join(_key(PAGE_COLOURS[part.colour], part.label) for part in parts)
    pictures = []
    for j, panel in enumerate(trajectory_panels(parts)):
        said = _text(panel.title)
        if len(panel.lines) > 1:
            said += "".join(f' <span class="key line-{k}">{_text(name)}</span>' for k, name in enumerate(panel.lines))
        label = f"{panel.title}, {recorded.problem}"
        pictures.append(_figure(said, inline_svg(panel.draw, label, f"{identity}-{j}")))
    grid = f'<div class="grid">{"".join(pictures)}</div>'
    return f'<article><h3>{_text(recorded.problem)}</h3><p class="keys">{keys}</p>{grid}</article>'


def _configuration(record: RunRecord) -> Section:
    title = "Configuration"
    if record.settings is None:
        return Section("configuration", title, missing=record.why_not("config.yaml", "No configuration."))
    changed, every = changed_settings(record.settings), flat_settings(record.settings)
    return Section(
        "configuration",
        title,
        "<p>What differs from the defaults; and the problems.</p>"
        f"{_pairs('Changed settings', changed.items())}<details><summary>All {len(every)} settings</summary>"
        f"{_pairs('All settings', every.items())}</details>",
    )


def _origin(record: RunRecord) -> Section:
    title = "Where the weights come from"
    card = record.card or {}
    said = card.get("provenance", {})
    data = said.get("data_sha256") or record.progress.get("data_sha256") or {}
    pairs = {
        "weights sha256": card.get("weights_sha256"),
        "parameters": card.get("parameters"),
        "best of meta-steps": said.get("best_meta_step"),
        "validation": said.get("validation_score"),
        "git commit": said.get("git"),
        "ml2o_dist": card.get("package_version"),
        "written": card.get("created"),
        "configuration sha256": said.get("config_hash"),
        "seed": said.get("seed", record.settings.seed if record.settings else None),
        "MLflow run": said.get("mlflow_run") or record.progress.get("tracking_run"),
        **{f"sha256 of {name}": digest for name, digest in data.items()},
    }
    known = [(key, value) for key, value in pairs.items() if value not in (None, "")]
    none = record.why_not("weights.json", "No weights yet: they are written when meta-training is done.")
    missing = "" if record.card is not None else none
    return Section("origin", title, _pairs(title, known) if known else "", missing)


def _warnings(record: RunRecord) -> Section:
    title = "Warnings"
    if not record.warnings:
        return Section("warnings", title, missing=record.why_not("run.log", "None in run.log."))
    newest = record.warnings[-MOST_WARNINGS:]
    rows = [("", [each.time, each.level, each.message]) for each in newest]
    left_out = len(record.warnings) - len(newest)
    said = f"<p>The newest {len(newest)}; {left_out} older ones are in run.log.</p>" if left_out else ""
    return Section("warnings", title, said + _table("Warnings", ["time", "level", "message"], rows, "words tall"))


def _pairs(label: str, pairs: Iterable[tuple[str, Any]]) -> str:
    rows = [
        ("", [key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]) for key, value in pairs
    ]
    return _table(label, ["", ""], rows, "words")


def _table(label: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """Return a table in a box of its own that scrolls; each row comes with its CSS classes. Everything is escaped."""
    head = "".join(f"<th scope=col>{_text(name)}</th>" for name in columns) if any(columns) else ""
    body = "".join(
        f'<tr class="{kind_of_row}">{"".join(f"<td>{_text(cell)}</td>" for cell in cells)}</tr>'
        for kind_of_row, cells in rows
    )
    box = f'<div class="scroll {kind}" role="region" tabindex="0" aria-label="{_text(label)}">'
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f"{box}<table>{head}<tbody>{body}</tbody></table></div>"


def _figure(caption_html: str, svg: str, kind: str = "") -> str:
    return f'<figure class="{kind}"><figcaption>{caption_html}</figcaption>{svg}</figure>'


def _key(colour: str, what: str, line: int = 0) -> str:
    return f'<span class="key line-{line}" style="--key: var(--{colour})">{_text(what)}</span>'


def _missing(why: str) -> str:
    return f'<p class="missing">{_text(why)}</p>' if why else ""


def _text(value: str) -> str:
    return html.escape(value)
