"""`ml2o sweep`: one call into the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ml2o_dist.cli.command import command, run_options


@click.command("sweep")
@run_options(
    config="YAML settings: the search space, the base, the search; or a sweep's run directory.",
    run_dir="Where the sweep lives: a folder that all machines share [default: runs/sweep-<time>].",
    seed="Of the search: short for --set seed=N. Trials have meta_train.seed.",
)
@click.option(
    "--resume", is_flag=True, help="Go on with the sweep in --run-dir: running trials from their checkpoints."
)
@command
def sweep(
    console: Console,
    config: Path | None,
    overrides: tuple[str, ...],
    run_dir: str | None,
    seed: int | None,
    address: str,
    tracking_uri: str | None,
    resume: bool,
) -> dict[str, Any]:
    """Meta-train with settings drawn from a search space, keep the best.

    `space` names keys of `ml2o meta-train` and where their values come from, as `learner.lr: {loguniform: [1e-4, 0.1]}`
    or `rule.hidden: {choice: [8, 16]}`; jobs/configs/sweep.yaml is an example. All of it is checked before anything
    starts. Each trial is a meta-training of `meta_train` (a file, or settings over the embedded default) with workers
    of its own; its score is the validation of its best weights. The best trial's are registered as a version.

    Exit codes: 0 done, 2 wrong words or settings, 3 done, but trials failed (--resume tries them again), 4 aborted and
    130 / 143 stopped (--resume goes on).
    """
    from ml2o_dist.workflows import api

    if seed is not None:
        overrides += (f"seed={seed}",)
    if tracking_uri is not None:
        overrides += (f"tracking.uri={tracking_uri}",)
    return api.sweep(config, run_dir, overrides=overrides, resume=resume, address=address, console=console).answer
