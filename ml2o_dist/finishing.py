"""The end of a meta-training: its weights saved, compared with baselines, reported and registered."""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ml2o_dist import artifact
from ml2o_dist.config_file import settings_hash
from ml2o_dist.errors import Aborted, Incomplete, UserError
from ml2o_dist.evaluation.benchmark import Comparison, compare
from ml2o_dist.evaluation.cell_tasks import run_cells_on_ray
from ml2o_dist.evaluation.cells import Cell, CellResult
from ml2o_dist.evaluation.contestants import Learned
from ml2o_dist.evaluation.plots import plot_comparison, plot_meta_loss
from ml2o_dist.evaluation.report import comparison_markdown, comparison_table
from ml2o_dist.files import replacing
from ml2o_dist.metatrain.pool import Stopped
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.progress import StepDisplay
from ml2o_dist.run_report import write_report
from ml2o_dist.run_storage import RunStorage
from ml2o_dist.stopping import StopRequest
from ml2o_dist.tracking.registry import register_version
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.store import StoreAway

log = logging.getLogger(__name__)


def finish(
    trainer: Trainer, storage: RunStorage, sink: MlflowSink, uri: str, console: Console, stop: StopRequest
) -> dict[str, Any]:
    """Save what `trainer` has come to, compare and register it; return what `ml2o meta-train --json` prints.

    Raises:
        Aborted: the weights could not be written.
        Incomplete: the comparison failed; all else is done.
        Stopped: a stop was requested meanwhile.
    """
    settings, progress, run_dir = trainer.settings, trainer.progress, trainer.run_dir
    provenance = {
        "config_hash": settings_hash(settings),
        "seed": settings.seed,
        "meta_steps": settings.meta_steps,
        "best_meta_step": progress.best_step,
        "validation_score": progress.best_score,
        "git": git_commit(),
        "data_sha256": progress.data_sha256,
        "mlflow_run": sink.run_id or "",
        "training_problems": [member.problem for member in settings.family.train],
        "validation_problems": list(settings.family.validation),
        "test_problems": list(settings.family.test),
    }
    try:
        saved = artifact.save_artifact(run_dir, trainer.best_weights, settings.rule, provenance)
    except UserError as error:  # a full disk: nothing that another setting would mend
        raise Aborted(str(error)) from error
    plots = run_dir / "plots"
    if progress.best_step <= 0:
        console.print("[yellow]no validation was better than the untrained network's: that is what is kept[/]")
    comparison: Comparison | None = None
    failure = ""
    try:
        plot_meta_loss(progress.history, plots / "meta_loss.png")
        if settings.compare:
            comparison = _compare(trainer, console, stop)
            with replacing(run_dir / "comparison.md") as stream:
                stream.write(comparison_markdown(comparison).encode())
            with replacing(run_dir / "comparison.json") as stream:
                stream.write(json.dumps(comparison.to_json()).encode())
            sink.log_artifact(run_dir / "comparison.md")
            sink.log_artifact(run_dir / "comparison.json")
            plot_comparison(comparison, plots / "comparison.png")
    except Stopped:
        raise
    except Exception as error:  # a cell or a picture that broke must not cost the finished weights
        log.info("the comparison failed", exc_info=True)
        failure = f"the comparison failed ({type(error).__name__}: {error}), the weights are saved and registered"
    for picture in sorted(plots.glob("*.png")):
        sink.log_artifact(picture, "plots")
    sink.log_artifact(run_dir / "config.yaml")
    _report(run_dir, sink)
    sink.flush()
    version = _register(trainer, sink, uri, comparison, console)
    console.print(f"weights        {storage.named(str(saved.path))}", highlight=False, soft_wrap=True)
    answer = {
        "run_dir": storage.name,
        "meta_steps": settings.meta_steps,
        "weights_sha256": saved.weights_sha256,
        "inner_steps_per_s": progress.inner_steps_per_s,
        "registered_version": version,
        "comparison": comparison.to_json() if comparison else None,
    }
    if failure:
        raise Incomplete(failure, answer)
    return answer


def _report(run_dir: Path, sink: MlflowSink) -> None:
    """Write the run's page; a page that cannot be made costs a line, not the run."""
    try:
        write_report(run_dir)
    except Exception as error:
        log.warning("no report.html: %s: %s; try again: ml2o report %s", type(error).__name__, error, run_dir)
        log.info("the report failed", exc_info=True)
    else:
        sink.log_artifact(run_dir / "report.html")


def _compare(trainer: Trainer, console: Console, stop: StopRequest) -> Comparison:
    settings, resources = trainer.settings, trainer.settings.resources
    contestants = [Learned("initial", settings.rule, None), Learned("learned", settings.rule, trainer.best_weights)]
    began = time.monotonic()

    def run_cells(cells: Sequence[Cell]) -> list[CellResult]:
        with StepDisplay(console, "compare", len(cells)) as display:

            def on_done(done: int, total: int) -> None:
                if stop():
                    raise Stopped
                display.update(done)

            return run_cells_on_ray(cells, num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, on_done=on_done)

    comparison = compare(settings, contestants, run_cells)
    console.print(f"compared in {time.monotonic() - began:.0f} s", highlight=False)
    console.print(comparison_table(comparison))
    return comparison


def _register(
    trainer: Trainer, sink: MlflowSink, uri: str, comparison: Comparison | None, console: Console
) -> int | None:
    tracking = trainer.settings.tracking
    if not tracking.register_version:
        return None
    description = comparison_markdown(comparison) if comparison else "Not compared with baselines."
    try:
        version = register_version(
            uri,
            tracking.model,
            trainer.run_dir,
            run_id=sink.run_id,
            experiment=tracking.experiment,
            description=description,
        )
    except UserError as error:
        later = ""
        if isinstance(error, StoreAway):
            sink.register_later(tracking.model, trainer.run_dir, description)
            later = "; done with what is sent later"
        console.print(f"[yellow]not registered:[/] {error}{later}", highlight=False, soft_wrap=True)
        return None
    console.print(f"registered     {tracking.model} version {version}, alias candidate", highlight=False)
    return version


def git_commit() -> str:
    """Return the commit of the folder the command was started in, "" where there is none."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
