"""What rollouts beside updates give: meta-steps per second at staleness 0, 1, 2 where the episodes are uneven.

    .venv/bin/python benchmarks/staleness.py
    .venv/bin/python benchmarks/staleness.py --workers 4 --set slots=6

The real trainer and pool on MultiDigits, each episode a small MLP or, one in three, a CNN that takes several times as
long, three of them for two workers. Every staleness goes on for `--meta-steps` with the same episodes, in turn
over the rounds, on workers that are warm; validation and checkpoints are left out as far as the trainer allows.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.config_file import load_settings
from ml2o_dist.metatrain.pool import WorkerPool
from ml2o_dist.metatrain.schedule import training_items
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.runtime.cluster import connected

UNEVEN = (
    "family.train=[{problem: multidigits, weight: 2, choices: {hidden: [16]}},"
    "{problem: 'multidigits[net=cnn,channels=8-16]'}]",
    "family.validation=['multidigits[hidden=8]']",
    "validation.instances=1",
    "validation.horizon=1",
    "slots=3",
    "horizon=20",
)


def meta_steps_per_s(settings: MetaTrainSettings, pool: WorkerPool) -> float:
    """Return the rate of one meta-training from the end of its first meta-step to the end of its last."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        Trainer(settings, Path(folder)).run(
            pool.begin, lambda step, row: ends.append(time.perf_counter()) if "meta_loss" in row else None
        )
    return (len(ends) - 1) / (ends[-1] - ends[0])


@click.command()
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As in ml2o meta-train.")
@click.option("--workers", default=2, show_default=True)
@click.option("--meta-steps", default=16, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(overrides: tuple[str, ...], workers: int, meta_steps: int, rounds: int, as_json: bool) -> None:
    """Compare the pace of meta-training at staleness 0, 1 and 2."""
    torch.set_num_threads(1)
    plain = load_settings(None, (*UNEVEN, f"meta_steps={meta_steps}", f"validation.every={meta_steps}", *overrides))
    plain = plain.model_copy(update={"device": "cpu", "checkpoint_every": meta_steps})
    rates: dict[int, list[float]] = {0: [], 1: [], 2: []}
    with connected("local"):
        pool = WorkerPool(workers, plain.resources)
        pool.run(training_items(plain, 0, "cpu") * workers, Trainer(plain, Path()).learner.weights)
        for number in range(rounds):
            for staleness in rates if number % 2 == 0 else reversed(rates):
                settings = plain.model_copy(update={"staleness": staleness})
                rates[staleness].append(meta_steps_per_s(settings, pool))
        pool.close()
    if as_json:
        click.echo(json.dumps({"workers": workers, "slots": plain.slots, "meta_steps_per_s": rates}))
        return
    base = statistics.median(rates[0])
    for staleness, found in rates.items():
        middle = statistics.median(found)
        click.echo(
            f"staleness {staleness}: {middle:6.2f} meta-steps/s (median of {rounds}; {min(found):.2f} to "
            f"{max(found):.2f}), {middle / base:.2f} times that of 0"
        )


if __name__ == "__main__":
    sys.exit(main())
