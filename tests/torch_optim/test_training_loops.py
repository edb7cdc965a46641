"""What a user's loop does to an optimizer: schedules, checkpoints, copies, groups, frozen and missing gradients."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ml2o_dist import GML2O, ML2O, UserError
from ml2o_dist.config import GuardSettings
from ml2o_dist.tracking.registry import register_version
from tests.torch_optim.small import TwoTasks, drawn, flat, losses, weights_file
from tests.tracking.filled_registry import Registry

Make = Callable[[nn.Module], ML2O]


def makers(place: Path) -> dict[str, Make]:
    return {
        "ml2o": lambda model: ML2O(model.parameters(), place, weight_decay=0.01),
        "gml2o": lambda model: GML2O(model.parameters(), place, guard=GuardSettings(budget=1.0)),
        "gml2o over mgda": lambda model: GML2O(
            model.parameters(), place, guard=GuardSettings(fallback="mgda+adam@0.01", margin=0.5)
        ),
    }


KINDS = list(makers(Path()))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return weights_file(tmp_path / "weights", lr=0.005, output="controlled", features="agreement")


def take(optimizer: ML2O, model: nn.Module, step: int) -> Tensor:
    batch, other = drawn(step), drawn(f"guard {step}")
    closure = lambda: losses(model, batch, "none")  # noqa: E731
    if isinstance(optimizer, GML2O):
        return optimizer.step(closure, lambda: losses(model, other, "none"))
    return optimizer.step(closure)


def saved_and_read(state: dict) -> dict:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    read: dict = torch.load(stream, weights_only=True)
    return read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_resumed_training_is_equal_step_by_step(kind: str, dtype: torch.dtype, place: Path) -> None:
    model = TwoTasks().to(dtype)
    make = makers(place)[kind]
    cast = lambda step: (drawn(step)[0].to(dtype), *drawn(step)[1:])  # noqa: E731

    def go(optimizer: ML2O, net: nn.Module, steps: range) -> list[Tensor]:
        points = []
        for step in steps:
            batch, other = cast(step), cast(f"guard {step}")
            closures = [lambda batch=batch: losses(net, batch, "none"), lambda other=other: losses(net, other, "none")]
            optimizer.step(*closures[: 2 if isinstance(optimizer, GML2O) else 1])
            points.append(flat(net))
        return points

    whole = TwoTasks().to(dtype)
    expected = go(make(whole), whole, range(12))
    optimizer = make(model)
    go(optimizer, model, range(6))
    state, weights = saved_and_read(optimizer.state_dict()), saved_and_read(model.state_dict())
    other = TwoTasks(seed=5).to(dtype)
    other.load_state_dict(weights)
    resumed = make(other)
    resumed.load_state_dict(state)
    assert resumed.steps == 6
    for one, point in zip(go(resumed, other, range(6, 12)), expected[6:], strict=True):
        assert torch.equal(one, point)
    if isinstance(resumed, GML2O):
        whole_run = make(TwoTasks().to(dtype))
        go(whole_run, TwoTasks().to(dtype), range(0))
        assert resumed.accepted_steps <= resumed.steps == 12


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_its_own_way(kind: str, place: Path) -> None:
    model = TwoTasks()
    optimizer = makers(place)[kind](model)
    for step in range(3):
        take(optimizer, model, step)
    twin, copied = copy.deepcopy((model, optimizer))
    for step in range(3, 6):
        take(optimizer, model, step)
    assert not torch.equal(flat(model), flat(twin))
    assert copied.steps == 3
    for step in range(3, 6):
        take(copied, twin, step)
    assert torch.equal(flat(model), flat(twin))


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
def test_a_group_may_come_before_and_after_a_checkpoint(kind: str, place: Path) -> None:
    def begun(model: TwoTasks) -> ML2O:
        half = nn.ModuleList([model.trunk])
        optimizer = makers(place)[kind](half)
        for step in range(2):
            take(optimizer, model, step)
        optimizer.add_param_group({"params": model.heads.parameters(), "lr": 0.5})
        return optimizer

    model = TwoTasks()
    optimizer = begun(model)
    for step in range(2, 4):
        take(optimizer, model, step)
    state = saved_and_read(optimizer.state_dict())
    twin = copy.deepcopy(model)
    resumed = makers(place)[kind](nn.ModuleList([twin.trunk]))
    resumed.add_param_group({"params": twin.heads.parameters()})
    resumed.load_state_dict(state)
    assert resumed.param_groups[1]["lr"] == 0.5
    for step in range(4, 6):
        take(optimizer, model, step)
        take(resumed, twin, step)
    assert torch.equal(flat(model), flat(twin))


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


@pytest.mark.parametrize("kind", KINDS)
def test_another_precision_than_the_first_steps_gets_one_line_again_and_again(kind: str, place: Path) -> None:
    model, new = TwoTasks(), nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = makers(place)[kind](model)
    take(optimizer, model, 0)
    saved = optimizer.state_dict()
    optimizer.add_param_group({"params": [new]})
    for _ in range(2):
        with pytest.raises(UserError, match="a float64 parameter was added"):
            take(optimizer, model, 1)
    model = TwoTasks()
    optimizer = makers(place)[kind](model)
    take(optimizer, model, 0)
    model.double()
    for _ in range(2):
        with pytest.raises(UserError, match=r"are on cpu in torch\.float64, .* states on cpu in torch\.float32: move"):
            take(optimizer, model, 1)
    with pytest.raises(UserError, match=r"the state dict is in torch\.float32, the parameters here in torch\.float64"):
        makers(place)[kind](model).load_state_dict(saved)
    makers(place)[kind](model).load_state_dict(makers(place)[kind](TwoTasks()).state_dict())  # of no step yet


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
    assert [line.startswith("GML2O in one of 2 ranks: it does not average") for line in said] == [True] * (ranks - 1)


def test_it_says_whose_weights_it_has(place: Path) -> None:
    optimizer = ML2O(TwoTasks().parameters(), place)
    assert optimizer.weights == str(place)
    assert f"weights: {place}" in repr(optimizer)
    assert copy.deepcopy(optimizer).weights == str(place)


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


def test_no_network_is_asked_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    model = TwoTasks()
    optimizer = GML2O(model.parameters(), "models:/ml2o@champion")
    before = flat(model)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        take(optimizer, model, 0)
    assert torch.equal(flat(model), before)


def test_a_registered_version_is_read_at_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path)
    artifact = registry.artifact(1)
    register_version(registry.uri, "drop", artifact, run_id=registry.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    model, twin = TwoTasks(), TwoTasks()
    one, other = GML2O(model.parameters(), "models:/drop@candidate"), GML2O(twin.parameters(), artifact)
    for step in range(3):
        take(one, model, step)
        take(other, twin, step)
    assert torch.equal(flat(model), flat(twin))
    with pytest.raises(UserError, match=r"belongs to weights .*, this optimizer has .*\(initial\)"):
        GML2O(model.parameters(), "initial").load_state_dict(one.state_dict())
