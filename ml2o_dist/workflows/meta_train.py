"""The workflow of a whole meta-training, from its settings to its end in `meta_train_end`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.config_file import resolve_settings
from ml2o_dist.metatrain.capacity import check_capacity, room_for_workers
from ml2o_dist.metatrain.checkpoint import newest_manifest
from ml2o_dist.metatrain.history import History, Row
from ml2o_dist.metatrain.pool import WorkerPool
from ml2o_dist.metatrain.trainer import Trainer, TrainingError
from ml2o_dist.metatrain.workers import PoolError
from ml2o_dist.problems import ProblemContext, ProblemSpec
from ml2o_dist.rules.guarded import fallback_rule
from ml2o_dist.rules.learned import learned_rule
from ml2o_dist.rundir.directory import (
    check_begun_with,
    check_folder,
    check_fresh,
    check_writable,
    only_begun,
    written_to,
)
from ml2o_dist.rundir.storage import RunStorage, StorageError, open_storage
from ml2o_dist.runtime.cluster import connected, own_capacity
from ml2o_dist.runtime.errors import Aborted, Incomplete, Interrupted, UserError
from ml2o_dist.runtime.progress import StepDisplay
from ml2o_dist.runtime.shown_text import ForeignTextConsole
from ml2o_dist.runtime.stopping import Stopped, StopRequest, stop_on_signals
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.spool import SPOOL_FOLDER, unsent_values
from ml2o_dist.tracking.store import tracking_uri_to_keep
from ml2o_dist.tracking.sync import sync_command
from ml2o_dist.workflows.gauges import RunGauges
from ml2o_dist.workflows.lifecycle import aborted_in_a_line, resume_command, show_places, tracked_run
from ml2o_dist.workflows.meta_train_end import compared, finish, finished_answer, show_finished

MOST_CHECKED = 1000
"""How many combinations of a training member's choices are tried before the run."""

log = logging.getLogger(__name__)


def meta_train(
    settings: MetaTrainSettings,
    run_dir: RunStorage | Path | str,
    *,
    resume: bool = False,
    address: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Meta-train, compare with baselines, register a version; return what `ml2o meta-train --json` prints.

    `run_dir` is a folder or the URI of one (`ml2o_dist.rundir.storage`), or either as `open_storage` returned it.

    Raises:
        UserError: settings, data, cluster or run directory are invalid (exit code 2).
        Aborted, Interrupted: the run was cut short; `--resume` resumes from the checkpoint.
    """
    console = console or ForeignTextConsole(stderr=True)
    settings = resolve_settings(settings)
    uri = tracking_uri_to_keep(settings.tracking.uri)
    storage = run_dir if isinstance(run_dir, RunStorage) else open_storage(run_dir, resume=resume)
    check_folder(storage.folder)
    unsent_values(storage.folder / SPOOL_FOLDER)  # refuses a run that another process is writing
    trainer = Trainer(settings, storage.folder, on_saved=storage.commit)
    from_start = resume and only_begun(storage.folder)
    same_run = resume
    refused: list[str] = []
    try:
        if resume and not from_start:
            refused = trainer.resume()
            if (answer := finished_answer(trainer)) is not None:
                console.print(f"run directory  {storage.name}", highlight=False, soft_wrap=True)
                show_finished(answer, trainer, storage, uri, console)
                _settle(storage, "the run is done, but")
                storage.forget()
                return answer | {"run_dir": storage.name}
        else:
            same_run = check_fresh(storage.folder, settings)
            if from_start:
                check_begun_with(storage.folder, settings)
            trainer.begin()
        check_writable(storage.folder)
        _check_data(trainer, check_problems(settings))
    except UserError as error:
        raise UserError(storage.named(str(error))) from error
    show_places(console, storage.name, uri)
    step = trainer.learner.version
    begins = f"checkpoints/step_{step:06d} (meta-step {step} of {settings.meta_steps})" if resume else ""
    if from_start:
        begins = "the beginning: it was cut short before its first checkpoint"
    if begins:
        console.print(f"resuming from  {begins}", highlight=False, soft_wrap=True)
    needed = settings.resources.at_start(settings.workers)
    beside = ", beside the process that replays," if settings.backward == "learner" else ""
    room = room_for_workers(settings, own_capacity(address))
    check_capacity(needed, settings.resources, room, f"this machine{beside}")

    def last_words() -> str:
        return _how_to_go_on(trainer, storage)

    awaited = "the meta-step under way, its checkpoint and MLflow"
    with (
        stop_on_signals(at_once=True, last_words=last_words, awaited=awaited) as stop,
        connected(address) as where,
    ):
        console.print(f"Ray            {where}", highlight=False, soft_wrap=True)
        stop.at_once = False
        try:
            learner = settings.learner if settings.backward == "learner" else None
            pool = WorkerPool(
                settings.workers, settings.resources, settings.faults, learner=learner, stop_requested=stop
            )
        except Stopped:
            raise Interrupted(stop.signal_number, f"stopped by {stop.name}; {last_words()}") from None
        with (
            aborted_in_a_line(_resume(storage), last_words),
            closing(pool),
            _committed(storage),
            written_to(storage.folder, settings, console),
            tracked_run(
                settings,
                settings.tracking.experiment,
                storage.folder,
                uri,
                console,
                stop,
                title=storage.title,
                place=storage.name,
                again=sync_command(storage.folder, uri),
                run_id=trainer.progress.tracking_run or None,
                config=settings.model_dump(mode="json", by_alias=True),
                go_on=same_run,
            ) as sink,
            _saved(trainer, storage, stop),
        ):
            trainer.progress.tracking_run = sink.run_id or trainer.progress.tracking_run
            for refusal in refused:
                log.warning("checkpoint refused: %s", storage.named(refusal))
            if begins:
                log.info("resuming from %s", begins)
            storage.commit()
            _train(trainer, pool, sink, console)
            pool.close()
            return finish(trainer, storage, sink, uri, console, stop)


@contextmanager
def _committed(storage: RunStorage) -> Iterator[None]:
    """Wait at the end of the `with` block, however it ends, until the remote place has everything."""
    try:
        yield
    except (Aborted, Incomplete, Interrupted, UserError) as error:
        _settle(storage, f"{error}; but")
        raise
    _settle(storage, "the run is done, but")
    storage.forget()


def _settle(storage: RunStorage, so_far: str) -> None:
    try:
        storage.settle()
    except StorageError as error:
        raise Aborted(
            f"{so_far} {storage.name} lacks what is in {storage.folder}: {error}; to bring it there: {_resume(storage)}"
        ) from error


def _resume(storage: RunStorage) -> str:
    return resume_command("meta-train", storage.name)


def _how_to_go_on(trainer: Trainer, storage: RunStorage) -> str:
    newest = newest_manifest(trainer.run_dir / "checkpoints")
    if newest is None:
        return "there is no checkpoint yet"
    return f"the last checkpoint is {storage.named(str(newest.parent))}; go on with: {_resume(storage)}"


@contextmanager
def _saved(trainer: Trainer, storage: RunStorage, stop: StopRequest) -> Iterator[None]:
    """If the `with` block is cut short, write a checkpoint first of all, then say how to resume."""
    try:
        yield
    except Incomplete:
        raise
    except Exception as error:
        step, steps = trainer.learner.version, trainer.settings.meta_steps
        try:
            trainer.save()
            what = f"checkpoint at meta-step {step} of {steps} written; go on with: {_resume(storage)}"
        except OSError as failure:
            reason = failure.strerror or failure
            what = f"no checkpoint could be written to {trainer.run_dir} at meta-step {step} of {steps}: {reason}"
            if isinstance(error, OSError | Stopped):
                raise Aborted(f"{what}; go on from the one before with: {_resume(storage)}") from error
        if isinstance(error, Stopped):
            log.info("stopped by %s; %s", stop.name, what)  # before waiting for anything else
            raise Interrupted(stop.signal_number, f"stopped by {stop.name}; {what}") from None
        if isinstance(error, UserError):
            raise
        log.info("aborted", exc_info=True)  # the traceback goes to run.log, the line to the screen
        spoken = isinstance(error, PoolError | TrainingError | Aborted)
        reason = str(error) if spoken else f"{type(error).__name__}: {error}"
        raise Aborted(f"{reason}; {what}") from error


def check_problems(settings: MetaTrainSettings) -> dict[str, str]:
    """Build every problem of the family once, so that errors show now and not after an hour.

    This also builds the image caches before several workers need them. Returns the sha256 of the data of each problem
    that has any; raises UserError.
    """
    compared(settings)
    if settings.rule.guard is not None:
        fallback_rule(settings.rule.guard)
    data: dict[str, str] = {}
    family = settings.family
    training = [spec for member in family.training().members for spec in islice(member.specs(), MOST_CHECKED)]
    test = [ProblemSpec.parse(text) for text in family.test]
    rule = learned_rule(settings.rule)
    for spec in dict.fromkeys([*training, *map(ProblemSpec.parse, family.validation), *test]):
        problem = spec.build(ProblemContext(data_root=settings.data.root))
        data |= problem.data_hashes(test=spec in test)
        try:
            rule.check_objectives(problem.objectives)
        except UserError as error:
            raise UserError(f"{spec}: {error}") from error
    return data


def _check_data(trainer: Trainer, data: dict[str, str]) -> None:
    """Store the data's hashes with the run, or refuse to resume with other data."""
    before = trainer.progress.data_sha256
    for name, digest in data.items():
        if before.get(name, digest) != digest:
            raise UserError(
                f"cannot resume {trainer.run_dir}: {name} has sha256 {digest[:12]}, it was {before[name][:12]}"
            )
    trainer.progress.data_sha256 = {**before, **data}


def _train(trainer: Trainer, pool: WorkerPool, sink: MlflowSink, console: Console) -> None:
    settings, progress = trainer.settings, trainer.progress
    restarts, repeated = progress.worker_restarts, progress.repeated_episodes  # in earlier processes
    gauges = RunGauges(trainer.run_dir.name)
    with StepDisplay(console, "meta-train", settings.meta_steps, trainer.learner.version) as display:

        def on_row(step: int, row: Row) -> None:
            progress.tracking_run = progress.tracking_run or sink.run_id or ""
            progress.worker_restarts, progress.repeated_episodes = restarts + pool.restarts, repeated + pool.repeated
            figures = row | {
                "workers": float(pool.alive),
                "worker_restarts": float(progress.worker_restarts),
                "repeated_episodes": float(progress.repeated_episodes),
            }
            sink.log(figures, step)
            gauges.set(step, figures)
            last = next((r["meta_loss"] for r in reversed(progress.history) if "meta_loss" in r), float("nan"))
            shown = f"{last:.4f}" if last == last else "-"
            display.update(
                step,
                f"meta-loss {shown}  best validation {progress.best_score:.4f} (step {progress.best_step})  "
                f"{progress.inner_steps_per_s:,.0f} steps/s  {_occupied(progress.history, pool.alive)}",
            )

        for row in progress.history:  # a resumed run's: MLflow may have been away when they were made
            sink.log({name: v for name, v in row.items() if name != "meta_step"}, int(row["meta_step"]))
        trainer.run(pool.begin, on_row)


def _occupied(history: History, workers: int) -> str:
    """Return in words how many workers run, how busy they are, the learner's share if high, and the lag."""
    row = next((row for row in reversed(history) if "seconds" in row), None)
    if row is None:
        return f"{workers} workers"
    learner = f"  learner {row['learner_share']:.0%}" if row["learner_share"] > 0.05 else ""
    lag = f"  lag {row['lag']:.0f}" if row["lag"] else ""
    return f"{workers} workers {row['worker_utilisation']:.0%} busy{learner}{lag}"
