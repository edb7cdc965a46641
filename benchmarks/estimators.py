"""Bias of the meta-gradient estimators in one direction that can be checked: the scale of every step.

    .venv/bin/python benchmarks/estimators.py --data-root ../shared/data

Adding s to the residual form's first output multiplies every step of an untrained optimizer by exp(s). The slope of
the episode's meta-loss in s is measured by central differences over s = -0.3, +0.3 (wide, because the loss of a
stochastic episode is rough) and compared with the entry that each estimator gives for it, over the same episodes.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from typing import Any

import click
import torch

from ml2o_dist.config import EstimatorSettings, RuleSettings
from ml2o_dist.metatrain.episode import EpisodeSpec, Weights, run_episode
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.rules.ml2o import ML2ONetwork

PROBLEMS = (
    "multimnist[net=mlp,hidden=20,size=12,batch=32]",
    "multifashion[net=cnn,channels=8-8,size=12,batch=32]",
    "multimnist[net=mlp,hidden=24,size=18,batch=64]",
)
WIDTH = 0.3
UNCLIPPED = 1e9

ESTIMATORS = {
    **{f"replay gamma {g:g}": EstimatorSettings(gamma=g, clip=UNCLIPPED) for g in (0.9, 0.95, 0.98, 0.99, 1.0)},
    "exact": EstimatorSettings(kind="exact", clip=UNCLIPPED),
}


def shifted(weights: Weights, shift: float) -> Weights:
    """Return the weights with `shift` added to the bias of the first output."""
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    changed["head.bias"][0] += shift
    return changed


def scale_entry(weights: Weights) -> int:
    """Return where the bias of the first output stands in a flat meta-gradient."""
    before = 0
    for name, tensor in weights.items():
        if name == "head.bias":
            return before
        before += tensor.numel()
    raise KeyError("head.bias")


def measure(problem: str, rule: RuleSettings, horizon: int, seeds: int, data_root: str) -> dict[str, Any]:
    """Return mean and standard error over the seeds of the slope and of every estimate of it."""
    weights = ML2ONetwork(rule).state_dict()
    parsed, index = ProblemSpec.parse(problem), scale_entry(weights)
    specs = [
        EpisodeSpec(parsed, seed, horizon, 1, rule, EstimatorSettings(), data_root=data_root) for seed in range(seeds)
    ]
    values: dict[str, list[float]] = {"finite differences": []}
    for spec in specs:
        ends = [run_episode(shifted(weights, sign * WIDTH), spec).meta_loss for sign in (1, -1)]
        values["finite differences"].append((ends[0] - ends[1]) / (2 * WIDTH))
        for name, estimator in ESTIMATORS.items():
            gradient = run_episode(weights, replace(spec, estimator=estimator)).gradient
            values.setdefault(name, []).append(float("nan") if gradient is None else float(gradient[index]))
    return {name: (statistics.mean(v), statistics.stdev(v) / len(v) ** 0.5) for name, v in values.items()}


@click.command()
@click.option("--problem", "problems", multiple=True, default=PROBLEMS, show_default=True)
@click.option("--horizon", default=200, show_default=True)
@click.option("--seeds", default=8, show_default=True)
@click.option("--lr", default=0.005, show_default=True)
@click.option("--data-root", default="")
@click.option("--json", "as_json", is_flag=True)
def main(problems: tuple[str, ...], horizon: int, seeds: int, lr: float, data_root: str, as_json: bool) -> None:
    """Compare the estimators' slope of the meta-loss in the step's scale with finite differences."""
    torch.set_num_threads(1)
    rule = RuleSettings(hidden=8, lr=lr)
    answer = {}
    for problem in problems:
        answer[problem] = measure(problem, rule, horizon, seeds, data_root)
        if not as_json:
            click.echo(f"{problem}  K = {horizon}, {seeds} seeds")
            for name, (mean, error) in answer[problem].items():
                click.echo(f"  {name:20} {mean:+.4f} +- {error:.4f}")
    if as_json:
        click.echo(json.dumps(answer))


if __name__ == "__main__":
    main()
