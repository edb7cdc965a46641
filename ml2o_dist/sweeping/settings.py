"""The settings of a sweep, including its search space."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import (
    BaseModel,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ml2o_dist.config import LARGEST_SEED, MOST_META_STEPS, MetaTrainSettings, TrackingSettings
from ml2o_dist.runtime.names import ModelName

DEFAULT_TRIALS = 10
MOST_TRIALS = 100_000
"""Maximum trials of a sweep; in a grid, maximum combinations."""


class _Settings(BaseModel):
    model_config = MetaTrainSettings.model_config


class Distribution(_Settings):
    """The source of one key's values: exactly one field is set; intervals include their ends."""

    uniform: tuple[float, float] | None = Field(None, description="a number from [low, high]")
    loguniform: tuple[float, float] | None = Field(None, description="the same, even in its logarithm; low > 0")
    randint: tuple[int, int] | None = Field(None, description="a whole number from low to high")
    lograndint: tuple[int, int] | None = Field(None, description="the same, even in its logarithm; low > 0")
    choice: tuple[JsonValue, ...] | None = Field(None, description="one of these values, drawn")
    grid: tuple[JsonValue, ...] | None = Field(None, description="each of these values, with every other combination")

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of an interval; None for choice and grid."""
        ends: tuple[float, float] | None = getattr(self, self.kind) if self.kind not in ("choice", "grid") else None
        return ends

    @property
    def whole(self) -> bool:
        """Whether it yields only whole numbers."""
        return self.kind in ("randint", "lograndint")

    @property
    def logarithmic(self) -> bool:
        """Whether its values are uniform in their logarithm."""
        return self.kind in ("loguniform", "lograndint")

    @property
    def values(self) -> tuple[Any, ...]:
        """The values to check before anything starts: every value of a list, both ends of an interval."""
        given: tuple[Any, ...] = getattr(self, self.kind)
        return given

    @model_serializer(mode="wrap")
    def _given(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialise only the field that is set."""
        return {key: value for key, value in whole(self).items() if value is not None}

    @model_validator(mode="after")
    def _one(self) -> Distribution:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}, not {given or 'none'}")
        if not self.values:
            raise ValueError(f"{self.kind} is empty; give at least one value")
        if self.interval is None:
            texts = [json.dumps(value, sort_keys=True) for value in self.values]
            if len(set(texts)) < len(texts):
                raise ValueError(f"{self.kind} names a value twice: {list(self.values)}")
            return self
        low, high = self.interval
        if not low < high:
            raise ValueError(f"{self.kind} must be [low, high] with low < high, not [{low:g}, {high:g}]")
        if self.logarithmic and low <= 0:
            raise ValueError(f"{self.kind} must have low > 0, not {low:g}")
        return self


class AshaSettings(_Settings):
    """Asynchronous successive halving: a trial is stopped early where others were better after as many meta-steps."""

    grace: int = Field(
        0, ge=0, le=MOST_META_STEPS, description="meta-steps that every trial is given; 0: until its first validation"
    )
    reduction: float = Field(3.0, gt=1, le=1e6, description="of as many trials one goes on from each rung to the next")


class PbtSettings(_Settings):
    """Population-based training in lockstep: at each `interval` the worst trials resume from the best ones' weights.

    They then use the best ones' settings, changed a little. All trials wait for each other at `interval`.
    """

    interval: int = Field(
        0, ge=0, le=MOST_META_STEPS, description="meta-steps between two exchanges; 0: validation.every"
    )
    quantile: float = Field(0.25, gt=0, le=0.5, description="share of the trials that is replaced, and that is copied")
    resample: float = Field(
        0.25, ge=0, le=1, description="probability that a value is drawn anew, not changed a little"
    )


class DriverSettings(_Settings):
    """Ray resources of a trial's driver process, which coordinates the workers and does the small updates."""

    num_cpus: float = Field(0.0, ge=0, le=1e6, description="0: it needs next to nothing beside workers that are busy")


class SweepTracking(_Settings):
    """MLflow settings for the runs of a sweep and the version of the best trial."""

    model_config = TrackingSettings.model_config

    uri: str = Field("", description='MLflow tracking URI; "": MLFLOW_TRACKING_URI, else sqlite in ML2O_HOME')
    model: ModelName = Field("ml2o", description="name of the registered model")
    register_version: bool = Field(True, alias="register", description="register the best trial as a version")


class SweepSettings(_Settings):
    """All of one sweep: trials are meta-trainings of `meta_train` with some keys replaced from `space`."""

    name: str = Field(
        "sweep", pattern=r"^[\w.-]+$", max_length=200, description="MLflow's experiment is ml2o/sweep/NAME"
    )
    seed: int = Field(
        0, ge=0, le=LARGEST_SEED, description="of the search; every trial has meta_train.seed, so that they are paired"
    )
    search: Literal["random", "grid", "optuna"] = "random"
    trials: int | None = Field(
        None, ge=1, le=MOST_TRIALS, description=f"null: {DEFAULT_TRIALS}; search=grid runs every combination"
    )
    scheduler: Literal["none", "asha", "pbt"] = Field("none", description="none: every trial runs to its end")
    asha: AshaSettings = AshaSettings()
    pbt: PbtSettings = PbtSettings()
    space: dict[str, Distribution] = Field(description="by dotted key of meta-train's settings")
    max_concurrent: int = Field(
        0, ge=0, le=MOST_TRIALS, description="trials at a time; 0: as many as there is room for"
    )
    retries: int = Field(
        1,
        ge=0,
        le=1000,
        description="how often a trial that failed goes on from its newest checkpoint; the loss of its process, as "
        "with its host, does not count (unless this is 0)",
    )
    driver: DriverSettings = DriverSettings()
    tracking: SweepTracking = SweepTracking()
    meta_train: MetaTrainSettings = Field(description="what is the same in all trials: a file's name, or settings")

    @property
    def experiment(self) -> str:
        """Name of MLflow's experiment."""
        return f"ml2o/sweep/{self.name}"

    @property
    def count(self) -> int:
        """The number of trials of the sweep."""
        if self.search == "grid":
            return math.prod(len(each.values) for each in self.space.values())
        return self.trials or DEFAULT_TRIALS

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, space: Any) -> Any:
        from ml2o_dist.config_file import current_key  # late: it is made of these settings, too

        return {current_key(key): each for key, each in _flattened(space)} if isinstance(space, Mapping) else space

    @field_validator("space")
    @classmethod
    def _not_empty(cls, space: dict[str, Distribution]) -> dict[str, Distribution]:
        if not space:
            raise ValueError(
                "it is empty; give at least one key, as in `space: {learner.lr: {loguniform: [1e-4, 0.1]}}`"
            )
        return space

    @model_validator(mode="after")
    def _fits(self) -> SweepSettings:
        for key, distribution in self.space.items():
            if self.search == "grid" and distribution.interval is not None:
                raise ValueError(f"search=grid takes grid or choice, space.{key} is {distribution.kind}")
            if self.search != "grid" and distribution.kind == "grid":
                raise ValueError(f"space.{key} is grid, which needs search=grid; choice is drawn from")
        if self.count > MOST_TRIALS:
            raise ValueError(f"search=grid has {self.count} combinations, more than {MOST_TRIALS}")
        if self.search == "grid" and self.trials is not None:
            raise ValueError(
                f"search=grid runs every combination ({self.count}); trials={self.trials} must be left out"
            )
        if self.scheduler == "pbt" and self.search != "random":
            raise ValueError(f"scheduler=pbt draws for itself: search must be random, not {self.search}")
        if self.scheduler == "pbt" and self.count < 2:
            raise ValueError("scheduler=pbt needs trials >= 2")
        return self


def _flattened(space: Mapping[Any, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the distributions of nested groups by dotted key."""
    for key, value in space.items():
        group = isinstance(value, Mapping) and value and not value.keys() & Distribution.model_fields.keys()
        if group and all(isinstance(each, Mapping) for each in value.values()):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
