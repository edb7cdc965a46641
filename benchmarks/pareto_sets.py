"""Fronts of PWE-MoE and its comparators over data sets and seeds, with paired bootstrap intervals.

    .venv/bin/python benchmarks/pareto_sets.py --data-root ../shared/data --seeds 3

Each data set and seed is a whole `ml2o pareto-set train` of jobs/configs/pareto_set.yaml in a folder of `--out`; it is
gone on with where it was stopped, and done once. The first `--dear-seeds` of them get the trained comparators, too. The
table has means over the seeds of the test split's figures; of what each approach's hypervolume is above ours at the
same seed it has the mean and a 95 % interval (bootstrap over the seeds).
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
DEAR = "ls,epo,mgda,phn-ls,phn-epo,cosmos,pamal"
OURS = "pwe"


@click.command()
@click.option("--data", "data_sets", multiple=True, default=DATA_SETS, show_default=True)
@click.option("--seeds", default=10, show_default=True)
@click.option("--dear-seeds", default=0, show_default=True, help="Seeds that train all comparators: an hour each.")
@click.option("--comparators", default=CHEAP, show_default=True, help="Joined by commas.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As for `ml2o pareto-set train`.")
@click.option("--config", default="jobs/configs/pareto_set.yaml", show_default=True)
@click.option("--data-root", default="")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/pareto-sets"), show_default=True)
def main(
    data_sets: tuple[str, ...],
    seeds: int,
    dear_seeds: int,
    comparators: str,
    overrides: tuple[str, ...],
    config: str,
    data_root: str,
    out: Path,
) -> None:
    """Run what is left, then print a table for each data set."""
    for data in data_sets:
        for seed in range(seeds):
            names = f"{comparators},{DEAR}" if seed < dear_seeds else comparators
            run(data, seed, names, overrides, config, data_root, out / f"{data}-{seed}")
        show(data, [json.loads((out / f"{data}-{seed}" / "fronts.json").read_bytes()) for seed in range(seeds)])


def run(
    data: str, seed: int, comparators: str, overrides: tuple[str, ...], config: str, data_root: str, folder: Path
) -> None:
    """Train one Pareto set, or what is left of it; nothing where it has all that is wanted."""
    if (folder / "fronts.json").exists():
        found = {each["approach"] for each in json.loads((folder / "fronts.json").read_bytes())["approaches"]}
        if found.issuperset(comparators.split(",")):
            return
    settings = [f"tasks={data}", f"seed={seed}", f"comparators=[{comparators}]", f"data.root={data_root}", *overrides]
    words = ["pareto-set", "train", "--config", config, "--run-dir", str(folder.absolute()), "--quiet"]
    words += [word for setting in settings for word in ("--set", setting)]
    if (folder / "pareto_set.yaml").exists():
        words.append("--resume")
    subprocess.run([sys.executable, "-m", "ml2o_dist", *words], check=True)


def show(data: str, runs: list[dict]) -> None:
    """Print the table of one data set."""
    click.echo(f"\n{data}\n")
    click.echo("| approach | seeds | hypervolume | above ours | IGD+ | monotonicity | trained | seconds | MB |")
    click.echo("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    by_name: dict[str, list[tuple[dict, dict]]] = {}  # each with ours at its seed
    for run in runs:
        approaches = {each["approach"]: each for each in run["approaches"] if "test" in each}
        for name, each in approaches.items():
            by_name.setdefault(name, []).append((each, approaches[OURS]))
    for name, pairs in sorted(by_name.items(), key=lambda item: -np.mean([volume(each) for each, _ in item[1]])):
        found = [each for each, _ in pairs]
        above = [volume(each) - volume(ours) for each, ours in pairs]
        monotone = [each["test"]["monotonicity"] for each in found]
        click.echo(
            f"| {name} | {len(found)} | {np.mean([volume(each) for each in found]):.3f} | "
            f"{'' if name == OURS else f'{np.mean(above):+.3f} {interval(above)}'} | "
            f"{np.mean([each['igd_plus'] for each in found]):.3f} | "
            f"{'-' if monotone[0] is None else f'{np.mean(monotone):.2f}'} | {found[0]['trained_parameters']:,} | "
            f"{np.mean([each['seconds'] for each in found]):.0f} | {max(each['peak_mb'] for each in found):.0f} |"
        )


def volume(approach: dict) -> float:
    """Return the hypervolume of the test front."""
    return float(approach["test"]["hypervolume"])


def interval(values: list[float]) -> str:
    """Return a 95 % bootstrap interval of the mean; of one value none."""
    if len(values) == 1:
        return ""
    means = np.random.default_rng(0).choice(values, size=(10_000, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"[{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
