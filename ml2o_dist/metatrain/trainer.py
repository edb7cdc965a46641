"""The loop that joins schedule, workers, learner and checkpoints. It knows no MLflow and no terminal."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.config_file import first_difference, parse_settings
from ml2o_dist.metatrain.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from ml2o_dist.metatrain.episode import EpisodeResult
from ml2o_dist.metatrain.history import History, Row, write_history
from ml2o_dist.metatrain.learner import Learner, UpdateInfo
from ml2o_dist.metatrain.schedule import (
    WorkItem,
    admitted,
    horizon,
    training_items,
    validates,
    validation_items,
    weights_version,
)
from ml2o_dist.metatrain.trajectories import TrajectoryWriter
from ml2o_dist.rules.learned import Weights
from ml2o_dist.runtime.errors import UserError

CHECKPOINT_SECONDS = 30.0
"""Seconds between checkpoints with `checkpoint_every: 0`: the most work that a crash may lose."""

LOST_STEPS = 10
"""The run ends after so many meta-steps in a row without a usable episode: the weights will not recover."""

log = logging.getLogger(__name__)

Pending = Callable[[], list[EpisodeResult]]
"""Waits for the results of work items and returns them in the order in which they were given."""

Begin = Callable[[Sequence[WorkItem], Weights], Pending]
"""Begins work items under weights: `WorkerPool.begin`, or a function that defers a plain loop."""


@dataclass
class Progress:
    """What a run has done so far, saved with every checkpoint: the history as columns, the rest as plain values.

    Attributes:
        inner_steps, rollout_seconds: of training alone.
        seconds: wall time of meta-training, validation and checkpoints included, over all its processes.
        worker_restarts, repeated_episodes: workers replaced and episodes retried, if workers run them.
        begun_from: sha256 of the weights that `begin` named.
    """

    inner_steps: int = 0
    rollout_seconds: float = 0.0
    seconds: float = 0.0
    worker_restarts: int = 0
    repeated_episodes: int = 0
    skipped_episodes: int = 0
    failed_episodes: int = 0
    best_score: float = math.inf
    best_step: int = -1
    validated_step: int = -1
    tracking_run: str = ""
    begun_from: str = ""
    data_sha256: dict[str, str] = field(default_factory=dict)
    history: History = field(default_factory=History)

    @property
    def inner_steps_per_s(self) -> float:
        """Inner steps of training per second of rollouts, over all workers."""
        return self.inner_steps / self.rollout_seconds if self.rollout_seconds else 0.0

    def values(self) -> dict[str, Any]:
        """Return everything but the history."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "history"}

    def columns(self) -> dict[str, Tensor]:
        """Return the history by figure, [meta-steps] in float64, nan where a row has none."""
        return {name: torch.from_numpy(np.array(column)) for name, column in self.history.columns.items()}

    @classmethod
    def restored(cls, values: Any, columns: Mapping[str, Tensor]) -> Progress:
        """Rebuild a Progress from its `values` and `columns`; raises UserError if they are malformed."""
        lengths = {column.shape if column.dtype == torch.float64 else None for column in columns.values()}
        if "meta_step" not in columns or len(lengths) != 1 or len(next(iter(lengths)) or ()) != 1:
            raise UserError("its history is no columns of one length, meta_step among them")
        history = History({name: column.tolist() for name, column in columns.items()})
        return cls(**checked_progress(values), history=history)


def checked_progress(values: Any) -> dict[str, Any]:
    """Return `values`, read back from a file, if `Progress.values` may have written them; else raise UserError."""
    defaults = Progress().values()
    if not isinstance(values, dict) or not values.keys() <= defaults.keys():
        raise UserError(f"its progress is something else than {', '.join(defaults)}")
    for name, value in values.items():
        kinds = (int, float) if isinstance(defaults[name], float) else type(defaults[name])
        texts = isinstance(value, dict) and not all(isinstance(each, str) for each in value.values())
        if isinstance(value, bool) or not isinstance(value, kinds) or texts:
            raise UserError(f"its progress has a {name} of the wrong type")
    return values


class TrainingError(Exception):
    """Meta-training cannot go on; the state is that of the last complete meta-step."""


class Trainer:
    """One meta-training: `run` continues from the current state, `save` writes the state to a checkpoint."""

    def __init__(self, settings: MetaTrainSettings, run_dir: Path, on_saved: Callable[[], None] = lambda: None) -> None:
        """`settings.device` must be a device, not `auto`; `on_saved` is called after each checkpoint."""
        self.settings = settings
        self.run_dir = run_dir
        self._on_saved = on_saved
        self.learner = Learner(settings)
        self.progress = Progress()
        self.best_weights: dict[str, Tensor] = self.learner.weights
        self._trajectories = TrajectoryWriter(run_dir)
        self._saved = (-1, -1)
        self._saved_at = self._timed_at = self._stepped_at = time.monotonic()
        self._waited = self._busy = 0.0  # seconds since the last meta-step: for results, of workers
        self._unwritable = False

    def begin(self) -> None:
        """Load the initial weights that `settings.init_from` names, if it names any.

        Raises:
            UserError: there are none, or they are of another rule.
        """
        name = self.settings.init_from
        if not name:
            return
        found = load_artifact(name)
        ours, theirs = (rule.model_dump(exclude={"guard"}) for rule in (self.settings.rule, found.rule))
        if others := [f"rule.{key}={theirs[key]}" for key in ours if ours[key] != theirs[key]]:
            raise UserError(f"init_from={name}: weights of another rule than these settings'; set {' '.join(others)}")
        self.learner.begin(found.weights)
        self.best_weights = self.learner.weights
        self.progress.begun_from = found.weights_sha256

    def resume(self) -> list[str]:
        """Load the newest valid checkpoint of the run directory; return why newer ones were refused.

        Raises:
            UserError: there is none, or it belongs to another configuration.
        """
        checkpoint, refused = newest_checkpoint(self.run_dir / "checkpoints")
        if checkpoint is None:
            why = f"; refused: {'; '.join(refused)}" if refused else ""
            raise UserError(f"nothing to resume: {self.run_dir / 'checkpoints'} holds no valid checkpoint{why}")
        step = f"checkpoints/step_{checkpoint.meta_step:06d}"
        try:
            settings = parse_settings(checkpoint.state.get("config"))
        except UserError as error:
            raise UserError(f"cannot resume {self.run_dir}: the configuration in {step}: {error}") from error
        if difference := first_difference(self.settings, settings):
            raise UserError(f"cannot resume {self.run_dir} with another configuration: {difference}")
        try:
            self.take_over(checkpoint)
        except UserError as error:
            raise UserError(f"cannot resume {self.run_dir}: {step} cannot be used: {error}") from error
        return refused

    def take_over(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`; its configuration may differ, its rule may not.

        Raises:
            UserError: it does not hold the state of such a run; nothing has changed.
        """
        tensors = checkpoint.tensors
        best = _below("best/", tensors)
        self.learner.check(tensors, best, checkpoint.meta_step)
        progress = Progress.restored(checkpoint.state.get("progress"), _below("history/", tensors))
        self.learner.restore(tensors, checkpoint.meta_step)
        self.best_weights, self.progress = best, progress
        self._saved = (checkpoint.meta_step, self.progress.validated_step)

    def run(self, begin: Begin, on_row: Callable[[int, Row], None] = lambda step, row: None) -> None:
        """Meta-train up to `meta_steps`, calling `on_row(meta_step, figures)` after each one.

        With `staleness` S, episodes of up to S later meta-steps are in flight beside those of the next one, under
        weights that are at most S updates old; the meta-step alone determines the age. Validation figures of a step
        are passed in a separate call. After any exception the state is that of the last complete meta-step, ready for
        `save`. The state is saved before anything is computed, so a run that is killed at any later moment can be
        resumed. If a checkpoint cannot be written, the run warns and continues; the last one raises OSError.

        Raises:
            TrainingError: the weights or all episodes of `LOST_STEPS` meta-steps are not finite.
        """
        self._timed_at = self._stepped_at = time.monotonic()
        self._try_to_save()
        self._saved_at = time.monotonic()
        self._trajectories.discard_from(self.learner.version + 1)
        begun: dict[int, tuple[Sequence[WorkItem], Pending]] = {}
        while True:
            step = self.learner.version
            if validates(self.settings, step) and self.progress.validated_step < step:
                self._record(step, {"validation": self._validate(step, begin)}, on_row)
            if step >= self.settings.meta_steps:
                self.save()
                return
            if self._checkpoint_due():
                self._try_to_save()
            for later in admitted(self.settings, step):
                if later not in begun:
                    items = training_items(self.settings, later, self.settings.device)
                    weights = self.learner.weights_of(weights_version(self.settings, later))
                    begun[later] = items, begin(items, weights)
            self._record(step + 1, self._train(step, *begun.pop(step)), on_row)

    def save(self) -> None:
        """Write checkpoint and metrics for the current state, unless they exist already; OSError: not possible."""
        state = (self.learner.version, self.progress.validated_step)
        if state == self._saved:
            return
        now = time.monotonic()
        self.progress.seconds += now - self._timed_at
        self._timed_at = now
        # before the checkpoint: a run that resumes from it does not write the trajectories again
        self._trajectories.flush()
        write_history(self.run_dir, self.progress.history)
        best = {f"best/{name}": tensor for name, tensor in self.best_weights.items()}
        history = {f"history/{name}": column for name, column in self.progress.columns().items()}
        config = self.settings.model_dump(mode="json", by_alias=True)
        saved = {"config": config, "progress": self.progress.values()}
        checkpoint = Checkpoint(self.learner.version, self.learner.tensors() | best | history, saved)
        save_checkpoint(self.run_dir / "checkpoints", checkpoint, self.settings.keep_checkpoints)
        self._saved, self._saved_at, self._unwritable = state, time.monotonic(), False
        self._on_saved()

    def _try_to_save(self) -> None:
        """Save; if that fails, warn once per outage and leave it to the next checkpoint."""
        try:
            self.save()
        except OSError as error:
            if not self._unwritable:
                log.warning(
                    "no checkpoint could be written to %s at meta-step %d: %s; training goes on, the next one is tried",
                    self.run_dir,
                    self.learner.version,
                    error.strerror or error,
                )
            self._unwritable, self._saved_at = True, time.monotonic()

    def _train(self, step: int, items: Sequence[WorkItem], pending: Pending) -> Row:
        results, seconds = self._await(pending)
        self._trajectories.add(step + 1, items, results)
        inner_steps = sum(r.inner_steps for r in results)
        failed = sum(bool(r.error) for r in results)
        update = self._update(results)
        self.progress.inner_steps += inner_steps
        self.progress.rollout_seconds += seconds
        self.progress.skipped_episodes += update.skipped
        self.progress.failed_episodes += failed
        if update.skipped:
            log.warning(
                "meta-step %d: %d of %d episodes skipped: %d failed, %d were not finite",
                step + 1,
                update.skipped,
                len(results),
                failed,
                update.skipped - failed,
            )
        finite = [r.meta_loss for r in results if r.finite]
        return {
            "meta_loss": sum(finite) / len(finite) if finite else math.nan,
            "gradient_norm": update.gradient_norm,
            "learning_rate": update.learning_rate,
            "skipped_episodes": float(update.skipped),
            "failed_episodes": float(failed),
            "horizon": float(horizon(self.settings, step)),
            "lag": float(step - weights_version(self.settings, step)),
            "inner_steps_per_s": inner_steps / seconds,
            "result_bytes": float(sum(r.gradient.nbytes for r in results if r.gradient is not None)),
            **self._shares(),
        }

    def _await(self, pending: Pending) -> tuple[list[EpisodeResult], float]:
        """Return the results and the seconds spent waiting for them."""
        began = time.monotonic()
        results = pending()
        waited = time.monotonic() - began
        self._waited += waited
        self._busy += sum(r.seconds for r in results)
        return results, waited

    def _shares(self) -> Row:
        """Return how the time since the last meta-step was spent."""
        now = time.monotonic()
        seconds, self._stepped_at = now - self._stepped_at, now
        shares = {
            "seconds": seconds,
            "learner_share": 1 - self._waited / seconds,
            "worker_utilisation": self._busy / seconds / self.settings.workers,
        }
        self._waited = self._busy = 0.0
        return shares

    def _update(self, results: Sequence[EpisodeResult]) -> UpdateInfo:
        """Update the weights, or raise TrainingError and change nothing."""
        recent = islice(reversed(self.progress.history), LOST_STEPS - 1)
        lost = [row for row in recent if row.get("skipped_episodes") == len(results)]
        if len(lost) == LOST_STEPS - 1 and all(r.gradient is None for r in results):
            raise TrainingError(
                f"no episode of the last {LOST_STEPS} meta-steps gave a finite meta-gradient: lower learner.lr or "
                "rule.lr, or look at the problems of family.train"
            )
        try:
            return self.learner.update(results)
        except ArithmeticError as error:
            raise TrainingError(f"meta-step {self.learner.version + 1}: {error}") from None

    def _record(self, step: int, row: Row, on_row: Callable[[int, Row], None]) -> None:
        row = {name: x for name, x in row.items() if x == x}
        self.progress.history.add(step, row)
        on_row(step, row)

    def _validate(self, step: int, begin: Begin) -> float:
        weights = self.learner.averaged_weights
        results, _ = self._await(begin(validation_items(self.settings, step, self.settings.device), weights))
        score = sum(r.score for r in results) / len(results) if all(r.finite for r in results) else math.inf
        if score < self.progress.best_score:
            self.progress.best_score, self.progress.best_step, self.best_weights = score, step, weights
        self.progress.validated_step = step
        return score

    def _checkpoint_due(self) -> bool:
        step = self.learner.version
        if self.settings.checkpoint_every:
            return step > 0 and step % self.settings.checkpoint_every == 0
        return time.monotonic() - self._saved_at > CHECKPOINT_SECONDS


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
