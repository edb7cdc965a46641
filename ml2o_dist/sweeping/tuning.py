"""Run a sweep on Ray Tune: begin or resume it, watch it, and stop it on request."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray.cloudpickle
from ray import tune
from ray.exceptions import RayActorError
from ray.tune import Callback

from ml2o_dist.metatrain.worker_loss import reason
from ml2o_dist.runtime.cluster import check_own_ray
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.progress import StepDisplay
from ml2o_dist.runtime.ray_internals import ray_internal
from ml2o_dist.runtime.reading import lies_within
from ml2o_dist.sweeping.record import FOLDER, SweepRecord, Trial
from ml2o_dist.sweeping.record_lines import Report, State
from ml2o_dist.sweeping.search import param_space, tune_config
from ml2o_dist.sweeping.settings import SweepSettings
from ml2o_dist.sweeping.space import as_values, trial_settings
from ml2o_dist.sweeping.trial import SCORE, SCRATCH, TIME, as_trainable
from ml2o_dist.sweeping.trial_source import Earlier
from ml2o_dist.tracking.sweep_runs import SweepRuns

log = logging.getLogger(__name__)

_ENVIRONMENT = {
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # nobody reads its state
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials.jsonl has it all
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours is there already
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a banner even where it is told to be quiet
}


class Watcher(Callback):  # type: ignore[misc]  # Ray is not followed
    """Records the trials' reports, sends them to MLflow, shows them, and ends the sweep when a stop is requested."""

    def __init__(
        self,
        settings: SweepSettings,
        record: SweepRecord,
        runs: SweepRuns,
        display: StepDisplay,
        stop: Callable[[], bool],
    ) -> None:
        self._settings, self._record, self._runs = settings, record, runs
        self._display, self._stop = display, stop
        self._begun = False
        self._losses: Counter[str] = Counter()

    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        """Return an empty callback for Tune to pickle; nothing unpickles it."""
        return Callback, ()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Check that Ray is alive, send earlier records to MLflow once, and stop the sweep if requested."""
        check_own_ray()
        self._look_back()
        if trials and self._stop():  # without trials Tune would read the state in its folder to find some
            signal.raise_signal(signal.SIGUSR1)  # on this signal Tune ends its loop

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial runs."""
        values = as_values(self._settings, trial.config)
        begun = self._record.begin(trial.trial_id, values)
        self._runs.begin(trial.trial_id, f"trial {begun.number}", values)
        self._show(trials)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Note what a trial reports."""
        report = Report(
            meta_step=result[TIME],
            validation=result[SCORE],
            best_validation=result["best_validation"],
            best_meta_step=result["best_meta_step"],
            seconds=result["seconds"],
            values=self._record.trials[trial.trial_id].runs_with,  # not trial.config: PBT may have changed it by now
            meta_loss=result["meta_loss"],
        )
        self._record.report(trial.trial_id, report)
        self._runs.log(trial.trial_id, report.meta_step, _figures(self._settings, report))
        self._show(trials)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log why a trial is retried, and do not count the loss of its process as a failure of the trial.

        This holds for as many losses as a meta-training may have worker restarts; a trial that always crashes ends.
        """
        with ray_internal("ray.tune.experiment.Trial.pickled_error_file"):
            file = trial.pickled_error_file
        # Tune has just written this file into Ray's local session folder: nothing from a run directory is unpickled.
        error = ray.cloudpickle.loads(Path(file).read_bytes()) if file else None
        if not isinstance(error, RayActorError):  # the error was raised in the trial, or by Tune
            return
        number, losses = self._known(trial).number, self._losses[trial.trial_id] + 1
        log.warning("trial %d is lost: %s; it goes on from its newest checkpoint", number, reason(error))
        self._losses[trial.trial_id] = losses
        counted = not error.preempted  # Tune itself does not count preemptions
        if counted and losses <= self._settings.meta_train.resources.max_restarts:
            with ray_internal("ray.tune.experiment.Trial.run_metadata"):
                trial.run_metadata.num_failures -= 1

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial finished, or that the scheduler stopped it."""
        steps = trial_settings(self._settings, as_values(self._settings, trial.config)).meta_steps
        self._end(trial.trial_id, "finished" if self._record.trials[trial.trial_id].meta_steps >= steps else "stopped")
        self._show(trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial failed, and why."""
        self._known(trial)
        self._end(trial.trial_id, "failed", _why(Path(trial.error_file)))
        self._show(trials)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Keep Tune from unpickling error files in the trials' folders for results that nobody uses."""
        self._look_back()  # if all trials had ended before, Tune took no step and MLflow may still lack records
        for trial in trials:
            with ray_internal("ray.tune.experiment.Trial.run_metadata"):
                trial.run_metadata.pickled_error_filename = None

    def tell_all(self) -> None:
        """Send the whole record to MLflow, which does not write again what it has already."""
        for id, trial in self._record.trials.items():
            first = next(iter(trial.reports.values()), None)
            self._runs.begin(id, f"trial {trial.number}", first.values if first else trial.values)
            for report in trial.reports.values():
                self._runs.log(id, report.meta_step, _figures(self._settings, report))
            if trial.state != "running":
                self._runs.tag(id, {"state": trial.state, "error": trial.error or None})
                self._runs.end(id, "FAILED" if trial.state == "failed" else "FINISHED")

    def on_copy(self, id: str, source: str, meta_step: int, sampled: Mapping[str, Any]) -> None:
        """Note that a trial resumes from another trial's checkpoint, with other values."""
        self._record.copy(id, source, meta_step, as_values(self._settings, sampled))

    def _known(self, trial: Any) -> Trial:
        """Return the recorded trial, recording it first if its process was lost before it had started."""
        known = self._record.trials.get(trial.trial_id)
        return known or self._record.begin(trial.trial_id, as_values(self._settings, trial.config))

    def _look_back(self) -> None:
        if not self._begun:
            self._begun = True
            self.tell_all()

    def _end(self, id: str, state: State, error: str = "") -> None:
        self._record.end(id, state, error)
        trial = self._record.trials[id]
        self._runs.begin(id, f"trial {trial.number}", trial.values)
        self._runs.tag(id, {"state": state, "error": error or None})
        self._runs.end(id, "FAILED" if state == "failed" else "FINISHED")

    def _show(self, trials: Iterable[Any]) -> None:
        running = sum(trial.status == "RUNNING" for trial in trials)
        ended = [trial for trial in self._record.trials.values() if trial.state != "running"]
        best = self._record.best()
        reported = any(trial.reports for trial in self._record.trials.values())
        none = "no finite validation yet" if reported else "starting"
        shown = f"best validation {best.score:.4f} (trial {best.number})" if best else none
        failed = sum(trial.state == "failed" for trial in ended)
        self._display.update(len(ended), f"{shown}  running {running}" + (f"  failed {failed}" if failed else ""))


def run_trials(settings: SweepSettings, folder: Path, earlier: Sequence[Earlier], watcher: Watcher) -> None:
    """Run all trials of a sweep except those that ended in an `earlier` process; failed ones are resumed, too.

    Returns when all trials have ended, or some time after a stop was requested. Trials that fail do not raise.

    Raises:
        UserError: Tune's folder is a link to somewhere else.
    """
    place = folder / FOLDER
    if not lies_within(place, folder):
        raise UserError(f"{place} is a link out of {folder}")
    _remove_state(place)
    pending = {"TUNE_MAX_PENDING_TRIALS_PG": "1" if settings.search == "optuna" else "200"}  # as Tune's own searches
    with _set(_ENVIRONMENT | pending), _handler_kept(signal.SIGUSR1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consider boosting PBT")  # our trials cannot follow it
        try:
            tune.Tuner(
                as_trainable(settings),
                param_space=param_space(settings),
                tune_config=tune_config(settings, earlier, watcher.on_copy),
                run_config=tune.RunConfig(
                    name=FOLDER,
                    storage_path=str(folder),
                    callbacks=[watcher],
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=settings.retries),
                    # Keep all, each some tens of kB: PBT may need any, as may a resume whose newest ones are damaged.
                    checkpoint_config=tune.CheckpointConfig(num_to_keep=None),
                ),
            ).fit()
        except Exception:
            check_own_ray()  # Tune's own message for a dead Ray is no help
            raise
        finally:
            _remove_state(place)
    for scratch in place.glob(f"*/{SCRATCH}"):
        if lies_within(scratch, place):
            shutil.rmtree(scratch, ignore_errors=True)


def _remove_state(place: Path) -> None:
    """Remove Tune's state files: they are pickled, and nothing reads them."""
    for pattern in ("*.pkl", "experiment_state-*.json", "basic-variant-state-*.json", "search_gen_state-*.json"):
        for file in (*place.glob(pattern), *place.glob(f"*/{pattern}")):
            if lies_within(file.parent, place):
                with suppress(OSError):  # the file then stays, but is not read
                    file.unlink()


@contextmanager
def _set(environment: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables during a `with` block, except those that the user has set."""
    ours = {name: value for name, value in environment.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


@contextmanager
def _handler_kept(number: int) -> Iterator[None]:
    before = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, before)


def _figures(settings: SweepSettings, report: Report) -> dict[str, float]:
    """Return the figures of a report for MLflow; with population-based training also the values, which change."""
    figures = {"validation": report.validation, "best_validation": report.best_validation}
    if report.meta_loss is not None:
        figures["meta_loss"] = report.meta_loss
    if settings.scheduler == "pbt":
        figures |= {key: float(value) for key, value in report.values.items() if isinstance(value, int | float)}
    return figures


def _why(file: Path) -> str:
    """Return the last line of Tune's error file: type and message of the trial's exception, without the traceback."""
    try:
        lines = file.read_text(errors="replace").split("\n")
    except OSError as error:
        return f"Tune kept no reason ({error.strerror})"
    return next(line.strip() for line in reversed(lines) if line.strip())
