"""The table of torchjd's methods: complete, with the settings it documents, scale-free where the method is."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torchjd._mixins
import torchjd.aggregation
import torchjd.scalarization
from torch import Tensor

from ml2o_dist.rules.aggregators import AGGREGATORS, aggregate, build_aggregator, check_aggregator
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator
from tests.rules.torchjd_objects import FEWEST, NAMES, RESCALED, SCALARIZERS, SOLVERS, marked, torchjd_object

EVERY = [marked(name) for name in NAMES]
NOT_SCALE_FREE = {"excessmtl", "fairgrad", "nashmtl", "pcd"}
"""Of those that see the Jacobian: the first and last have absolute constants, the others another power of its scale."""


def once(name: str, jacobian: Tensor, losses: Tensor | None = None, seed: int = 3) -> Tensor:
    losses = torch.linspace(1.0, 2.0, len(jacobian)).to(jacobian) if losses is None else losses
    return aggregate(name, build_aggregator(name, len(jacobian)), jacobian, losses, seed)[0]


def matrix(m: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return conflicting gradients whose largest entry is in [1/2, 1)."""
    jacobian = torch.randn(m, n, generator=generator("J", m, n), dtype=torch.float64)
    jacobian[1:] -= jacobian.mean(dim=0)
    return (0.9 * jacobian / jacobian.abs().max()).to(dtype)


def test_every_method_of_torchjd_has_its_name_or_is_left_out_for_a_reason() -> None:
    def concrete(module: object, base: type) -> set[str]:
        classes = (getattr(module, name) for name in module.__all__)  # type: ignore[attr-defined]
        return {each.__name__.lower() for each in classes if issubclass(each, base) and not inspect.isabstract(each)}

    aggregators = concrete(torchjd.aggregation, torchjd.aggregation.Aggregator)
    aggregators -= {"weightedaggregator", "gramianweightedaggregator"}  # what the others are made of
    scalarizers = concrete(torchjd.scalarization, torchjd.scalarization.Scalarizer)
    assert aggregators - set(AGGREGATORS) == {"constant", "random"}  # `random` is `randomweights` here
    assert scalarizers - set(AGGREGATORS) == {"constant", "random", "cosmos", "pbi"}
    assert set(AGGREGATORS) == set(NAMES)
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in page] == []
    assert set(NAMES) - aggregators - scalarizers == {"crmogm", "randomweights"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3), (3, 5), (5, 1), (5, 40)])
@pytest.mark.parametrize("name", EVERY)
def test_a_direction_is_torchjds(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if shape[0] < FEWEST.get(name, 1):
        pytest.skip(f"{name} needs {FEWEST[name]} objectives")
    jacobian = matrix(*shape, dtype)
    losses = torch.linspace(0.5, 2.0, shape[0], dtype=dtype)
    module = torchjd_object(name, shape[0]).to(dtype)
    torch.manual_seed(3)
    if name in SCALARIZERS:
        values = losses.clone().requires_grad_(True)
        module(values).backward()
        expected = values.grad @ jacobian
    else:
        expected = module(jacobian)
    direction = once(name, jacobian, losses)
    assert direction.dtype == dtype
    torch.testing.assert_close(direction[: shape[1]], expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("scale", [2.0**-27, 2.0**27])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [marked(name) for name in NAMES if name not in NOT_SCALE_FREE])
def test_a_multiple_of_the_jacobian_gives_the_multiple_of_the_direction(
    name: str, dtype: torch.dtype, scale: float
) -> None:
    """2^27 is 1.3e8; powers of two, so that Frank-Wolfe meets the same roundings."""
    jacobian = matrix(5, 7, dtype)
    direction = once(name, jacobian)[:7]
    rounding = 1e-5 * float(direction.norm())  # of eigenvalues and pseudo-inverses in float32
    torch.testing.assert_close(once(name, scale * jacobian)[:7] / scale, direction, rtol=0.0, atol=rounding)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("name", [marked(name) for name in sorted(NOT_SCALE_FREE)])
def test_the_others_stay_finite(name: str, scale: float) -> None:
    for dtype in (torch.float32, torch.float64):
        assert once(name, scale * matrix(5, 7, dtype)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_where_all_gradients_vanish_the_direction_does(name: str, dtype: torch.dtype) -> None:
    direction = once(name, torch.zeros(3, 4, dtype=dtype))[:4]
    assert torch.equal(direction, torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize("name", EVERY)
def test_degenerate_gradients_have_a_direction(name: str) -> None:
    for rows in ([0, 0, 1], [0, 1, 1], [1, 1, 1], [1, -1, 0], [1, 2, -3], [1e-6, 1, 1]):
        jacobian = torch.tensor(rows, dtype=torch.float64)[:, None] * matrix(3, 6)[:1]
        assert once(name, jacobian).isfinite().all()


@pytest.mark.parametrize("name", [marked(name) for name in RESCALED])
def test_small_gradients_are_not_taken_for_stationary_ones(name: str) -> None:
    """torchjd alone takes |J|^2 < 1e-4 for 0; here the answer is that of the same gradients at any size."""
    small = 1e-3 * matrix(3, 6)
    torch.testing.assert_close(once(name, small), 1e-3 * once(name, matrix(3, 6)), rtol=1e-6, atol=0.0)
    alone = torchjd_object(name, 3)
    torch.manual_seed(3)
    assert not torch.allclose(alone(small), once(name, small), rtol=1e-6, atol=0.0)


def test_closed_forms() -> None:
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])  # <g1, g2> = -1: they conflict
    both = torch.stack([first, second])
    assert torch.equal(once("pcgrad", both), (first + second / 2) + (second + first))
    assert torch.equal(once("sum", both), first + second)
    assert torch.equal(once("mean", both), (first + second) / 2)
    three = torch.tensor([[1.0, 5.0], [2.0, -7.0], [9.0, 6.0]])
    assert torch.equal(once("trimmedmean", three), torch.tensor([2.0, 5.0]))  # the median
    assert torch.equal(once("krum", torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]]))[1:], torch.zeros(1))
    losses = torch.tensor([1.0, 4.0])
    torch.testing.assert_close(once("stch", both, losses), torch.softmax(losses / 2 / 0.1, 0) / 2 @ both)
    torch.testing.assert_close(once("geometricmean", both, losses), (2.0 / 2) * (1 / losses) @ both)
    torch.testing.assert_close(once("famo", both, losses), (1 / losses) / (1 / losses).sum() @ both)
    # uw: 1/2 exp(-s) f + 1/2 s at s = 0, its own gradient behind; imtll: exp(s) f - s
    torch.testing.assert_close(once("uw", both, losses), torch.cat([both.sum(0) / 2, (1 - losses) / 2]))
    torch.testing.assert_close(once("imtll", both, losses), torch.cat([both.sum(0), losses - 1]))
    # imtlg: equal projections on all unit gradients
    direction = once("imtlg", matrix(3, 5))
    projections = torch.nn.functional.normalize(matrix(3, 5)) @ direction
    torch.testing.assert_close(projections, projections.mean().expand(3))


@pytest.mark.parametrize("name", [marked(name) for name in ("upgrad", "dualproj")])
def test_no_objective_gets_worse(name: str) -> None:
    for m in (2, 3, 5):
        least = (matrix(m, 9) @ once(name, matrix(m, 9))).min()
        assert least >= -1e-3  # torchjd adds 1e-4 tr(G) to the Gramian's diagonal
        assert (matrix(m, 9) @ once("mean", matrix(m, 9))).min() < -1e-2


@pytest.mark.parametrize("name", list(SOLVERS))
def test_a_missing_solver_is_named_with_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchjd._mixins, "find_spec", lambda package: None)
    with pytest.raises(UserError) as caught:
        check_aggregator(name)
    line = str(caught.value)
    assert line.startswith(f"aggregator {name!r}: ")
    assert "\n" not in line
    assert all(package in line for package in SOLVERS[name])
    assert 'pip install "torchjd[' in line
    assert "ml2o-dist[solvers]" in line


def test_too_few_objectives_are_refused() -> None:
    for name, fewest in FEWEST.items():
        if name not in SOLVERS:
            with pytest.raises(UserError, match=f"{name!r}.*at least {fewest} objectives.* {fewest - 1}"):
                build_aggregator(name, fewest - 1)
