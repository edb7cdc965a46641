"""What is optimized: the `Problem` contract, problems by name, and families to draw them from.

Shapes everywhere: P instances advanced together, m objectives, n parameters (flat), B samples in a batch.
"""

from __future__ import annotations

import inspect
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ml2o_dist.errors import UserError, unknown
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.seeding import derive_seed

Batch = Any
"""What `sample_batch` returns; opaque to everything but the problem that drew it."""

Scalar = str | int | float | bool


class Problem(ABC):
    """P instances of one multi-objective problem min_z (f_1(z), ..., f_m(z)), z in R^n.

    Attributes:
        instances: P.  objectives: m.  dimension: n.
        positive: every loss is >= 0 by construction (cross-entropy, squared error).
        minima: known minimum of each objective, [P, m], or None.
        bounds: (lower, upper), each [n], of the feasible box, or None.
        reference_point: [m], for the hypervolume, or None.
        device, dtype: where parameters live and in which precision.
    """

    instances: int
    objectives: int
    dimension: int
    positive: bool = False
    minima: Tensor | None = None
    bounds: tuple[Tensor, Tensor] | None = None
    reference_point: Tensor | None = None
    device: torch.device
    dtype: torch.dtype

    @property
    def layout(self) -> ParameterLayout:
        """The tensors behind the parameters [n]: one vector, unless a problem knows more."""
        return ParameterLayout.vector(self.dimension)

    @abstractmethod
    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        """Return starting points [P, n], row i a pure function of `seeds[i]` (len(seeds) == P)."""

    @abstractmethod
    def sample_batch(self, generator: torch.Generator) -> Batch:
        """Draw one batch per instance from `generator` (a CPU generator); None where the losses are noise-free."""

    @abstractmethod
    def sample_losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Return the losses of every sample, [P, B, m], differentiable in `parameters` [P, n]; noise-free: B = 1."""

    def losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Return the objectives [P, m]: the mean of `sample_losses` over the batch."""
        return self.sample_losses(parameters, batch).mean(dim=1)

    def jacobian(self, parameters: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (J [P, m, n], losses [P, m]), both detached: one forward serves all m backward passes."""
        jacobian, losses = autograd_jacobian(self.losses, parameters.detach(), batch)
        return jacobian.detach(), losses.detach()

    def gradient(self, parameters: Tensor, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return (J^T weights [P, n], losses [P, m]), both detached, by one backward pass; `weights` [P, m].

        Raises:
            UserError: no objective depends on the parameters.
        """
        return autograd_gradient(self.losses, parameters, batch, weights)

    def exact(self, batch: Batch) -> bool:
        """Tell whether losses on `batch` are the objectives themselves, so that two points compare without error."""
        return batch is None

    def project(self, parameters: Tensor) -> Tensor:
        """Return the nearest feasible point to `parameters` [P, n]: clipped to `bounds`, or unchanged."""
        if self.bounds is None:
            return parameters
        return torch.minimum(torch.maximum(parameters, self.bounds[0]), self.bounds[1])

    def test_metrics(self, parameters: Tensor) -> dict[str, Tensor]:
        """Return figures on unseen data, each [P, m] (`test_loss`, `test_accuracy`), or {} where there is none."""
        return {}

    def pareto_front(self, points: int) -> Tensor:
        """Return about `points` points of the true front, [k, m]; raises UserError where none is known."""
        raise UserError(f"{type(self).__name__} has no known Pareto front")

    def pareto_set(self, points: int) -> Tensor:
        """Return about `points` points of the true Pareto set, [k, n]; raises UserError where none is known."""
        raise UserError(f"{type(self).__name__} has no known Pareto set")


def autograd_jacobian(
    losses: Callable[[Tensor, Batch], Tensor], parameters: Tensor, batch: Batch, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Differentiate `losses(parameters, batch)` [P, m] in `parameters` [P, n]; return (J [P, m, n], losses [P, m]).

    One backward pass per objective over the sum of the instances, which do not interact. With `create_graph`
    both stay attached to `parameters` (the second-order estimator needs it).

    Raises:
        UserError: an objective does not depend on the parameters.
    """
    with torch.enable_grad():
        point = parameters if create_graph else parameters.detach().requires_grad_(True)
        values = losses(point, batch)
        rows = []
        for i in range(values.shape[1]):
            total = values[:, i].sum()
            if not total.requires_grad:
                raise UserError(f"objective {i} has no gradient with respect to the parameters")
            (row,) = torch.autograd.grad(
                total,
                point,
                retain_graph=create_graph or i + 1 < values.shape[1],
                create_graph=create_graph,
                allow_unused=True,
            )
            if row is None:
                raise UserError(f"objective {i} has no gradient with respect to the parameters")
            rows.append(row)
    return torch.stack(rows, dim=1), values


def autograd_gradient(
    losses: Callable[[Tensor, Batch], Tensor], parameters: Tensor, batch: Batch, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Differentiate the weighted sum of `losses(parameters, batch)` [P, m]; return (J^T weights [P, n], losses).

    `weights` [P, m]. One backward pass over the sum of the instances, which do not interact.

    Raises:
        UserError: no objective depends on the parameters.
    """
    with torch.enable_grad():
        point = parameters.detach().requires_grad_(True)
        values = losses(point, batch)
        total = (weights.detach() * values).sum()
        gradient = torch.autograd.grad(total, point, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None:
        raise UserError("the weighted objectives have no gradient with respect to the parameters")
    return gradient, values.detach()


@dataclass(frozen=True)
class ProblemContext:
    """What a problem is built with besides its own settings.

    `seed` names the problem's own randomness (coefficients, data order); starting points have seeds of their own.
    `data_root` is the folder of the image data, "" where the embedded default or ML2O_DATA serves.
    """

    instances: int = 1
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    data_root: str = ""

    def __post_init__(self) -> None:
        if self.instances < 1:
            raise UserError(f"a problem needs at least 1 instance, not {self.instances}")


@dataclass(frozen=True)
class ProblemSpec:
    """A problem by name with its settings: `multimnist[net=lenet5,batch=64]`. Hashable, picklable, printable."""

    name: str
    settings: tuple[tuple[str, Scalar], ...] = ()

    def __str__(self) -> str:
        inside = ",".join(f"{key}={_written(value)}" for key, value in self.settings)
        return f"{self.name}[{inside}]" if inside else self.name

    @classmethod
    def parse(cls, text: str) -> ProblemSpec:
        """Read `name` or `name[key=value,...]`; raises UserError on bad syntax, an unknown name or setting."""
        match = re.fullmatch(r"\s*([A-Za-z0-9_\-+]+)\s*(?:\[(.*)\])?\s*", text)
        if match is None:
            raise UserError(f"problem {text!r} is not of the form name or name[key=value,...]")
        name, inside = match.group(1), match.group(2)
        pairs: dict[str, Scalar] = {}
        for item in filter(None, (part.strip() for part in (inside or "").split(","))):
            key, equals, value = item.partition("=")
            if not equals or not key.strip() or not value.strip():
                raise UserError(f"problem {text!r}: {item!r} is not of the form key=value")
            pairs[key.strip()] = _scalar(value.strip())
        return cls.of(name, pairs)

    @classmethod
    def of(cls, name: str, settings: Mapping[str, Scalar]) -> ProblemSpec:
        """Build a spec, checked against what the problem `name` accepts; settings are kept in name order."""
        allowed = problem_settings(name)
        for key in settings:
            if key not in allowed:
                raise unknown(f"setting of problem {name!r}", key, allowed)
        return cls(name, tuple(sorted(settings.items())))

    def build(self, context: ProblemContext) -> Problem:
        """Construct the problem; raises UserError for a wrong value or missing data."""
        try:
            return _factory(self.name)(context, **dict(self.settings))
        except TypeError as error:
            raise UserError(f"problem {self}: {error}") from error


Factory = Callable[..., Problem]
_FACTORIES: dict[str, Factory] = {}


def register_problem(name: str) -> Callable[[Factory], Factory]:
    """Register a factory `(context: ProblemContext, *, key=default, ...) -> Problem` under `name` (a decorator).

    Its keyword-only parameters are the problem's settings; the first line of its docstring describes it.
    """

    def register(factory: Factory) -> Factory:
        if name in _FACTORIES:
            raise ValueError(f"problem {name!r} is registered twice")
        _FACTORIES[name] = factory
        return factory

    return register


def problem_names() -> list[str]:
    """Return the names of all registered problems, sorted."""
    return sorted(_FACTORIES)


def problem_settings(name: str) -> dict[str, Scalar]:
    """Return the settings of problem `name` with their defaults; raises UserError for an unknown name."""
    parameters = inspect.signature(_factory(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def problem_description(name: str) -> str:
    """Return the docstring of problem `name`'s factory; raises UserError for an unknown name."""
    return inspect.getdoc(_factory(name)) or ""


def _factory(name: str) -> Factory:
    if name not in _FACTORIES:
        raise unknown("problem", name, _FACTORIES)
    return _FACTORIES[name]


def _scalar(text: str) -> Scalar:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _written(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class FamilyMember:
    """One line of a family: a problem, how often it is drawn, and the values each setting is drawn from."""

    name: str
    weight: float
    choices: tuple[tuple[str, tuple[Scalar, ...]], ...]

    def specs(self) -> Iterator[ProblemSpec]:
        """Yield every problem that can be drawn from this member."""
        keys = [key for key, _ in self.choices]
        for values in itertools.product(*(values for _, values in self.choices)):
            yield ProblemSpec.of(self.name, dict(zip(keys, values, strict=True)))


@dataclass(frozen=True)
class ProblemFamily:
    """A distribution over problems: a member by weight, then each of its settings uniformly from its choices."""

    members: tuple[FamilyMember, ...]

    def sample(self, seed: int) -> ProblemSpec:
        """Return the problem that `seed` names: a pure function of the family and the seed."""
        if not self.members:
            raise UserError("the problem family is empty: give it at least one member")
        total = sum(member.weight for member in self.members)
        left = (derive_seed("member", seed) / 2**63) * total
        for member in self.members:
            left -= member.weight
            if left < 0:
                break
        picked = {key: values[derive_seed("choice", seed, key) % len(values)] for key, values in member.choices}
        return ProblemSpec.of(member.name, picked)
