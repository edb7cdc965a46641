"""Multi-task networks as pure functions of flat parameters: one trunk, one linear head for each task.

| net | trunk | settings |
|---|---|---|
| mlp | dense layers | hidden: widths, `24` or `40-40` |
| cnn | (convolution, 2x2 max pooling) for each width | channels: `8-16`; kernel: 3 or 5 |
| lenet5 | two convolutions with pooling, a dense layer of 50 | variant: `cosmos` or `paretomtl` |
| vgg | blocks of two 3x3 convolutions and one pooling | channels: one width for each block, `16-32-64` |

Convolutions of cnn and vgg keep the side, those of lenet5 shrink it. Pooling comes before the activation: for relu
and tanh it makes no difference but the cost, for gelu, which is not monotone, it is a choice.

The parameters lie in the order trunk, head of task 1, head of task 2, ..., each layer as weight and bias, so that
objective i depends on two contiguous ranges of coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.runtime.errors import UserError, unknown
from ml2o_dist.runtime.seeding import generator

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "tanh": torch.tanh, "gelu": F.gelu}
NETWORKS = ("mlp", "cnn", "lenet5", "vgg")
# Kernels of the two convolutions (10 and 20 channels). At 36x36 with two heads of 10 classes: 42,350 parameters, as
# COSMOS's MultiLeNet at one channel, and 31,910, as ParetoMTL's.
LENET_KERNELS = {"cosmos": (5, 5), "paretomtl": (9, 5)}


WIDEST, DEEPEST = 65_536, 100
MOST_PARAMETERS = 100_000_000
"""Most parameters of one network: 400 MB, and as much for each objective's gradient."""


@dataclass(frozen=True)
class Dense:
    """A dense layer; it takes one network's weight, or those of several networks with one more dimension in front."""

    inputs: int
    outputs: int

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.outputs, self.inputs)

    def __call__(self, weight: Tensor, bias: Tensor, features: Tensor) -> Tensor:
        if weight.dim() == 2:
            return F.linear(features.flatten(1), weight, bias)
        return torch.baddbmm(bias.unsqueeze(1), features.flatten(2), weight.mT)


@dataclass(frozen=True)
class Convolution:
    """A convolution, followed by 2x2 max pooling where `pool` says so."""

    inputs: int
    outputs: int
    kernel: int
    padding: int
    pool: bool

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.outputs, self.inputs, self.kernel, self.kernel)

    def __call__(self, weight: Tensor, bias: Tensor, features: Tensor) -> Tensor:
        result = F.conv2d(features, weight, bias, padding=self.padding)
        return F.max_pool2d(result, 2) if self.pool else result

    def side_after(self, side: int) -> int:
        side = side + 2 * self.padding - self.kernel + 1
        return side // 2 if self.pool else side


Layer = Dense | Convolution


@dataclass(frozen=True)
class Parameters:
    """One network's parameters as tensors: (weight, bias) of each trunk layer, and all heads at once.

    head_weight is [m, classes, features], head_bias [m, classes].
    """

    trunk: list[Tensor]
    head_weight: Tensor
    head_bias: Tensor


@dataclass(frozen=True)
class Network:
    """A trunk and one dense head for each task; it holds shapes, never parameters.

    Attributes:
        trunk: its layers, an activation after each.  head: the shape of every head.  tasks: m, how many there are.
        activation: a name in `ACTIVATIONS`.
    """

    trunk: tuple[Layer, ...]
    head: Dense
    tasks: int
    activation: str

    @cached_property
    def trunk_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the trunk's tensors, in order: weight and bias of each layer."""
        return [shape for layer in self.trunk for shape in (layer.weight_shape, (layer.outputs,))]

    @cached_property
    def trunk_dimension(self) -> int:
        """How many parameters the tasks share; they come first."""
        return sum(self._trunk_sizes)

    @cached_property
    def head_dimension(self) -> int:
        """How many parameters one head has, weight first."""
        return self.head.outputs * (self.head.inputs + 1)

    @cached_property
    def dimension(self) -> int:
        """n, the number of parameters."""
        return self.trunk_dimension + self.tasks * self.head_dimension

    @cached_property
    def layout(self) -> ParameterLayout:
        """The tensors in their order: `trunk.0.weight`, `trunk.0.bias`, ..., `heads.0.weight`, `heads.0.bias`, ..."""
        layers = [(f"trunk.{i}", layer) for i, layer in enumerate(self.trunk)]
        return layout_of([*layers, *((f"heads.{i}", self.head) for i in range(self.tasks))])

    @cached_property
    def _trunk_sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.trunk_shapes]

    def split(self, flat: Tensor) -> Parameters:
        """View the parameters `flat` [..., n] as tensors, each with the same leading dimensions."""
        leading = flat.shape[:-1]
        *trunk, heads = flat.split_with_sizes([*self._trunk_sizes, self.tasks * self.head_dimension], dim=-1)
        outputs, inputs = self.head.weight_shape
        weight, bias = heads.view(*leading, self.tasks, -1).split_with_sizes([outputs * inputs, outputs], dim=-1)
        tensors = [part.view(*leading, *shape) for part, shape in zip(trunk, self.trunk_shapes, strict=True)]
        return Parameters(tensors, weight.view(*weight.shape[:-1], outputs, inputs), bias)

    def features(self, trunk: Sequence[Tensor], images: Tensor) -> Tensor:
        """Return the heads' inputs, [B, features], for `images` [B, 1, H, W]; `trunk` as `split` returns it.

        Without convolutions, both may have a leading dimension of instances; with convolutions, vmap adds it.
        """
        activation = ACTIVATIONS[self.activation]
        features = images
        for i, layer in enumerate(self.trunk):
            features = activation(layer(trunk[2 * i], trunk[2 * i + 1], features))
        return features.flatten(1) if self.convolutional else features

    def logits(self, parameters: Parameters, features: Tensor) -> Tensor:
        """Return the logits [..., m, B, classes] of all heads on `features` [..., B, features]."""
        return features.unsqueeze(-3) @ parameters.head_weight.mT + parameters.head_bias.unsqueeze(-2)

    @cached_property
    def convolutional(self) -> bool:
        """Whether the trunk has convolutions."""
        return any(isinstance(layer, Convolution) for layer in self.trunk)

    def initial_parameters(self, seed: int, scale: float = 1.0) -> Tensor:
        """Draw parameters [n], float64, as torch's layers draw theirs, times `scale`.

        Weights and biases are uniform in +-1/sqrt(fan in), as kaiming_uniform_ with a = sqrt(5) gives.
        """
        bounds = []
        for layer in (*self.trunk, *[self.head] * self.tasks):
            fan_in = math.prod(layer.weight_shape[1:])
            bounds.append(torch.full((layer.outputs * (fan_in + 1),), scale / math.sqrt(fan_in), dtype=torch.float64))
        uniform = torch.rand(self.dimension, generator=generator("network", seed), dtype=torch.float64)
        return (2 * uniform - 1) * torch.cat(bounds)


def layout_of(layers: Iterable[tuple[str, Layer]]) -> ParameterLayout:
    """Return the layout of layers by name, each as weight and bias."""
    return ParameterLayout.of(
        (f"{name}.{part}", shape)
        for name, layer in layers
        for part, shape in (("weight", layer.weight_shape), ("bias", (layer.outputs,)))
    )


def build_network(
    net: str,
    *,
    side: int,
    classes: int,
    tasks: int,
    hidden: str | int = "24",
    channels: str | int = "8-16",
    kernel: int = 3,
    variant: str = "cosmos",
    activation: str = "relu",
) -> Network:
    """Build the network `net` for images [1, side, side] and `tasks` heads of `classes` classes.

    Settings that `net` does not use are ignored (see the table above).

    Raises:
        UserError: an unknown name, widths that are no positive integers, or images too small for the trunk.
    """
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    if net == "mlp":
        trunk, features = _mlp(side, widths("hidden", hidden))
    elif net == "cnn":
        if kernel not in (3, 5):
            raise UserError(f"kernel {kernel} of net cnn is not one of 3, 5")
        layers = _convolutions(widths("channels", channels), kernel, repeats=1)
        trunk, features = layers, _features(net, layers, side)
    elif net == "lenet5":
        trunk, features = _lenet5(side, variant)
    elif net == "vgg":
        layers = _convolutions(widths("channels", channels), 3, repeats=2)
        trunk, features = layers, _features(net, layers, side)
    else:
        raise unknown("net", net, NETWORKS)
    network = Network(trunk, Dense(features, classes), tasks, activation)
    if network.dimension > MOST_PARAMETERS:
        raise UserError(f"net {net} would have {network.dimension:,} parameters (allowed: {MOST_PARAMETERS:,})")
    return network


def _mlp(side: int, widths: tuple[int, ...]) -> tuple[tuple[Layer, ...], int]:
    sizes = (side * side, *widths)
    return tuple(Dense(sizes[i], sizes[i + 1]) for i in range(len(widths))), sizes[-1]


def _convolutions(widths: tuple[int, ...], kernel: int, repeats: int) -> tuple[Convolution, ...]:
    layers, inputs = [], 1
    for width in widths:
        for repeat in range(repeats):
            layers.append(Convolution(inputs, width, kernel, kernel // 2, pool=repeat + 1 == repeats))
            inputs = width
    return tuple(layers)


def _lenet5(side: int, variant: str) -> tuple[tuple[Layer, ...], int]:
    if variant not in LENET_KERNELS:
        raise unknown("variant of lenet5", variant, LENET_KERNELS)
    first, second = LENET_KERNELS[variant]
    convolutions = (Convolution(1, 10, first, 0, pool=True), Convolution(10, 20, second, 0, pool=True))
    return (*convolutions, Dense(_features("lenet5", convolutions, side), 50)), 50


def _features(net: str, layers: tuple[Convolution, ...], side: int) -> int:
    """Return how many features leave `layers`; raises UserError if an image of `side` becomes too small for them."""
    left = side
    for layer in layers:
        left = layer.side_after(left)
        if left < 1:
            raise UserError(f"images of {side}x{side} are too small for net {net}: use a larger size or another net")
    return left * left * layers[-1].outputs


def widths(setting: str, value: str | int) -> tuple[int, ...]:
    """Read `24` or `40-40`; raises UserError where a width is no positive integer."""
    parts = str(value).split("-")
    if not all(part.strip().isascii() and part.strip().isdecimal() and len(part) < 20 for part in parts):
        raise UserError(f"{setting} {repr(value)[:200]} is not a width or widths joined by '-', as in 24 or 40-40")
    found = tuple(int(part) for part in parts)
    if not all(1 <= width <= WIDEST for width in found) or len(found) > DEEPEST:
        raise UserError(
            f"{setting} {repr(value)[:200]} is not a width or widths joined by '-', as in 24 or 40-40, "
            f"each from 1 to {WIDEST}, at most {DEEPEST}"
        )
    return found
