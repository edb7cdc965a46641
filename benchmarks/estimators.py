"""Bias and variance of the meta-gradient estimators: in one direction that can be checked, and as a whole.

    .venv/bin/python benchmarks/estimators.py --data-root ../shared/data
    .venv/bin/python benchmarks/estimators.py --data-root ../shared/data --whole

The direction is the scale of every step. Adding s to the residual form's first output multiplies every step of an
untrained optimizer by exp(s). The slope of the episode's meta-loss in s is measured by central differences over
s = -0.3, +0.3 (wide, because the loss of a stochastic episode is rough) and compared with the entry that each estimator
gives for it, over the same episodes.

`--whole` compares all entries, of the trained weights in the wheel, with those of the exact estimator over the same
episodes. With d the difference of two gradients of one episode and G the mean exact one: bias |mean d| / |G| (what the
noise of the mean adds to the squares is subtracted, from |G|^2 as well) and how far noise alone would carry it, noise
sqrt(E|g - mean g|^2) / |G| of one episode, and the cosine between the mean gradients.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from typing import Any

import click
import torch
from torch import Tensor

from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.config import EstimatorSettings, RuleSettings
from ml2o_dist.metatrain.episode import EpisodeSpec, run_episode
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from ml2o_dist.rules.learned import Weights

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

WHOLE = ESTIMATORS | {
    "es sigma 0.01": EstimatorSettings(kind="es", sigma=0.01, clip=UNCLIPPED),
    "es sigma 0.1": EstimatorSettings(kind="es", sigma=0.1, clip=UNCLIPPED),
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


def compare(problem: str, horizon: int, seeds: int, data_root: str) -> dict[str, Any]:
    """Return bias, noise and cosine of every estimator's whole gradient, at the weights in the wheel."""
    learned = load_artifact("pretrained")
    parsed, found = ProblemSpec.parse(problem), {}
    for name, estimator in WHOLE.items():
        specs = [EpisodeSpec(parsed, s, horizon, 1, learned.rule, estimator, data_root=data_root) for s in range(seeds)]
        results = [run_episode(learned.weights, spec).gradient for spec in specs]
        found[name] = torch.stack([torch.from_numpy(gradient).double() for gradient in results if gradient is not None])
        if len(found[name]) < seeds:
            raise click.ClickException(
                f"{name}: {seeds - len(found[name])} of {seeds} episodes have no finite gradient"
            )
    exact = found["exact"]
    size = math.sqrt(square_of_mean(exact))
    return {
        name: (
            math.sqrt(square_of_mean(gradients - exact)) / size,
            math.sqrt(float((gradients - exact).var(dim=0).sum()) / seeds) / size,
            math.sqrt(float(gradients.var(dim=0).sum())) / size,
            float(torch.cosine_similarity(gradients.mean(dim=0), exact.mean(dim=0), dim=0)),
        )
        for name, gradients in found.items()
    }


def square_of_mean(rows: Tensor) -> float:
    """Return |E row|^2, estimated without bias from the rows [S, n], but for not being negative."""
    return max(0.0, float(rows.mean(dim=0).square().sum() - rows.var(dim=0).sum() / len(rows)))


@click.command()
@click.option("--problem", "problems", multiple=True, default=PROBLEMS, show_default=True)
@click.option("--horizon", default=200, show_default=True)
@click.option("--seeds", default=8, show_default=True)
@click.option("--lr", default=0.005, show_default=True)
@click.option("--data-root", default="")
@click.option(
    "--whole", is_flag=True, help="Bias, noise and cosine of the whole gradient, at the weights in the wheel."
)
@click.option("--json", "as_json", is_flag=True)
def main(
    problems: tuple[str, ...], horizon: int, seeds: int, lr: float, data_root: str, whole: bool, as_json: bool
) -> None:
    """Compare the estimators' slope of the meta-loss in the step's scale with finite differences."""
    torch.set_num_threads(1)
    rule = RuleSettings(hidden=8, lr=lr)
    answer = {}
    for problem in problems:
        found = (
            compare(problem, horizon, seeds, data_root) if whole else measure(problem, rule, horizon, seeds, data_root)
        )
        answer[problem] = found
        if not as_json:
            click.echo(f"{problem}  K = {horizon}, {seeds} seeds")
            for name, values in found.items():
                shown = "bias {:.3f} +- {:.3f}  noise {:.2f}  cosine {:+.3f}" if whole else "{:+.4f} +- {:.4f}"
                click.echo(f"  {name:20} {shown.format(*values)}")
    if as_json:
        click.echo(json.dumps(answer))


if __name__ == "__main__":
    main()
