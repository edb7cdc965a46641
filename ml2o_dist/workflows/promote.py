"""The workflow of `ml2o models promote`: run the gate suite, or find its results, and update the registry."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ml2o_dist.config import EvaluateSettings
from ml2o_dist.evaluation.gate import Judgement, judge
from ml2o_dist.runtime.errors import Incomplete, Refused, UserError
from ml2o_dist.tracking.champion import ChampionChanged, champion_of, promote_version
from ml2o_dist.tracking.registry import CANDIDATE, CHAMPION, find_version
from ml2o_dist.tracking.store import tracking_uri_to_keep
from ml2o_dist.workflows.evaluate import failures, run_evaluation

TRIES = 5
"""How often a candidate is compared again after another promotion was quicker."""


def promote(
    settings: EvaluateSettings, model: str, reference: str = "", *, force: bool, address: str, console: Console
) -> dict[str, Any]:
    """Make a version the champion of `model` if it is better than the champion on a suite.

    Better: the whole 95 % interval of its loss over the champion's, paired by seeds, lies below 1. The first champion
    must be better than the tuned reference of the suite. Finished cells are reused, not run again.

    Args:
        settings: of the gate suite.
        reference: `models:/NAME@ALIAS` or `models:/NAME/VERSION`; "": the candidate of `model`.
        force: promote it even if the gate refuses; the version's tag `forced` keeps the gate's reason.

    Returns what `ml2o models promote --json` prints.

    Raises:
        UserError: there is no such version, or it is champion already.
        Refused: it is not better (exit code 5).
        Incomplete: a cell of the gate failed.
    """
    uri = tracking_uri_to_keep(settings.tracking.uri)
    version = find_version(uri, reference or f"models:/{model}@{CANDIDATE}")
    model, number = version["name"], version["version"]
    for _ in range(TRIES):
        champion = champion_of(uri, model)
        if champion == number:
            raise UserError(f"{model}/{number} is the {CHAMPION} already")
        judgement, answer = _judge(settings, model, number, champion, address, console)
        if not judgement.passed and not force:
            raise Refused(judgement.reason)
        forced = "" if judgement.passed else judgement.reason
        try:
            promote_version(uri, model, number, expected=champion, note=judgement.reason, forced=forced)
        except ChampionChanged as error:
            console.print(f"{error}: compared again", markup=False, highlight=False, soft_wrap=True)
            continue
        ratio = judgement.ratio
        return {
            "name": model,
            "champion": number,
            "previous": champion,
            "forced": bool(forced),
            "reason": judgement.reason,
            "ratio": [ratio.estimate, ratio.low, ratio.high],
            "mlflow_runs": answer["summary"]["mlflow_runs"],
        }
    raise UserError(f"the {CHAMPION} of {model} changed {TRIES} times while {model}/{number} was compared; try again")


def _judge(
    settings: EvaluateSettings, model: str, number: int, champion: int | None, address: str, console: Console
) -> tuple[Judgement, dict[str, Any]]:
    candidate = f"models:/{model}/{number}"
    over = None if champion is None else f"models:/{model}/{champion}"
    names = (candidate,) if over is None else (candidate, over)
    chosen = settings.model_copy(update={"optimizers": names})
    evaluation, answer, _ = run_evaluation(chosen, None, address=address, console=console)
    if wrong := failures(evaluation):
        raise Incomplete(f"{model}/{number} is not promoted: {'; '.join(wrong)}", answer)
    other = f"tuned {settings.reference}" if champion is None else f"{model}/{champion}"
    return judge(evaluation, candidate, over, named=f"{model}/{number}", over=other), answer
