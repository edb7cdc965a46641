"""The end of a meta-training: its weights saved, compared with baselines, reported and registered."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from rich.console import Console

from ml2o_dist import artifact
from ml2o_dist.config import EvaluateSettings, MetaTrainSettings
from ml2o_dist.config_file import settings_hash
from ml2o_dist.evaluation.evaluated import Evaluation
from ml2o_dist.evaluation.optimizer_names import Entrant, parse_optimizers
from ml2o_dist.evaluation.optimizer_specs import Learned
from ml2o_dist.evaluation.suites import comparison_settings
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.reporting.evaluation_plots import plot_evaluation
from ml2o_dist.reporting.evaluation_tables import evaluation_markdown, evaluation_table
from ml2o_dist.reporting.plots import plot_meta_loss
from ml2o_dist.rundir.log import COMPARISON_FAILED
from ml2o_dist.rundir.storage import RunStorage
from ml2o_dist.runtime.errors import Aborted, Incomplete, UserError
from ml2o_dist.runtime.files import replacing
from ml2o_dist.runtime.reading import read_json, validated
from ml2o_dist.runtime.shown_text import headed
from ml2o_dist.runtime.stopping import Stopped, StopRequest
from ml2o_dist.tracking.registry import register_version
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.spool import SPOOL_FOLDER, unsent_values
from ml2o_dist.tracking.store import StoreAway
from ml2o_dist.tracking.sync import sync_command
from ml2o_dist.workflows.benchmark_run import run_benchmark
from ml2o_dist.workflows.lifecycle import git_commit, say_unsent, waiting_values
from ml2o_dist.workflows.report import write_report

RESULT_FILE = "result.json"
"""The output of `ml2o meta-train --json` and the settings behind it; if this file exists, the run is finished."""


class _Answer(BaseModel):
    run_dir: str
    meta_steps: int
    weights_sha256: str
    inner_steps_per_s: float
    registered_version: int | None
    comparison: dict[str, Any] | None


class _Result(BaseModel):
    answer: _Answer
    asked: dict[str, Any]


_RESULT = TypeAdapter(_Result)
"""The content of `RESULT_FILE`."""

log = logging.getLogger(__name__)


def finish(
    trainer: Trainer, storage: RunStorage, sink: MlflowSink, uri: str, console: Console, stop: StopRequest
) -> dict[str, Any]:
    """Save the weights of `trainer`, compare and register them; return what `ml2o meta-train --json` prints.

    Raises:
        Aborted: the weights could not be written.
        Incomplete: the comparison failed; all else is done.
        Stopped: a stop was requested meanwhile.
    """
    settings, progress, run_dir = trainer.settings, trainer.progress, trainer.run_dir
    provenance = {
        "config_hash": settings_hash(settings),
        "seed": settings.seed,
        **({"begun_from": progress.begun_from} if progress.begun_from else {}),
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
    except UserError as error:  # a full disk: no other setting would help
        raise Aborted(str(error)) from error
    plots = run_dir / "plots"
    if progress.best_step <= 0:
        before = settings.init_from or "the untrained network"
        console.print(f"no validation was better than that of {before}, which is what is kept", style="yellow")
    comparison: Evaluation | None = None
    failure = ""
    try:
        plot_meta_loss(list(progress.history), plots / "meta_loss.png")
        if settings.compare:
            comparison = _compare(trainer, console, stop)
            with replacing(run_dir / "comparison.md") as stream:
                stream.write(evaluation_markdown(comparison).encode())
            with replacing(run_dir / "comparison.json") as stream:
                stream.write(json.dumps(comparison.to_json(curves=True)).encode())
            sink.log_artifact(run_dir / "comparison.md")
            sink.log_artifact(run_dir / "comparison.json")
            plot_evaluation(comparison, plots)
            if comparison.failed:
                first, count = comparison.failed[0], len(comparison.failed)
                failure = f"{count} cells of the comparison failed; {first.optimizer} on {first.problem}: {first.error}"
    except Stopped:
        raise
    except Exception as error:  # a cell or a picture that broke must not cost the finished weights
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        log.info("%s: %s", COMPARISON_FAILED, reason, exc_info=True)
        failure = f"{COMPARISON_FAILED} ({reason}), the weights are saved and registered"
    for picture in sorted(plots.glob("*.png")):
        sink.log_artifact(picture, "plots")
    sink.log_artifact(run_dir / "config.yaml")
    unwritten = _report(storage, sink)
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
    if not (failure or unwritten):
        unwritten = _keep(answer, trainer)
    if failure or unwritten:
        raise Incomplete("; ".join(filter(None, [failure, unwritten])), answer)
    return answer


def finished_answer(trainer: Trainer) -> dict[str, Any] | None:
    """Return the earlier answer of `finish` for the resumed `trainer`; None if `finish` must run (again).

    It must run if the settings now ask for another comparison or another place in MLflow, or if the version could not
    be registered and does not wait in the spool.
    """
    settings, run_dir = trainer.settings, trainer.run_dir
    try:
        kept = read_json(run_dir / RESULT_FILE, "result", within=run_dir, finite=True)
        validated(_RESULT, kept, RESULT_FILE)
        answer: dict[str, Any] = kept["answer"]
        if answer["comparison"] is not None:
            Evaluation.from_json(answer["comparison"])
        same = (kept["asked"], answer["meta_steps"], answer["weights_sha256"]) == (
            _asked(settings),
            trainer.learner.version,
            artifact.load_artifact(run_dir).weights_sha256,
        )
    except (FileNotFoundError, UserError):  # missing or damaged: it can be made again
        return None
    lacks_version = settings.tracking.register_version and answer["registered_version"] is None
    if not same or settings.meta_steps != trainer.learner.version:
        return None
    return None if lacks_version and not (run_dir / SPOOL_FOLDER).exists() else answer


def show_finished(answer: Mapping[str, Any], trainer: Trainer, storage: RunStorage, uri: str, console: Console) -> None:
    """Say that the run is finished, and print its table again."""
    run_dir, tracking = trainer.run_dir, trainer.settings.tracking
    console.print(f"finished       {answer['meta_steps']} meta-steps, nothing is left to do", highlight=False)
    if answer["comparison"] is not None:
        console.print(evaluation_table(Evaluation.from_json(answer["comparison"])))
    if answer["registered_version"] is not None:
        console.print(f"registered     {tracking.model} version {answer['registered_version']}", highlight=False)
    weights = storage.named(str(run_dir / artifact.WEIGHTS_FILE))
    console.print(f"weights        {weights}", highlight=False, soft_wrap=True)
    if (run_dir / SPOOL_FOLDER).exists():
        waiting = waiting_values(run_dir, unsent_values(run_dir / SPOOL_FOLDER))
        say_unsent(console, waiting, uri, sync_command(run_dir, uri))


def _keep(answer: Mapping[str, Any], trainer: Trainer) -> str:
    """Record last of all that the run is finished; on failure return the reason: a resume then finishes it again."""
    file = trainer.run_dir / RESULT_FILE
    try:
        with replacing(file) as stream:
            stream.write((json.dumps({"answer": answer, "asked": _asked(trainer.settings)}, indent=1) + "\n").encode())
    except OSError as error:
        return f"{file} cannot be written: {error.strerror or error}"
    return ""


def _asked(settings: MetaTrainSettings) -> dict[str, Any]:
    """Return, as JSON values, the settings that affect the end of a run and that a resumed run may change."""
    return settings.model_dump(mode="json", by_alias=True, include={"compare", "comparison", "tracking"})


def _report(storage: RunStorage, sink: MlflowSink) -> str:
    """Write the run's page; return why it cannot be written. A page that cannot be made is only logged."""
    try:
        write_report(storage.folder, place=storage.name)
    except UserError as error:
        return str(error)
    except Exception as error:
        log.warning("no report.html: %s: %s; try again: ml2o report %s", type(error).__name__, error, storage.name)
        log.info("the report failed", exc_info=True)
    else:
        sink.log_artifact(storage.folder / "report.html")
    return ""


def compared(settings: MetaTrainSettings) -> tuple[EvaluateSettings, list[Entrant]]:
    """Return the settings of the comparison, and its baselines.

    Raises:
        UserError: a wrong suite, or an unknown baseline.
    """
    evaluation = comparison_settings(settings)
    return evaluation, parse_optimizers(evaluation, _no_version)


def _no_version(reference: str) -> Path:
    raise UserError(f"comparison.baselines: {reference} is a registered version; evaluate it with `ml2o evaluate`")


def _compare(trainer: Trainer, console: Console, stop: StopRequest) -> Evaluation:
    evaluation, baselines = compared(trainer.settings)
    rule = trainer.settings.rule
    initial, learned = Learned("initial", rule, None), Learned("learned", rule, trainer.best_weights)
    entrants = [
        *baselines,
        Entrant("initial", lambda lr: initial),
        Entrant("learned", lambda lr: learned, role="learned"),
    ]
    named = evaluation.model_copy(update={"optimizers": ("initial", "learned")})
    comparison = run_benchmark(named, entrants, console, stop)
    console.print(f"compared in {comparison.seconds:.0f} s", highlight=False)
    console.print(evaluation_table(comparison))
    return comparison


def _description(comparison: Evaluation | None) -> str:
    """Return the text for MLflow's small box: the standings, or if there are none, how the figures were made."""
    if comparison is None:
        return "Not compared with baselines."
    beginning, _, _ = evaluation_markdown(comparison).partition("\n\n")
    return f"On problems that its meta-training did not see (all of it: comparison.md of the run):\n\n{beginning}"


def _register(
    trainer: Trainer, sink: MlflowSink, uri: str, comparison: Evaluation | None, console: Console
) -> int | None:
    tracking = trainer.settings.tracking
    if not tracking.register_version:
        return None
    description = _description(comparison)
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
        console.print(headed("not registered:", f"{error}{later}"), soft_wrap=True)
        return None
    console.print(f"registered     {tracking.model} version {version}, alias candidate", highlight=False)
    return version
