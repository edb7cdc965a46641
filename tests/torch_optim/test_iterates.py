"""What the optimizers do to a model is what the rules do to a vector."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ml2o_dist import GML2O, ML2O, ML2ORule, Oracle, Problem, load_artifact
from ml2o_dist.config import GuardSettings, RuleSettings
from ml2o_dist.problems.base import Batch
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.guarded import guarded
from tests.crossed import crossed
from tests.torch_optim.small import TwoTasks, drawn, flat, jacobian, losses, weights_file

OUTPUTS = {
    "residual": {"output": "residual"},
    "controlled": {"output": "controlled", "features": "alignment"},
    "scaled": {"output": "scaled", "features": "log_sign", "objectives": "per_objective", "count": 2},
}


class OnVectors(Problem):
    """The same network as a `Problem`: the second batch of a step is all that is drawn after the first."""

    def __init__(self, model: nn.Module, decay: float = 0.0) -> None:
        self.model, self.decay = copy.deepcopy(model), decay
        self.instances, self.objectives, self.dimension = 1, 2, flat(model).shape[1]
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.coming: list[Batch] = []

    def initial_parameters(self, seeds: object) -> Tensor:
        return flat(self.model)

    def sample_batch(self, generator: torch.Generator) -> Batch:
        return self.coming.pop(0) if len(self.coming) > 1 else self.coming[0]

    def sample_losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        shapes = [parameter.shape for parameter in self.model.parameters()]
        parts = torch.split(parameters[0], [shape.numel() for shape in shapes])
        names = [name for name, _ in self.model.named_parameters()]
        state = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

        class Call(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, x: Tensor) -> list[Tensor]:
                answer: list[Tensor] = functional_call(self.model, state, (x,))
                return answer

        found = torch.stack(losses(Call(self.model), batch, "none"), dim=1)
        squares = {name: part.square().sum() for name, part in zip(names, parts, strict=True)}
        trunk = sum(square for name, square in squares.items() if name.startswith("trunk"))
        heads = [sum(squares[f"heads.{i}.{kind}"] for kind in ("weight", "bias")) for i in range(2)]
        penalties = [self.decay * (trunk / 4 + head / 2) for head in heads]  # each head counts for its own loss alone
        return (found + torch.stack(penalties)).unsqueeze(0)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_ml2o_moves_a_model_as_the_rule_moves_a_vector(kind: str, tmp_path: Path) -> None:
    place = weights_file(tmp_path, **OUTPUTS[kind])
    artifact = load_artifact(place)
    model = TwoTasks()
    optimizer = ML2O(model.parameters(), place)
    rule = ML2ORule.from_weights(artifact.rule, artifact.weights)
    state, expected = rule.initial_state(1, 2, ParameterLayout.vector(flat(model).shape[1])), flat(model)
    twin = TwoTasks()
    for step in range(12):
        batch = drawn(step)
        nn.utils.vector_to_parameters(expected[0], twin.parameters())
        update, state = rule.update(jacobian(twin, batch), state)
        expected = expected + update
        seen = optimizer.step(lambda batch=batch: losses(model, batch))
        assert seen.shape == (2,)
        torch.testing.assert_close(flat(model), expected, rtol=1e-5, atol=1e-6)
    assert optimizer.steps == 12
    assert (flat(model) - flat(TwoTasks())).abs().max() > 1e-3


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_untrained_it_is_adam_on_the_sum(decay: float) -> None:
    model, twin = TwoTasks(), TwoTasks()
    optimizer = ML2O(model.parameters(), "initial", weight_decay=decay)
    adam = torch.optim.Adam(twin.parameters(), lr=0.01, weight_decay=decay)
    for step in range(20):
        batch = drawn(step)
        optimizer.step(lambda batch=batch: losses(model, batch))
        adam.zero_grad()
        sum(losses(twin, batch)).backward()
        adam.step()
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-4, atol=1e-5)


@crossed(
    "settings, decay",
    [{"margin": 0.0, "budget": 0.0}, {}, {"every": 3}, {"fallback": "mgda+adam@0.02", "budget": 0.0}],
    [0.0, 0.05],
)
def test_gml2o_moves_a_model_as_the_guarded_rule_does(settings: dict, decay: float) -> None:
    guard = GuardSettings.model_validate(settings)
    model = TwoTasks()
    optimizer = GML2O(model.parameters(), "initial", guard=guard, weight_decay=decay)
    problem = OnVectors(model, decay)
    rule = guarded(ML2ORule.from_weights(RuleSettings(), None), guard)
    parameters, state, accepted = flat(model), rule.initial_state(1, 2, problem.layout), 0
    for step in range(15):
        batch, other = drawn(step), drawn(f"guard {step}", 24)
        problem.coming = [batch, other]
        parameters, state, info = rule.step(Oracle(problem, torch.Generator()), parameters, state)
        accepted += int(info.accepted)
        optimizer.step(
            lambda batch=batch: losses(model, batch, "none"), lambda other=other: losses(model, other, "none")
        )
        torch.testing.assert_close(flat(model), parameters, rtol=1e-4, atol=1e-5)
        assert optimizer.accepted_steps == accepted
    if "margin" in settings:
        assert 0 < accepted < 15


@pytest.mark.parametrize("guard", [True, False])
def test_with_scalars_or_one_closure_it_compares_on_what_it_gets(guard: bool, tmp_path: Path) -> None:
    model = TwoTasks()
    optimizer = GML2O(model.parameters(), weights_file(tmp_path))
    before = []
    for step in range(6):
        batch = drawn(step)
        other = drawn(f"guard {step}")
        closures: list[Callable[[], list[Tensor]]] = [lambda batch=batch: losses(model, batch)]
        if guard:
            closures.append(lambda other=other: losses(model, other))
        before.append(optimizer.step(*closures))
    assert torch.stack(before).isfinite().all()
    assert 0 <= optimizer.accepted_steps <= optimizer.steps == 6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_in_parts_gives_the_steps_of_the_whole(reduction: str, tmp_path: Path) -> None:
    place = weights_file(tmp_path)
    whole, parts = TwoTasks(), TwoTasks()
    one, other = ML2O(whole.parameters(), place), ML2O(parts.parameters(), place)
    for step in range(5):
        x, *labels = drawn(step)
        one.step(lambda x=x, labels=labels: losses(whole, (x, *labels), reduction))
        cuts = [slice(0, 8), slice(8, 16)] if reduction == "mean" else [slice(0, 3), slice(3, 16)]
        seen = other.step(
            [lambda c=c, x=x, labels=labels: losses(parts, (x[c], *(y[c] for y in labels)), reduction) for c in cuts]
        )
        assert seen.shape == (2,)
        torch.testing.assert_close(flat(parts), flat(whole), rtol=1e-4, atol=1e-5)


def test_a_decay_of_next_to_nothing_changes_next_to_nothing() -> None:
    """A head's gradient of another task's loss is 0, and must not become a feature that is free of scale."""
    ends = []
    for decay in (0.0, 1e-12):
        model = TwoTasks()
        optimizer = ML2O(model.parameters(), weight_decay=decay)
        for step in range(40):
            optimizer.step(lambda model=model, step=step: losses(model, drawn(step, 32)))
        ends.append(flat(model))
    assert (ends[0] - flat(TwoTasks())).abs().max() > 0.1
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-4)


def test_the_losses_that_a_step_returns_are_the_closures() -> None:
    model = TwoTasks()
    optimizer = GML2O(model.parameters(), weight_decay=10.0)
    for step in range(3):
        before = torch.stack(losses(model, drawn(step))).detach()
        seen = optimizer.step(lambda step=step: losses(model, drawn(step), "none"))
        torch.testing.assert_close(seen, before)
