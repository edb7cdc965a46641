"""Trunks of other libraries by name: timm, Hugging Face and open_clip, the extra `zoo`.

Their weights are downloaded by the library, or read from a folder that the name gives (Hugging Face). A name may come
from somebody else's file. It therefore loads no code, and only weights that a library itself lists or that Hugging
Face reads without unpickling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ml2o_dist.runtime.errors import UserError, unknown

LIBRARIES = ("timm", "hf", "open_clip")


def library_trunk(library: str, name: str, side: int, *, pretrained: bool = True) -> tuple[nn.Module, int]:
    """Load the trunk `name` for images [B, 1, side, side]; return it and how many features it gives.

    Without `pretrained` no weights are loaded or looked for, only the architecture.

    Raises:
        UserError: an unknown library, one that is not installed, or an error of the library while loading the trunk.
    """
    if library not in LIBRARIES:
        raise unknown("library of networks", library, LIBRARIES)
    try:
        trunk = _LOADERS[library](name, pretrained)
        trunk.eval()  # in training mode the moments of BatchNorm would take in the black image
        with torch.no_grad():
            features = trunk(torch.zeros(1, 1, side, side))
    except ModuleNotFoundError as error:
        raise UserError(
            f"network {library}/{name}: {error.name} is not installed: pip install 'ml2o-dist[zoo]'"
        ) from error
    except UserError:
        raise
    except Exception as error:  # unknown names, no network, no such file: each library has errors of its own
        raise UserError(f"network {library}/{name}: {' '.join(str(error).split())[:300]}") from error
    if features.dim() != 2:
        shape = list(features.shape)
        raise UserError(f"network {library}/{name} gives features of shape {shape}, not [batch, features]")
    return trunk.train(), features.shape[1]


class GreyImages(nn.Module):
    """Adapts our grey images for a library's trunk, which needs three colours and its own image size."""

    def __init__(self, trunk: nn.Module, size: int, *, pooled: bool = False) -> None:
        """`pooled`: the trunk's answer has the features as `pooler_output`, else in its last hidden state's first."""
        super().__init__()
        self.trunk, self._size, self._pooled = trunk, size, pooled

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images [B, 1, H, W]."""
        if images.shape[-1] != self._size:
            images = nn.functional.interpolate(images, size=(self._size, self._size), mode="bilinear")
        answer: Any = self.trunk(images.expand(-1, 3, -1, -1))
        if not self._pooled:
            return answer  # type: ignore[no-any-return]
        pooled = getattr(answer, "pooler_output", None)
        features: Tensor = answer.last_hidden_state[:, 0] if pooled is None else pooled
        return features.flatten(1)


def _timm(name: str, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):  # it would take schemes, too: a folder, somebody's repository
        raise UserError(f"network timm/{name}: timm lists no model of this name")
    trunk = timm.create_model(name, pretrained=pretrained, num_classes=0)
    return GreyImages(trunk, trunk.pretrained_cfg["input_size"][-1])


def _hugging_face(name: str, pretrained: bool) -> nn.Module:
    import transformers

    if pretrained:
        trunk = transformers.AutoModel.from_pretrained(name, trust_remote_code=False)
    else:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        trunk = transformers.AutoModel.from_config(config, trust_remote_code=False)
    trunk = getattr(trunk, "vision_model", trunk)  # of CLIP and its like
    return GreyImages(trunk, int(getattr(trunk.config, "image_size", 224)), pooled=True)


def _open_clip(name: str, pretrained: bool) -> nn.Module:
    import open_clip

    architecture, _, weights = name.partition(":")
    if architecture not in open_clip.list_models():  # it would take schemes, too: a folder, somebody's repository
        raise UserError(f"network open_clip/{name}: open_clip lists no model {architecture!r}")
    if weights and weights not in (tags := open_clip.list_pretrained_tags_by_model(architecture)):  # a file, too
        raise unknown(f"weights of network open_clip/{architecture}", weights, tags)
    model = open_clip.create_model(architecture, pretrained=(weights or None) if pretrained else None)
    size = model.visual.image_size
    return GreyImages(model.visual, size[0] if isinstance(size, tuple) else size)


_LOADERS = {"timm": _timm, "hf": _hugging_face, "open_clip": _open_clip}
"""The loaders of trunks by name; each library is imported only here."""
