"""The settings of `ml2o pareto-set train`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from ml2o_dist.config import (
    LARGEST_SEED,
    DataSettings,
    Device,
    MetaTrainSettings,
    Plugins,
    ShareSettings,
    TrackingSettings,
    check_device,
    plugins_field,
)
from ml2o_dist.paretoset.task_names import task_sets
from ml2o_dist.runtime.errors import unknown
from ml2o_dist.runtime.names import ExperimentName, ModelName

SETTINGS, FRONTS, TABLE, PICTURE = "pareto_set.yaml", "fronts.json", "fronts.md", "plots/fronts.png"
"""File names of settings and results in a run directory."""

MOST_SAMPLES = 1_000_000
"""Samples of each task in a batch."""


class _Settings(BaseModel):
    model_config = MetaTrainSettings.model_config


class NetworkSettings(_Settings):
    """The network; what its kind does not use is ignored."""

    name: str = Field("cnn", description="mlp, cnn, lenet5, vgg, vit, or timm/NAME, hf/NAME, open_clip/NAME")
    hidden: str | int = Field("100-50", description="mlp: widths")
    channels: str | int = Field("8-16", description="cnn, vgg: one width for each block")
    variant: str = Field("cosmos", description="lenet5: cosmos or paretomtl")
    activation: Literal["relu", "tanh", "gelu"] = "relu"
    patch: int = Field(6, ge=1, le=1024, description="vit: side of a patch")
    width: int = Field(48, ge=1, le=16_384, description="vit: features of a token")
    depth: int = Field(4, ge=1, le=1000, description="vit: blocks")


class FineTuning(_Settings):
    """One training by Adam with data-parallel ranks: of the common start, or of an expert."""

    steps: int = Field(1000, ge=0, le=10**9)
    batch: int = Field(128, ge=1, le=MOST_SAMPLES, description="samples of each task in a step, over all ranks")
    lr: float = Field(0.001, gt=0, description="Adam's; a cosine leads to final_lr of it")
    final_lr: float = Field(0.1, ge=0, le=1)
    ranks: int = Field(1, ge=1, le=10_000, description="processes that share a batch; the batch must be a multiple")
    checkpoint_every: int = Field(200, ge=1, le=10**9)
    max_failures: int = Field(3, ge=0, le=10**6, description="how often a group of ranks is started anew")

    @model_validator(mode="after")
    def _even(self) -> FineTuning:
        if self.batch % self.ranks:
            raise ValueError(f"batch {self.batch} must be a multiple of ranks {self.ranks}")
        return self


class ExpertSettings(FineTuning):
    """The experts: fine-tuned here, or read from files."""

    files: tuple[str, ...] = Field(
        (), max_length=100, description="state dicts, .safetensors or .pt: the start, then each expert"
    )

    @field_validator("files")
    @classmethod
    def _enough(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        if files and len(files) < 3:
            raise ValueError(f"must name the common start and at least two experts, not {len(files)} files")
        return files


class RouterSettings(_Settings):
    """How the routers, and the comparators that take a preference, are trained."""

    begin: Literal["soup", "arithmetic"] = Field(
        "soup", description="what routers are before training: the rewarded soup, or scale for every task, the paper's"
    )
    loss: Literal["ls", "epo", "tchebycheff", "hypervolume"] = Field("ls", description="what is made of a preference")
    optimizer: str = Field(
        "mean+adam@0.01", description="AGGREGATOR[+OPTIMIZER]@LR, a run directory, models:/NAME@ALIAS, gml2o:NAME, ..."
    )
    steps: int = Field(4000, ge=0, le=10**9)
    batch: int = Field(128, ge=1, le=MOST_SAMPLES, description="samples of each task in a step")
    final_lr: float = Field(
        0.1, ge=0, le=1, description="a cosine leads to this share of the learning rate; hand-designed optimizers only"
    )
    checkpoint_every: int = Field(500, ge=1, le=10**9)


class ParetoTracking(TrackingSettings):
    """Where MLflow keeps runs and versions."""

    experiment: ExperimentName = "ml2o/pareto-set"
    model: ModelName = "ml2o-pareto-set"


class ParetoSetSettings(_Settings):
    """All of one Pareto set: tasks, network, experts, fusion, routers, comparators."""

    plugins: Plugins = plugins_field()
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    tasks: str = Field("multidigits", description="a task set: " + ", ".join(task_sets()))
    network: NetworkSettings = NetworkSettings()
    start: FineTuning = FineTuning()
    experts: ExpertSettings = ExpertSettings()
    modules: str = Field("all", description="what gets a router: all, mlp, or a glob over module names")
    scale: float = Field(
        0.3,
        description="lambda_0: the weight of every task vector in modules without a router; what begin: arithmetic has",
    )
    routers: RouterSettings = RouterSettings()
    comparators: tuple[str, ...] = Field(
        ("average", "arithmetic", "ties", "soup"),
        description="any of average, arithmetic, ties, soup; trained: ls, epo, mgda, phn-ls, phn-epo, cosmos, pamal",
    )
    comparator_lr: float = Field(0.001, gt=0, description="Adam's, of the comparators that train networks")
    divisions: int = Field(10, ge=1, le=50, description="of the grid of preferences, up to three tasks")
    test_samples: int | None = Field(None, ge=1, le=10**9, description="evenly spaced ones of the split; null: all")
    device: Device = "auto"
    resources: ShareSettings = Field(ShareSettings(), description="of each training")
    data: DataSettings = DataSettings()
    tracking: ParetoTracking = ParetoTracking()

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, name: str) -> str:
        if name not in task_sets():
            raise unknown("task set", name, task_sets())
        return name

    @field_validator("comparators")
    @classmethod
    def _known_comparators(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from ml2o_dist.paretoset.comparators.base import COMPARATORS  # late: it is made of these settings

        for name in names:
            if name not in COMPARATORS:
                raise unknown("comparator", name, COMPARATORS, extensible=True)
        if len(set(names)) < len(names):
            raise ValueError(f"names a comparator twice: {list(names)}")
        return names

    @model_validator(mode="after")
    def _has_its_device(self) -> ParetoSetSettings:
        check_device(self.device, self.resources)
        return self
