"""Buffers of modules change as by one call of the closure, however often the guard calls it, compiled or not."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ml2o_dist import GML2O, ML2O

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)) + 1


class Normed(nn.Module):
    """The buffers of a child that is never called, by a functional call; in eval mode as in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        moments = self.norm.running_mean, self.norm.running_var
        return self.last(F.batch_norm(x, *moments, training=True, momentum=0.1))


class Codebook(nn.Module):
    """A codebook by moving average, in a child without parameters, that is written in a way of one's own."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.write = write
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)
        self.codes = nn.Module()
        self.codes.register_buffer("table", torch.randn(5, 4))
        self.codes.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        features = self.inner(x)
        table = self.codes.table
        nearest = torch.cdist(features, table).argmin(dim=1)
        chosen = table[nearest]
        new = 0.9 * chosen + 0.1 * features.detach()
        if self.write == "in place":
            table[nearest] = new
        elif self.write == "by data":
            table.data[nearest] = new
        else:
            self.codes.table = table.index_copy(0, nearest, new)
        self.codes.calls = self.codes.calls + 1
        return self.outer(features + (chosen - features).detach())


class Growing(nn.Module):
    """A buffer that its first call registers."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "calls"):
            self.register_buffer("calls", torch.zeros(()))
        self.calls += 1
        return self.last(x)


def spectral() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def ordinary() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "child": Normed,
    "child in eval mode": lambda: Normed().eval(),
    "codebook in place": lambda: Codebook("in place"),
    "codebook by data": lambda: Codebook("by data"),
    "codebook reassigned": lambda: Codebook("anew"),
    "registered late": Growing,
    "spectral norm": spectral,
    "scripted": lambda: torch.jit.script(ordinary()),
    "BatchNorm": ordinary,
}


def squares(output: Tensor) -> list[Tensor]:
    return list((output - 1).square().unbind(1))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("kind", [pytest.param(ML2O, marks=pytest.mark.long), GML2O])
@pytest.mark.parametrize("name", MODELS)
def test_buffers_change_as_by_one_call_a_step(name: str, kind: type[ML2O]) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = kind(model.parameters())
    for _ in range(3):
        twin = copy.deepcopy(model)
        twin(X)
        optimizer.step(lambda: squares(model(X)))
        expected = dict(twin.named_buffers())
        assert expected.keys() == dict(model.named_buffers()).keys()
        for key, buffer in model.named_buffers():
            assert torch.equal(buffer, expected[key]), key
    assert optimizer.steps == 3


@pytest.mark.parametrize("known", [True, False])
def test_buffers_of_modules_outside_the_model_count_too(known: bool) -> None:
    """A module that weighs the losses, and a model whose parameters are not the optimizer's but copies of them."""

    class Weighing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.ones(2))

        def forward(self, losses: Tensor) -> Tensor:
            self.mean.mul_(0.9).add_(0.1 * losses.detach())
            return losses / self.mean

    model, weighing = ordinary(), Weighing().eval()
    copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    optimizer = GML2O(model.parameters() if known else copies.values())
    call = model if known else lambda x: torch.func.functional_call(model, copies, (x,))
    expected = torch.ones(2)
    for _ in range(4):
        first = []

        def closure(first: list[Tensor] = first) -> Tensor:
            losses = (call(X) - 1).square().mean(dim=0)
            first.append(losses.detach())
            return weighing(losses)

        optimizer.step(closure)
        assert len(first) > 1
        expected = 0.9 * expected + 0.1 * first[0]
        torch.testing.assert_close(weighing.mean, expected)
    assert int(model[1].num_batches_tracked) == 4


def test_a_child_that_comes_later_and_a_module_inside_another_model_count_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    whole = nn.ModuleDict({"model": model, "statistics": nn.BatchNorm1d(2, affine=False)})
    optimizer = GML2O(model.parameters())
    closure = lambda: squares(whole["statistics"](model(X)))  # noqa: E731
    for _ in range(2):
        optimizer.step(closure)
    whole["statistics"] = nn.BatchNorm1d(2, affine=False)
    for _ in range(3):
        optimizer.step(closure)
    assert int(whole["statistics"].num_batches_tracked) == 3


def test_a_copy_and_frozen_objects_find_their_modules() -> None:
    model = ordinary()
    optimizer = GML2O(model.parameters())
    optimizer.step(lambda: squares(model(X)))
    twin, other = copy.deepcopy((model, optimizer))
    gc.freeze()
    try:
        other.step(lambda: squares(twin(X)))
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    assert int(model[1].num_batches_tracked) == 1
    assert int(twin[1].num_batches_tracked) == 2


def test_a_step_that_fails_leaves_the_buffers_as_they_were() -> None:
    model = ordinary()
    optimizer = GML2O(model.parameters())
    optimizer.step(lambda: squares(model(X)))
    before = [buffer.clone() for buffer in model.buffers()]
    calls = itertools.count()

    def closure() -> list[Tensor]:
        found = squares(model(X))
        if next(calls) == 2:
            raise KeyError("stop")
        return found

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert next(calls) == 3
    assert all(torch.equal(buffer, old) for buffer, old in zip(model.buffers(), before, strict=True))


def test_two_parts_of_a_batch_count_twice() -> None:
    model = ordinary()
    optimizer = GML2O(model.parameters())
    twin = copy.deepcopy(model)
    twin(X[:8])
    twin(X[8:])
    optimizer.step([lambda: squares(model(X[:8])), lambda: squares(model(X[8:]))])
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def counters() -> Iterator[dict[str, Any]]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "how", "backend"),
    [
        pytest.param(GML2O, "module", "eager", marks=pytest.mark.long),
        pytest.param(GML2O, "module", "aot_eager", marks=pytest.mark.long),
        (GML2O, "function", "eager"),
        pytest.param(GML2O, "method", "aot_eager", marks=pytest.mark.long),
        (ML2O, "module", "eager"),
    ],
)
def test_a_compiled_model_is_compiled_once(kind: type[ML2O], how: str, backend: str, counters: dict[str, Any]) -> None:
    class Whole(nn.Module):
        """nn.Sequential.compile() compiles nothing: torch takes its forward for a part of itself."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = ordinary()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    model = Whole()
    parameters = list(model.parameters())
    call: Callable[[Tensor], Any] = model
    if how == "module":
        call = torch.compile(model, backend=backend)
    elif how == "method":
        model.compile(backend=backend)
    closure = lambda: squares(call(X))  # noqa: E731
    if how == "function":
        compiled = torch.compile(lambda x: squares(model(x)), backend=backend)
        closure = lambda: compiled(X)  # noqa: E731
    optimizer = kind(parameters)
    for _ in range(15):
        optimizer.step(closure)
    assert int(model.layers[1].num_batches_tracked) == 15
    assert counters["unique_graphs"] == 1
