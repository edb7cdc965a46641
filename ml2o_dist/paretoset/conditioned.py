"""Networks that take a preference and are trained over all preferences at once: ours and its rivals.

Each is a module whose `forward(preference, images)` gives the logits of all tasks for each of several batches of
images. Its parameters are trained.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ml2o_dist.paretoset.fitted_states import TensorNames
from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.networks import MultiHead
from ml2o_dist.paretoset.tasks import Logits
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import derive_seed

EMBEDDING = 100
"""Width of the hypernetwork's ray encoding, as published."""


class Conditioned(nn.Module):
    """A family of networks, one for each preference.

    Attributes:
        moving_buffers: whether training changes its buffers (BatchNorm's moments), which then belong to a checkpoint.
    """

    moving_buffers = True

    @abstractmethod
    def forward(self, preference: Tensor, images: Sequence[Tensor]) -> list[Logits]:
        """Return the logits of all tasks for each batch of `images` [B, 1, H, W]; `preference` [T]."""


class Plain(Conditioned):
    """One network that ignores the preference, for training on a single ray and for MGDA."""

    def __init__(self, network: MultiHead) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)

    def forward(self, preference: Tensor, images: Sequence[Tensor]) -> list[Logits]:
        """Return the network's answers."""
        return [self.network(each) for each in images]


class Fused(Conditioned):
    """PWE-MoE: only the routers of a fusion are trained, with the network in evaluation mode.

    BatchNorm therefore uses the experts' averaged moments, as in the exported network.
    """

    moving_buffers = False

    def __init__(self, fusion: Fusion) -> None:
        super().__init__()
        self.fusion = fusion
        self.eval()

    def train(self, mode: bool = True) -> Fused:
        """Stay in evaluation mode."""
        super().train(False)
        return self

    def forward(self, preference: Tensor, images: Sequence[Tensor]) -> list[Logits]:
        """Merge once, then answer for all."""
        return answers(self.fusion.network, self.fusion.state(preference), images)


class OfArchitecture(Conditioned):
    """A family whose networks have parameters that are made for each preference.

    Attributes:
        network: the architecture; its values are not used, and its mode is that of the family.
    """

    def __init__(self, network: MultiHead) -> None:
        """Create the family; raises UserError if the network's buffers change in training: they fit no preference."""
        super().__init__()
        moving = [name for name, buffer in network.named_buffers() if buffer.is_floating_point()]
        if moving:
            raise UserError(
                "what makes parameters for each preference (pamal, phn-ls, phn-epo) needs a network without running "
                f"moments, and this one has {moving[0]}: leave it out of the comparators of this network"
            )
        self._network = (copy.deepcopy(network).requires_grad_(False),)  # in a tuple: its parameters are not ours

    @property
    def network(self) -> MultiHead:
        """The architecture."""
        return self._network[0]

    def train(self, mode: bool = True) -> OfArchitecture:
        """Put the architecture into training or evaluation mode, too."""
        self.network.train(mode)
        super().train(mode)
        return self


class WeightLine(OfArchitecture):
    """PaMaL (Dimitriadis, Frossard, Fleuret 2023): theta(r) = sum_t r_t theta_t, all T ends trained together.

    Heads belong to a task and exist once.
    """

    def __init__(self, network: MultiHead, ends: Sequence[MultiHead]) -> None:
        """Create the ends with the initial values `ends`; `network` gives the heads."""
        super().__init__(network)
        self.heads = copy.deepcopy(network.heads)
        self.ends = nn.ModuleList(copy.deepcopy(end.trunk) for end in ends)

    def forward(self, preference: Tensor, images: Sequence[Tensor]) -> list[Logits]:
        """Merge the ends, then answer for all."""
        trunks = [dict(end.named_parameters()) for end in self.ends]
        state = {
            f"trunk.{name}": sum(
                (r * trunk[name] for r, trunk in zip(preference, trunks, strict=True)), torch.zeros(())
            )
            for name in trunks[0]
        }
        state |= {f"heads.{name}": head for name, head in self.heads.named_parameters()}
        return answers(self.network, state, images)


class Hypernetwork(OfArchitecture):
    """A Pareto hypernetwork (Navon et al. 2021): an MLP turns r into all parameters of the network.

    Linear(T, 100), ReLU, Linear(100, 100), ReLU, Linear(100, 100), then one linear map for each tensor.
    """

    def __init__(self, network: MultiHead, tasks: int, seed: int) -> None:
        """`network` is the architecture; the hypernetwork's first values are drawn from `seed`."""
        super().__init__(network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("hypernetwork", seed))
            sizes = (tasks, EMBEDDING, EMBEDDING, EMBEDDING)
            layers: list[nn.Module] = []
            for i in range(3):
                layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
            self.encoder = nn.Sequential(*layers[:-1])
            self.makers = nn.ModuleList(nn.Linear(EMBEDDING, p.numel()) for p in network.parameters())

    def forward(self, preference: Tensor, images: Sequence[Tensor]) -> list[Logits]:
        """Make the network, then answer for all."""
        encoded = self.encoder(preference)
        named = self.network.named_parameters()
        state = {name: maker(encoded).view(p.shape) for (name, p), maker in zip(named, self.makers, strict=True)}
        return answers(self.network, state, images)


class ConditionedInput(Conditioned):
    """COSMOS (Ruchte & Grabocka 2021): the preference is T more channels of the image, constant over it.

    Its loss is the scalarization `cosmos`.
    """

    def __init__(self, network: MultiHead, tasks: int, seed: int) -> None:
        """Widen the first layer of `network` to 1 + T channels; the new weights are drawn from `seed`.

        Raises:
            UserError: `network` takes images of several channels, as other libraries' networks do, or its first layer
                is tied to another.
        """
        super().__init__()
        self.network = copy.deepcopy(network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("cosmos", seed))
            first, name = _first_layer(self.network)
            if isinstance(first, nn.Conv2d) and first.in_channels != 1:
                raise UserError(
                    f"COSMOS lays the preference over grey images as further channels, and layer {name} wants "
                    f"{first.in_channels} channels: leave `cosmos` out of the comparators of this network"
                )
            prefix = f"{name}."
            for group in TensorNames.of(self.network).groups():
                if any(each.startswith(prefix) for each in group):
                    raise UserError(
                        f"COSMOS widens the first layer, and {group[0]} is one tensor with {group[1]}: leave `cosmos` "
                        "out of the comparators of this network"
                    )
            self.network.set_submodule(name, _widened(first, tasks))

    def forward(self, preference: Tensor, images: Sequence[Tensor]) -> list[Logits]:
        """Append the preference to every image as channels, and return the network's answers."""
        return [self.network(_with_channels(each, preference)) for each in images]


def answers(network: nn.Module, state: dict[str, Tensor], images: Sequence[Tensor]) -> list[Logits]:
    """Return the output of `network` with the parameters and buffers `state`, for each batch of images."""
    return [functional_call(network, state, (each,)) for each in images]


def _with_channels(images: Tensor, preference: Tensor) -> Tensor:
    planes = preference.to(images).view(1, -1, 1, 1).expand(len(images), -1, *images.shape[2:])
    return torch.cat([images, planes], dim=1)


def _first_layer(network: nn.Module) -> tuple[nn.Linear | nn.Conv2d, str]:
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            return module, name
    raise ValueError("the network has no layer")


def _widened(layer: nn.Linear | nn.Conv2d, tasks: int) -> nn.Linear | nn.Conv2d:
    """Return the layer for 1 + T channels, with all weights redrawn for the larger fan-in."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features * (1 + tasks), layer.out_features, bias=bias)
    padding = layer.padding
    assert not isinstance(padding, str)
    side, stride = (layer.kernel_size[0], layer.kernel_size[1]), (layer.stride[0], layer.stride[1])
    return nn.Conv2d(1 + tasks, layer.out_channels, side, stride, (padding[0], padding[1]), bias=bias)


def trainable(model: nn.Module) -> int:
    """Return how many parameters are trained."""
    return sum(parameter.numel() for parameter in model.parameters())


def flat_parameters(model: nn.Module) -> Tensor:
    """Return the parameters of `model` as one vector [n], in the order of `named_parameters`."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def named_views(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    """View the vector `flat` [n] as the parameters of `model`, by name."""
    named = dict(model.named_parameters())
    sizes = [parameter.numel() for parameter in named.values()]
    parts = torch.split(flat, sizes)  # one copy of [n] in the backward pass; slices need one for each name
    return {name: part.view(parameter.shape) for (name, parameter), part in zip(named.items(), parts, strict=True)}
