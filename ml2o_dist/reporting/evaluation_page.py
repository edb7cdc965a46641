"""An evaluation as sections of a page: sortable standings and results, and its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from ml2o_dist.config import EvaluateSettings
from ml2o_dist.config_file import flat_settings
from ml2o_dist.evaluation.evaluated import Evaluation, Row
from ml2o_dist.reporting.document import PageHead, Section, document, duration, warnings_section
from ml2o_dist.reporting.elements import SortableRow, bar, figure, pairs, sortable_table, table, text
from ml2o_dist.reporting.evaluation_captions import Terms, row_terms, rows_lead, standing_terms, standings_lead
from ml2o_dist.reporting.evaluation_figures import (
    NOTHING,
    OPTIMIZER,
    RATIO_FORM,
    Shown,
    note,
    number,
    ranked,
    ranked_standings,
    row_columns,
    row_figures,
    standing_columns,
    standing_figures,
    verdicts,
)
from ml2o_dist.reporting.evaluation_panels import (
    Looks,
    draw_acceptance,
    draw_curves,
    draw_ends,
    draw_profile,
    end_points,
    evaluations_per_step,
    profile_losses,
)
from ml2o_dist.reporting.optimizer_looks import optimizer_looks, swatch
from ml2o_dist.reporting.plots import PAGE_COLOURS, inline_svg
from ml2o_dist.reporting.run_record import EvaluationRecord

MS, EVALUATIONS = "ms/step", "evals/step"

CURVES = (
    "The summed loss on each step's own batch, over the steps: mean of the seeds, smoothed, and its standard error; "
    "lower is better."
)
PROFILE = (
    "How many of an optimizer's runs, over all problems and seeds, end within a factor of the best loss on the same "
    "problem from the same seed; higher and further left is better. A run that diverged is within none. Left out are "
    "runs that failed for some optimizer, and problems whose losses are not positive."
)
ENDS = (
    "The losses of the seeds' end points on a large fixed batch; lower is better. The known front is drawn in grey. "
    "Of more than two objectives each has an axis, from the lowest to the highest value; thick lines are means."
)
TIME = "Median wall time of a step, and forward and backward passes per step; lower is better."
GUARD = "The share of the seeds whose learned candidate the guard took, over the steps, smoothed; in per cent."


def evaluation_sections(evaluation: Evaluation) -> list[Section]:
    """Return the sections that an evaluation has; the first one is `comparison`, which always exists."""
    looks = optimizer_looks(evaluation)
    return [
        _comparison(evaluation, looks),
        *(
            section
            for section in (
                _curves(evaluation, looks),
                _profile(evaluation, looks),
                _ends(evaluation, looks),
                _times(evaluation, looks),
                _acceptance(evaluation, looks),
                _failed(evaluation),
            )
            if section.body
        ),
    ]


def evaluation_page_sections(record: EvaluationRecord) -> list[Section]:
    """Return the parts of the page of `ml2o evaluate`, each with its HTML or the reason why it has none."""
    if record.evaluation is None:
        why = record.why_not("evaluation.json", "No results yet: they are written when the evaluation is done.")
        shown = [Section("comparison", "Comparison", missing=why)]
    else:
        shown = evaluation_sections(record.evaluation)
    return [*shown, _configuration(record), _origin(record), warnings_section(record)]


def render_evaluation(record: EvaluationRecord, sections: Sequence[Section]) -> str:
    """Return the page of an evaluation as a whole document."""
    evaluation = record.evaluation
    state = "No results."
    if evaluation is not None:
        suite = f"Suite {evaluation.suite}." if evaluation.suite else "Finished."
        state = " ".join(filter(None, (suite, evaluation.settings.about)))
    tiles = [] if evaluation is None else _tiles(evaluation)
    return document(PageHead("Evaluation", record.name, record.path, state, tiles, record.unread_lines), sections)


def _tiles(evaluation: Evaluation) -> list[tuple[str, str]]:
    roles = {row.optimizer: row.role for row in evaluation.rows}
    learned = sum(role == "learned" for role in roles.values())
    diverged, failed = sum(cell.diverged for cell in evaluation.cells), len(evaluation.failed)
    tiles = [
        ("Problems", str(len(evaluation.problems))),
        ("Optimizers", f"{len(roles)}, {learned} learned"),
        ("Paired seeds", str(evaluation.settings.seeds)),
        ("Runs", f"{len(evaluation.cells)}, {diverged} diverged, {failed} failed"),
    ]
    if evaluation.standings:
        best = ranked_standings(evaluation.standings)[0]
        reference, ratio = evaluation.settings.reference, number(best.ratio.estimate, RATIO_FORM)
        of = ", the reference" if best.optimizer == reference else f", {ratio} of {reference}"
        tiles.append(("Best", best.optimizer + ("" if ratio == NOTHING else of)))
    if evaluation.seconds is not None:
        tiles.append(("Time", duration(evaluation.seconds)))
    return tiles


def _comparison(evaluation: Evaluation, looks: Looks) -> Section:
    if not evaluation.rows:
        return Section("comparison", "Comparison", missing="No results: no run was finished.")
    body = ""
    if evaluation.standings:
        standings = ranked_standings(evaluation.standings)
        rows = [
            _sortable(standing_figures(each), i, each.role, looks, each.optimizer) for i, each in enumerate(standings)
        ]
        body += f"<h3>Standings</h3>{sortable_table('Standings', standing_columns(standings), rows)}"
    body += _caption(standings_lead(evaluation), standing_terms(evaluation))
    for problem in evaluation.problems:
        found = ranked(evaluation.rows_of(problem))
        rows = [_sortable(row_figures(row), i, row.role, looks, row.optimizer) for i, row in enumerate(found)]
        said = [*verdicts(evaluation, problem), *(f"* {row.label}: {note(row)}" for row in found if note(row))]
        body += f"<h3>{text(problem)}</h3>{sortable_table(problem, row_columns(evaluation, found), rows)}"
        body += f"<ul>{''.join(f'<li>{text(line)}</li>' for line in said)}</ul>" if said else ""
    return Section("comparison", "Comparison", body + _caption(rows_lead(evaluation), row_terms(evaluation)))


def _caption(lead: str, terms: Terms) -> str:
    listed = "".join(f"<div><dt>{text(what)}</dt><dd>{text(how)}</dd></div>" for what, how in terms)
    return f'<p class="fine">{text(lead)}</p>' + (f'<dl class="terms">{listed}</dl>' if listed else "")


def _sortable(figures: dict[str, Shown], place: int, role: str, looks: Looks, optimizer: str) -> SortableRow:
    kind = " ".join(["best"] * (place == 0) + ["learned"] * (role == "learned"))
    return SortableRow(kind, figures, {OPTIMIZER: swatch(looks[optimizer])} if optimizer in looks else {})


def _curves(evaluation: Evaluation, looks: Looks) -> Section:
    problems = [p for p in evaluation.problems if any(row.curve.steps for row in evaluation.rows_of(p))]

    def draw(problem: str) -> str:
        drawn = partial(draw_curves, rows=evaluation.rows_of(problem), looks=looks)
        return inline_svg(drawn, f"Learning curves on {problem}", f"learning-{problems.index(problem)}")

    return Section("learning-curves", "Learning curves", _grid(CURVES, problems, draw, looks))


def _profile(evaluation: Evaluation, looks: Looks) -> Section:
    losses = profile_losses(evaluation)
    body = ""
    if losses:
        svg = inline_svg(partial(draw_profile, losses=losses, looks=looks), "Performance profile", "profile")
        runs = len(next(iter(losses.values())))
        said = f"{runs} runs of each optimizer"
        keys = _keys({name: looks[name] for name in looks if name in losses})
        body = f"<p>{text(PROFILE)}</p>{keys}{figure(text(said), svg, 'wide')}"
    return Section("profile", "Performance profile", body)


def _ends(evaluation: Evaluation, looks: Looks) -> Section:
    ends = {problem: end_points(evaluation, problem) for problem in evaluation.problems}
    problems = [problem for problem, each in ends.items() if each]

    def draw(problem: str) -> str:
        drawn = partial(draw_ends, ends=ends[problem], front=evaluation.fronts.get(problem, ()), looks=looks)
        return inline_svg(drawn, f"End points on {problem}", f"ends-{problems.index(problem)}")

    return Section("end-points", "End points", _grid(ENDS, problems, draw, looks))


def _times(evaluation: Evaluation, looks: Looks) -> Section:
    articles = ""
    for problem in evaluation.problems:
        rows = [row for row in evaluation.rows_of(problem) if math.isfinite(row.ms_per_step)]
        longest = max((row.ms_per_step for row in rows), default=0) or 1
        shown = [_time(row, longest, looks) for row in sorted(rows, key=lambda row: row.ms_per_step)]
        listed = sortable_table(f"Time on {problem}", [OPTIMIZER, MS, EVALUATIONS], shown)
        articles += f"<article><h3>{text(problem)}</h3>{listed}</article>" if shown else ""
    body = f'<p>{text(TIME)}</p><div class="grid two">{articles}</div>' if articles else ""
    return Section("time", "Time per step", body)


def _time(row: Row, longest: float, looks: Looks) -> SortableRow:
    passes = evaluations_per_step(row)
    figures = {
        OPTIMIZER: Shown(row.optimizer, row.optimizer),
        MS: Shown(number(row.ms_per_step, ".2f"), row.ms_per_step),
        EVALUATIONS: Shown(number(passes, ".2f"), passes),
    }
    colour = PAGE_COLOURS[looks[row.optimizer].colour]
    kind = "learned" if row.role == "learned" else ""
    return SortableRow(kind, figures, {MS: bar(row.ms_per_step / longest, colour)})


def _acceptance(evaluation: Evaluation, looks: Looks) -> Section:
    guarded = [row for row in evaluation.rows if row.curve.acceptance is not None]
    problems = list(dict.fromkeys(row.problem for row in guarded))

    def draw(problem: str) -> str:
        drawn = partial(draw_acceptance, rows=evaluation.rows_of(problem), looks=looks)
        return inline_svg(drawn, f"What the guard accepted on {problem}", f"guard-{problems.index(problem)}")

    shown = {name: look for name, look in looks.items() if name in {row.optimizer for row in guarded}}
    return Section("acceptance", "The guard", _grid(GUARD, problems, draw, shown))


def _failed(evaluation: Evaluation) -> Section:
    rows = [
        ("", [each.optimizer, each.problem, "tuning" if each.seed is None else str(each.seed), each.error])
        for each in evaluation.failed
    ]
    body = table("Failed runs", ["optimizer", "problem", "seed", "error"], rows, "words tall") if rows else ""
    return Section("failed", "Failed runs", body)


def _grid(said: str, problems: Sequence[str], draw: Callable[[str], str], looks: Looks) -> str:
    """Return a picture for each problem below one legend, "" without pictures."""
    pictures = "".join(figure(text(problem), draw(problem)) for problem in problems)
    return f'<p>{text(said)}</p>{_keys(looks)}<div class="grid">{pictures}</div>' if pictures else ""


def _keys(looks: Looks) -> str:
    entries = "".join(f"<span>{swatch(look)}{text(name)}</span>" for name, look in looks.items())
    return f'<p class="keys">{entries}</p>'


def _configuration(record: EvaluationRecord) -> Section:
    title = "Configuration"
    if record.settings is None:
        return Section("configuration", title, missing=record.why_not("evaluate.yaml", "No configuration."))
    every, defaults = flat_settings(record.settings), flat_settings(EvaluateSettings())
    changed = {name: value for name, value in every.items() if defaults.get(name) != value}
    said = "What differs from the defaults of config.py."
    return Section(
        "configuration",
        title,
        f"<p>{said}</p>{pairs('Changed settings', changed.items())}"
        f"<details><summary>All {len(every)} settings</summary>{pairs('All settings', every.items())}</details>",
    )


def _origin(record: EvaluationRecord) -> Section:
    title, evaluation = "Where the figures come from", record.evaluation
    if evaluation is None:
        return Section("origin", title, missing=record.why_not("evaluation.json", "No results yet."))
    facts = {
        "suite": evaluation.suite,
        "sha256 of what was asked for": evaluation.suite_sha256,
        "git commit": evaluation.git,
        **{f"sha256 of {name}": digest for name, digest in evaluation.data_sha256.items()},
    }
    return Section("origin", title, pairs(title, [(name, value) for name, value in facts.items() if value]))
