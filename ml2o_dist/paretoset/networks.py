"""Networks of T tasks as torch modules: one trunk, one dense head for each task.

mlp, cnn, lenet5 and vgg are those of problems/networks.py; vit is a small vision transformer. `timm/NAME`, `hf/NAME`
and `open_clip/NAME` are trunks of those libraries (the extra `zoo`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ml2o_dist.paretoset.library_trunks import LIBRARIES, library_trunk
from ml2o_dist.problems.networks import MOST_PARAMETERS, NETWORKS, Convolution, build_network
from ml2o_dist.runtime.errors import UserError, unknown
from ml2o_dist.runtime.seeding import derive_seed

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class MultiHead(nn.Module):
    """A trunk and a dense head for each task: images [B, 1, H, W] -> the logits [B, classes_t] of every task."""

    def __init__(self, trunk: nn.Module, features: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(features, count) for count in classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the logits of all heads."""
        features = self.trunk(images)
        return [head(features) for head in self.heads]

    @property
    def head_names(self) -> tuple[str, ...]:
        """The module names of the heads, in the order of the tasks."""
        return tuple(f"heads.{t}" for t in range(len(self.heads)))


class ChannelsLast(nn.Module):
    """Lays the images out for convolutions: half the time of convolution and pooling on a CPU."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the same images."""
        return images.contiguous(memory_format=torch.channels_last)


class Block(nn.Module):
    """A pre-norm transformer block: attention and an MLP of twice the width."""

    def __init__(self, width: int, attention_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, attention_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens [B, L, width] after the block."""
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        after: Tensor = tokens + self.mlp(self.norm2(tokens))
        return after


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, blocks, and the class token's features [B, width]."""

    def __init__(self, side: int, patch: int, width: int, depth: int, attention_heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*[Block(width, attention_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images [B, 1, side, side]."""
        patches = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1) + self.positions
        features: Tensor = self.norm(self.blocks(tokens)[:, 0])
        return features


def build_multi_head(
    net: str,
    *,
    side: int,
    classes: Sequence[int],
    seed: int,
    hidden: str | int = "100-50",
    channels: str | int = "8-16",
    variant: str = "cosmos",
    activation: str = "relu",
    patch: int = 6,
    width: int = 48,
    depth: int = 4,
    pretrained: bool = True,
) -> MultiHead:
    """Build the network `net` with its first values drawn from `seed`; settings that `net` does not use are ignored.

    Without `pretrained` a library's trunk is built without its weights.

    Raises:
        UserError: an unknown name or a setting that does not fit.
    """
    library, slash, name = net.partition("/")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("paretoset network", seed))
        if slash:
            trunk, features = library_trunk(library, name, side, pretrained=pretrained)
        elif net == "vit":
            trunk, features = _vit(side, patch, width, depth), width
        elif net in NETWORKS:
            trunk, features = _plain_trunk(net, side, hidden, channels, variant, activation)
        else:
            raise unknown("network", net, (*NETWORKS, "vit", *(f"{each}/NAME" for each in LIBRARIES)))
        return MultiHead(trunk, features, classes)


def _plain_trunk(
    net: str, side: int, hidden: str | int, channels: str | int, variant: str, activation: str
) -> tuple[nn.Module, int]:
    shapes = build_network(
        net, side=side, classes=2, tasks=1, hidden=hidden, channels=channels, variant=variant, activation=activation
    )
    layers: list[nn.Module] = [ChannelsLast()] if shapes.convolutional else []
    flat = False
    for layer in shapes.trunk:
        if isinstance(layer, Convolution):
            layers.append(nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, padding=layer.padding))
            if layer.pool:
                layers.append(nn.MaxPool2d(2))
        else:
            layers += [] if flat else [nn.Flatten()]
            flat = True
            layers.append(nn.Linear(layer.inputs, layer.outputs))
        layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers, *([] if flat else [nn.Flatten()])), shapes.head.inputs


def _vit(side: int, patch: int, width: int, depth: int) -> nn.Module:
    if patch < 1 or side % patch:
        raise UserError(f"patch {patch} of vit does not divide the images' side of {side}")
    if width < 1 or depth < 1:
        raise UserError(f"width {width} and depth {depth} of vit must be at least 1")
    if 8 * depth * width**2 > MOST_PARAMETERS:
        raise UserError(f"width {width} and depth {depth} of vit: 8 * depth * width^2 is above {MOST_PARAMETERS:,}")
    return VisionTransformer(side, patch, width, depth, attention_heads=math.gcd(width, 4))
