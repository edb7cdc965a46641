"""Joins the rooms for `ml2o evaluate`: settings, Ray, MLflow and the folder of the results."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ml2o_dist.cluster_connection import connected
from ml2o_dist.config import EvaluateSettings
from ml2o_dist.config_file import dump_settings, resolve_settings
from ml2o_dist.errors import Incomplete, Interrupted, UserError
from ml2o_dist.evaluation.cell_tasks import run_outcomes_on_ray
from ml2o_dist.evaluation.cells import Cell, CellResult, Outcome
from ml2o_dist.evaluation.evaluate import (
    Learning,
    Planned,
    check_fit,
    evaluated,
    plan,
    problem_specs,
    summarise,
    tune_entrants,
)
from ml2o_dist.evaluation.evaluated import Evaluation
from ml2o_dist.evaluation.evaluation_metrics import cell_metrics, curve_metrics, metric_names, row_metrics
from ml2o_dist.evaluation.evaluation_report import evaluation_markdown, evaluation_table
from ml2o_dist.evaluation.optimizer_names import Entrant, parse_optimizers
from ml2o_dist.files import cache_folder, replacing
from ml2o_dist.metatrain.pool import Stopped
from ml2o_dist.progress import StepDisplay
from ml2o_dist.run_directory import check_writable, logged_to
from ml2o_dist.run_storage import RunStorage, StorageError, open_storage
from ml2o_dist.stopping import StopRequest, stop_on_signals
from ml2o_dist.tracked_run import tracked_run
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.spool import SPOOL_FOLDER, unsent_values
from ml2o_dist.tracking.store import redacted, tracking_uri_to_keep

RESULT, TABLE, CONFIG = "evaluation.json", "evaluation.md", "evaluate.yaml"
"""What an evaluation leaves in its folder."""

CLOSE_LIMIT_S = 30.0
"""How long the end may wait for MLflow: there is no checkpoint, and its whole figures are sent at the end."""

log = logging.getLogger(__name__)


def evaluate(
    settings: EvaluateSettings,
    run_dir: str | None = None,
    *,
    address: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Run every optimizer on every problem as Ray tasks; return what `ml2o evaluate --json` prints.

    `run_dir` is a folder or the URI of one for the results; without one they go to MLflow alone, and stay on the disk
    only where MLflow has not taken them.

    Raises:
        UserError: settings, weights, data, cluster or folder are not as they must be (exit code 2).
        Incomplete: cells failed; Interrupted: stopped by a signal. What was done is kept.
    """
    console = console or Console(stderr=True)
    settings = resolve_settings(settings)
    uri = tracking_uri_to_keep(settings.tracking.uri)
    for what, names in (("optimizer", settings.optimizers), ("problem", settings.problems)):
        if not names:
            raise UserError(f"name at least one {what}: --{what} NAME")
    entrants = parse_optimizers(settings, lambda reference: _registered(uri, reference))
    data = check_fit(settings, entrants)
    with _folder(run_dir) as storage:
        if run_dir is not None:
            console.print(f"run directory  {storage.name}", highlight=False, soft_wrap=True)
        console.print(f"tracking URI   {redacted(uri)}", highlight=False, soft_wrap=True)
        try:
            with (
                stop_on_signals(at_once=True) as stop,
                connected(address) as where,
                logged_to(storage.folder, console),
            ):
                console.print(f"Ray            {where}", highlight=False, soft_wrap=True)
                stop.at_once = False
                tags = {"data_sha256": json.dumps(data)}
                with tracked_run(settings, storage, uri, console, stop, tags=tags, close_limit_s=CLOSE_LIMIT_S) as sink:
                    evaluation = _run(settings, entrants, storage, sink, console, stop)
        except Interrupted as error:
            raise Interrupted(error.signal_number, "; but ".join([str(error), *_lacking(storage)])) from None
        lacking = _lacking(storage)
    answer = evaluation.to_json()
    answer["summary"] |= {
        "data_sha256": data,
        "mlflow_run_id": sink.run_id,
        "tracking_uri": redacted(uri),
        "run_dir": None if run_dir is None else storage.name,
    }
    wrong = [*_failures(evaluation), *lacking]
    if wrong:
        raise Incomplete("; ".join(wrong), answer)
    return answer


def _failures(evaluation: Evaluation) -> list[str]:
    """Return in words which cells failed, and the first one's reason; [] where none did."""
    failed = evaluation.failed
    if not failed:
        return []
    first = failed[0]
    what = "tuning" if first.seed is None else f"seed {first.seed}"
    return [
        f"{len(failed)} cells failed, {len(evaluation.cells)} did not; the first: {first.optimizer} on "
        f"{first.problem}, {what}: {first.error}"
    ]


def _registered(uri: str, reference: str) -> Path:
    from ml2o_dist.tracking.registry import resolve_model  # late: MLflow takes 2 s

    return resolve_model(uri, reference)


@contextmanager
def _folder(run_dir: str | None) -> Iterator[RunStorage]:
    """Give the folder of the results; without a `run_dir` one in the cache, which goes once MLflow has everything."""
    if run_dir is not None:
        storage = open_storage(run_dir)
        _check_free(storage)
        check_writable(storage.folder)
        yield storage
        return
    kept = cache_folder() / "evaluations"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=kept, prefix="evaluate-"))
    except OSError as error:
        raise UserError(f"{str(kept)!r} cannot be written: {error.strerror or error} (ML2O_CACHE names it)") from error
    try:
        yield RunStorage(str(folder), folder)
    finally:
        if not ((folder / SPOOL_FOLDER).exists() and (folder / RESULT).exists()):
            shutil.rmtree(folder)


def _check_free(storage: RunStorage) -> None:
    """Raise UserError where the folder holds a meta-training, or an evaluation that MLflow has not got."""
    if (storage.folder / "config.yaml").exists():
        raise UserError(f"{storage.name} holds a meta-training; choose another --run-dir for the evaluation")
    if (storage.folder / RESULT).exists():
        raise UserError(f"{storage.name} holds an evaluation; choose another --run-dir for this one")
    if values := unsent_values(storage.folder / SPOOL_FOLDER):
        raise UserError(
            f"{storage.name} holds {values} values of another evaluation, not yet sent to MLflow; send them with "
            f"`ml2o sync {storage.folder}`, or choose another --run-dir"
        )


def _run(
    settings: EvaluateSettings,
    entrants: Sequence[Entrant],
    storage: RunStorage,
    sink: MlflowSink,
    console: Console,
    stop: StopRequest,
) -> Evaluation:
    """Tune, run and report; where it is stopped, report what there is."""
    outcomes: dict[int, Outcome] = {}
    planned: list[Planned] = []
    tuned: Learning = {}
    names = metric_names(entrant.name for entrant in entrants), metric_names(problem_specs(settings))

    def on_outcome(index: int, outcome: Outcome) -> None:
        outcomes[index] = outcome
        if isinstance(outcome, CellResult):
            cell = evaluated(planned[index], outcome)
            sink.log(cell_metrics(cell, *names), cell.seed)

    stopped = False
    try:
        tuned = tune_entrants(settings, entrants, lambda cells: _tuning(cells, settings, console, stop))
        planned = plan(settings, entrants, tuned)
        _run_cells("evaluate", [each.cell for each in planned], on_outcome, settings, console, stop)
    except Stopped:
        stopped = True
    evaluation = summarise(settings, planned, outcomes, tuned)
    for row in evaluation.rows:
        sink.log(row_metrics(row, *names), 0)
        for step, metrics in curve_metrics(row, *names):
            sink.log(metrics, step)
    _write(evaluation, storage.folder, sink)
    if evaluation.rows:
        console.print(evaluation_table(evaluation))
    if stopped:
        cells = settings.seeds * len(entrants) * len(problem_specs(settings))
        raise Interrupted(
            stop.signal_number,
            f"stopped by {stop.name}: {len(evaluation.cells)} of {cells} cells were finished; their figures are in "
            + (f"MLflow run {sink.run_id}" if _is_temporary(storage) and sink.run_id else storage.name),
        )
    return evaluation


def _is_temporary(storage: RunStorage) -> bool:
    return storage.folder.parent == cache_folder() / "evaluations"


def _tuning(cells: Sequence[Cell], settings: EvaluateSettings, console: Console, stop: StopRequest) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    _run_cells("tune", cells, outcomes.__setitem__, settings, console, stop)
    return [outcomes[index] for index in range(len(cells))]


def _run_cells(
    title: str,
    cells: Sequence[Cell],
    on_outcome: Callable[[int, Outcome], None],
    settings: EvaluateSettings,
    console: Console,
    stop: StopRequest,
) -> None:
    resources = settings.resources
    with StepDisplay(console, title, len(cells)) as display:

        def on_done(done: int, total: int) -> None:
            if stop():
                raise Stopped
            display.update(done)

        run_outcomes_on_ray(
            cells, on_outcome, num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, on_done=on_done
        )


def _write(evaluation: Evaluation, folder: Path, sink: MlflowSink) -> None:
    """Write the results into the folder and hand them to MLflow; a full disk costs a warning, not the answer."""
    contents = {
        RESULT: json.dumps(evaluation.to_json(), indent=1, allow_nan=False) + "\n",
        TABLE: evaluation_markdown(evaluation),
        CONFIG: dump_settings(evaluation.settings),
    }
    for name, content in contents.items():
        try:
            with replacing(folder / name) as stream:
                stream.write(content.encode())
        except OSError as error:
            log.warning("%s cannot be written: %s", folder / name, error.strerror or error)
        else:
            sink.log_artifact(folder / name)


def _lacking(storage: RunStorage) -> list[str]:
    """Bring the results to a remote place; return what it lacks, [] where it has everything."""
    try:
        storage.settle()
    except StorageError as error:
        return [f"{storage.name} lacks what is in {storage.folder}: {error}"]
    storage.forget()
    return []
