"""Graphs that torch.autograd.grad does not see through are refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ml2o_dist import GML2O, ML2O, UserError

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
REENTRANT = r"^the closure.*torch\.utils\.checkpoint.*use_reentrant=True.*use_reentrant=False"


class Checkpointed(nn.Module):
    """A frozen embedding, two blocks, each within a checkpoint, and a head."""

    def __init__(self, *, reentrant: bool | None, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Linear(6, 6).requires_grad_(False)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 2)
        self.reentrant, self.tied = reentrant, tied

    def forward(self, x: Tensor) -> Tensor:
        features = self.embedding(x)
        if not features.requires_grad:
            features.requires_grad_(True)  # as enable_input_require_grads of Hugging Face's models does by a hook
        for block in self.blocks:
            if self.reentrant is None:
                features = block(features)
            else:
                features = checkpoint(block, features, use_reentrant=self.reentrant)
        if self.tied:  # every parameter is reached, but some of them only outside the checkpoint
            for block in self.blocks:
                features = block(features)
        return self.head(torch.tanh(features))


def squares(output: Tensor) -> list[Tensor]:
    return list((output - 1).square().unbind(1))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", [ML2O, GML2O])
@pytest.mark.parametrize("what", ["head", "no head", "tied", "embedding"])
def test_a_reentrant_checkpoint_is_refused(what: str, kind: type[ML2O]) -> None:
    model = Checkpointed(reentrant=True, tied=what == "tied")
    if what == "embedding":  # autograd's path leads through the checkpoint, which raises by itself
        model.embedding.requires_grad_(True)
    if what == "no head":
        model.head.requires_grad_(False)
    optimizer = kind(trained(model))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        with pytest.raises(UserError, match=REENTRANT):
            optimizer.step(lambda: squares(model(X)))
    assert optimizer.steps == 0
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_reentrant_checkpoint_that_comes_later_is_refused() -> None:
    model = Checkpointed(reentrant=None)
    optimizer = ML2O(trained(model))
    optimizer.step(lambda: squares(model(X)))
    model.reentrant = True
    with pytest.raises(UserError, match=REENTRANT):
        optimizer.step(lambda: squares(model(X)))


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_other_checkpoints_change_nothing(kind: type[ML2O]) -> None:
    torch.manual_seed(0)
    models = [Checkpointed(reentrant=None), Checkpointed(reentrant=False)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        optimizer = kind(trained(model))
        for _ in range(4):
            optimizer.step(lambda model=model: squares(model(X)))
    for one, other in zip(*(trained(model) for model in models), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(models[0].blocks[0].weight, Checkpointed(reentrant=None).blocks[0].weight)
