"""What a user's loop does to an optimizer: schedules, groups, frozen and missing gradients, other precisions."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from ml2o_dist import GML2O, ML2O, UserError
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.coordinatewise.rule import ML2ORule
from tests.torch_optim.small import KINDS, TwoTasks, drawn, flat, losses, makers, take
from tests.wording import says


def test_the_learning_rate_multiplies_the_step_and_schedulers_change_it(place: Path) -> None:
    models = {factor: TwoTasks() for factor in (1.0, 0.25)}
    start = flat(models[1.0])
    for factor, model in models.items():
        take(ML2O(model.parameters(), place, lr=factor), model, 0)
    moved = {factor: flat(model) - start for factor, model in models.items()}
    torch.testing.assert_close(moved[0.25], 0.25 * moved[1.0], rtol=1e-4, atol=1e-7)

    model = TwoTasks()
    optimizer = ML2O(model.parameters(), "initial")
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
        ],
        milestones=[2],
    )
    sizes = []
    for step in range(6):
        before = flat(model)
        take(optimizer, model, step)
        schedule.step()
        sizes.append(float((flat(model) - before).abs().max()))
    assert sizes[0] == pytest.approx(0.005, rel=1e-3)  # Adam's first step is its learning rate, 0.01
    assert sizes[5] < 0.2 * max(sizes)


def test_a_factor_of_zero_stands_still_under_a_guard_too(place: Path) -> None:
    model = TwoTasks()
    optimizer = GML2O(model.parameters(), place, lr=0.0)
    before = flat(model)
    for step in range(3):
        take(optimizer, model, step)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_rows_that_no_sample_names_and_masked_weights_stay_where_they_are(kind: type[ML2O]) -> None:
    """With the shipped weights, whose network says something of every coordinate."""
    torch.manual_seed(0)
    table, layer = nn.Embedding(9, 4), nn.Linear(4, 2)
    mask = (torch.arange(4) != 1).float()
    start = [table.weight.detach().clone(), layer.weight.detach().clone()]
    optimizer = kind([*table.parameters(), *layer.parameters()])
    for step in range(30):
        rows = torch.tensor([0, 2, 3 + step % 4])
        optimizer.step(lambda rows=rows: list((layer(table(rows) * mask) - 1).square().mean(dim=0)))
    moved = [(table.weight - start[0]).detach(), (layer.weight - start[1]).detach()]
    assert moved[0][[1, 7, 8]].abs().max() == 0
    assert moved[0][:, 1].abs().max() == moved[1][:, 1].abs().max() == 0
    assert moved[0][0, 0] != 0
    assert moved[1][0, 0] != 0


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_the_rule_is_told_tables_from_matrices(kind: type[ML2O], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[ParameterLayout] = []
    initial_state = ML2ORule.initial_state

    def noted(self: ML2ORule, instances: int, objectives: int, layout: ParameterLayout) -> object:
        told.append(layout)
        return initial_state(self, instances, objectives, layout)

    monkeypatch.setattr(ML2ORule, "initial_state", noted)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))  # both weights are matrices
    optimizer = kind(model.named_parameters(), "initial")
    optimizer.step(lambda: list(model(torch.arange(5)).square().sum(dim=1)[:2]))
    assert [(t.name, t.kind) for t in told[0].tensors] == [
        ("0.weight", "embedding"), ("1.weight", "matrix"), ("1.bias", "vector")
    ]  # fmt: skip


def test_groups_have_their_own_factors() -> None:
    model, twin = TwoTasks(), TwoTasks()
    groups = [{"params": model.trunk.parameters(), "lr": 0.1}, {"params": model.heads.parameters()}]
    optimizer = ML2O(groups, "initial")
    adam = torch.optim.Adam(
        [{"params": twin.trunk.parameters(), "lr": 0.001}, {"params": twin.heads.parameters()}], lr=0.01
    )
    for step in range(6):
        take(optimizer, model, step)
        adam.zero_grad()
        sum(losses(twin, drawn(step))).backward()
        adam.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [6, 700])
def test_parameters_that_come_later_begin_as_new_ones(hidden: int) -> None:
    """With `residual` steps coordinates do not know of each other: both halves are as optimizers of their own."""
    model, twin = TwoTasks(hidden=hidden), TwoTasks(hidden=hidden)
    optimizer = ML2O(model.trunk.parameters(), "initial")
    adams = [torch.optim.Adam(twin.trunk.parameters(), lr=0.01)]
    for step in range(8):
        if step == 4:
            optimizer.add_param_group({"params": model.heads.parameters()})
            adams.append(torch.optim.Adam(twin.heads.parameters(), lr=0.01))
        take(optimizer, model, step)
        twin.zero_grad()
        sum(losses(twin, drawn(step))).backward()
        for adam in adams:
            adam.step()
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_frozen_parameters_stay_until_they_are_released(kind: str, place: Path) -> None:
    model = TwoTasks()
    model.trunk.requires_grad_(False)
    optimizer = makers(place)[kind](model)
    trunk = [p.detach().clone() for p in model.trunk.parameters()]
    for step in range(2):
        take(optimizer, model, step)
    assert all(torch.equal(p, before) for p, before in zip(model.trunk.parameters(), trunk, strict=True))
    model.trunk.requires_grad_(True)
    for step in range(2, 4):
        take(optimizer, model, step)
    assert all(not torch.equal(p, before) for p, before in zip(model.trunk.parameters(), trunk, strict=True))
    model.heads.requires_grad_(False)
    heads = flat(model.heads)
    take(optimizer, model, 4)
    assert torch.equal(flat(model.heads), heads)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_no_loss_reaches_stays(kind: str, place: Path) -> None:
    model = TwoTasks()
    model.unused = nn.Linear(3, 3)
    optimizer = makers(place)[kind](model)
    before = flat(model.unused)
    start = flat(model)
    for step in range(4):
        take(optimizer, model, step)
    assert torch.equal(flat(model.unused), before)
    assert not torch.equal(flat(model), start)


def test_halves_keep_what_is_smaller_than_their_rounding() -> None:
    """Steps of 1e-4 on numbers near 1 are lost in bfloat16, whose spacing there is 8e-3, unless they add up."""
    parameter = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    optimizer = ML2O([parameter], "initial", lr=0.01)
    for _ in range(200):
        optimizer.step(lambda: [parameter.float().sum(), parameter.float().sum()])
    assert parameter.tolist() == pytest.approx([0.98] * 4, abs=0.004)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_that_share_a_model_are_warned(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GML2O(TwoTasks().parameters(), "initial")
    said = [str(each.message) for each in caught]
    assert [says(line, "GML2O in one of 2 ranks", "not average") for line in said] == [True] * (ranks - 1)


@pytest.mark.parametrize("cls", [ML2O, GML2O])
def test_autocast_in_the_closure_is_the_same_but_for_its_rounding(cls: type[ML2O]) -> None:
    ends = []
    for autocast in (False, True):
        model = TwoTasks()
        optimizer = cls(model.parameters())

        def closure(net: nn.Module = model, autocast: bool = autocast) -> list[Tensor]:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                return losses(net, drawn(0, 64), "none")

        found = [float(optimizer.step(closure).sum()) for _ in range(40)]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        ends.append(found)
    assert ends[0] != ends[1]  # it was in force
    assert ends[1][-1] < 0.7 * ends[1][0]
    assert ends[1][-1] == pytest.approx(ends[0][-1], rel=0.05)


def test_a_value_that_somebody_else_wrote_counts() -> None:
    parameter = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    optimizer = ML2O([parameter], "initial", lr=0.01)
    optimizer.step(lambda: [parameter.float().sum()])
    with torch.no_grad():
        parameter[1:] = 3.0
    optimizer.step(lambda: [parameter.float().sum()])
    assert parameter.tolist() == [1.0, 3.0, 3.0, 3.0]


def test_scalars_of_any_number_and_one_loss() -> None:
    parameter = nn.Parameter(torch.ones(3))
    twin = nn.Parameter(torch.ones(3))
    optimizer, other = ML2O([parameter], "initial"), ML2O([twin], "initial")
    for _ in range(3):
        assert optimizer.step(lambda: parameter.square().sum()).shape == (1,)
        assert other.step(lambda: torch.stack([twin.square().sum() / 3] * 3)).shape == (3,)
    torch.testing.assert_close(parameter, twin)


def test_gradients_of_others_are_left_alone(place: Path) -> None:
    model = TwoTasks()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    take(ML2O(model.parameters(), place), model, 0)
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("kind", [ML2O, GML2O])
def test_a_step_without_a_closure_says_what_to_write(kind: type[ML2O]) -> None:
    model = TwoTasks()
    optimizer = kind(model.parameters())
    with pytest.raises(
        UserError, match=rf"^{kind.__name__}\.step needs a closure .*: optimizer\.step\(lambda: \[loss_1"
    ):
        optimizer.step()
    optimizer.step(lambda: losses(model, drawn(0)))
    with pytest.raises(UserError, match=r"torch\.distributed\.checkpoint.*optimizer\.state_dict\(\)$"):
        get_optimizer_state_dict(model, optimizer)


def test_what_a_distributed_checkpoint_restores_is_refused(tmp_path: Path) -> None:
    model = TwoTasks()
    optimizer, other = GML2O(model.parameters()), GML2O(model.parameters())
    for step in range(3):
        optimizer.step(lambda step=step: losses(model, drawn(step)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is one process
        distributed_checkpoint.save({"optimizer": optimizer}, checkpoint_id=tmp_path)
        with pytest.raises(UserError, match=r"state dict is not whole.*torch\.save.*torch\.load"):
            distributed_checkpoint.load({"optimizer": other}, checkpoint_id=tmp_path)
    assert other.steps == 0
    other.step(lambda: losses(model, drawn(0)))


def test_the_wrapper_of_accelerate_passes_one_closure_on() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = TwoTasks()
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, GML2O(model.parameters()))
    before = flat(model)
    assert optimizer.step(lambda: losses(model, drawn(0))) is None
    assert not torch.equal(flat(model), before)
    assert optimizer.optimizer.step(lambda: losses(model, drawn(0)), lambda: losses(model, drawn(1))).shape == (2,)
    assert optimizer.optimizer.steps == 2
    with pytest.raises(UserError, match="needs a closure"):
        optimizer.step()


def test_parameters_without_values_are_refused() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(2))
    optimizer = GML2O(lazy.parameters())
    closure = lambda: list(lazy(drawn(0)[0]).square().unbind(1))  # noqa: E731
    with pytest.raises(UserError, match=r"lazy module.*no shape.*batch once"):
        optimizer.step(closure)
    closure()
    optimizer.step(closure)
    with torch.device("meta"):
        model = TwoTasks()
    with pytest.raises(UserError, match=r"shape \[6, 5\].*meta device"):
        ML2O(model.parameters()).step(lambda: losses(model, drawn(0)))
