"""Trunks of other libraries: loaded from modules that stand in for them, and one line where there is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.library_trunks import library_trunk
from ml2o_dist.paretoset.networks import build_multi_head
from ml2o_dist.runtime.errors import UserError
from tests.paretoset.small import start_and_experts

MODULES = {"timm": "timm", "hf": "transformers", "open_clip": "open_clip"}
SIZE = 16


class Colours(nn.Module):
    """Wants three colours in pictures of 16 x 16 and gives 6 features."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(6, 6)})])
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.pretrained_cfg = {"input_size": (3, SIZE, SIZE)}  # timm
        self.config = SimpleNamespace(image_size=SIZE)  # transformers
        self.image_size: Any = (SIZE, SIZE)  # open_clip

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, SIZE, SIZE)
        return self.blocks[0]["mlp"](self.stem(images).mean(dim=(2, 3)))


class Answering(Colours):
    """Answers as Hugging Face's models do, with or without a pooler."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled

    def forward(self, images: Tensor) -> Any:
        features = super().forward(images)
        tokens = torch.stack([features, features + 1], dim=1)
        pooler = (2 * features)[:, :, None, None] if self.pooled else None
        return SimpleNamespace(last_hidden_state=tokens, pooler_output=pooler)


LISTS = {
    "is_model": lambda name: name.split(".")[0] in ("tiny", "x"),
    "list_models": lambda: ["ViT-X", "x"],
    "list_pretrained_tags_by_model": lambda architecture: {"ViT-X": ["tag"], "x": []}[architecture],
}
"""What timm and open_clip say that they have."""


def stand_in(monkeypatch: pytest.MonkeyPatch, library: str, **functions: Any) -> None:
    monkeypatch.setitem(sys.modules, MODULES[library], SimpleNamespace(**functions))


def both_answers(trunk: nn.Module, inner: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what the trunk and what the library's own model make of one picture of its size."""
    grey = torch.rand(2, 1, SIZE, SIZE)
    with torch.no_grad():
        return trunk(grey), inner(grey.repeat(1, 3, 1, 1))


@pytest.mark.parametrize("library", MODULES)
def test_a_library_that_is_not_installed_is_one_line(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULES[library], None)
    with pytest.raises(UserError, match=f"{library}/some.model.* not installed.*pip install") as caught:
        library_trunk(library, "some.model", 8)
    assert MODULES[library] in str(caught.value)
    assert "ml2o-dist[zoo]" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_library_is_one_line() -> None:
    with pytest.raises(UserError, match=r"library.*'keras' \(allowed: hf, open_clip, timm\)"):
        library_trunk("keras", "x", 8)


@pytest.mark.parametrize("library", MODULES)
def test_what_the_library_says_becomes_one_line(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        raise RuntimeError("no such\n  model" + " and so on" * 100)

    loader = SimpleNamespace(from_pretrained=fail)
    stand_in(monkeypatch, library, create_model=fail, AutoModel=loader, **LISTS)
    with pytest.raises(UserError, match=f"{library}/x: no such model and so on") as caught:
        library_trunk(library, "x", 8)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, inner = {}, Colours()

    def create_model(name: str, **settings: Any) -> nn.Module:
        asked.update(settings, name=name)
        return inner

    stand_in(monkeypatch, "timm", create_model=create_model, **LISTS)
    library_trunk("timm", "tiny", 8, pretrained=False)
    assert asked == {"name": "tiny", "pretrained": False, "num_classes": 0}
    trunk, features = library_trunk("timm", "tiny", 8)
    assert asked == {"name": "tiny", "pretrained": True, "num_classes": 0}
    assert features == 6
    torch.testing.assert_close(*both_answers(trunk, inner))
    assert trunk(torch.rand(2, 1, 40, 40)).shape == (2, 6)  # larger and smaller ones are resized


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("tower", [False, True])
def test_hugging_face(pooled: bool, tower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Answering(pooled)
    model = SimpleNamespace(vision_model=inner) if tower else inner  # CLIP has a tower for images
    asked = []

    def from_pretrained(name: str, *, trust_remote_code: bool) -> Any:
        asked.append((name, trust_remote_code))
        return model

    stand_in(monkeypatch, "hf", AutoModel=SimpleNamespace(from_pretrained=from_pretrained))
    trunk, features = library_trunk("hf", "some/folder", 8)
    assert features == 6
    assert asked == [("some/folder", False)]
    ours, theirs = both_answers(trunk, inner)
    torch.testing.assert_close(ours, theirs.pooler_output.flatten(1) if pooled else theirs.last_hidden_state[:, 0])


@pytest.mark.parametrize(("name", "weights"), [("ViT-X", None), ("ViT-X:tag", "tag")])
def test_open_clip(name: str, weights: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, asked = Colours(), {}

    def create_model(architecture: str, pretrained: str | None) -> Any:
        asked.update(architecture=architecture, pretrained=pretrained)
        return SimpleNamespace(visual=inner)

    stand_in(monkeypatch, "open_clip", create_model=create_model, **LISTS)
    library_trunk("open_clip", name, 8, pretrained=False)
    assert asked == {"architecture": "ViT-X", "pretrained": None}
    for inner.image_size in ((SIZE, SIZE), SIZE):
        trunk, features = library_trunk("open_clip", name, 8)
        assert asked == {"architecture": "ViT-X", "pretrained": weights}
        assert features == 6
        torch.testing.assert_close(*both_answers(trunk, inner))


@pytest.mark.parametrize(
    ("network", "line"),
    [
        ("timm/hf_hub:somebody/theirs", "timm.*no model"),
        ("timm/local-dir:/tmp", "timm.*no model"),
        ("open_clip/hf-hub:somebody/theirs", "open_clip.*no model 'hf-hub'"),
        ("open_clip/local-dir:/tmp", "open_clip.*no model 'local-dir'"),
        ("open_clip/ViT-X:/tmp/weights.pt", "weights.*open_clip/ViT-X '/tmp/weights.pt'.*allowed: tag"),
    ],
)
def test_only_what_a_library_lists_is_loaded_by_it(network: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **settings: Any) -> None:
        raise AssertionError(args)

    library, _, name = network.partition("/")
    stand_in(monkeypatch, library, create_model=never, **LISTS)
    with pytest.raises(UserError, match=line):
        library_trunk(library, name, 8)


def test_a_hugging_face_folder_gives_an_architecture_without_its_weights_and_never_its_code(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **size))
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="no file named"):
        library_trunk("hf", str(tmp_path), 16)
    trunk, features = library_trunk("hf", str(tmp_path), 16, pretrained=False)
    assert features == 8
    assert {k: v.shape for k, v in trunk.trunk.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "theirs", "auto_map": own}))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for pretrained in (True, False):
        with pytest.raises(UserError, match="network hf/"):
            library_trunk("hf", str(tmp_path), 16, pretrained=pretrained)
    assert not (tmp_path / "ran").exists()


def test_features_that_no_head_can_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = nn.Conv2d(3, 6, 4)
    inner.pretrained_cfg = {"input_size": (3, SIZE, SIZE)}  # type: ignore[assignment]
    stand_in(monkeypatch, "timm", create_model=lambda name, **settings: inner, **LISTS)
    with pytest.raises(UserError, match=r"features.*\[1, 6, 13, 13\].*\[batch, features\]"):
        library_trunk("timm", "x", 8)


def test_looking_at_the_features_leaves_the_moments_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    inner.pretrained_cfg = {"input_size": (3, SIZE, SIZE)}  # type: ignore[assignment]
    before = {name: tensor.clone() for name, tensor in inner.state_dict().items()}
    stand_in(monkeypatch, "timm", create_model=lambda name, **settings: inner, **LISTS)
    trunk, _ = library_trunk("timm", "x", 8)
    assert trunk.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in inner.state_dict().items())


def test_a_trunk_that_cannot_take_the_images_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = nn.Linear(5, 5)
    inner.pretrained_cfg = {"input_size": (3, SIZE, SIZE)}  # type: ignore[assignment]
    stand_in(monkeypatch, "timm", create_model=lambda name, **settings: inner, **LISTS)
    with pytest.raises(UserError, match=r"network timm/x: .*shapes cannot be multiplied"):
        library_trunk("timm", "x", 8)


def test_a_trunk_of_a_library_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "timm", create_model=lambda name, **settings: Colours(), **LISTS)
    network = build_multi_head("timm/tiny", side=8, classes=(3, 4), seed=0).eval()
    fusion = Fusion(network, *start_and_experts(network, 2), modules="mlp", heads=network.head_names).eval()
    assert list(fusion.upscaled) == ["trunk.trunk.blocks.0.mlp"]
    images, r = torch.rand(2, 1, 8, 8), torch.tensor([0.4, 0.6])
    for live, exported in zip(fusion(r, images), fusion.export(r)(images), strict=True):
        torch.testing.assert_close(live, exported)
