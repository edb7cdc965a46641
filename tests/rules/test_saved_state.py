"""States of rules as JSON and tensors: a run that goes on from what was saved is the run that never stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ml2o_dist.config import GuardSettings, RuleSettings
from ml2o_dist.problems import Problem
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.aggregated import AggregatedRule
from ml2o_dist.rules.base import Oracle, UpdateRule
from ml2o_dist.rules.coordinatewise.rule import ML2ORule
from ml2o_dist.rules.guarded import guarded
from ml2o_dist.rules.saved_state import StateError, check_alike, modules_of, put_together, take_apart
from ml2o_dist.rules.stochastic import DSSMG, SMG
from ml2o_dist.runtime.seeding import generator
from tests.rules.torchjd_objects import NAMES, REMEMBERING, marked
from tests.rules.toys import Positive

RESTARTS = (0, 1, 3, 23)
GO_ON = 25  # steps after the restart: an epoch of dwa, which has 20, ends among them


def learned(**settings: Any) -> Callable[[torch.dtype], UpdateRule]:
    """Build a learned rule with weights that are not the first ones, under a guard where there is one."""

    def build(dtype: torch.dtype) -> UpdateRule:
        rule = ML2ORule.from_weights(RuleSettings(hidden=4, **settings), None, dtype=dtype)
        weights = {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator("weights", name)).to(dtype)
            for name, tensor in rule.network.state_dict().items()
        }
        return guarded(ML2ORule.from_weights(rule.network.settings, weights, dtype=dtype), rule.network.settings.guard)

    return build


RULES: dict[str, Callable[[torch.dtype], UpdateRule]] = {
    "smg": lambda dtype: SMG(),
    "dssmg": lambda dtype: DSSMG(),
    "ml2o": learned(),
    "ml2o alignment": learned(features="alignment", output="controlled"),
    "ml2o per objective": learned(objectives="per_objective", count=3, output="scaled", features="log_sign"),
    "gml2o": learned(guard=GuardSettings()),
    "gml2o budget": learned(guard=GuardSettings(budget=1.0, every=2)),
    "gml2o aggregated": learned(guard=GuardSettings(fallback="famo+adam@0.01")),
}


class Noisy(Positive):
    """Three samples a batch, so that a guard can compare."""

    def sample_losses(self, parameters: Tensor, batch: Tensor) -> Tensor:
        one = super().sample_losses(parameters, batch)
        return torch.cat([one, 1.5 * one, 0.25 * one, one + 1], dim=1)


def advance(rule: UpdateRule, problem: Problem, z: Tensor, state: Any, first: int, last: int) -> tuple[Tensor, Any]:
    """Take the steps number `first` to `last` - 1, each on a batch that is a function of its number."""
    for step in range(first, last):
        z, state, _ = rule.step(Oracle(problem, generator("step", step)), z, state)
    return z, state


def on_the_disk(tree: Any, tensors: dict[str, Tensor], folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Write the state as JSON and safetensors, and read it."""
    file = folder / "tensors.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()} | {"": torch.zeros(1)}, file)
    return json.loads(json.dumps(tree)), load_file(file)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal, bit for bit; an instance that diverges must do so again."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def assert_goes_on(build: Callable[[], UpdateRule], dtype: torch.dtype, folder: Path, instances: int = 2) -> None:
    problem, rule = Noisy(instances, 3, 5, dtype), build()
    reached, state = (
        [problem.initial_parameters(range(instances))],
        rule.initial_state(instances, 3, ParameterLayout.vector(5)),
    )
    saved = {}
    for step in range(RESTARTS[-1] + GO_ON):  # the run that never stops
        if step in RESTARTS:
            (folder / str(step)).mkdir()
            saved[step] = on_the_disk(*take_apart(state), folder / str(step))
        z, state = advance(rule, problem, reached[-1], state, step, step + 1)
        reached.append(z)
    for taken, (tree, tensors) in saved.items():
        fresh = build()
        modules = modules_of(fresh.initial_state(instances, 3, ParameterLayout.vector(5)))
        restored = put_together(tree, tensors, modules.__getitem__)
        _, again = take_apart(restored)
        assert all(same(tensor, tensors[name]) for name, tensor in again.items())
        ended, _ = advance(fresh, problem, reached[taken], restored, taken, taken + GO_ON)
        assert same(ended, reached[taken + GO_ON]), f"restored after {taken} steps"
        assert ended.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_goes_on_as_if_it_had_not_stopped(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert_goes_on(lambda: RULES[name](dtype), dtype, tmp_path)


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("momentum", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "name",
    [
        *map(marked, REMEMBERING),
        *(
            pytest.param(name, marks=[*marked(name).marks, pytest.mark.long])
            for name in NAMES
            if name not in {*REMEMBERING, "fairgrad"}
        ),
    ],
)
def test_an_aggregator_goes_on_as_if_it_had_not_stopped(name: str, optimizer: str, tmp_path: Path) -> None:
    dtype = torch.float32 if optimizer == "adam" else torch.float64
    assert_goes_on(lambda: AggregatedRule(name, optimizer, 0.01), dtype, tmp_path)


@pytest.mark.long
def test_nor_does_the_slowest_aggregator(tmp_path: Path) -> None:
    assert_goes_on(lambda: AggregatedRule("fairgrad", "adam", 0.01), torch.float32, tmp_path)


def test_what_is_saved_is_independent_of_the_state() -> None:
    problem, rule = Noisy(1, 3, 5), AggregatedRule("famo", "adam", 0.01)
    z, state = advance(
        rule, problem, problem.initial_parameters([0]), rule.initial_state(1, 3, ParameterLayout.vector(5)), 0, 3
    )
    _, tensors = take_apart(state)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for value in (state.first, state.second, *state.modules[0].parameters()):
        value.data.fill_(7.0)
    advance(rule, problem, z, state, 3, 5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_a_fresh_module_is_not_written_to() -> None:
    problem, rule = Noisy(1, 3, 5), AggregatedRule("uw", "adam", 0.01)
    _, state = advance(
        rule, problem, problem.initial_parameters([0]), rule.initial_state(1, 3, ParameterLayout.vector(5)), 0, 3
    )
    fresh = modules_of(rule.initial_state(1, 3, ParameterLayout.vector(5)))
    restored = put_together(*take_apart(state), fresh.__getitem__)
    assert all((parameter == 0).all() for module in fresh.values() for parameter in module.parameters())
    assert all((parameter != 0).any() for parameter in restored.modules[0].parameters())


@dataclass(frozen=True)
class Foreign:
    """A state of no rule of the package."""

    value: int


class ForeignTuple(NamedTuple):
    value: int


@pytest.mark.parametrize("state", [Foreign(1), ForeignTuple(1), (1, Foreign(2))])
def test_a_class_of_elsewhere_is_refused(state: Any) -> None:
    tree, tensors = take_apart(state)
    with pytest.raises(StateError, match=r"'tests\.rules\.test_saved_state:Foreign.*'.*no state of a rule"):
        put_together(tree, tensors, {}.__getitem__)


@pytest.mark.parametrize(
    "kind",
    [
        "ml2o_dist.rules.guarded:Nothing",
        "ml2o_dist.rules.nothing:GML2OState",
        "ml2o_dist.rules.guarded:guarded",
        "ml2o_dist.rules.guarded:GML2O",  # a class, and no value
        "builtins:eval",
        "os:system",
        "",
    ],
)
def test_a_name_that_is_no_state_is_refused(kind: str) -> None:
    with pytest.raises(StateError, match="which is no state of a rule"):
        put_together({"kind": kind, "items": []}, {}, {}.__getitem__)


def test_a_missing_tensor_is_named() -> None:
    tree, tensors = take_apart(DSSMG().initial_state(1, 2, ParameterLayout.vector(3)))
    with pytest.raises(StateError, match=r"lacks the tensor '\.alpha_0'"):
        put_together(tree, {name: t for name, t in tensors.items() if name != ".alpha_0"}, {}.__getitem__)


@pytest.mark.parametrize("value", [object(), {1, 2}, nn.functional.relu])
def test_what_cannot_be_saved_is_told(value: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot be saved.*\.0 is of type"):
        take_apart((value,))


@pytest.mark.parametrize(
    "tree",
    [
        [1],
        {},
        {"kind": 1},
        {"kind": "tuple"},
        {"kind": "tuple", "items": {"a": 1}},
        {"kind": "tuple", "items": [{"kind": ["tuple"]}]},
        {"kind": "tensor", "place": [1]},
        {"kind": "module", "place": ".x", "parts": {}},
        {"kind": "dtype", "name": "Tensor"},
        {"kind": "dtype", "name": "load"},
        {"kind": "dtype"},
        {"kind": "device", "name": "nowhere"},
        {"kind": "dict", "keys": ["a"], "items": []},
        {"kind": "dict", "keys": [[1]], "items": [1]},
        {"kind": "ml2o_dist.rules.coordinatewise.rule:ML2OState", "items": [1]},
        {"kind": "ml2o_dist.rules.coordinatewise.rule:BlockState", "items": []},
        {"kind": "ml2o_dist.rules.coordinatewise.rule:RuleSettings", "items": []},
        {"kind": "ml2o_dist.rules..ml2o:ML2OState", "items": []},
        {"kind": "ml2o_dist.rules.\0:x", "items": []},
    ],
)
def test_a_tree_that_is_none_is_one_error(tree: Any) -> None:
    with pytest.raises(StateError) as caught:
        put_together(tree, {}, {}.__getitem__)
    assert len(str(caught.value).splitlines()) == 1


def test_a_state_of_other_shapes_than_the_rule_has_is_refused() -> None:
    rule = DSSMG()
    fresh = rule.initial_state(1, 2, ParameterLayout.vector(3))
    check_alike(rule.initial_state(1, 2, ParameterLayout.vector(3)), fresh)
    for other in (rule.initial_state(1, 3, ParameterLayout.vector(3)), 1, "a", (fresh,), {"a": fresh}):
        with pytest.raises(StateError, match="has at"):
            check_alike(other, fresh)
