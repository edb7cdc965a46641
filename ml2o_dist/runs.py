"""Joins the rooms: meta-train, compare, register. The only place that knows all of them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ml2o_dist import artifact
from ml2o_dist.cluster_connection import connected
from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.config_file import dump_settings, first_difference, load_settings, settings_hash
from ml2o_dist.errors import UserError
from ml2o_dist.evaluation.benchmark import Comparison, compare
from ml2o_dist.evaluation.cells import Cell, CellResult, Learned, run_cells_on_ray
from ml2o_dist.evaluation.report import comparison_markdown, comparison_table, plot_comparison, plot_meta_loss
from ml2o_dist.metatrain.checkpoint import newest_checkpoint
from ml2o_dist.metatrain.pool import PoolError, Stopped, WorkerPool
from ml2o_dist.metatrain.trainer import Row, Trainer
from ml2o_dist.problems import ProblemContext, ProblemSpec
from ml2o_dist.progress import StepDisplay
from ml2o_dist.stopping import StopRequest, stop_on_signals
from ml2o_dist.tracking.registry import register_version
from ml2o_dist.tracking.run import Status
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.store import home_folder, redacted, resolve_tracking_uri

log = logging.getLogger(__name__)


class Aborted(Exception):
    """The run could not go on; what it had is in a checkpoint. Exit code 4."""


class Interrupted(Exception):
    """The run was asked to stop by a signal; what it had is in a checkpoint. Exit code 128 + signal."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def meta_train(
    settings: MetaTrainSettings,
    run_dir: Path,
    *,
    resume: bool = False,
    address: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Meta-train, compare with baselines, register a version; return what `ml2o meta-train --json` prints.

    Raises:
        UserError: settings, data, cluster or run directory are not as they must be (exit code 2).
        Aborted, Interrupted: see there; `--resume` goes on from the checkpoint.
    """
    console = console or Console(stderr=True)
    run_dir = run_dir if run_dir.is_absolute() else home_folder() / run_dir
    uri = resolve_tracking_uri(settings.tracking.uri)
    trainer = Trainer(settings, run_dir, device_of(settings))
    if resume:
        for refusal in trainer.resume():
            console.print(f"[yellow]checkpoint refused:[/] {refusal}", highlight=False)
    else:
        _check_fresh(run_dir, settings)
    check_problems(settings)
    console.print(f"run directory  {run_dir}", highlight=False, soft_wrap=True)
    console.print(f"tracking URI   {redacted(uri)}", highlight=False, soft_wrap=True)
    _write_config(run_dir, settings)
    with _log_file(run_dir), connected(address) as where, stop_on_signals() as stop:
        console.print(f"Ray            {where}", highlight=False, soft_wrap=True)
        try:
            with (
                closing(WorkerPool(settings.workers, settings.resources, stop)) as pool,
                _tracked(trainer, uri) as sink,
            ):
                _train(trainer, pool, sink, console)
                pool.close()
                return _finish(trainer, sink, uri, console, stop)
        except Stopped:
            trainer.save()
            name = signal.Signals(stop.signal_number).name
            raise Interrupted(stop.signal_number, f"stopped by {name}; {_how_to_resume(trainer)}") from None
        except PoolError as error:
            trainer.save()
            raise Aborted(f"{error}; {_how_to_resume(trainer)}") from error


@contextmanager
def _tracked(trainer: Trainer, uri: str) -> Iterator[MlflowSink]:
    """Open the trainer's MLflow run, or go on with it, and end it as the `with` block ended."""
    settings = trainer.settings
    sink = MlflowSink.open(
        uri,
        settings.tracking.experiment,
        trainer.progress.tracking_run or None,
        trainer.run_dir.name,
        params=_parameters(settings),
        tags={"config_hash": settings_hash(settings), "git": _git_commit(), "run_dir": str(trainer.run_dir)},
    )
    trainer.progress.tracking_run = sink.run_id or trainer.progress.tracking_run
    status: Status = "FINISHED"
    try:
        yield sink
    except BaseException as error:
        status = "KILLED" if isinstance(error, Stopped) else "FAILED"
        raise
    finally:
        sink.close(status)


def resumed_settings(run_dir: Path, overrides: tuple[str, ...]) -> MetaTrainSettings:
    """Read the settings of the run in `run_dir`, to go on with it; raises UserError where there is none."""
    folder = run_dir if run_dir.is_absolute() else home_folder() / run_dir
    if not (folder / "config.yaml").exists():
        raise UserError(f"nothing to resume: {folder} holds no config.yaml")
    return load_settings(folder / "config.yaml", overrides)


def device_of(settings: MetaTrainSettings) -> str:
    """Resolve `device: auto`: cuda where the workers ask for a share of a GPU, else cpu."""
    if settings.device != "auto":
        return settings.device
    return "cuda" if settings.resources.num_gpus > 0 else "cpu"


def check_problems(settings: MetaTrainSettings) -> None:
    """Build every validation and test problem and every training member once, so that what is wrong shows now.

    It also builds the image caches before several workers ask for them. Raises UserError.
    """
    training = [ProblemSpec.of(m.name, {k: v[0] for k, v in m.choices}) for m in settings.family.training().members]
    texts = (*settings.family.validation, *settings.family.test)
    objectives = settings.rule.count if settings.rule.objectives == "per_objective" else None
    for spec in dict.fromkeys([*training, *map(ProblemSpec.parse, texts)]):
        problem = spec.build(ProblemContext(data_root=settings.data.root))
        if objectives is not None and problem.objectives != objectives:
            raise UserError(
                f"rule.count={objectives} with rule.objectives=per_objective, but {spec} has {problem.objectives} "
                "objectives; use rule.objectives=tied for any number"
            )


def _train(trainer: Trainer, pool: WorkerPool, sink: MlflowSink, console: Console) -> None:
    settings, progress = trainer.settings, trainer.progress
    with StepDisplay(console, "meta-train", settings.meta_steps, trainer.learner.version) as display:

        def on_row(step: int, row: Row) -> None:
            progress.tracking_run = progress.tracking_run or sink.run_id or ""
            figures = {name: value for name, value in row.items() if value == value}
            sink.log(figures | {"workers": float(pool.alive), "worker_restarts": float(pool.restarts)}, step)
            last = next((r["meta_loss"] for r in reversed(progress.history) if "meta_loss" in r), float("nan"))
            display.update(
                step,
                f"meta-loss {last:.4f}  best validation {progress.best_score:.4f} (step {progress.best_step})  "
                f"{progress.inner_steps_per_s:,.0f} inner steps/s  workers {pool.alive}",
            )

        trainer.run(pool.run, on_row)


def _finish(trainer: Trainer, sink: MlflowSink, uri: str, console: Console, stop: StopRequest) -> dict[str, Any]:
    settings, progress, run_dir = trainer.settings, trainer.progress, trainer.run_dir
    provenance = {
        "config_hash": settings_hash(settings),
        "seed": settings.seed,
        "meta_steps": settings.meta_steps,
        "best_meta_step": progress.best_step,
        "validation_score": progress.best_score,
        "git": _git_commit(),
        "mlflow_run": sink.run_id or "",
        "training_problems": [member.problem for member in settings.family.train],
        "validation_problems": list(settings.family.validation),
        "test_problems": list(settings.family.test),
    }
    saved = artifact.save_artifact(run_dir, trainer.best_weights, settings.rule, provenance)
    plots = run_dir / "plots"
    plots.mkdir(exist_ok=True)
    plot_meta_loss(progress.history, plots / "meta_loss.png")
    comparison: Comparison | None = None
    if settings.compare:
        comparison = _compare(trainer, console, stop)
        (run_dir / "comparison.md").write_text(comparison_markdown(comparison))
        plot_comparison(comparison, plots / "comparison.png")
        sink.log_artifact(run_dir / "comparison.md")
    for picture in sorted(plots.glob("*.png")):
        sink.log_artifact(picture, "plots")
    sink.log_artifact(run_dir / "config.yaml")
    sink.flush()
    version = _register(trainer, sink, uri, comparison, console)
    console.print(f"weights        {saved.path}", highlight=False, soft_wrap=True)
    return {
        "run_dir": str(run_dir),
        "meta_steps": settings.meta_steps,
        "weights_sha256": saved.weights_sha256,
        "inner_steps_per_s": progress.inner_steps_per_s,
        "registered_version": version,
        "comparison": comparison.to_json() if comparison else None,
    }


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
        console.print(f"[yellow]not registered:[/] {error}", highlight=False)
        return None
    console.print(f"registered     {tracking.model} version {version}, alias candidate", highlight=False)
    return version


def _check_fresh(run_dir: Path, settings: MetaTrainSettings) -> None:
    config = run_dir / "config.yaml"
    if not config.exists() or newest_checkpoint(run_dir / "checkpoints")[0] is None:
        return
    difference = first_difference(settings, load_settings(config))
    if difference:
        raise UserError(f"{run_dir} holds a run of another configuration ({difference}); choose another --run-dir")
    raise UserError(f"{run_dir} holds a run of this configuration; add --resume to go on, or choose another --run-dir")


def _write_config(run_dir: Path, settings: MetaTrainSettings) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_settings(settings))
    except OSError as error:
        raise UserError(f"run directory {str(run_dir)!r} cannot be written: {error.strerror}") from error


def _how_to_resume(trainer: Trainer) -> str:
    return (
        f"checkpoint at meta-step {trainer.learner.version} of {trainer.settings.meta_steps} written; "
        f"go on with: ml2o meta-train --run-dir {trainer.run_dir} --resume"
    )


@contextmanager
def _log_file(run_dir: Path) -> Iterator[None]:
    handler = logging.FileHandler(run_dir / "run.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("ml2o_dist")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _parameters(settings: MetaTrainSettings) -> dict[str, object]:
    flat: dict[str, object] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = str(value)[:500]

    walk(settings.model_dump(mode="json", by_alias=True), "")
    return flat


def _git_commit() -> str:
    """Return the commit of the folder the command was started in, "" where there is none."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, cwd=os.getcwd(), check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
