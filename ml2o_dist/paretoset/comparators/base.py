"""The inputs and outputs of comparators, and their registration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from ml2o_dist.paretoset.conditioned import Conditioned
from ml2o_dist.paretoset.networks import MultiHead
from ml2o_dist.paretoset.settings import ParetoSetSettings
from ml2o_dist.paretoset.task_vectors import TaskVectors
from ml2o_dist.paretoset.tasks import TaskSet
from ml2o_dist.runtime.registry import Registry, modules_of

State = dict[str, Tensor]
"""A whole state dict of the network."""

Training = Literal["none", "ray", "once", "all"]


@dataclass(frozen=True)
class Ingredients:
    """The inputs of a comparator: the same tasks, network and experts as for our fusion.

    Attributes:
        settings: the settings of the run.
        tasks: the T tasks.
        network: the network, with initial values from the run's seed.
        start, experts: the common start and the T experts, on the run's device.
        rays: the preferences that are evaluated, [k, T] float64.
        measure: (state dict, "validation" or "test") -> losses [T] and accuracies [T].
    """

    settings: ParetoSetSettings
    tasks: TaskSet
    network: MultiHead
    start: State
    experts: list[State]
    rays: Tensor
    measure: Callable[[State, str], tuple[Tensor, Tensor]]

    @cached_property
    def vectors(self) -> TaskVectors:
        """The experts as differences from the start."""
        return TaskVectors.of(self.network, self.start, self.experts, self.network.head_names)


@dataclass(frozen=True)
class Merged:
    """Networks that were made without training.

    Attributes:
        rays: the preference of each network, [k, T].
        states: k state dicts.
        chosen: selected hyperparameters, as JSON values; they are stored with the result.
    """

    rays: Tensor
    states: list[State]
    chosen: dict[str, Any] = field(default_factory=dict)


Make = Callable[[Ingredients], "Merged | Conditioned"]


@dataclass(frozen=True)
class Comparator:
    """A comparator by name; see `register_comparator`."""

    make: Make
    training: Training
    loss: str
    aggregator: str


COMPARATORS: Registry[Comparator] = Registry("comparator", lambda: modules_of("ml2o_dist.paretoset.comparators"))


def register_comparator(
    name: str, *, training: Training = "none", loss: str = "ls", aggregator: str = "mean"
) -> Callable[[Make], Make]:
    """Register a function of `Ingredients` as a comparator for `comparators` (a decorator).

    Args:
        training: "none": the function returns `Merged` networks. Otherwise it returns a `Conditioned` model that is
            trained by Adam: "ray", one for each preference of the grid; "once", one that knows no preference; "all",
            one that takes the preference.
        loss: the scalarization of the tasks' losses for a preference: ls, epo, tchebycheff, hypervolume, cosmos.
        aggregator: the aggregator of the losses' gradients in training.
    """

    def register(make: Make) -> Make:
        COMPARATORS.register(name, make)(Comparator(make, training, loss, aggregator))
        return make

    return register
