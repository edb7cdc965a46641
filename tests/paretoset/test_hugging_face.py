"""Trunks of Hugging Face, real ones: small models that are built here, saved, and loaded by their folder's name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.networks import build_multi_head

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 24,
    "patch_size": 8,
}
MODELS = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_is_the_trunk_of_a_network_that_is_fused_and_exported(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    model.save_pretrained(tmp_path / kind)
    network = build_multi_head(f"hf/{tmp_path / kind}", side=12, classes=(3, 4), seed=0).eval()
    images = torch.randn(5, 1, 12, 12)
    large = torch.nn.functional.interpolate(images, size=(24, 24), mode="bilinear").expand(-1, 3, -1, -1)
    with torch.no_grad():
        features = model(pixel_values=large).pooler_output
        expected = [head(features) for head in network.heads]
        answered = network(images)
    for ours, theirs in zip(answered, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    start = network.state_dict()
    floats = {name for name, tensor in start.items() if tensor.is_floating_point()}
    experts = [
        {name: t + 0.01 * torch.randn_like(t) if name in floats else t for name, t in start.items()} for _ in range(2)
    ]
    fusion = Fusion(network, start, experts, modules="mlp" if kind != "vit" else "*.layer*", heads=network.head_names)
    with torch.no_grad():
        live = fusion.eval()(torch.tensor([0.4, 0.6]), images)
        plain = fusion.export([0.4, 0.6])(images)
    for ours, theirs in zip(live, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_name_that_is_not_on_this_machine_is_one_line() -> None:
    from ml2o_dist.runtime.errors import UserError

    with pytest.raises(UserError, match=r"network hf/nobody/nothing: ") as error:
        build_multi_head("hf/nobody/nothing", side=12, classes=(2, 2), seed=0)
    assert "\n" not in str(error.value)
