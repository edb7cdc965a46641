"""Are the image problems as hard as the literature's? Hypervolumes of linear-scalarisation fronts of the LeNet.

    .venv/bin/python benchmarks/scalarization_fronts.py --data-root ../shared/data --out runs/fronts

For each data set one LeNet for each ray w trains on w_1 f_1 + w_2 f_2 with Adam at 0.001 and batches of 256, the
recipe of Pareto hypernetworks and their successors. Each ray keeps the epoch with the lowest weighted validation loss;
its test cross-entropies over all test pairs are a point of the front, whose hypervolume has the reference (2, 2).
Published (GMOOAR, NeurIPS 2022; MultiMNIST / MultiFashion / Fashion+MNIST): EPO 2.95 / 2.31 / 2.86, PHN-LS 2.79 /
2.14 / 2.67, one network for each task 2.89 / 2.22 / 2.85.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from ml2o_dist.evaluation.metrics import hypervolume
from ml2o_dist.problems import ProblemContext, ProblemSpec
from ml2o_dist.problems.base import autograd_gradient
from ml2o_dist.problems.multitask import MultiTaskImages

DATA_SETS = ("multimnist", "multifashion", "multifashionmnist")
BATCH = 256
LR = 0.001
TRAINING_PAIRS = 110_000


def test_front(problem: MultiTaskImages, weights: Tensor, epochs: int, seed: int) -> tuple[Tensor, list[int]]:
    """Train one network for each row of `weights` [P, m]; return test losses [P, m] and the epoch each ray keeps."""
    rays = len(weights)
    parameters = problem.initial_parameters([seed] * rays).requires_grad_(True)
    optimizer = torch.optim.Adam([parameters], lr=LR)
    generator = torch.Generator().manual_seed(seed)
    best, kept = weights.new_full((rays,), float("inf")), [0] * rays
    front = weights.new_full((rays, problem.objectives), float("nan"))
    for epoch in range(1, epochs + 1):
        for _ in range(TRAINING_PAIRS // BATCH):
            batch = problem.sample_batch(generator)
            parameters.grad, _ = autograd_gradient(problem.losses, parameters, batch, weights)
            optimizer.step()
        with torch.no_grad():
            validation = problem.test_metrics(parameters, split="validation", samples=None)["test_loss"]
            test = problem.test_metrics(parameters, samples=None)["test_loss"]
        score = (validation * weights).sum(dim=1)
        for ray in (score < best).nonzero()[:, 0].tolist():
            best[ray], front[ray], kept[ray] = score[ray], test[ray], epoch
    return front.cpu(), kept


@click.command()
@click.option("--data", "data_sets", multiple=True, default=DATA_SETS, show_default=True)
@click.option("--variant", default="cosmos", show_default=True, help="Of the LeNet: cosmos or paretomtl.")
@click.option("--rays", default=5, show_default=True, help="From (0.1, 0.9) to (0.9, 0.1).")
@click.option("--epochs", default=6, show_default=True)
@click.option("--seeds", default=1, show_default=True)
@click.option("--data-root", default="")
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/scalarization-fronts"), show_default=True)
def main(
    data_sets: tuple[str, ...],
    variant: str,
    rays: int,
    epochs: int,
    seeds: int,
    data_root: str,
    device: str,
    out: Path,
) -> None:
    """Print the table; `--out`/fronts.jsonl keeps a line for each data set and seed, done once."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "fronts.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    first = torch.linspace(0.1, 0.9, rays)
    weights = torch.stack([first, 1 - first], dim=1)
    for data in data_sets:
        for seed in range(seeds):
            wanted = {"data": data, "variant": variant, "rays": rays, "epochs": epochs, "seed": seed}
            row = next((row for row in done if wanted.items() <= row.items()), None)
            if row is None:
                row = wanted | measured(data, variant, weights, epochs, seed, data_root, torch.device(device))
                with file.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
            click.echo(f"{data} seed {seed}: hypervolume {row['hypervolume']:.3f}, {row['seconds'] / 60:.0f} min")


def measured(
    data: str, variant: str, weights: Tensor, epochs: int, seed: int, data_root: str, device: torch.device
) -> dict[str, Any]:
    """Return the front of one data set and seed, its hypervolume, and what it took."""
    start = time.monotonic()
    spec = ProblemSpec.of(data, {"net": "lenet5", "variant": variant, "batch": BATCH})
    problem = spec.build(ProblemContext(instances=len(weights), device=device, data_root=data_root))
    assert isinstance(problem, MultiTaskImages)
    front, kept = test_front(problem, weights.to(device), epochs, seed)
    return {
        "hypervolume": hypervolume(front, torch.full((2,), 2.0)).value,
        "front": front.tolist(),
        "kept": kept,
        "seconds": time.monotonic() - start,
    }


if __name__ == "__main__":
    main()
