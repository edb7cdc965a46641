"""How fast do optimizers train the routers of a Pareto set? Steps and seconds to the same validation hypervolume.

    .venv/bin/python benchmarks/router_training.py RUN_DIR --optimizer mean+adam@0.01 --optimizer runs/mm

RUN_DIR is a finished `ml2o pareto-set train`: its start and experts serve, its routers are trained anew by each
optimizer from the same first values and on the same batches. The target is 99.9 % of the best final hypervolume.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
import torch
from torch import Tensor

from ml2o_dist.config import EvaluateSettings
from ml2o_dist.config_file import read_settings
from ml2o_dist.evaluation.optimizer_names import parse_optimizers
from ml2o_dist.evaluation.optimizer_specs import HandDesigned
from ml2o_dist.paretoset.conditioned import Fused
from ml2o_dist.paretoset.experts import network_of
from ml2o_dist.paretoset.fronts import Front
from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.image_tasks import load_tasks
from ml2o_dist.paretoset.preference_problem import PreferenceProblem
from ml2o_dist.paretoset.preferences import evaluation_rays
from ml2o_dist.paretoset.scalarization import Scalarization
from ml2o_dist.paretoset.settings import ParetoSetSettings
from ml2o_dist.paretoset.states import read_state
from ml2o_dist.paretoset.training import train
from ml2o_dist.tracking.registry import resolve_model

TARGET = 0.999


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True))
@click.option("--optimizer", "optimizers", multiple=True, default=["mean+adam@0.01"], show_default=True)
@click.option("--steps", default=1000, show_default=True)
@click.option("--every", default=100, show_default=True, help="Steps between two measurements.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--samples", default=2000, show_default=True, help="Of the validation split.")
@click.option("--tracking-uri", default="")
def main(
    run_dir: Path,
    optimizers: tuple[str, ...],
    steps: int,
    every: int,
    seeds: int,
    samples: int,
    tracking_uri: str,
) -> None:
    """Print a row for each optimizer, and the curves as JSON."""
    torch.set_num_threads(1)
    settings = read_settings(ParetoSetSettings, run_dir / "pareto_set.yaml", ())
    tasks = load_tasks(settings.tasks, settings.data.root)
    names = ("start", *(f"expert_{t + 1}" for t in range(tasks.count)))
    files = settings.experts.files or [run_dir / "experts" / f"{name}.safetensors" for name in names]
    start, *experts = [read_state(file) for file in files]
    network = network_of(tasks, settings.network, settings.seed)
    rays = evaluation_rays(tasks.count, 4)
    entrants = parse_optimizers(EvaluateSettings(optimizers=optimizers), lambda name: resolve_model(tracking_uri, name))
    curves: dict[str, list[list[tuple[int, float, float]]]] = {}
    for entrant in entrants:
        optimizer = entrant.optimizer(None)
        for seed in range(seeds):
            fusion = Fusion(
                network,
                start,
                experts,
                modules=settings.modules,
                heads=network.head_names,
                scale=settings.scale,
                begin=settings.routers.begin,
                seed=seed,
            )
            problem = PreferenceProblem(
                Fused(fusion), tasks, Scalarization("ls"), batch=settings.routers.batch, device=torch.device("cpu")
            )
            points: list[tuple[int, float, float]] = []

            def note(step: int, parameters: Tensor, seconds: float, problem=problem, points=points) -> bool:
                if step % every == 0 or step == 1:
                    measured = [problem.measure(parameters, ray, "validation", samples) for ray in rays]
                    losses, accuracies = (torch.stack(each) for each in zip(*measured, strict=True))
                    points.append((step, seconds, Front(rays, losses, accuracies).hypervolume))
                return True

            with tempfile.TemporaryDirectory() as folder:
                final = settings.routers.final_lr if isinstance(optimizer, HandDesigned) else 1.0
                rule = optimizer.rule(problem.device, problem.dtype)
                train(
                    problem, rule, steps=steps, seed=seed, folder=Path(folder), fingerprint={}, final_lr=final,
                    checkpoint_every=steps + 1, on_step=note,
                )  # fmt: skip
            curves.setdefault(entrant.name, []).append(points)
            click.echo(
                f"{entrant.name} seed {seed}: hypervolume {points[-1][2]:.4f} in {points[-1][1]:.0f} s", err=True
            )
    target = TARGET * max(points[-1][2] for runs in curves.values() for points in runs)
    click.echo(
        f"| optimizer | final hypervolume | steps to {target:.4f} | seconds to it | ms a step |\n|---|---|---|---|---:|"
    )
    for name, runs in curves.items():
        reached = [next(((s, t) for s, t, volume in points if volume >= target), None) for points in runs]
        shown = [" ".join("-" if each is None else f"{each[i]:.0f}" for each in reached) for i in (0, 1)]
        last = " ".join(f"{points[-1][2]:.4f}" for points in runs)
        pace = sum(points[-1][1] for points in runs) / sum(points[-1][0] for points in runs) * 1000
        click.echo(f"| {name} | {last} | {shown[0]} | {shown[1]} | {pace:.0f} |")
    click.echo(json.dumps(curves))


if __name__ == "__main__":
    main()
