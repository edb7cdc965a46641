"""Inner steps per second: Ray workers against as many plain processes that run the same episodes, in one run.

    .venv/bin/python benchmarks/workers.py --workers 2 --meta-steps 4

The plain processes take the episodes of every meta-step from one queue, without Ray, without waiting for each other's
meta-step: what the machine gives when nothing is coordinated. Both sides start warm (one meta-step is run first). The
order alternates over the rounds, and the medians and their ratio are printed.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click

from ml2o_dist.cluster_connection import connected
from ml2o_dist.config import MetaTrainSettings, ResourceSettings
from ml2o_dist.config_file import load_settings
from ml2o_dist.metatrain.learner import Learner
from ml2o_dist.metatrain.schedule import training_items


def plain_worker(tasks: Any, results: Any, weights: Any) -> None:
    """Run episodes from `tasks` until None comes; answer each with its inner steps."""
    import torch

    from ml2o_dist.metatrain.episode import run_episode

    torch.set_num_threads(1)
    for spec in iter(tasks.get, None):
        results.put(run_episode(weights, spec).inner_steps)


class PlainProcesses:
    """As many processes as there are workers, fed from one queue."""

    def __init__(self, count: int, weights: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.tasks, self.results, self.count = context.Queue(), context.Queue(), count
        arguments = (self.tasks, self.results, weights)
        self.processes = [context.Process(target=plain_worker, args=arguments, daemon=True) for _ in range(count)]
        for process in self.processes:
            process.start()

    def run(self, specs: list[Any]) -> int:
        for spec in specs:
            self.tasks.put(spec)
        return sum(self.results.get() for _ in specs)

    def close(self) -> None:
        for _ in self.processes:
            self.tasks.put(None)
        for process in self.processes:
            process.join()


def measure(settings: MetaTrainSettings, workers: int, meta_steps: int, rounds: int) -> dict[str, Any]:
    """Return inner steps per second of both sides for every round."""
    from ml2o_dist.metatrain.pool import WorkerPool

    weights = Learner(settings).weights
    steps = [training_items(settings, step, "cpu") for step in range(meta_steps)]
    rates: dict[str, list[float]] = {"ray": [], "plain": []}
    pool = WorkerPool(workers, ResourceSettings())
    plain = PlainProcesses(workers, weights)

    def run_ray() -> int:
        return sum(result.inner_steps for items in steps for result in pool.run(items, weights))

    def run_plain() -> int:
        return plain.run([item.spec for items in steps for item in items])

    pool.run(steps[0], weights)
    plain.run([item.spec for item in steps[0]])
    for number in range(rounds):
        sides = [("ray", run_ray), ("plain", run_plain)]
        for side, run in sides if number % 2 == 0 else reversed(sides):
            began = time.perf_counter()
            done = run()
            rates[side].append(done / (time.perf_counter() - began))
    pool.close()
    plain.close()
    return rates


@click.command()
@click.option(
    "--config", type=click.Path(path_type=Path), help="Meta-training settings [default: the embedded digits]."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
@click.option("--workers", default=2, show_default=True)
@click.option("--meta-steps", default=4, show_default=True)
@click.option("--rounds", default=4, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    config: Path | None, overrides: tuple[str, ...], workers: int, meta_steps: int, rounds: int, as_json: bool
) -> None:
    """Compare Ray workers with plain processes on the same episodes."""
    settings = load_settings(config, overrides)
    with connected("local"):
        rates = measure(settings, workers, meta_steps, rounds)
    medians = {side: statistics.median(values) for side, values in rates.items()}
    ratios = [ray / plain for ray, plain in zip(rates["ray"], rates["plain"], strict=True)]
    answer = {"inner_steps_per_s": medians, "ratio": statistics.median(ratios), "rounds": rates}
    if as_json:
        click.echo(json.dumps(answer))
        return
    for side, value in medians.items():
        click.echo(f"{side:6} {value:8.1f} inner steps/s (median; {min(rates[side]):.1f} to {max(rates[side]):.1f})")
    click.echo(f"ratio  {answer['ratio']:8.3f} (median of the rounds; {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    sys.exit(main())
