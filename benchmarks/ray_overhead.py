"""What Ray costs: episodes on workers against the same episodes in plain processes, and how soon the first are done.

    .venv/bin/python benchmarks/ray_overhead.py
    .venv/bin/python benchmarks/ray_overhead.py --workers 2

With one worker the episodes run in this very process for comparison, with more in as many plain processes that take
them from one queue and wait for no meta-step. All episodes have K = 50 steps of the embedded default's problems. Both
sides start warm and alternate over the rounds. The overhead is the median over the rounds of (Ray / plain) - 1 in wall
time. Once, for a fresh pool: seconds from Ray being up to workers that are up, and to the end of a first meta-step.
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
import torch

from ml2o_dist.config import MetaTrainSettings, ResourceSettings
from ml2o_dist.config_file import load_settings
from ml2o_dist.metatrain.episode import run_episode
from ml2o_dist.metatrain.learner import Learner
from ml2o_dist.metatrain.pool import WorkerPool
from ml2o_dist.metatrain.schedule import training_items
from ml2o_dist.runtime.cluster import connected


def plain_worker(tasks: Any, results: Any, weights: Any) -> None:
    """Run episodes from `tasks` until None comes; answer each with its inner steps."""
    torch.set_num_threads(1)
    for spec in iter(tasks.get, None):
        results.put(run_episode(weights, spec).inner_steps)


class PlainProcesses:
    """As many processes as there are workers, fed from one queue; one worker: this process."""

    def __init__(self, count: int, weights: Any) -> None:
        self.weights, self.processes = weights, []
        if count > 1:
            context = multiprocessing.get_context("spawn")
            self.tasks, self.results = context.Queue(), context.Queue()
            arguments = (self.tasks, self.results, weights)
            self.processes = [context.Process(target=plain_worker, args=arguments, daemon=True) for _ in range(count)]
            for process in self.processes:
                process.start()

    def run(self, specs: list[Any]) -> None:
        if not self.processes:
            for spec in specs:
                run_episode(self.weights, spec)
            return
        for spec in specs:
            self.tasks.put(spec)
        for _ in specs:
            self.results.get()

    def close(self) -> None:
        for _ in self.processes:
            self.tasks.put(None)
        for process in self.processes:
            process.join()


def measure(settings: MetaTrainSettings, workers: int, meta_steps: int, rounds: int) -> dict[str, Any]:
    """Return seconds of both sides for every round, and those of a fresh pool's start."""
    weights = Learner(settings).weights
    steps = [training_items(settings, step, "cpu") for step in range(meta_steps)]
    began = time.perf_counter()
    pool = WorkerPool(workers, ResourceSettings())
    start = {"workers_up_s": time.perf_counter() - began}
    pool.run(steps[0], weights)
    start["first_meta_step_s"] = time.perf_counter() - began
    plain = PlainProcesses(workers, weights)
    plain.run([item.spec for item in steps[0]])

    def on_ray() -> None:
        for items in steps:
            pool.run(items, weights)

    sides = [("ray", on_ray), ("plain", lambda: plain.run([item.spec for items in steps for item in items]))]
    seconds: dict[str, list[float]] = {"ray": [], "plain": []}
    for number in range(rounds):
        for side, run in sides if number % 2 == 0 else reversed(sides):
            began = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - began)
    pool.close()
    plain.close()
    return {"seconds": seconds, "episodes": meta_steps * settings.slots, **start}


@click.command()
@click.option(
    "--config", type=click.Path(path_type=Path), help="Meta-training settings [default: the embedded digits]."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As in ml2o meta-train.")
@click.option("--workers", default=1, show_default=True)
@click.option("--meta-steps", default=4, show_default=True)
@click.option("--rounds", default=6, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    config: Path | None, overrides: tuple[str, ...], workers: int, meta_steps: int, rounds: int, as_json: bool
) -> None:
    """Compare episodes on Ray workers with the same episodes without Ray."""
    torch.set_num_threads(1)
    settings = load_settings(config, ("horizon=50", *overrides))
    with connected("local"):
        answer = measure(settings, workers, meta_steps, rounds)
    ratios = [ray / plain - 1 for ray, plain in zip(answer["seconds"]["ray"], answer["seconds"]["plain"], strict=True)]
    each = {side: statistics.median(values) / answer["episodes"] for side, values in answer["seconds"].items()}
    answer |= {"overhead": statistics.median(ratios), "overheads": ratios, "s_per_episode": each}
    if as_json:
        click.echo(json.dumps(answer))
        return
    for side, value in each.items():
        click.echo(f"{side:6} {1e3 * value:8.1f} ms an episode (median of {rounds} rounds of {answer['episodes']})")
    click.echo(
        f"overhead {100 * answer['overhead']:+.1f} % (median; {100 * min(ratios):+.1f} to {100 * max(ratios):+.1f})"
    )
    click.echo(
        f"workers up {answer['workers_up_s']:.1f} s after Ray, first meta-step done {answer['first_meta_step_s']:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
