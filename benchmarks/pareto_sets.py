"""Fronts of PWE-MoE and its comparators over data sets and seeds, with paired bootstrap intervals.

    .venv/bin/python benchmarks/pareto_sets.py --data-root ../shared/data --seeds 3

Each data set and seed is a whole `ml2o pareto-set train` of jobs/configs/pareto_set.yaml in a folder of `--out`; it is
gone on with where it was stopped, and done once. The table has means over seeds of the test split's figures, and of
the hypervolume a 95 % interval (bootstrap over the seeds).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np

DATA_SETS = ("multimnist", "multifashion", "multifashionmnist")
CHEAP = "average,arithmetic,ties,soup"


@click.command()
@click.option("--data", "data_sets", multiple=True, default=DATA_SETS, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--comparators", default=CHEAP, show_default=True, help="Joined by commas.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As for `ml2o pareto-set train`.")
@click.option("--config", default="jobs/configs/pareto_set.yaml", show_default=True)
@click.option("--data-root", default="")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/pareto-sets"), show_default=True)
def main(
    data_sets: tuple[str, ...],
    seeds: int,
    comparators: str,
    overrides: tuple[str, ...],
    config: str,
    data_root: str,
    out: Path,
) -> None:
    """Run what is left, then print a table for each data set."""
    for data in data_sets:
        for seed in range(seeds):
            run(data, seed, comparators, overrides, config, data_root, out / f"{data}-{seed}")
        show(data, [json.loads((out / f"{data}-{seed}" / "fronts.json").read_bytes()) for seed in range(seeds)])


def run(
    data: str, seed: int, comparators: str, overrides: tuple[str, ...], config: str, data_root: str, folder: Path
) -> None:
    """Train one Pareto set, or what is left of it."""
    settings = [f"tasks={data}", f"seed={seed}", f"comparators=[{comparators}]", f"data.root={data_root}", *overrides]
    words = ["pareto-set", "train", "--config", config, "--run-dir", str(folder.absolute()), "--quiet"]
    words += [word for setting in settings for word in ("--set", setting)]
    if (folder / "pareto_set.yaml").exists():
        words.append("--resume")
    subprocess.run([sys.executable, "-m", "ml2o_dist", *words], check=True)


def show(data: str, runs: list[dict]) -> None:
    """Print the table of one data set."""
    click.echo(f"\n{data}, {len(runs)} seeds")
    click.echo(
        "| approach | hypervolume | IGD+ | monotonicity | trained | seconds | MB |\n|---|---:|---:|---:|---:|---:|---:|"
    )
    names = [each["approach"] for each in runs[0]["approaches"]]
    found = {name: [next(a for a in run["approaches"] if a["approach"] == name) for run in runs] for name in names}
    for name, each in sorted(found.items(), key=lambda pair: -np.mean([a["test"]["hypervolume"] for a in pair[1]])):
        volumes = [a["test"]["hypervolume"] for a in each]
        monotone = [a["test"]["monotonicity"] for a in each]
        click.echo(
            f"| {name} | {np.mean(volumes):.3f} {interval(volumes)} | {np.mean([a['igd_plus'] for a in each]):.3f} | "
            f"{'-' if monotone[0] is None else f'{np.mean(monotone):.2f}'} | {each[0]['trained_parameters']:,} | "
            f"{np.mean([a['seconds'] for a in each]):.0f} | {max(a['peak_mb'] for a in each):.0f} |"
        )


def interval(values: list[float]) -> str:
    """Return a 95 % bootstrap interval of the mean; of one value none."""
    if len(values) == 1:
        return ""
    means = np.random.default_rng(0).choice(values, size=(10_000, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"[{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
