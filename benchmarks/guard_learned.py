"""A meta-trained optimizer guarded and unguarded, on problems like those of its training and unlike them.

    .venv/bin/python benchmarks/guard_learned.py runs/first

In distribution: the first test problem of `make train`. Out of it: losses a thousand times as large, a horizon ten
times as long, a network with ten times the parameters. The guards: without a budget, with one, and the default; with
one guard batch a step (32 samples) and with four (128). A row is printed as soon as it is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import click
import torch

from ml2o_dist import ML2ORule, ProblemSpec, load_artifact
from ml2o_dist.artifact import Artifact
from ml2o_dist.config import GuardSettings
from ml2o_dist.evaluation.measured_runs import Course, measured_run
from ml2o_dist.evaluation.statistics import mean_and_standard_error
from ml2o_dist.rules.base import UpdateRule
from ml2o_dist.rules.guarded import guarded
from ml2o_dist.rules.stochastic import DSSMG


@dataclass(frozen=True)
class Setting:
    """A problem and how it is met: the factor of its losses, the factor of the horizon."""

    title: str
    problem: str
    loss_scale: float = 1.0
    longer: int = 1


SETTINGS = (
    Setting("in distribution", "multidigits[batch=32,hidden=40,net=mlp]"),
    Setting("losses x 1000", "multidigits[batch=32,hidden=40,net=mlp]", loss_scale=1000.0),
    Setting("horizon x 10", "multidigits[batch=32,hidden=40,net=mlp]", longer=10),
    Setting("parameters x 10", "multidigits[batch=32,hidden=400,net=mlp]"),
)

GUARDS = (
    GuardSettings(budget=0.0),
    GuardSettings(budget=0.0, batches=4),
    GuardSettings(budget=0.0, margin=0.0),
    GuardSettings(budget=0.0, margin=0.0, batches=4),
    GuardSettings(budget=1.0),
    GuardSettings(budget=1.0, batches=4),
    GuardSettings(),
)
"""z = 3 as it is; z = 0, so that the difference is what the margin costs; a budget."""


def rules(weights: Artifact) -> Iterator[tuple[str, UpdateRule]]:
    """Yield every rule with its name."""

    def learned() -> ML2ORule:
        return ML2ORule.from_weights(weights.rule.model_copy(update={"guard": None}), weights.weights)

    yield "dssmg", DSSMG()
    yield "learned", learned()
    for guard in GUARDS:
        budget = f", budget {guard.budget:g}" if guard.budget else ""
        yield f"guarded, z = {guard.margin:g}{budget}, guard batch {32 * guard.batches}", guarded(learned(), guard)


@click.command()
@click.argument("weights")
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True, help="of the usual horizon")
@click.option("--seeds", type=click.IntRange(2), default=5, show_default=True, help="paired seeds")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object in place of the table")
def main(weights: str, steps: int, seeds: int, as_json: bool) -> None:
    """Measure the guard of the meta-trained optimizer in WEIGHTS: a run directory, a file or models:/NAME@ALIAS."""
    torch.set_num_threads(1)
    found, answer = load_artifact(weights), []
    if not as_json:
        click.echo("| setting | rule | summed loss | criticality | accepted | guard's time | ms a step |")
        click.echo("|---|---|---:|---:|---:|---:|---:|")
    for setting in SETTINGS:
        spec = ProblemSpec.parse(setting.problem)
        course = Course.build(spec, tuple(range(seeds)), loss_scale=setting.loss_scale)
        horizon = setting.longer * steps
        for name, rule in rules(found):
            run = measured_run(rule, course, horizon, every=horizon)
            ends = [loss / setting.loss_scale for loss in run.losses[-1].sum(dim=1).tolist()]
            row: dict[str, Any] = {
                "setting": setting.title,
                "rule": name,
                "loss": mean_and_standard_error(ends),
                "criticality": fmean(run.absolute[-1].tolist()) / setting.loss_scale,
                "acceptance": run.acceptance if name.startswith("guarded") else None,
                "guard_share": run.guard_seconds / run.seconds,
                "ms_per_step": 1e3 * run.seconds / horizon,
            }
            answer.append(row)
            if not as_json:
                accepted = "" if row["acceptance"] is None else f"{row['acceptance']:.1%}"
                loss, error = row["loss"]
                click.echo(
                    f"| {setting.title} | {name} | {loss:.3f} ± {error:.3f} | {row['criticality']:.3f} | {accepted} | "
                    f"{row['guard_share']:.0%} | {row['ms_per_step']:.1f} |"
                )
    if as_json:
        click.echo(json.dumps({"weights_sha256": found.weights_sha256, "steps": steps, "rows": answer}))


if __name__ == "__main__":
    main()
