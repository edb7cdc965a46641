"""Put the weights of a meta-training into the package, with a card that says how they came about.

    .venv/bin/python benchmarks/ship.py runs/small ml2o-small --recipe jobs/configs/ml2o_small.yaml --data-root FOLDER

The card names the recipe, and the weights' sha256 after its first meta-steps on this kind of CPU, which are taken once
more for it: tests/test_pretrained.py takes them again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import ray
import torch

from ml2o_dist.artifact import save_artifact, weights_sha256
from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.config_file import first_difference, load_settings
from ml2o_dist.metatrain.pool import WorkerPool
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.pretrained import SHIPPED

FIRST = 20
"""Meta-steps whose outcome the card promises."""


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.argument("name")
@click.option("--recipe", required=True, type=click.Path(exists=True), help="The settings of the run, as a file.")
@click.option("--data-root", default="")
@click.option("--note", default="", help="Figures, in words.")
def main(run: Path, name: str, recipe: str, data_root: str, note: str) -> None:
    """Write `NAME.safetensors` and its card."""
    found = load_artifact(run)
    settings = recipe_settings(recipe, data_root)
    if difference := first_difference(load_settings(run / "config.yaml"), settings):
        raise click.ClickException(f"{run} is no run of {recipe}: {difference}")
    columns = pq.read_table(run / "metrics.parquet", columns=["seconds"]).to_pydict()
    hours = settings.workers * sum(seconds or 0.0 for seconds in columns["seconds"]) / 3600
    card = dict(found.card["provenance"]) | {
        "recipe": recipe,
        "cpu": cpu(),
        "cpu_hours": round(hours, 1),
        "horizons": sorted(set(settings.horizon)),
        "first_steps": {"meta_steps": FIRST, "weights_sha256": first_steps(settings)},
        "never_trained_on": "Multi-Fashion+MNIST, LeNets, VGGs, any network of the suites `paper` and `shift`",
        "note": note,
    }
    saved = save_artifact(SHIPPED / f"{name}.safetensors", found.weights, found.rule, card)
    click.echo(f"{saved.path}  {saved.weights_sha256}")


def recipe_settings(recipe: str | Path, data_root: str) -> MetaTrainSettings:
    """Return the recipe's settings, on the CPU."""
    return load_settings(Path(recipe), [f"data.root={data_root}", "device=cpu"])


def cpu() -> str:
    """Return what kind of CPU this is, as far as rounding depends on it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__.partition('+')[0]}"


class Reached(Exception):
    """The meta-steps that were wanted are taken."""


def first_steps(settings: MetaTrainSettings, steps: int = FIRST) -> str:
    """Return the sha256 of the learner's weights after the first `steps` meta-steps, on the running Ray or its own."""

    def on_row(step: int, row: dict[str, Any]) -> None:
        if step >= steps and "meta_loss" in row:
            raise Reached

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=settings.workers, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="ml2o-first-") as folder:
        trainer, pool = Trainer(settings, Path(folder)), WorkerPool.of(settings)
        try:
            trainer.begin()
            trainer.run(pool.begin, on_row)
        except Reached:
            pass
        finally:
            pool.close()
    return weights_sha256(trainer.learner.weights)


if __name__ == "__main__":
    main()
