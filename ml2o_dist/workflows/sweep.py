"""The workflow of `ml2o sweep`: joins settings, Ray Tune, MLflow and the run directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.config_file import resolve_settings, settings_hash
from ml2o_dist.metatrain.capacity import check_capacity, check_labels, cluster_total, room_for_workers
from ml2o_dist.rundir.directory import check_writable, logged_to
from ml2o_dist.rundir.kinds import check_kind
from ml2o_dist.runtime.cluster import connected, own_capacity
from ml2o_dist.runtime.errors import Incomplete, Interrupted, UserError
from ml2o_dist.runtime.progress import StepDisplay
from ml2o_dist.runtime.shown_text import ForeignTextConsole
from ml2o_dist.runtime.stopping import StopRequest, own_handlers_kept, stop_on_signals
from ml2o_dist.sweeping.record import FILE, SweepRecord
from ml2o_dist.sweeping.search import check_search
from ml2o_dist.sweeping.settings import SweepSettings
from ml2o_dist.sweeping.space import SETTINGS, load_sweep, sweep_difference, trial_settings
from ml2o_dist.sweeping.taking_up import checkpoint_of, take_up
from ml2o_dist.sweeping.tuning import Watcher, run_trials
from ml2o_dist.tracking.identity import load_identity
from ml2o_dist.tracking.named_servers import check_resumed, remember
from ml2o_dist.tracking.records import Status
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.store import tracking_uri_to_keep
from ml2o_dist.tracking.sweep_runs import SweepRuns
from ml2o_dist.workflows.lifecycle import (
    aborted_in_a_line,
    closed_as_it_ends,
    git_commit,
    is_unsent,
    open_run,
    resume_command,
    shared_folder,
    show_places,
    write_settings,
)
from ml2o_dist.workflows.meta_train import check_problems
from ml2o_dist.workflows.sweep_end import (
    best_optimizer,
    finished_answer,
    keep_answer,
    show_trials,
    write_results,
)

SPOOLS = "spools"
"""The folder of the trials' records that MLflow has not got yet."""

log = logging.getLogger(__name__)


def sweep(
    settings: SweepSettings,
    run_dir: str,
    *,
    resume: bool = False,
    address: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Run all trials, register the best one's weights; return what `ml2o sweep --json` prints.

    Raises:
        UserError: settings, data, cluster or run directory are invalid (exit code 2).
        Incomplete: trials failed; Interrupted: stopped by a signal; Aborted: a full disk, or the like.
    """
    console = console or ForeignTextConsole(stderr=True)
    settings = settings.model_copy(update={"meta_train": resolve_settings(settings.meta_train)})
    uri = tracking_uri_to_keep(settings.tracking.uri)
    check_search(settings)
    folder = shared_folder(run_dir, "a sweep")
    if resume:
        _check_same(folder, settings)
    else:
        _check_fresh(folder, settings)
    check_writable(folder)
    show_places(console, folder, uri)
    if resume and (answer := finished_answer(folder, settings)) is not None:
        console.print(f"finished       {len(answer['trials'])} trials, nothing is left to do", highlight=False)
        show_trials(SweepRecord(folder), settings, console)
        return answer | {"run_dir": str(folder)}  # the folder may have been moved
    data = _check_problems(settings)
    _check_room(settings, lambda custom: own_capacity(address), "this machine")
    record = _record(folder)

    again = resume_command("sweep", folder)

    def last_words() -> str:
        return f"go on with: {again}"

    with (
        stop_on_signals(at_once=True, last_words=last_words, awaited="Ray Tune's state and MLflow") as stop,
        logged_to(folder, console),
        aborted_in_a_line(again, last_words),
        connected(address) as where,
    ):
        console.print(f"Ray            {where}", highlight=False, soft_wrap=True)
        _check_room(settings, cluster_total, "the cluster")
        _check_labels(settings)
        stop.at_once = False
        remember(uri)  # before the folder can be resumed
        write_settings(folder / SETTINGS, settings)
        if record.left_out:
            console.print(record.what_is_left_out, style="yellow", markup=False, highlight=False, soft_wrap=True)
        if record.trials:
            console.print(f"resuming       {record.so_far(settings.count)}", highlight=False, soft_wrap=True)
        with _tracked(settings, folder, uri, console, stop) as (sink, runs):
            checkpoints = _run(settings, folder, record, runs, console, stop)
            if stop():
                so_far = record.so_far(settings.count)
                raise Interrupted(stop.signal_number, f"stopped by {stop.name}; {so_far}; {last_words()}")
            provenance = {"config_hash": settings_hash(settings), "git": git_commit(), "data_sha256": data}
            best = best_optimizer(settings, folder, record, checkpoints, provenance)
            answer, wrong = write_results(settings, folder, record, best, sink, runs, uri, console)
        keep_answer(folder, settings, answer, unsent=runs.unsent + is_unsent(sink))
    if wrong:
        raise Incomplete("; ".join([*wrong, f"to try again: {again}"]), answer)
    return answer


def resumed_sweep(run_dir: str, overrides: Sequence[str]) -> SweepSettings:
    """Read the settings of a sweep to resume; raises UserError if there is none."""
    file = shared_folder(run_dir, "a sweep") / SETTINGS
    if not file.exists():
        raise UserError(f"nothing to resume: {file.parent} holds no {SETTINGS}")
    settings = load_sweep(file, overrides, within=file.parent)
    check_resumed(settings.tracking.uri, overrides, file)
    return settings


def _check_fresh(folder: Path, settings: SweepSettings) -> None:
    if not (folder / SETTINGS).exists():
        check_kind(folder, "a sweep")
        return
    difference = sweep_difference(settings, load_sweep(folder / SETTINGS, within=folder))
    if difference:
        raise UserError(f"{folder} holds another sweep ({difference}); choose another --run-dir")
    raise UserError(f"{folder} holds this sweep; add --resume to go on, or choose another --run-dir")


def _check_same(folder: Path, settings: SweepSettings) -> None:
    if not (folder / SETTINGS).exists():
        raise UserError(f"nothing to resume: {folder} holds no {SETTINGS}")
    difference = sweep_difference(settings, load_sweep(folder / SETTINGS, within=folder))
    if difference.startswith("trials "):
        difference += "; to add trials, begin another sweep, with another seed, or it draws the same ones"
    if difference:
        raise UserError(f"cannot resume {folder} with another configuration: {difference}")


def _check_problems(settings: SweepSettings) -> dict[str, str]:
    """Build the problems of every trial's family once; returns the sha256 of their data. Raises UserError."""
    data = check_problems(settings.meta_train)
    for key, distribution in settings.space.items():
        if key.split(".")[0] in ("family", "rule"):
            for value in distribution.values:
                data |= check_problems(trial_settings(settings, {key: value}))
    return data


def _check_room(settings: SweepSettings, total: Callable[[Iterable[str]], Mapping[str, float]], place: str) -> None:
    """Raise UserError if `place` has no room for the largest trial: Tune would wait for it without end.

    `total` is called with the names of custom resources.
    """
    for trial in _trials_by_room(settings):
        have = total(trial.resources.custom)
        left = {kind: each - settings.driver.num_cpus * (kind == "CPU") for kind, each in have.items()}
        check_capacity(trial.workers, trial.resources, room_for_workers(trial, left), place)


def _check_labels(settings: SweepSettings) -> None:
    """Raise UserError if no node of the cluster has the labels that a trial's processes ask for."""
    for trial in _trials_by_room(settings):
        check_labels(trial.resources.labels, "resources.labels")
        if trial.backward == "learner":
            check_labels(trial.learner.resources.labels, "learner.resources.labels")


def _trials_by_room(settings: SweepSettings) -> Iterator[MetaTrainSettings]:
    """Yield the trials' base settings, and these with each value of the keys that determine a trial's resources."""
    yield settings.meta_train
    for key, distribution in settings.space.items():
        if key in ("workers", "backward") or key.split(".")[0] in ("resources", "learner"):
            for value in distribution.values:
                yield trial_settings(settings, {key: value})


def _record(folder: Path) -> SweepRecord:
    try:
        return SweepRecord(folder)
    except OSError as error:
        raise UserError(f"{folder / FILE} cannot be read: {error.strerror or error}") from error


@contextmanager
def _tracked(
    settings: SweepSettings, folder: Path, uri: str, console: Console, stop: StopRequest
) -> Iterator[tuple[MlflowSink, SweepRuns]]:
    """Open or resume the MLflow run of the whole sweep, and end it as the `with` block ended."""
    title = f"{settings.name} {folder.name}"
    sink = open_run(settings, settings.experiment, folder, uri, stop, title, str(folder))
    identity = load_identity(folder)
    runs = SweepRuns(uri, settings.experiment, sink, identity.run_key if identity else folder.name, folder / SPOOLS)

    def close(status: Status, limit_s: float) -> str:
        runs.close(limit_s)
        values = sink.close(status, limit_s) + runs.unsent_values
        unsent = runs.unsent + is_unsent(sink)
        return f"{values} values, and more, of {unsent} runs" if unsent else ""

    with closed_as_it_ends(close, stop, console, uri, resume_command("sweep", folder)):
        yield sink, runs


def _run(
    settings: SweepSettings,
    folder: Path,
    record: SweepRecord,
    runs: SweepRuns,
    console: Console,
    stop: StopRequest,
) -> dict[str, Path]:
    """Run the trials; return the checkpoint of the best trial's last report, by the trial's id."""
    earlier = take_up(settings, folder, record)
    done = sum(trial.state != "running" for trial in record.trials.values())
    with StepDisplay(console, "sweep", settings.count, done) as display, own_handlers_kept():
        display.update(done, "starting")
        run_trials(settings, folder, earlier, Watcher(settings, record, runs, display, stop))
    best = record.best()
    return {best.id: checkpoint_of(folder, best)} if best else {}
