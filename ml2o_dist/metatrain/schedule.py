"""The episode of each (meta_step, slot): pure functions of the settings and the key, no Ray, no clock."""

from __future__ import annotations

from dataclasses import dataclass

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.metatrain.episode import EpisodeSpec, log_uniform
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.runtime.seeding import derive_seed


@dataclass(frozen=True, order=True)
class Key:
    """Names a work item; its episode is the same wherever it runs.

    Attributes:
        meta_step: updates of the weights before the episode, so 0 for the first meta-step.
        slot: number of the episode within its meta-batch, from 0.
        purpose: `train` or `validate`.
    """

    meta_step: int
    slot: int
    purpose: str = "train"

    @property
    def number(self) -> int:
        """The meta-step as every file and message shows it: training is counted from 1.

        A validation has the number of the last meta-step before it, 0 before the first.
        """
        return self.meta_step + (self.purpose == "train")

    def __str__(self) -> str:
        return f"{'' if self.purpose == 'train' else 'validation at '}meta-step {self.number} slot {self.slot}"


@dataclass(frozen=True)
class WorkItem:
    """A key and the episode it stands for."""

    key: Key
    spec: EpisodeSpec


def horizon(settings: MetaTrainSettings, meta_step: int) -> int:
    """Return K of `meta_step`, the same for all its slots: drawn uniformly from `horizon`."""
    choices = settings.horizon
    return choices[derive_seed("horizon", settings.seed, meta_step) % len(choices)]


def weights_version(settings: MetaTrainSettings, meta_step: int) -> int:
    """Return the number of updates, at most `meta_step`, behind the weights that roll out `meta_step`."""
    return max(0, meta_step - settings.staleness)


def admitted(settings: MetaTrainSettings, version: int) -> range:
    """Return the meta-steps that may be rolled out after `version` updates, since their weights exist."""
    return range(version, min(version + settings.staleness + 1, settings.meta_steps))


def training_items(settings: MetaTrainSettings, meta_step: int, device: str) -> list[WorkItem]:
    """Return the episodes of `meta_step`, in slot order."""
    family = settings.family.training()
    items = []
    for slot in range(settings.meta_batch_size):
        seed = derive_seed("train", settings.seed, meta_step, slot)
        spec = EpisodeSpec(
            problem=family.sample(seed),
            seed=seed,
            horizon=horizon(settings, meta_step),
            instances=settings.instances,
            rule=settings.rule,
            estimator=settings.estimator,
            unroll=settings.unroll,
            parameter_scale=log_uniform(settings.family.rescale, seed),
            objective_rescale=settings.family.objective_rescale,
            device=device,
            data_root=settings.data.root,
            record=recorded(settings, meta_step, slot),
        )
        items.append(WorkItem(Key(meta_step, slot), spec))
    return items


def recorded(settings: MetaTrainSettings, meta_step: int, slot: int) -> bool:
    """Tell whether this training episode's trajectory is kept: the first slots of evenly spaced meta-steps.

    The first meta-step is among them, and the last one where there are at least two.
    """
    kept, last = min(settings.trajectories.meta_steps, settings.meta_steps), settings.meta_steps - 1
    steps = (i * last // max(1, kept - 1) for i in range(kept))
    return slot < settings.trajectories.slots and meta_step in steps


def validation_items(settings: MetaTrainSettings, meta_step: int, device: str) -> list[WorkItem]:
    """Return the validation episodes after `meta_step` updates; their seeds are the same every time."""
    items = []
    for slot, text in enumerate(settings.family.validation):
        spec = EpisodeSpec(
            problem=ProblemSpec.parse(text),
            seed=derive_seed("validate", settings.seed, slot),
            horizon=settings.validation.horizon,
            instances=settings.validation.instances,
            rule=settings.rule,
            estimator=None,
            device=device,
            data_root=settings.data.root,
        )
        items.append(WorkItem(Key(meta_step, slot, "validate"), spec))
    return items


def validates(settings: MetaTrainSettings, meta_step: int) -> bool:
    """Tell whether the weights after `meta_step` updates are validated: at 0, every `validation.every`, at the end."""
    return meta_step % settings.validation.every == 0 or meta_step == settings.meta_steps
