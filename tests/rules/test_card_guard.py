"""What the card of weights may ask of the guard: only what is stricter than the default one."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from ml2o_dist import GML2O
from ml2o_dist.config import EvaluateSettings, GuardSettings
from ml2o_dist.evaluation.optimizer_names import parse_optimizers
from ml2o_dist.evaluation.optimizer_specs import Guarded, Learned, OptimizerSpec
from ml2o_dist.rules.card_guard import admitted
from tests.torch_optim.small import weights_file
from tests.wording import says

DEFAULT = GuardSettings()
LOOSER = {
    "fallback": ["mean+sgd@1000", "mgda+adam@0.01"],
    "eps": [1e-9, 1e12],
    "budget": [5.1, 1e12],
    "margin": [2.9, 0.0],
    "every": [2, 1_000_000_000],
    "criterion": ["sum"],
    "batches": [17, 10_000],
    "growth": [0.11, 2.0],
}
STRICTER = {
    "fallback": ["smg", "dssmg"],
    "p": [0.51, 1.0],
    "budget": [0.0, 4.9],
    "margin": [3.1, 100.0],
    "batches": [4, 16],
    "growth": [0.1],
    "criterion": ["each"],
}


def test_every_setting_is_held_against_the_default() -> None:
    assert set(LOOSER) | set(STRICTER) == set(GuardSettings.model_fields)
    assert admitted(None, "w") == (None, "")
    for name, values in LOOSER.items():
        for value in values:
            asked = GuardSettings.model_validate({name: value, "p": 0.7})
            found, line = admitted(asked, "w")
            assert found == GuardSettings(p=0.7)
            assert says(line, "card of 'w'", "looser", f"{name}=")
            assert "\n" not in line
    for name, values in STRICTER.items():
        for value in values:
            asked = GuardSettings.model_validate({name: value})
            assert admitted(asked, "w") == (asked, "")
    found, line = admitted(GuardSettings(every=10**9, budget=1e12, margin=10.0), "w")
    assert found == GuardSettings(margin=10.0)
    assert says(line, "budget=1e+12, every=1000000000", "default", "budget=5, every=1")


OFF = {"every": 10**9, "budget": 1e12, "criterion": "sum", "margin": 0.0}


def test_weights_cannot_switch_their_guard_off(tmp_path: Path) -> None:
    """Random weights of a scaled rule run away, unless something stops them."""
    place = weights_file(tmp_path / "off", output="scaled", scale=1.0, guard=OFF)
    plain = weights_file(tmp_path / "plain", output="scaled", scale=1.0)
    x, y = torch.randn(64, 5), torch.randn(64, 2)
    ends = {}
    for name, weights, guard in (("card", place, None), ("own", place, OFF), ("default", plain, None)):
        torch.manual_seed(0)
        model = nn.Linear(5, 2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = GML2O(model.parameters(), weights, guard=guard)
            for _ in range(40):
                found = optimizer.step(lambda model=model: list((model(x) - y).square().unbind(1)))
            twin, copied = copy.deepcopy((model, optimizer))
            copied.step(lambda twin=twin: list((twin(x) - y).square().unbind(1)))
        ends[name] = float(found.sum())
        lines = [str(each.message) for each in caught if "looser" in str(each.message)]
        assert len(lines) == (name == "card")
    assert ends["card"] == pytest.approx(ends["default"], rel=0.5)
    assert ends["own"] > 100 * ends["card"]  # the user's guard counts


def entered(name: str) -> OptimizerSpec:
    (entrant,) = parse_optimizers(EvaluateSettings(optimizers=(name,)), lambda reference: Path(reference))
    return entrant.optimizer(None)


def test_an_evaluation_does_not_take_a_looser_guard_either(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = str(weights_file(tmp_path / "off", guard={**OFF, "p": 0.8}))
    with caplog.at_level(logging.WARNING):
        found = entered(place)
    assert isinstance(found, Learned)
    assert found.settings.guard == GuardSettings(p=0.8)
    (record,) = caplog.records
    assert says(record.message, "guard", "looser", "budget=1e+12, margin=0, every=")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        guarded = entered(f"gml2o:{place}")
        strict = entered(str(weights_file(tmp_path / "strict", guard={"budget": 0})))
    assert isinstance(guarded, Guarded)
    assert guarded.guard == DEFAULT
    assert isinstance(strict, Learned)
    assert strict.settings.guard == GuardSettings(budget=0)
    assert not caplog.records
