"""How many workers one driver serves: the real trainer, pool and learner, with workers that only wait.

    .venv/bin/python benchmarks/scaling.py

Every worker is a stand-in that takes its item through Ray, waits as long as an episode would take, and sends back the
result of an episode that was recorded before; a few processes of one CPU share play all of them. So everything that the
driver does is real: items, weights through the object store, dispatch, twins, the reduction, Adam. Episodes last
`--seconds` on average, lognormal with a spread of 30 %, drawn from the item's key.

utilisation: seconds of the episodes used, over wall time and workers. driver CPU: seconds of its process over the wall
time. The first line is the reduction alone.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import click
import ray
import torch

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.config_file import load_settings
from ml2o_dist.metatrain import pool as pool_module
from ml2o_dist.metatrain.episode import EpisodeResult, EpisodeSpec, run_episode
from ml2o_dist.metatrain.learner import Learner
from ml2o_dist.metatrain.pool import WorkerPool
from ml2o_dist.metatrain.schedule import training_items
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.metatrain.workers import Worker, Workers
from ml2o_dist.rules.learned import Weights
from ml2o_dist.runtime.cluster import connected

HOSTS = 2
"""Processes that play the workers."""

SPREAD = 0.3
"""Standard deviation of the logarithm of an episode's seconds."""


def duration(spec: EpisodeSpec, mean: float) -> float:
    """Return how long the episode takes, the same wherever it runs."""
    return mean * math.exp(random.Random(spec.seed).gauss(-(SPREAD**2) / 2, SPREAD))


class Host:
    """Plays many workers at once."""

    def __init__(self, results: list[EpisodeResult], mean: float) -> None:
        self.results, self.mean = results, mean

    async def where(self) -> tuple[int, str]:
        return os.getpid(), ray.get_runtime_context().get_node_id()

    async def run(self, weights: Weights, spec: EpisodeSpec) -> EpisodeResult:
        seconds = duration(spec, self.mean)
        await asyncio.sleep(seconds)
        result = self.results[spec.seed % len(self.results)]
        return EpisodeResult(**{**vars(result), "seconds": seconds})


class PlayedWorkers(Workers):
    """Workers whose actors are the hosts, in turn."""

    hosts: tuple[Any, ...] = ()

    def _start(self, number: int) -> None:
        actor = self.hosts[number % HOSTS]
        self.starting[actor.where.remote()] = Worker(actor, number)

    def close(self) -> None:
        self.up, self.idle, self.starting = [], [], {}


def resident_mb() -> float:
    """Return the memory of this process."""
    (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def measure(settings: MetaTrainSettings, hosts: tuple[Any, ...]) -> dict[str, float]:
    """Meta-train with played workers; the figures are of the meta-steps after the first."""
    with mock.patch.object(PlayedWorkers, "hosts", hosts), mock.patch.object(pool_module, "Workers", PlayedWorkers):
        pool = WorkerPool(settings.workers, settings.resources)
    rows: list[dict[str, float]] = []
    marks: list[tuple[float, float]] = []

    def on_row(step: int, row: dict[str, float]) -> None:
        if "meta_loss" in row:
            rows.append(row)
            marks.append((time.perf_counter(), time.process_time()))

    memory = resident_mb()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(settings, Path(folder)).run(pool.begin, on_row)
    pool.close()
    (began, cpu_began), (ended, cpu_ended) = marks[0], marks[-1]
    wall = sum(row["seconds"] for row in rows[1:])
    return {
        "workers": settings.workers,
        "staleness": settings.staleness,
        "results_per_s": settings.slots * (len(rows) - 1) / (ended - began),
        "utilisation": sum(row["worker_utilisation"] * row["seconds"] for row in rows[1:]) / wall,
        "learner_share": sum(row["learner_share"] * row["seconds"] for row in rows[1:]) / wall,
        "driver": (cpu_ended - cpu_began) / (ended - began),
        "lag": max(row["lag"] for row in rows),
        "memory_mb": resident_mb() - memory,
    }


def reduction_per_s(settings: MetaTrainSettings, results: list[EpisodeResult], count: int) -> float:
    """Return how many results a second the learner reduces, Adam's step included."""
    learner, many = Learner(settings), [results[i % len(results)] for i in range(count)]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        learner.update(many)
        times.append(time.perf_counter() - began)
    return count / statistics.median(times)


@click.command()
@click.option("--workers", multiple=True, default=(16, 64, 256, 1024), show_default=True)
@click.option("--staleness", multiple=True, default=(0, 1), show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="Mean of an episode.")
@click.option("--slots-per-worker", default=2, show_default=True)
@click.option("--meta-steps", default=6, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    workers: tuple[int, ...],
    staleness: tuple[int, ...],
    seconds: float,
    slots_per_worker: int,
    meta_steps: int,
    as_json: bool,
) -> None:
    """Serve more and more workers."""
    torch.set_num_threads(1)
    common = (f"meta_steps={meta_steps}", f"validation.every={meta_steps}", "trajectories.meta_steps=0")
    plain = load_settings(None, (*common, "resources.num_cpus=0.001", "horizon=20"))
    plain = plain.model_copy(update={"device": "cpu", "checkpoint_every": meta_steps})
    items = training_items(plain, 0, "cpu")
    results = [run_episode(Learner(plain).weights, item.spec) for item in items]
    reduced = reduction_per_s(plain, results, 1024)
    rows = []
    with connected("local"):
        host = ray.remote(Host).options(num_cpus=0.1, max_concurrency=4096)
        hosts = tuple(host.remote(results, seconds) for _ in range(HOSTS))
        for count in workers:
            for lag in staleness:
                update = {"workers": count, "slots": count * slots_per_worker, "staleness": lag}
                rows.append(measure(plain.model_copy(update=update), hosts))
                click.echo(json.dumps(rows[-1]), err=True)
    if as_json:
        click.echo(json.dumps({"reduction_per_s": reduced, "rows": rows}))
        return
    click.echo(f"reduction alone: {reduced:,.0f} results/s of {results[0].gradient.nbytes:,} bytes")  # type: ignore[union-attr]
    click.echo("workers  staleness  results/s  utilisation  learner share  driver CPU  lag  memory MB")
    for row in rows:
        click.echo(
            f"{row['workers']:7,} {row['staleness']:10} {row['results_per_s']:10,.1f} {row['utilisation']:11.1%} "
            f"{row['learner_share']:13.1%} {row['driver']:11.1%} {row['lag']:4.0f} {row['memory_mb']:10.1f}"
        )


if __name__ == "__main__":
    main()
