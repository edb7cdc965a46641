"""The optimizers on a GPU: the CPU's iterates to rounding, masks of the device's own generator, two devices at once."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ml2o_dist import GML2O, ML2O
from tests.torch_optim.small import Batch, TwoTasks, drawn, flat, losses, weights_file

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on(batch: Batch, device: str) -> Batch:
    x, first, second = batch
    return x.to(device), first.to(device), second.to(device)


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_the_iterates_are_those_of_the_cpu(kind: type[ML2O], tmp_path: Path) -> None:
    place = weights_file(tmp_path, lr=0.005)
    models = {device: TwoTasks().to(device) for device in ("cpu", "cuda")}
    optimizers = {device: kind(model.parameters(), place) for device, model in models.items()}
    for step in range(8):
        for device, optimizer in optimizers.items():
            batch, other = on(drawn(step), device), on(drawn(f"guard {step}"), device)
            closures = [lambda m=models[device], b=b: losses(m, b, "none") for b in (batch, other)]
            optimizer.step(*closures[: 2 if kind is GML2O else 1])
    torch.testing.assert_close(flat(models["cuda"]).cpu(), flat(models["cpu"]), rtol=1e-3, atol=1e-4)


class Halves(nn.Module):
    """A trunk on the CPU, heads on the GPU, dropout on both."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TwoTasks()
        self.net.heads.to("cuda")
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        features = F.dropout(torch.tanh(self.net.trunk(x.cpu()))).cuda()
        kept = F.dropout(torch.ones_like(features))
        self.masks.append(kept)
        return [head(features * kept) for head in self.net.heads]


def test_parameters_on_two_devices_and_masks_of_both(tmp_path: Path) -> None:
    model = Halves()
    optimizer = GML2O(model.parameters(), weights_file(tmp_path))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for step in range(3):
        model.masks = []
        batch, other = on(drawn(step), "cuda"), on(drawn(f"guard {step}", 24), "cuda")
        optimizer.step(lambda b=batch: losses(model, b, "none"), lambda b=other: losses(model, b, "none"))
        for size in (16, 24):
            masks = [mask for mask in model.masks if len(mask) == size]
            assert all(torch.equal(mask, masks[0]) for mask in masks)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert parameter.device == old.device
        assert not torch.equal(parameter, old)


def test_a_checkpoint_goes_from_the_gpu_to_the_cpu_and_back(tmp_path: Path) -> None:
    place = weights_file(tmp_path)
    model = TwoTasks().cuda()
    optimizer = ML2O(model.parameters(), place)
    for step in range(3):
        batch = on(drawn(step), "cuda")
        optimizer.step(lambda b=batch: losses(model, b))
    twin = copy.deepcopy(model)
    file = tmp_path / "state.pt"
    torch.save(optimizer.state_dict(), file)
    resumed = ML2O(twin.parameters(), place)
    resumed.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    for step in range(3, 6):
        batch = on(drawn(step), "cuda")
        optimizer.step(lambda b=batch: losses(model, b))
        resumed.step(lambda b=batch: losses(twin, b))
    torch.testing.assert_close(flat(twin), flat(model))
