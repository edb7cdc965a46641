"""Closures: their randomness, their traces, and what is said about wrong ones."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ml2o_dist import GML2O, ML2O, UserError
from ml2o_dist.config import GuardSettings
from tests.torch_optim.small import TwoTasks, drawn, flat, losses


class Noisy(nn.Module):
    """Dropout and BatchNorm, which remembers every input's mask and is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.net = TwoTasks()
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        kept = F.dropout(torch.ones_like(x), 0.5, self.training)
        self.masks.append(kept)
        return self.net(self.norm(x) * kept)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_call_within_a_step_has_the_same_masks(reduction: str) -> None:
    model = Noisy()
    optimizer = GML2O(model.parameters(), "initial")
    for step in range(3):
        model.masks = []
        batch, other = drawn(step), drawn(f"guard {step}", 24)
        torch.manual_seed(step)
        optimizer.step(lambda batch=batch: losses(model, batch, reduction), lambda o=other: losses(model, o, reduction))
        after = torch.rand(5)
        training = [mask for mask in model.masks if len(mask) == 16]
        guard = [mask for mask in model.masks if len(mask) == 24]
        assert len(training) >= (3 if step == 0 else 1)  # the first step searches the fallback's size, and compares
        assert len(guard) == (5 if step == 0 else 3)
        for masks in (training, guard):
            assert all(torch.equal(mask, masks[0]) for mask in masks)
        torch.manual_seed(step)
        assert torch.equal(training[0], F.dropout(torch.ones(16, 5), 0.5))
        assert torch.equal(guard[0], F.dropout(torch.ones(24, 5), 0.5))
        assert torch.equal(after, torch.rand(5))  # as after one call of each


def test_moments_are_those_of_one_pass_over_the_training_batch() -> None:
    model, twin = Noisy(), Noisy()
    optimizer = GML2O(model.parameters(), "initial")
    for step in range(4):
        batch, other = drawn(step), drawn(f"guard {step}", 24)
        twin.norm(batch[0])
        optimizer.step(lambda batch=batch: losses(model, batch, "none"), lambda o=other: losses(model, o, "none"))
    for name, buffer in model.norm.named_buffers():
        assert torch.equal(buffer, dict(twin.norm.named_buffers())[name]), name
    assert int(model.norm.num_batches_tracked) == 4


@pytest.mark.parametrize("fails_at", [1, 2, 3, 5])
def test_a_closure_that_raises_leaves_the_parameters_as_they_were(fails_at: int) -> None:
    model = TwoTasks()
    optimizer = GML2O(model.parameters(), "initial")
    calls = 0

    def closure() -> list[Tensor]:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise KeyError("stop")
        return losses(model, drawn(0), "none")

    before, state = flat(model), torch.get_rng_state()
    with pytest.raises(KeyError, match="stop"):
        optimizer.step(closure, closure)
    assert torch.equal(flat(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    optimizer.step(lambda: losses(model, drawn(0), "none"), lambda: losses(model, drawn(1), "none"))
    assert optimizer.steps == 1


def spent(computed: list[Tensor], keep: bool = False) -> list[Tensor]:
    torch.autograd.backward([each.mean() for each in computed], retain_graph=keep)
    return computed


def wrong(model: nn.Module) -> dict[str, tuple[Callable[[], object], str]]:
    def computed() -> list[Tensor]:
        return losses(model, drawn(0), "none")

    return {
        "a matrix": (lambda: [each.reshape(4, 4) for each in computed()], r"loss 1 of the closure .*\[4, 4\]"),
        "a number": (lambda: [1.0, 2.0], "loss 1 of the closure is float"),
        "none": (lambda: None, "the closure returned NoneType"),
        "a dict": (lambda: dict(enumerate(computed())), "closure returned dict.*list"),
        "backward": (lambda: spent(computed()), "closure called backward"),
        "backward that keeps": (lambda: spent(computed(), keep=True), "closure called backward"),
        "backward of numbers": (lambda: [each.mean().item() for each in spent(computed())], "called backward"),
        "a bare vector": (lambda: computed()[0], r"shape \[16\].*16 losses"),
        "transposed": (lambda: torch.stack(computed(), dim=1), r"shape \[16, 2\].*16 losses"),
        "no loss": (lambda: [], "returned no loss"),
        "no sample": (lambda: [each[:0] for each in computed()], r"shape \[0\]"),
        "mixed": (lambda: [computed()[0].mean(), computed()[1]], r"\[\[\], \[16\]\]"),
        "other samples": (
            lambda: [computed()[0], computed()[1][:5]],
            r"\[\[5\], \[16\]\].*label.*0",
        ),
        "nan": (
            lambda: [computed()[0], computed()[1] * torch.nan],
            r"not finite: nan; .* torch\.where\(mask, loss, 0\)",
        ),
        "no label": (
            lambda: [computed()[0].mean(), computed()[1][:0].mean()],
            r"loss 2 of the closure is not finite: nan; .* torch\.where\(mask, loss, 0\)",
        ),
        "constant": (lambda: [computed()[0], torch.zeros(16)], r"loss 2 .* return \(output \* 0\)\.sum\(\), not a con"),
        "inf": (lambda: [computed()[0] / 0, computed()[1]], "loss 1 of the closure is not finite: inf"),
        "detached": (lambda: [computed()[0], computed()[1].detach()], "loss 2 of the closure has no gradient"),
        "one loss": (lambda: computed()[:1], "one loss only"),
        "not a function": (3, "must be a function"),  # type: ignore[dict-item]
    }


@pytest.mark.parametrize("what", list(wrong(TwoTasks())))
def test_a_wrong_closure_gets_one_line(what: str) -> None:
    model = TwoTasks()
    closure, message = wrong(model)[what]
    optimizer = GML2O(model.parameters(), "initial")
    before = flat(model)
    with pytest.raises(UserError, match=message) as caught:
        optimizer.step(closure, lambda: losses(model, drawn(1), "none"))
    assert "\n" not in str(caught.value)
    assert torch.equal(flat(model), before)
    optimizer.step(lambda: losses(model, drawn(0), "none"), lambda: losses(model, drawn(1), "none"))


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = ML2O([parameter], "initial")
    with pytest.raises(UserError, match=r"gradient.*closure.*not finite"):
        optimizer.step(lambda: [parameter.sqrt().sum(), parameter.sum()])


def test_the_guard_must_return_what_the_closure_does() -> None:
    model = TwoTasks()
    optimizer = GML2O(model.parameters(), "initial")
    closure = lambda: losses(model, drawn(0), "none")  # noqa: E731
    with pytest.raises(UserError, match=r"guard closure.*scalars.*vectors"):
        optimizer.step(closure, lambda: losses(model, drawn(1)))
    with pytest.raises(UserError, match=r"guard closure returned 1 losses.* 2"):
        optimizer.step(closure, lambda: losses(model, drawn(1), "none")[:1])
    before = flat(model)
    with pytest.raises(UserError, match=r"guard closure.* 3 samples.* 4 or more.*drop_last"):
        optimizer.step(closure, lambda: losses(model, drawn(1, 3), "none"))
    assert torch.equal(flat(model), before)
    assert optimizer.steps == 0
    optimizer.step(closure, lambda: losses(model, drawn(1, 4), "none"))
    GML2O(model.parameters(), "initial").step(lambda: losses(model, drawn(0, 1), "none"), closure)  # nothing by one
    strict = GML2O(model.parameters(), "initial", guard={"budget": 0})
    with pytest.raises(UserError, match=r"closure.* 1 samples.* 2 or more"):
        strict.step(lambda: losses(model, drawn(1, 1), "none"))


def test_a_hand_designed_fallback_takes_no_more_parameters() -> None:
    model = TwoTasks()
    optimizer = GML2O(model.trunk.parameters(), "initial", guard=GuardSettings(fallback="mgda+adam@0.01"))
    closure = lambda: losses(model, drawn(0))  # noqa: E731
    optimizer.step(closure)
    optimizer.add_param_group({"params": model.heads.parameters()})
    with pytest.raises(UserError, match=r"mgda\+adam.*no more parameters"):
        optimizer.step(closure)


def test_other_mistakes_get_one_line() -> None:
    model = TwoTasks()
    closure = lambda: losses(model, drawn(0))  # noqa: E731
    with pytest.raises(UserError, match="takes no guard_closure"):
        ML2O(model.parameters(), "initial").step(closure, closure)
    with pytest.raises(UserError, match=r"GML2O.*not a module.*model\.parameters\(\)"):
        GML2O(model, "initial")
    with pytest.raises(UserError, match="batches 4"):
        GML2O(model.parameters(), "initial", guard=GuardSettings(batches=4))
    with pytest.raises(UserError, match="is missing"):
        ML2O(model.parameters(), "no/such/run")
    with pytest.raises(UserError, match=r"weights 'ml2o-smal'.*'ml2o-small'.*run directory"):
        ML2O(model.parameters(), "ml2o-smal")
    with pytest.raises(UserError, match=r"weights 0\.001.*name or a file.*lr=0\.001"):
        ML2O(model.parameters(), 0.001)
    with pytest.raises(UserError, match=r"weights None must be a name or a file$"):
        ML2O(model.parameters(), None)  # type: ignore[arg-type]
    for lr in (-1.0, "auto", None):
        with pytest.raises(UserError, match=f"lr {lr!r} of a parameter group must be"):
            ML2O(model.parameters(), "initial", lr=lr)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"weight_decay nan"):
        GML2O(model.parameters(), "initial", weight_decay=math.nan)
    with pytest.raises(UserError, match=r"setting 'budgt'.*'budget'"):
        GML2O(model.parameters(), "initial", guard={"budgt": 0})
    scheduled = ML2O(model.parameters(), "initial")
    scheduled.param_groups[0]["lr"] = -1.0
    with pytest.raises(UserError, match=r"lr -1\.0"):
        scheduled.step(closure)
    optimizer = ML2O(model.parameters(), "initial")
    optimizer.step(closure)
    with pytest.raises(UserError, match=r"returned 1 losses.* 2"):
        optimizer.step(lambda: closure()[:1])
    with pytest.raises(UserError, match="without a guard's memory"):
        GML2O(model.parameters(), "initial").load_state_dict(optimizer.state_dict())
    guarded = GML2O(model.parameters(), "initial")
    guarded.step(closure)
    with pytest.raises(UserError, match=r"GML2O.*guard's memory.* ML2O"):
        optimizer.load_state_dict(guarded.state_dict())
    wider = ML2O(TwoTasks(hidden=9).parameters(), "initial")
    with pytest.raises(UserError, match=r"parameter.*\[6, 5\].*\[9, 5\]"):
        wider.load_state_dict(optimizer.state_dict())
    with pytest.raises(UserError, match="none of ML2O"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
    frozen = TwoTasks().requires_grad_(False)
    with pytest.raises(UserError, match=r"no parameter.*requires a gradient"):
        ML2O(frozen.parameters(), "initial").step(lambda: losses(frozen, drawn(0)))
    number = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(UserError, match="complex64"):
        ML2O([number], "initial").step(lambda: [number.abs().sum()])


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_a_batch_in_parts_keeps_the_graph_of_one_part_only(kind: type[ML2O]) -> None:
    model, alive, most = TwoTasks(), [], []

    def part(k: int) -> list[Tensor]:
        most.append(sum(each() is not None for each in alive))
        x, *labels = drawn(k)
        kept = torch.tanh(x.clone().requires_grad_())  # what a graph holds on to
        alive.append(weakref.ref(kept))
        return [F.cross_entropy(a, y) for a, y in zip(model(kept), labels, strict=True)]

    optimizer = kind(model.parameters(), "initial")
    for _ in range(2):
        optimizer.step([lambda k=k: part(k) for k in range(4)])
    assert max(most) == 0


def test_a_first_step_that_fails_fixes_nothing() -> None:
    model = TwoTasks()
    optimizer = GML2O(model.parameters(), "initial")
    x, *labels = drawn(0, 2)
    with pytest.raises(UserError, match="to tell worse from noise"):
        optimizer.step(lambda: losses(model, (x, *labels), "none"))
    before = optimizer.state_dict()["ml2o"]
    assert (before["steps"], before["objectives"]) == (0, 0)
    optimizer.step(lambda: [*losses(model, drawn(1)), flat(model).square().sum() + model.trunk.weight.sum()])
    assert optimizer.steps == 1


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lr": None}, "lr None.*finite"),
        ({"lr": "fast"}, "lr 'fast'"),
        ({"guard": "dssmg"}, "guard 'dssmg' must be settings"),
        ({"guard": True}, "guard True must be settings"),
    ],
)
def test_a_wrong_setting_gets_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        GML2O(TwoTasks().parameters(), "initial", **settings)
    if "lr" in settings:
        with pytest.raises(UserError, match=line):
            ML2O([{"params": list(TwoTasks().parameters()), **settings}], "initial")


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_samples_without_a_label_are_left_out_as_the_message_says(kind: type[ML2O]) -> None:
    model, x, label = nn.Linear(3, 2), torch.randn(12, 3), torch.randn(12, 2)
    label[::4, 1] = math.nan
    mask = ~label.isnan()
    optimizer = kind(model.parameters(), "initial")

    def plain() -> list[Tensor]:
        return list((model(x) - label).square().mean(dim=0))

    def left_out() -> list[Tensor]:
        return list(torch.where(mask, (model(x) - label).square(), 0).mean(dim=0))

    def replaced() -> list[Tensor]:
        errors = (model(x) - torch.where(mask, label, 0)).square()
        return list(torch.where(mask, errors, 0).mean(dim=0))

    for closure in (plain, left_out):
        with pytest.raises(UserError, match=r"torch\.where\(mask, label, 0\)"):
            optimizer.step(closure)
    for _ in range(5):
        optimizer.step(replaced)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
