"""The end of a sweep: its best weights and configuration, tables, page, and a version in the registry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ml2o_dist import artifact
from ml2o_dist.config_file import RUN_CONFIG, dump_settings
from ml2o_dist.metatrain.checkpoint import load_checkpoint
from ml2o_dist.metatrain.trainer import checked_progress
from ml2o_dist.reporting.sweep_plots import plot_sweep
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import replacing
from ml2o_dist.runtime.reading import read_json, validated
from ml2o_dist.runtime.shown_text import headed
from ml2o_dist.sweeping.importance import importance
from ml2o_dist.sweeping.record import SweepRecord, Trial, markdown, shown, shown_step, write_table
from ml2o_dist.sweeping.settings import SweepSettings
from ml2o_dist.sweeping.space import trial_settings
from ml2o_dist.tracking.registry import register_version
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.sweep_runs import SweepRuns
from ml2o_dist.workflows.lifecycle import resume_command
from ml2o_dist.workflows.report import write_report

BEST, RESULT, LIST = RUN_CONFIG, "result.json", "trials.md"
"""The best trial's settings (for `ml2o meta-train --config`), the answer, and the trials as a table."""


class _Answer(BaseModel):
    run_dir: str
    trials: list[dict[str, Any]]
    best: dict[str, Any] | None
    registered_version: int | None


class _Result(BaseModel):
    answer: _Answer
    tracking: dict[str, Any]
    unsent: int


_RESULT = TypeAdapter(_Result)
"""The content of `RESULT`."""


@dataclass(frozen=True)
class Best:
    """The best trial, and its weights as they were saved in the run directory."""

    trial: Trial
    saved: artifact.Artifact


def best_optimizer(
    settings: SweepSettings,
    folder: Path,
    record: SweepRecord,
    checkpoints: Mapping[str, Path],
    provenance: Mapping[str, Any],
) -> Best | None:
    """Save the weights and the configuration of the best trial; None if no trial has reached a validation.

    Raises:
        UserError: the weights cannot be written; CheckpointError: the trial's weights were cut or altered.
    """
    trial = record.best()
    if trial is None:
        return None
    checkpoint = load_checkpoint(checkpoints[trial.id])
    configuration = trial_settings(settings, trial.values)
    weights = {n.removeprefix("best/"): t for n, t in checkpoint.tensors.items() if n.startswith("best/")}
    progress = checked_progress(checkpoint.state.get("progress"))
    family = configuration.family
    saved = artifact.save_artifact(
        folder,
        weights,
        configuration.rule,
        {
            **provenance,
            "seed": configuration.seed,
            "meta_steps": trial.meta_steps,
            "best_meta_step": progress.get("best_step"),
            "validation_score": progress.get("best_score"),
            "sweep": settings.name,
            "trial": trial.number,
            "sampled": trial.values,
            "training_problems": [member.problem for member in family.train],
            "validation_problems": list(family.validation),
            "test_problems": list(family.test),
        },
    )
    with replacing(folder / BEST) as stream:
        header = [f"of trial {trial.number} of the sweep {settings.name}", *record.notes(settings.scheduler)]
        stream.write("".join(f"# {line}\n" for line in header).encode())
        stream.write(dump_settings(configuration).encode())
    return Best(trial, saved)


def write_results(
    settings: SweepSettings,
    folder: Path,
    record: SweepRecord,
    best: Best | None,
    sink: MlflowSink,
    runs: SweepRuns,
    uri: str,
    console: Console,
) -> tuple[dict[str, Any], list[str]]:
    """Write and track the results of a finished sweep; return its answer, and its problems in words."""
    show_trials(record, settings, console)
    with replacing(folder / LIST) as stream:
        stream.write(markdown(record, settings.name, settings.scheduler).encode())
    files = [folder / LIST, write_table(folder, record)]
    if best is not None:
        files.append(folder / BEST)
        sink.log({"best_validation": best.trial.score, "best_trial": float(best.trial.number)}, 0)
    for picture in plot_sweep(settings, record, importance(settings, record), folder / "plots"):
        sink.log_artifact(picture, "plots")
    files.append(Path(write_report(folder)["path"]))
    for file in files:
        sink.log_artifact(file)
    if sink.flush():
        runs.send_again()
    version = _register(settings, folder, record, best, runs, uri, console) if best else None
    answer = {
        "run_dir": str(folder),
        "trials": [trial.to_json() for trial in record.in_order],
        "best": None if best is None else best.trial.to_json() | {"weights_sha256": best.saved.weights_sha256},
        "registered_version": version,
    }
    return answer, _wrong(record, best)


def show_trials(record: SweepRecord, settings: SweepSettings, console: Console) -> None:
    """Print the trials as a table, the best first."""
    best = record.best()
    columns = ["trial", "state", "meta-steps", "best at", "validation", *settings.space]
    table = Table(*columns, title=f"sweep {settings.name}")
    for trial in record.ranked():
        cells = [str(trial.number), trial.state, str(trial.meta_steps), shown_step(trial.best_at), shown(trial.score)]
        cells += [shown(trial.values.get(key)) for key in settings.space]
        table.add_row(*map(Text, cells), style="bold" if trial is best else None)
    console.print(table)
    for note in record.notes(settings.scheduler):
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    for trial in record.ranked():
        if trial.error:
            console.print(f"trial {trial.number}: {trial.error}", markup=False, highlight=False, soft_wrap=True)


def finished_answer(folder: Path, settings: SweepSettings) -> dict[str, Any] | None:
    """Return the answer of a fully finished sweep; None if there is still something to do or to send."""
    try:
        kept = read_json(folder / RESULT, "result", within=folder)
        validated(_RESULT, kept, RESULT)
    except (FileNotFoundError, UserError):  # missing or damaged: it can be made again
        return None
    answer: dict[str, Any] = kept["answer"]
    whole = not kept["unsent"] and all(trial.get("state") != "failed" for trial in answer["trials"])
    same = kept["tracking"] == settings.tracking.model_dump(mode="json", by_alias=True)
    registered = answer["registered_version"] is not None or not settings.tracking.register_version
    return answer if whole and same and registered else None


def keep_answer(folder: Path, settings: SweepSettings, answer: Mapping[str, Any], unsent: int) -> None:
    """Record last of all that the sweep is finished; raises OSError, as on a full disk: a resume finishes it again.

    `unsent`: the number of runs with records that MLflow has not got.
    """
    kept = {"answer": answer, "tracking": settings.tracking.model_dump(mode="json", by_alias=True), "unsent": unsent}
    with replacing(folder / RESULT) as stream:
        stream.write((json.dumps(kept, indent=1) + "\n").encode())


def _register(
    settings: SweepSettings,
    folder: Path,
    record: SweepRecord,
    best: Best,
    runs: SweepRuns,
    uri: str,
    console: Console,
) -> int | None:
    tracking = settings.tracking
    if not tracking.register_version:
        return None
    try:
        if (run_id := runs.run_ids.get(best.trial.id)) is None:
            raise UserError(
                f"MLflow has not answered for the run of trial {best.trial.number}, which the version is of"
            )
        version = register_version(
            uri,
            tracking.model,
            folder,
            run_id=run_id,
            experiment=settings.experiment,
            description=f"Trial {best.trial.number} of {markdown(record, settings.name, settings.scheduler)}",
            tags={"sweep": settings.name, "trial": str(best.trial.number)},
        )
    except UserError as error:
        again = f"to try again: {resume_command('sweep', folder)}"
        console.print(headed("not registered:", f"{error}; {again}"), soft_wrap=True)
        return None
    console.print(f"registered     {tracking.model} version {version}, alias candidate", highlight=False)
    return version


def _wrong(record: SweepRecord, best: Best | None) -> list[str]:
    failed = [trial for trial in record.in_order if trial.state == "failed"]
    if not failed:
        return [] if best else ["no trial has come to a finite validation"]
    first = failed[0]
    return [f"{len(failed)} of {len(record.trials)} trials failed; trial {first.number}: {first.error}"]
