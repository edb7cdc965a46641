"""The workflow of `ml2o evaluate`: joins settings, Ray, MLflow and the results folder."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ml2o_dist.config import EvaluateSettings, GuardSettings
from ml2o_dist.config_file import dump_settings, load_evaluation, resolve_settings
from ml2o_dist.evaluation.evaluated import Evaluation
from ml2o_dist.evaluation.optimizer_names import Entrant, parse_optimizers
from ml2o_dist.evaluation.optimizer_specs import Guarded, Learned
from ml2o_dist.evaluation.optimizer_words import GUARD, REGISTRY
from ml2o_dist.reporting.evaluation_plots import plot_evaluation
from ml2o_dist.reporting.evaluation_tables import evaluation_markdown, evaluation_table
from ml2o_dist.rundir.directory import check_folder, check_writable, logged_to
from ml2o_dist.rundir.kinds import check_kind
from ml2o_dist.rundir.storage import RunStorage, StorageError, open_storage
from ml2o_dist.runtime.cluster import connected
from ml2o_dist.runtime.errors import Interrupted, UserError
from ml2o_dist.runtime.files import replacing
from ml2o_dist.runtime.shown_text import headed
from ml2o_dist.runtime.stopping import stop_on_signals
from ml2o_dist.tracking.evaluation_runs import Version, log_evaluation
from ml2o_dist.tracking.store import redacted, tracking_uri_to_keep
from ml2o_dist.workflows.benchmark_run import BenchmarkStopped, run_benchmark
from ml2o_dist.workflows.lifecycle import git_commit
from ml2o_dist.workflows.report import write_report

RESULT, TABLE, CONFIG = "evaluation.json", "evaluation.md", "evaluate.yaml"
"""Files that an evaluation writes to its folder, besides plots/ and report.html."""

log = logging.getLogger(__name__)


def run_evaluation(
    settings: EvaluateSettings, run_dir: str | None, *, address: str, console: Console
) -> tuple[Evaluation, dict[str, Any], list[str]]:
    """Run every optimizer on every problem as Ray tasks.

    Finished cells are kept in the cache folder and reused. `run_dir` is a folder, or the URI of one, for the results.
    They go to MLflow in any case; if MLflow is away, repeating the call sends them later.

    Returns:
        the evaluation, the output of `ml2o evaluate --json`, and the parts that the run directory lacks.

    Raises:
        UserError: settings, weights, data, cluster or folder are invalid (exit code 2).
        Interrupted: stopped by a signal; finished cells are kept.
    """
    settings = resolve_settings(settings)
    uri = tracking_uri_to_keep(settings.tracking.uri)
    if not (settings.optimizers or settings.baselines):
        raise UserError("name at least one optimizer: --optimizer NAME")
    if not settings.problems:
        raise UserError("name at least one problem: --problem NAME, or a suite: --suite NAME")
    versions: dict[str, Version] = {}
    entrants = parse_optimizers(settings, lambda reference: _registered(uri, reference, versions))
    with _folder(run_dir, settings) as storage:
        if run_dir is not None:
            console.print(f"run directory  {storage.name}", highlight=False, soft_wrap=True)
        console.print(f"tracking URI   {redacted(uri)}", highlight=False, soft_wrap=True)
        with stop_on_signals(at_once=True) as stop, ExitStack() as stack, logged_to(storage.folder, console):

            def connect() -> None:
                where = stack.enter_context(connected(address))
                console.print(f"Ray            {where}", highlight=False, soft_wrap=True)
                stop.at_once = False

            try:
                evaluation = run_benchmark(settings, entrants, console, stop, connect)
            except BenchmarkStopped as stopped:
                raise Interrupted(stop.signal_number, f"stopped by {stop.name}: {stopped}") from None
            stop.at_once = False
            evaluation = replace(evaluation, git=git_commit())
            files, unwritten = _write(evaluation, storage)
            console.print(evaluation_table(evaluation))
            runs = _track(uri, evaluation, entrants, versions, files, console)
        lacking = unwritten + _lacking(storage)
    answer = evaluation.to_json()
    answer["summary"] |= {
        "mlflow_runs": runs,
        "tracking_uri": redacted(uri),
        "run_dir": None if run_dir is None else storage.name,
    }
    return evaluation, answer, lacking


def failures(evaluation: Evaluation) -> list[str]:
    """Return lines that name the failed cells and the first one's reason; [] if none failed."""
    failed = evaluation.failed
    if not failed:
        return []
    first = failed[0]
    what = "tuning" if first.seed is None else f"seed {first.seed}"
    return [
        f"{len(failed)} cells failed, {len(evaluation.cells)} did not; the first: {first.optimizer} on "
        f"{first.problem}, {what}: {first.error}"
    ]


def _registered(uri: str, reference: str, versions: dict[str, Version]) -> Path:
    """Return the weights file of a version, and note which version it is."""
    from ml2o_dist.tracking.registry import find_version, resolve_model  # late: MLflow takes 2 s

    found = find_version(uri, reference)
    versions[reference] = Version(found["name"], found["version"])
    return resolve_model(uri, reference)


@contextmanager
def _folder(run_dir: str | None, settings: EvaluateSettings) -> Iterator[RunStorage]:
    """Yield the folder for the results; without a `run_dir` a temporary one."""
    if run_dir is not None:
        storage = open_storage(run_dir)
        check_folder(storage.folder)
        _check_free(storage, settings)
        check_writable(storage.folder)
        yield storage
        return
    with tempfile.TemporaryDirectory(prefix="ml2o-evaluation-") as folder:
        yield RunStorage(folder, Path(folder))


def _check_free(storage: RunStorage, settings: EvaluateSettings) -> None:
    """Raise UserError if the folder holds a meta-training, a sweep, or another evaluation than this one."""
    check_kind(storage.folder, "an evaluation", storage.name)
    if not (storage.folder / RESULT).exists():
        return
    try:
        same = settings == load_evaluation(storage.folder / CONFIG, within=storage.folder)
    except (FileNotFoundError, UserError):
        same = False
    if not same:
        raise UserError(f"{storage.name} holds another evaluation; choose another --run-dir for this one")


def _write(evaluation: Evaluation, storage: RunStorage) -> tuple[list[Path], list[str]]:
    """Write the results to the folder; return the written files, and why others are missing, as on a full disk."""
    folder = storage.folder
    contents = {
        CONFIG: dump_settings(evaluation.settings),
        TABLE: evaluation_markdown(evaluation),
        RESULT: json.dumps(evaluation.to_json(curves=True), allow_nan=False) + "\n",  # last: it marks the folder
    }
    written = []
    try:
        for name, content in contents.items():
            with replacing(folder / name) as stream:
                stream.write(content.encode())
            written.append(folder / name)
        written += plot_evaluation(evaluation, folder / "plots")
        write_report(folder, place=storage.name)
        written.append(folder / "report.html")
    except (OSError, UserError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or error
        return written, [f"results cannot be written into {folder}: {reason}; the same command tries again"]
    return written, []


def _track(
    uri: str,
    evaluation: Evaluation,
    entrants: Sequence[Entrant],
    versions: Mapping[str, Version],
    files: Sequence[Path],
    console: Console,
) -> dict[str, str]:
    """Log a run for each optimizer, and the figures of registered versions with them; {} if MLflow is away."""
    entered = {entrant.name: entrant.optimizer(entrant.learning_rate or 1.0) for entrant in entrants}
    identities = {
        name: hashlib.sha256(json.dumps(each.identity, sort_keys=True).encode()).hexdigest()
        for name, each in entered.items()
    }
    guards: dict[str, str] = {}
    for name, each in entered.items():
        guard = each.guard if isinstance(each, Guarded) else each.settings.guard if isinstance(each, Learned) else None
        if guard is not None:
            guards[name] = guard_words(guard)
    registered = {name: versions[name.removeprefix(GUARD)] for name in entered if REGISTRY in name}
    try:
        runs = log_evaluation(
            uri,
            evaluation,
            files,
            optimizers=entered,
            identities=identities,
            guards=guards,
            versions=registered,
            git=evaluation.git,
        )
        _describe(uri, evaluation, registered, runs)
    except UserError as error:
        console.print(
            headed("not in MLflow:", f"{error}; the finished cells are kept: the same command sends them later"),
            soft_wrap=True,
        )
        return {}
    return runs


def _describe(uri: str, evaluation: Evaluation, registered: Mapping[str, Version], runs: Mapping[str, str]) -> None:
    """Write the figures of registered versions on a suite into their descriptions."""
    from ml2o_dist.tracking.champion import describe_version  # late: MLflow takes 2 s

    for name, version in registered.items():
        standing = evaluation.standing(name)
        if evaluation.suite and standing is not None and not name.startswith(GUARD):
            ratio = standing.ratio
            line = (
                f"{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of tuned {evaluation.settings.reference}'s "
                f"loss, {standing.to_best.estimate:.3f} of the best baseline's; run {runs[name]}"
            )
            describe_version(uri, version.model, version.version, evaluation.suite, line)


def guard_words(guard: GuardSettings) -> str:
    """Return a guard's fallback, and its settings that differ from the defaults."""
    default = GuardSettings()
    changed = {key: value for key, value in guard.model_dump().items() if value != getattr(default, key)}
    changed.pop("fallback", None)
    return " ".join([guard.fallback, *(f"{key}={value}" for key, value in changed.items())])


def _lacking(storage: RunStorage) -> list[str]:
    """Copy the results to a remote place; return what is missing there, [] if nothing is."""
    try:
        storage.settle()
    except StorageError as error:
        return [f"{storage.name} lacks what is in {storage.folder}: {error}"]
    storage.forget()
    return []
