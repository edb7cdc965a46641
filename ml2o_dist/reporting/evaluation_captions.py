"""Explanations of an evaluation's figures and of which direction is better: a lead, then one text per term."""

from __future__ import annotations

from ml2o_dist.evaluation.evaluated import Evaluation
from ml2o_dist.reporting.evaluation_figures import (
    ACCURACY,
    AT_EVALUATIONS,
    AT_TIME,
    CRITICALITY,
    DELTA_M,
    DIVERGED,
    EVALUATIONS,
    GUARD,
    IMPROVED,
    LOG_AREA,
    LOSS,
    RANK,
    RATIO,
    RATIO_AT_EVALUATIONS,
    RATIO_AT_TIME,
    SPEEDUP,
    TO_BEST,
    count,
)

Terms = list[tuple[str, str]]
"""Pairs (term, its explanation)."""


def rows_lead(evaluation: Evaluation) -> str:
    """Return the lead of the rows: suite, seeds and steps."""
    settings = evaluation.settings
    suite = f"Suite {evaluation.suite}: " if evaluation.suite else ""
    return (
        f"{suite}{count(settings.seeds, 'paired seed')}, {settings.steps} steps (N on a problem written PROBLEM@N); "
        "means ± standard errors."
    )


def row_terms(evaluation: Evaluation) -> Terms:
    """Return the explanations of the rows' figures, only of those that occur."""
    settings, rows = evaluation.settings, evaluation.rows
    terms = [(LOSS, "summed over the objectives, over the last tenth of the steps; lower is better")]
    if any(row.optimizer == settings.reference for row in rows):
        spent = (
            f"the loss when as much was spent, in evaluations or time, as {settings.reference} spends in all its steps"
        )
        terms.append((f"{AT_EVALUATIONS}, {AT_TIME}", spent))
    if any(row.test_accuracy for row in rows):
        terms.append((ACCURACY, "of each task on unseen data; higher is better"))
    small = "small on flat stretches too, so it says little alone"
    terms.append((CRITICALITY, f"of the end point on a large fixed batch; lower is better, but {small}"))
    terms.append((EVALUATIONS, "forward and backward passes of a run"))
    if any(row.acceptance is not None for row in rows):
        terms.append(
            (f"accepted, {GUARD}", "steps at which the learned candidate was taken; the guard's share of their time")
        )
    if any(row.front for row in rows):
        terms.append(("hypervolume", "of the seeds' end points, and the known front's own; higher is better"))
        terms.append(("IGD+, epsilon", "how far the end points are from the known front; lower is better"))
        terms.append(("outside", "end points that are not better than the reference point"))
    if any(row.tuning for row in rows):
        grid = ", ".join(f"{lr:g}" for lr in settings.learning_rates)
        terms.append(("@", f"the best learning rate of {grid} on {count(settings.tuning_seeds, 'other seed')}"))
    return terms


def standings_lead(evaluation: Evaluation) -> str:
    """Return the lead of the standings: reference and problems, or why there are no standings."""
    reference, problems = evaluation.settings.reference, len(evaluation.problems)
    if not evaluation.standings:
        missing = f"the reference {reference} is not among the optimizers (add --optimizer {reference})"
        return f"No standings: {missing}." if problems else ""
    counted = max(standing.problems for standing in evaluation.standings)
    of = "" if counted == problems else f" of {problems} (the other losses are not positive by construction)"
    return f"Against {reference} on the same seeds, over {count(counted, 'problem')}{of}; [in brackets] 95 % intervals."


def standing_terms(evaluation: Evaluation) -> Terms:
    """Return the explanations of the standings' figures, [] without standings."""
    if not evaluation.standings:
        return []
    return [
        (RATIO, "loss / the reference's, interquartile mean on a log scale over problems and seeds; below 1 is better"),
        (TO_BEST, "the ratio to the best baseline of each problem (of a baseline: to the best of all)"),
        (IMPROVED, "probability to end lower than the reference"),
        (RANK, "mean place among the baselines and the optimizer; 1 is best"),
        (
            f"{RATIO_AT_EVALUATIONS}, {RATIO_AT_TIME.removeprefix('ratio ')}",
            "when as much was spent as by the reference",
        ),
        (DELTA_M, "mean change of each objective's loss (of each task's accuracy); below 0 is better"),
        (SPEEDUP, "how many times its steps the best baseline needs for the same loss; above 1 is quicker"),
        (LOG_AREA, "mean over the steps of the ratio's logarithm; below 0 is better"),
        (DIVERGED, "share of the runs"),
    ]


def caption(lead: str, terms: Terms) -> str:
    """Return the lead and the terms as one paragraph."""
    said = [f"{what[0].upper()}{what[1:]}: {how}." for what, how in terms]
    return " ".join(filter(None, (lead, *said)))
