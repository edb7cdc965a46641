"""A Pareto set on disk: what was saved is what is read back, and what cannot be used is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.networks import build_multi_head
from ml2o_dist.paretoset.saved_set import FILE, SetCard, load_set, save_set, set_network
from ml2o_dist.paretoset.settings import NetworkSettings
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.workflows.query_pareto_set import query_set


def parts() -> tuple[Fusion, SetCard, dict[str, Tensor], list[dict[str, Tensor]]]:
    network = build_multi_head("mlp", side=12, classes=(10, 10), seed=0, hidden="3")
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    draws = torch.Generator().manual_seed(1)
    experts = [
        {name: t + torch.randn(t.shape, generator=draws) for name, t in start.items()} for _ in range(2)
    ]  # none is like another, so that no two can be taken for each other
    fusion = Fusion(network, start, experts, heads=network.head_names)
    card = SetCard("multidigits", ("a", "b"), (10, 10), 12, (30.0,), (40.0,), NetworkSettings(name="mlp", hidden="3"),
                   "all", 0.3, 0, {})  # fmt: skip
    return fusion, card, start, experts


def saved(folder: Path, card: SetCard, *states: Any, routers: Mapping[str, Tensor]) -> Path:
    start, *experts = states
    save_set(folder / FILE, card, start, experts, routers)
    return folder


@pytest.mark.parametrize("preference", [[1.0, 0.0], [0.2, 0.8]])
def test_what_is_read_back_exports_the_same_network(preference: list[float], tmp_path: Path) -> None:
    fusion, card, start, experts = parts()
    found = load_set(saved(tmp_path, card, start, *experts, routers=fusion.routers.state_dict()))
    ours, theirs = (each.export(preference).state_dict() for each in (fusion, found.fusion))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"tasks": "eightdigits"}, {"classes": (2, 10)}, {"names": ("a", "c")}, {}])
def test_a_set_is_not_measured_on_tasks_that_are_not_its_own(change: dict[str, Any], tmp_path: Path) -> None:
    _, card, start, experts = parts()
    card = replace(card, **change)
    network = set_network(card)
    states = [network.state_dict()] * 3 if "classes" in change else [start, *experts]
    routers = Fusion(network, states[0], states[1:], heads=network.head_names).routers.state_dict()
    place = str(saved(tmp_path, card, *states, routers=routers))
    words = {"data_root": "", "tracking_uri": "", "console": Console(quiet=True)}
    with pytest.raises(UserError, match=r"classes.*names.*sizes"):
        query_set(place, [0.5, 0.5], out=None, measure=True, **words)
    query_set(place, [0.5, 0.5], out=tmp_path / "plain.safetensors", measure=False, **words)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["start", "expert 2", "routers"])
def test_values_that_are_not_finite_are_refused(part: str, value: float, tmp_path: Path) -> None:
    fusion, card, start, experts = parts()
    routers = {name: tensor.clone() for name, tensor in fusion.routers.state_dict().items()}
    state = {"start": start, "expert 2": experts[1], "routers": routers}[part]
    next(iter(state.values())).view(-1)[0] = value
    place = saved(tmp_path, card, start, *experts, routers=routers)
    with pytest.raises(UserError, match="not finite") as caught:
        load_set(place)
    assert part in str(caught.value)
