"""One run as one self-contained HTML page: curves, comparison, trajectories, configuration."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from ml2o_dist.config_file import changed_settings, flat_settings
from ml2o_dist.metatrain.trajectories import RecordedProblem, recorded_problems
from ml2o_dist.reporting.document import PageHead, Section, document, duration, warnings_section
from ml2o_dist.reporting.evaluation_figures import verdict_on
from ml2o_dist.reporting.evaluation_page import evaluation_sections
from ml2o_dist.reporting.html_templates import macros
from ml2o_dist.reporting.plots import HISTORY_CAPTION, PAGE_COLOURS, draw_history, inline_svg, is_finite
from ml2o_dist.reporting.run_record import RunRecord
from ml2o_dist.reporting.trajectory_plots import CAPTION, TrajectoryPanel, stages, trajectory_panels
from ml2o_dist.rundir.log import COMPARISON_FAILED

CURVES = {
    "validation": "Look here: validation (lower is better)",
    "meta_loss": "Meta-loss of the rollouts (lower is better)",
    "gradient_norm": "Norm of the meta-gradient, before clipping",
    "learning_rate": "Meta-learning rate",
    "inner_steps_per_s": "Inner steps per second",
    "skipped_episodes": "Episodes skipped: failed, or not finite",
}
"""Titles of a run's curves by key of its history, the most important first."""

MOST_PROBLEMS = 2
"""Number of problems whose trajectories are drawn: those recorded at the most meta-steps."""


def page_sections(record: RunRecord) -> list[Section]:
    """Return the parts of the page in their order, each with its HTML or the reason why it has none."""
    return [
        _curves(record),
        *_comparison(record),
        _trajectories(record),
        _configuration(record),
        _origin(record),
        warnings_section(record),
    ]


def render_page(record: RunRecord, sections: Sequence[Section]) -> str:
    """Return the whole document."""
    tiles = [*_learning_tiles(record), *_faults_tiles(record), *_comparison_tiles(record)]
    head = PageHead("Meta-training run", record.name, record.path, _state(record), tiles, record.unread_lines)
    return document(head, sections)


def _state(record: RunRecord) -> str:
    done = record.meta_steps
    steps = "" if done is None else f"{done}{f' of {record.settings.meta_steps}' if record.settings else ''}"
    if record.card is not None:
        return f"Finished after {steps} meta-steps." if steps else "Finished."
    state = "Not known to be finished" if "weights.json" in record.unread else "Not finished"
    ended = f"; {record.log.ended}" if record.log.ended else ""
    if steps:
        return f"{state}: meta-step {steps} at the last checkpoint{ended}."
    return f"{state}{'' if record.unread else ': no checkpoint has been written yet'}{ended}."


def _learning_tiles(record: RunRecord) -> list[tuple[str, str]]:
    tiles = []
    scores = [(row["validation"], row["meta_step"]) for row in record.history if is_finite(row.get("validation"))]
    if scores:
        score, step = min(scores)
        untrained = "" if step else ", the untrained network"
        tiles.append(("Best validation", f"{score:.4f} at meta-step {step}{untrained}"))
    seconds = record.progress.get("seconds")
    if seconds:
        compared = record.comparison.seconds if record.comparison is not None else None
        parts = f" ({duration(seconds)} meta-training, {duration(compared)} comparison)" if compared else ""
        tiles.append(("Time", f"{duration(seconds + (compared or 0))}{parts or ' of meta-training'}"))
    speeds = [row["inner_steps_per_s"] for row in record.history if is_finite(row.get("inner_steps_per_s"))]
    if speeds:
        tiles.append(("Inner steps per second, median", f"{sorted(speeds)[len(speeds) // 2]:,.0f}"))
    return tiles


def _faults_tiles(record: RunRecord) -> list[tuple[str, str]]:
    """Return the counts of handled faults: skipped and repeated episodes, replaced workers; zeros are shown, too."""
    tiles = []
    if any(row.get("skipped_episodes") is not None for row in record.history):
        skipped, failed = (
            sum(row.get(name) or 0 for row in record.history) for name in ("skipped_episodes", "failed_episodes")
        )
        causes = f" ({failed:.0f} failed, {skipped - failed:.0f} not finite)" if skipped else ""
        tiles.append(("Episodes skipped", f"{skipped:.0f}{causes}"))
    counts = {"Episodes run again": "repeated_episodes", "Workers replaced": "worker_restarts"}
    tiles += [(what, str(record.progress[name])) for what, name in counts.items() if name in record.progress]
    return tiles


def _comparison_tiles(record: RunRecord) -> list[tuple[str, str]]:
    if record.comparison is None:
        return []
    found = [verdict_on(record.comparison, problem) for problem in record.comparison.problems]
    said = [difference.verdict for difference in found if difference is not None]
    if not said:
        return []
    better, level = (sum(verdict.startswith(word) for verdict in said) for word in ("better", "no worse"))
    return [("Against the best baseline", f"better on {better}, level on {level} of {len(said)}")]


def _curves(record: RunRecord) -> Section:
    title = "Curves"
    if not record.history:
        return Section(
            "curves",
            title,
            missing=record.why_not("metrics.parquet", "No metrics yet: they are written with each checkpoint."),
        )
    pictures = []
    for name, what in CURVES.items():
        given = [row[name] for row in record.history if row.get(name) is not None]
        lost = sum(not is_finite(value) for value in given)
        left_out = f" ({lost} of {len(given)} not finite, left out)" if lost else ""
        svg = inline_svg(partial(draw_history, history=record.history, key=name), what, f"curve-{name}")
        pictures.append((what + left_out, svg, "main" if name == "validation" else ""))
    return Section("curves", title, macros("meta_train").curves(HISTORY_CAPTION, pictures))


def _comparison(record: RunRecord) -> list[Section]:
    if record.comparison is not None:
        return evaluation_sections(record.comparison)
    why = record.why_not("comparison.json", _why_no_comparison(record))
    return [Section("comparison", "Comparison", missing=why)]


def _why_no_comparison(record: RunRecord) -> str:
    if record.settings is None:
        return "No comparison; whether it was asked for is not known, since the configuration cannot be read."
    if not record.settings.compare:
        return "No comparison: it was not asked for (compare=false)."
    if record.card is None:
        return "No comparison: it is made when meta-training is done."
    ended = record.log.ended
    again = f"ml2o meta-train --run-dir {shlex.quote(record.path)} --resume"
    if ended.startswith(COMPARISON_FAILED):
        return f"No comparison: it failed{ended.removeprefix(COMPARISON_FAILED)}; run.log has more. Again: {again}"
    if ended:
        return f"No comparison: the run was {ended} before its end. To make it: {again}"
    return f"No comparison: it is being made, or its process was killed; run.log says nothing. To make it: {again}"


def _trajectories(record: RunRecord) -> Section:
    title, recorded = "Trajectories", record.trajectories
    if recorded is None:
        none = record.settings is not None and record.settings.trajectories.meta_steps == 0
        why = "trajectories.meta_steps=0" if none else "no file is written yet"
        return Section("trajectories", title, missing=record.why_not("trajectories", f"No trajectories: {why}."))
    problems = recorded_problems(recorded)
    most = sorted(problems, key=lambda each: (-len(each.meta_steps), -each.episodes, each.problem))[:MOST_PROBLEMS]
    names = recorded["problem"].cast(pa.string())
    articles = [
        _problem_trajectories(each, recorded.filter(pc.equal(names, each.problem)), f"trajectory-{i}")
        for i, each in enumerate(most)
    ]
    rows = [
        ("", [each.problem, str(each.objectives), str(each.episodes), str(len(each.meta_steps)), str(each.inner_steps)])
        for each in problems
    ]
    columns = ["problem", "objectives", "episodes", "meta-steps", "inner steps"]
    return Section("trajectories", title, macros("meta_train").trajectories(CAPTION, articles, columns, rows))


def _problem_trajectories(
    recorded: RecordedProblem, rows: pa.Table, identity: str
) -> tuple[str, list[tuple[str, str]], list[tuple[TrajectoryPanel, Markup]]]:
    """Return the problem's name, the colour and label of each part, and its pictures."""
    parts = stages(rows)
    pictures = [
        (panel, inline_svg(panel.draw, f"{panel.title}, {recorded.problem}", f"{identity}-{j}"))
        for j, panel in enumerate(trajectory_panels(parts))
    ]
    return recorded.problem, [(PAGE_COLOURS[part.colour], part.label) for part in parts], pictures


def _configuration(record: RunRecord) -> Section:
    title = "Configuration"
    if record.settings is None:
        return Section("configuration", title, missing=record.why_not("config.yaml", "No configuration."))
    (base, changed), every = changed_settings(record.settings), flat_settings(record.settings)
    return Section("configuration", title, macros("meta_train").configuration(base, changed, every))


def _origin(record: RunRecord) -> Section:
    title = "Where the weights come from"
    card = record.card or {}
    said = card.get("provenance", {})
    data = said.get("data_sha256") or record.progress.get("data_sha256") or {}
    facts = {
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
    known = [(name, value) for name, value in facts.items() if value not in (None, "")]
    none = record.why_not("weights.json", "No weights yet: they are written when meta-training is done.")
    return Section(
        "origin",
        title,
        macros("parts").pairs(title, known) if known else Markup(""),
        "" if record.card is not None else none,
    )
