"""An evaluation as sections of a page: sortable standings and results, and its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from markupsafe import Markup

from ml2o_dist.config import EvaluateSettings
from ml2o_dist.config_file import flat_settings
from ml2o_dist.evaluation.evaluated import Evaluation, Row
from ml2o_dist.reporting.document import EMPTY, PageHead, Section, document, duration, warnings_section
from ml2o_dist.reporting.evaluation_captions import row_terms, rows_lead, standing_terms, standings_lead
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
from ml2o_dist.reporting.html_templates import SortableRow, macros
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
    found = []
    for problem in evaluation.problems:
        rows = ranked(evaluation.rows_of(problem))
        shown = [_sortable(row_figures(row), i, row.role, looks, row.optimizer) for i, row in enumerate(rows)]
        notes = [*verdicts(evaluation, problem), *(f"* {row.label}: {note(row)}" for row in rows if note(row))]
        found.append((problem, row_columns(evaluation, rows), shown, notes))
    body = macros("evaluation").comparison(
        _standings(evaluation, looks),
        (standings_lead(evaluation), standing_terms(evaluation)),
        found,
        (rows_lead(evaluation), row_terms(evaluation)),
    )
    return Section("comparison", "Comparison", body)


def _standings(evaluation: Evaluation, looks: Looks) -> tuple[Sequence[str], Sequence[SortableRow]] | None:
    standings = ranked_standings(evaluation.standings)
    rows = [_sortable(standing_figures(each), i, each.role, looks, each.optimizer) for i, each in enumerate(standings)]
    return (standing_columns(standings), rows) if rows else None


def _sortable(figures: dict[str, Shown], place: int, role: str, looks: Looks, optimizer: str) -> SortableRow:
    kind = " ".join(["best"] * (place == 0) + ["learned"] * (role == "learned"))
    return SortableRow(kind, figures, {OPTIMIZER: swatch(looks[optimizer])} if optimizer in looks else {})


def _curves(evaluation: Evaluation, looks: Looks) -> Section:
    problems = [p for p in evaluation.problems if any(row.curve.steps for row in evaluation.rows_of(p))]

    def draw(problem: str) -> Markup:
        drawn = partial(draw_curves, rows=evaluation.rows_of(problem), looks=looks)
        return inline_svg(drawn, f"Learning curves on {problem}", f"learning-{problems.index(problem)}")

    return Section("learning-curves", "Learning curves", _grid(CURVES, problems, draw, looks))


def _profile(evaluation: Evaluation, looks: Looks) -> Section:
    losses = profile_losses(evaluation)
    body = EMPTY
    if losses:
        svg = inline_svg(partial(draw_profile, losses=losses, looks=looks), "Performance profile", "profile")
        runs = len(next(iter(losses.values())))
        shown = {name: looks[name] for name in looks if name in losses}
        body = macros("evaluation").profile(PROFILE, _swatches(shown), runs, svg)
    return Section("profile", "Performance profile", body)


def _ends(evaluation: Evaluation, looks: Looks) -> Section:
    ends = {problem: end_points(evaluation, problem) for problem in evaluation.problems}
    problems = [problem for problem, each in ends.items() if each]

    def draw(problem: str) -> Markup:
        drawn = partial(draw_ends, ends=ends[problem], front=evaluation.fronts.get(problem, ()), looks=looks)
        return inline_svg(drawn, f"End points on {problem}", f"ends-{problems.index(problem)}")

    return Section("end-points", "End points", _grid(ENDS, problems, draw, looks))


def _times(evaluation: Evaluation, looks: Looks) -> Section:
    found = []
    for problem in evaluation.problems:
        rows = [row for row in evaluation.rows_of(problem) if math.isfinite(row.ms_per_step)]
        longest = max((row.ms_per_step for row in rows), default=0) or 1
        shown = [_time(row, longest, looks) for row in sorted(rows, key=lambda row: row.ms_per_step)]
        found += [(problem, shown)] if shown else []
    body = macros("evaluation").times(TIME, [OPTIMIZER, MS, EVALUATIONS], found)
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
    return SortableRow(kind, figures, {MS: macros("parts").bar(row.ms_per_step / longest, colour)})


def _acceptance(evaluation: Evaluation, looks: Looks) -> Section:
    guarded = [row for row in evaluation.rows if row.curve.acceptance is not None]
    problems = list(dict.fromkeys(row.problem for row in guarded))

    def draw(problem: str) -> Markup:
        drawn = partial(draw_acceptance, rows=evaluation.rows_of(problem), looks=looks)
        return inline_svg(drawn, f"What the guard accepted on {problem}", f"guard-{problems.index(problem)}")

    shown = {name: look for name, look in looks.items() if name in {row.optimizer for row in guarded}}
    return Section("acceptance", "The guard", _grid(GUARD, problems, draw, shown))


def _failed(evaluation: Evaluation) -> Section:
    rows = [
        ("", [each.optimizer, each.problem, "tuning" if each.seed is None else str(each.seed), each.error])
        for each in evaluation.failed
    ]
    title, columns = "Failed runs", ["optimizer", "problem", "seed", "error"]
    body = macros("parts").table(title, columns, rows, "words tall")
    return Section("failed", title, body)


def _grid(text: str, problems: Sequence[str], draw: Callable[[str], Markup], looks: Looks) -> Markup:
    """Return a picture for each problem below one legend, "" without problems."""
    pictures = [(problem, draw(problem)) for problem in problems]
    return macros("evaluation").grid(text, _swatches(looks), pictures)  # type: ignore[no-any-return]


def _swatches(looks: Looks) -> list[tuple[str, Markup]]:
    return [(name, swatch(look)) for name, look in looks.items()]


def _configuration(record: EvaluationRecord) -> Section:
    title = "Configuration"
    if record.settings is None:
        return Section("configuration", title, missing=record.why_not("evaluate.yaml", "No configuration."))
    every, defaults = flat_settings(record.settings), flat_settings(EvaluateSettings())
    changed = {name: value for name, value in every.items() if defaults.get(name) != value}
    return Section("configuration", title, macros("evaluation").configuration(changed, every))


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
    known = [(name, value) for name, value in facts.items() if value]
    return Section("origin", title, macros("parts").pairs(title, known))
