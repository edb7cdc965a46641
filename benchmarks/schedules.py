"""What is a schedule of the step's size worth, for those who know how many steps they will take?

    .venv/bin/python benchmarks/schedules.py --data-root ../shared/data

The weights in the wheel, and Adam on the sum at the best of three learning rates for each problem and schedule, with
torch's schedulers over `lr`, on the held-out problems of the weights' recipe. "Linear 1/2" falls to zero over the last
half of the steps. Figures: the summed training loss, mean of the last tenth of the steps, geometric mean over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import click
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ml2o_dist import ML2O
from ml2o_dist.config_file import load_settings
from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec
from ml2o_dist.runtime.seeding import generator

Schedule = Callable[[float], float]
"""The share of the steps that are taken -> factor on the step's size."""

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda share: 1.0,
    "linear 1/4": lambda share: min(1.0, 4 * (1 - share)),
    "linear 1/2": lambda share: min(1.0, 2 * (1 - share)),
    "linear": lambda share: 1 - share,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
}
RATES = (0.001, 0.003, 0.01)
"""Of Adam."""


@click.command()
@click.option("--recipe", default="jobs/configs/ml2o_small.yaml", show_default=True)
@click.option("--data-root", default="")
@click.option("--steps", default=200, show_default=True)
@click.option("--seeds", default=3, show_default=True)
def main(recipe: str, data_root: str, steps: int, seeds: int) -> None:
    """Print a row for each problem and optimizer, a column for each schedule."""
    torch.set_num_threads(1)
    click.echo(f"| problem | optimizer | {' | '.join(SCHEDULES)} |")
    click.echo("|---|---|" + "---:|" * len(SCHEDULES))
    means: dict[str, list[list[float]]] = {"Adam": [], "ML2O": []}
    for text in load_settings(Path(recipe)).family.validation:
        problem = ProblemSpec.parse(text).build(ProblemContext(data_root=data_root))
        for name in means:
            found = [final(problem, name, schedule, steps, seeds) for schedule in SCHEDULES.values()]
            means[name].append(found)
            click.echo(f"| `{text}` | {name} | {' | '.join(f'{loss:.3f}' for loss in found)} |")
    for name, rows in means.items():
        ratios = (torch.tensor(rows).log().mean(0) - torch.tensor(means["Adam"]).log().mean(0)[0]).exp()
        click.echo(f"| all, to Adam without a schedule | {name} | {' | '.join(f'{each:.3f}' for each in ratios)} |")


def final(problem: Problem, name: str, schedule: Schedule, steps: int, seeds: int) -> float:
    """Return the final loss under `schedule`; of Adam that of its best rate."""
    if name == "ML2O":
        return mean_final(problem, lambda point: ML2O([point]), schedule, steps, seeds)
    return min(
        mean_final(problem, lambda point, rate=rate: torch.optim.Adam([point], rate), schedule, steps, seeds)
        for rate in RATES
    )


def mean_final(
    problem: Problem,
    build: Callable[[Tensor], torch.optim.Optimizer],
    schedule: Schedule,
    steps: int,
    seeds: int,
) -> float:
    """Return the geometric mean over the seeds of the summed loss at the end."""
    logs = []
    for seed in range(seeds):
        point = problem.initial_parameters([seed]).requires_grad_(True)
        optimizer = build(point)
        scheduler = LambdaLR(optimizer, lambda step: schedule(step / steps))
        batches = generator("schedules", seed)
        losses = []
        for _ in range(steps):
            losses.append(one_step(problem, point, optimizer, batches))
            scheduler.step()
        logs.append(math.log(fmean(losses[-max(1, steps // 10) :])))
    return math.exp(fmean(logs))


def one_step(problem: Problem, point: Tensor, optimizer: torch.optim.Optimizer, batches: torch.Generator) -> float:
    """Take a step on the next batch; return the summed loss where it began."""
    batch = problem.sample_batch(batches)

    def losses() -> Tensor:
        return problem.losses(point, batch)[0]

    if isinstance(optimizer, ML2O):
        return float(optimizer.step(losses).sum())
    optimizer.zero_grad()
    total = losses().sum()
    total.backward()
    optimizer.step()
    return float(total.detach())


if __name__ == "__main__":
    main()
