"""The tensors behind a flat vector of parameters, for rules that work on matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self, get_args

import torch
from torch import Tensor

Kind = Literal["scalar", "vector", "matrix", "convolution", "embedding"]
"""The kind of a tensor: a matrix [out, in], a convolution [out, in, ...], an embedding [entries, width]."""

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class ParameterTensor:
    """One tensor of a model.

    Attributes:
        name: its name in the model, such as `trunk.0.weight`.
        shape: its shape, () for a single number.
        kind: its kind.
        start: where its entries begin in the flat vector, row by row.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    start: int

    @property
    def size(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)

    @property
    def place(self) -> slice:
        """Its entries in the flat vector."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class ParameterLayout:
    """The tensors behind a flat vector [n], in order and without gaps.

    A problem whose parameters have no structure is one vector.
    """

    tensors: tuple[ParameterTensor, ...]

    def __post_init__(self) -> None:
        end = 0
        for tensor in self.tensors:
            if tensor.start != end:
                raise ValueError(f"the tensor {tensor.name!r} starts at {tensor.start}, not at {end}")
            end = tensor.place.stop

    @classmethod
    def of(cls, named: Iterable[tuple[str, Iterable[int]] | tuple[str, Iterable[int], Kind]]) -> Self:
        """Lay tensors one behind the other: (name, shape), or (name, shape, kind).

        The default kind follows from the shape: a tensor of one dimension is a vector, one of two a matrix, one of more
        a convolution, and one without a dimension a scalar.
        """
        tensors, start = [], 0
        for name, given, *kind in named:
            shape = tuple(given)
            tensors.append(ParameterTensor(name, shape, kind[0] if kind else kind_of(shape), start))
            start = tensors[-1].place.stop
        return cls(tuple(tensors))

    @classmethod
    def vector(cls, dimension: int, name: str = "parameters") -> Self:
        """Return the layout of `dimension` parameters without a known structure."""
        return cls.of([(name, (dimension,))])

    @cached_property
    def dimension(self) -> int:
        """n, how many parameters there are."""
        return self.tensors[-1].place.stop if self.tensors else 0

    def split(self, flat: Tensor) -> list[Tensor]:
        """View parameters `flat` [..., n] as tensors, each with the same leading dimensions."""
        parts = torch.split(flat, [tensor.size for tensor in self.tensors], dim=-1)
        shapes = (tensor.shape for tensor in self.tensors)
        return [part.reshape(*flat.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]

    def grown(self, more: ParameterLayout) -> ParameterLayout:
        """Return the layout with the tensors of `more` appended."""
        own = ((tensor.name, tensor.shape, tensor.kind) for tensor in (*self.tensors, *more.tensors))
        return ParameterLayout.of(own)


def kind_of(shape: tuple[int, ...]) -> Kind:
    """Return the kind of a tensor of which only this shape is known."""
    return KINDS[min(len(shape), 3)]
