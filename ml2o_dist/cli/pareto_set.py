"""`ml2o pareto-set`: train a network with a dial, and take plain networks out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ml2o_dist.cli.command import command


@click.group("pareto-set")
def pareto_set() -> None:
    """Fuse networks fine-tuned for single tasks into one that takes a preference."""


@pareto_set.command("train")
@click.option("--config", type=click.Path(path_type=Path), help="YAML settings [default: scikit-learn's digits].")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a dotted key; repeatable.")
@click.option("--run-dir", help="Where it lives: a folder that all machines share [default: runs/pareto-<time>].")
@click.option("--seed", type=int, help="Short for --set seed=N.")
@click.option("--address", default="auto", show_default=True, help="Ray: auto, local, or HOST:PORT.")
@click.option("--tracking-uri", help="Short for --set tracking.uri=URI.")
@click.option("--resume", is_flag=True, help="Go on with what lies in --run-dir.")
@command
def train(
    console: Console,
    config: Path | None,
    overrides: tuple[str, ...],
    run_dir: str | None,
    seed: int | None,
    address: str,
    tracking_uri: str | None,
    resume: bool,
) -> dict[str, Any]:
    """Train start, experts and routers, compare with other ways to a front, register the set in MLflow.

    The start is trained on all tasks, an expert for each task from it (Ray Train), then the routers, which merge the
    experts for any preference; `comparators` are trained as Ray tasks. Results: fronts.md, plots/, report.html with
    the dial, pareto_set.safetensors for `ml2o pareto-set query`.

    Exit codes: 0 done, 2 wrong words or settings, 3 done, but comparators failed, 4 aborted, 130 / 143 stopped
    (--resume goes on).
    """
    from ml2o_dist.workflows import api

    if seed is not None:
        overrides += (f"seed={seed}",)
    if tracking_uri is not None:
        overrides += (f"tracking.uri={tracking_uri}",)
    return api.train_pareto_set(
        config, run_dir, overrides=overrides, resume=resume, address=address, console=console
    ).answer


@pareto_set.command("query")
@click.argument("place")
@click.option("--preference", required=True, metavar="R1,R2,...", help="One number for each task; they sum to 1.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the network's state dict there (.safetensors).")
@click.option("--data-root", default="", help="Image data, to measure the network [default: ML2O_DATA].")
@click.option("--measure/--no-measure", default=True, show_default=True, help="Measure it on the test split.")
@click.option("--tracking-uri", help="Where models:/NAME@ALIAS is looked up.")
@command
def query(
    console: Console,
    place: str,
    preference: str,
    out: Path | None,
    data_root: str,
    measure: bool,
    tracking_uri: str | None,
) -> dict[str, Any]:
    """Turn the dial of the set in PLACE: a run directory, a .safetensors file, or models:/NAME@ALIAS.

    Prints losses and accuracies of the network for this preference, and with --out writes its plain state dict, of the
    original size.
    """
    from ml2o_dist.workflows.query_pareto_set import query_set, written_preference

    return query_set(
        place,
        written_preference(preference),
        out=out,
        data_root=data_root,
        measure=measure,
        tracking_uri=tracking_uri or "",
        console=console,
    )
