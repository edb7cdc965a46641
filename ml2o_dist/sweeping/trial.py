"""One trial: a whole meta-training in a Ray Tune process, with its own workers in one placement group."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from ray import tune

from ml2o_dist.config import MetaTrainSettings, PlacementSettings
from ml2o_dist.metatrain.checkpoint import load_checkpoint
from ml2o_dist.metatrain.history import Row
from ml2o_dist.metatrain.pool import WorkerPool
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.plugins import Carried
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.sweeping.settings import SweepSettings
from ml2o_dist.sweeping.space import as_values, trial_settings

SCRATCH = "meta-training"
"""The working folder of a trial, inside the folder that Tune gives it."""

SCORE, TIME = "validation", "meta_step"
"""The reported figures that Tune's schedulers and searches use: the score, lower is better, and the meta-steps."""


def as_trainable(settings: SweepSettings) -> Any:
    """Return the function that Ray Tune runs for each trial, with the placement group of a trial."""
    sent = Carried(settings)

    def meta_training(sampled: dict[str, Any]) -> None:  # on resume Tune finds it by this name
        meta_train_trial(_in_trial(sent.value, sampled))

    def resources(sampled: dict[str, Any]) -> Any:
        try:
            return placement(sent.value, _in_trial(sent.value, sampled))
        except UserError:  # invalid combination of values: the trial itself reports it
            return placement(sent.value, sent.value.meta_train)

    return tune.with_resources(meta_training, resources)


def placement(settings: SweepSettings, trial: MetaTrainSettings) -> Any:
    """Return the placement group of a trial: the driver first, then each other process, close together if possible.

    A driver that asks for no resources has no bundle of its own and runs beside the first worker.
    """
    replayer = [trial.learner.resources] if trial.backward == "learner" else []
    processes: list[PlacementSettings] = [*replayer, *[trial.resources] * trial.workers]
    head: list[dict[str, str]] = (
        [{}] if settings.driver.num_cpus else []
    )  # Tune leaves out a first bundle that asks for nothing
    labels = {"bundle_label_selector": [*head, *(dict(each.labels) for each in processes)]}
    return tune.PlacementGroupFactory(
        [{"CPU": settings.driver.num_cpus}, *map(_bundle, processes)],
        strategy="PACK",
        **(labels if any(each.labels for each in processes) else {}),
    )


def _bundle(share: PlacementSettings) -> dict[str, float]:
    shares = {"CPU": share.num_cpus, "GPU": share.num_gpus, **share.custom}
    return {kind: each for kind, each in shares.items() if each}


def meta_train_trial(settings: MetaTrainSettings) -> None:
    """Meta-train, resuming from Tune's checkpoint if there is one, and report every validation with a checkpoint.

    Tune keeps the checkpoints; the next process of the trial deletes its working folder. An exception of the
    meta-training is raised, and the trial has failed.
    """
    torch.set_num_threads(1)
    folder = Path(tune.get_context().get_trial_dir()) / SCRATCH
    shutil.rmtree(folder, ignore_errors=True)  # an earlier process's; Tune's checkpoint has all that matters
    trainer = Trainer(settings, folder)
    if (found := tune.get_checkpoint()) is not None:
        with found.as_directory() as path:
            trainer.take_over(load_checkpoint(Path(path)))
    else:
        trainer.begin()
    with closing(WorkerPool.of(settings)) as pool:
        trainer.run(pool.begin, _reporting(trainer))


def _reporting(trainer: Trainer) -> Callable[[int, Row], None]:
    def on_row(step: int, row: Mapping[str, float]) -> None:
        if SCORE not in row:
            return
        checkpoint = trainer.run_dir / "checkpoints" / f"step_{step:06d}"
        shutil.rmtree(checkpoint, ignore_errors=True)  # an older one, written before the validation
        trainer.save()
        progress = trainer.progress
        figures = {
            TIME: step,
            SCORE: row[SCORE],
            "best_validation": progress.best_score,
            "best_meta_step": progress.best_step,
            "meta_loss": next((r["meta_loss"] for r in reversed(progress.history) if "meta_loss" in r), None),
            "inner_steps": progress.inner_steps,
            "seconds": progress.seconds,
            "done": step >= trainer.settings.meta_steps,
        }
        tune.report(figures, checkpoint=tune.Checkpoint.from_directory(checkpoint))

    return on_row


def _in_trial(settings: SweepSettings, sampled: Mapping[str, Any]) -> MetaTrainSettings:
    """Return a trial's settings without the steps that a sweep does only once, or not at all."""
    trial = trial_settings(settings, as_values(settings, sampled))
    return trial.model_copy(
        update={"trajectories": trial.trajectories.model_copy(update={"meta_steps": 0}), "keep_checkpoints": 1}
    )
