"""Training from checkpoint to checkpoint: killed anywhere and gone on with, it ends where it would have ended."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml2o_dist.config import GuardSettings, RuleSettings
from ml2o_dist.evaluation.optimizer_specs import HandDesigned, Learned, Stochastic
from ml2o_dist.metatrain.checkpoint import load_checkpoint
from ml2o_dist.paretoset.conditioned import Conditioned, Fused, Plain
from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.networks import MultiHead
from ml2o_dist.paretoset.preference_problem import PreferenceProblem
from ml2o_dist.paretoset.scalarization import Scalarization
from ml2o_dist.paretoset.training import Diverged, Trained, annealed, train
from ml2o_dist.rules.base import Oracle, UpdateRule
from ml2o_dist.rules.coordinatewise.features import Alignment
from ml2o_dist.runtime.seeding import generator
from tests.crossed import crossed
from tests.paretoset.small import separate_noise, small_multi_head, start_and_experts

CPU = torch.device("cpu")
STEPS = 9


def learned(**settings: Any) -> Callable[[], UpdateRule]:
    return lambda: Learned("ml2o", RuleSettings(hidden=4, **settings), None).rule(CPU, torch.float32)


RULES: dict[str, Callable[[], UpdateRule]] = {
    "mean+adam": lambda: HandDesigned("mean", "adam", 0.01).rule(CPU, torch.float32),
    "mgda+adam": lambda: HandDesigned("mgda", "adam", 0.01).rule(CPU, torch.float32),
    "famo+adam": lambda: HandDesigned("famo", "adam", 0.01).rule(CPU, torch.float32),
    "dssmg": lambda: Stochastic("dssmg", 0.55).rule(CPU, torch.float32),
    "gml2o": learned(guard=GuardSettings()),
    "controlled": learned(features="alignment", output="controlled"),
}


def normed() -> Conditioned:
    """Return a network whose buffers move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Tanh())
        return Plain(MultiHead(trunk, 5, (3, 3)))


def fused() -> Conditioned:
    network = small_multi_head(2)
    return Fused(Fusion(network, *start_and_experts(network, 2, size=0.8), heads=network.head_names))


MODELS: dict[str, Callable[[], Conditioned]] = {"fused": fused, "normed": normed}


def problem_of(model: str, loss: str = "ls") -> PreferenceProblem:
    return PreferenceProblem(MODELS[model](), separate_noise(2), Scalarization(loss), batch=5, device=CPU)


def trained(problem: PreferenceProblem, rule: UpdateRule, folder: Path, **settings: Any) -> Trained:
    given = {"steps": STEPS, "seed": 3, "fingerprint": {"name": "a"}, "checkpoint_every": 3, "final_lr": 0.1}
    return train(problem, rule, folder=folder, **(given | settings))


def assert_alike(one: PreferenceProblem, first: Trained, other: PreferenceProblem, second: Trained) -> None:
    assert first.steps == second.steps == STEPS
    assert first.failures == second.failures
    assert torch.equal(first.parameters, second.parameters)
    buffers = dict(other.model.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in one.model.named_buffers())


class Killed(Exception):
    pass


@crossed("model, name, stopped", MODELS, RULES, [((4,), (5,)), ((1, STEPS - 1), (1, 6))])
def test_stopped_at_any_step_and_gone_on_with(
    model: str, name: str, stopped: tuple[tuple[int, ...], tuple[int, ...]], tmp_path: Path
) -> None:
    stops, kills = stopped
    calm = problem_of(model)
    expected = trained(calm, RULES[name](), tmp_path / "calm")
    for stop in stops:
        folder = tmp_path / str(stop)
        short = trained(problem_of(model), RULES[name](), folder, on_step=lambda step, z, s, stop=stop: step < stop)
        assert short.steps == stop
        after = problem_of(model)
        assert_alike(after, trained(after, RULES[name](), folder), calm, expected)
    for kill in kills:  # no time for a checkpoint: the last of every third step serves

        def die(step: int, z: Tensor, seconds: float, kill: int = kill) -> bool:
            if step == kill:
                raise Killed
            return True

        folder = tmp_path / f"killed at {kill}"
        with pytest.raises(Killed):
            trained(problem_of(model), RULES[name](), folder, on_step=die)
        after, seen = problem_of(model), []
        assert_alike(
            after,
            trained(after, RULES[name](), folder, on_step=lambda step, z, s, seen=seen: seen.append(step) is None),
            calm,
            expected,
        )
        assert seen == list(range((kill - 1) // 3 * 3 + 1, STEPS + 1))


@pytest.mark.parametrize("loss", ["epo", "hypervolume", "cosmos", "tchebycheff"])
def test_every_loss_goes_on_and_counts_on(loss: str, tmp_path: Path) -> None:
    calm, after = problem_of("fused", loss), problem_of("fused", loss)
    calm.scalarization.failures = 0
    expected = trained(calm, RULES["mean+adam"](), tmp_path / "calm")
    stopped = problem_of("fused", loss)
    trained(stopped, RULES["mean+adam"](), tmp_path / "a", on_step=lambda step, z, s: step < 5)
    assert_alike(after, trained(after, RULES["mean+adam"](), tmp_path / "a"), calm, expected)


def test_failures_are_counted_over_all_starts(tmp_path: Path) -> None:
    problem = problem_of("fused", "epo")
    problem.scalarization.failures = 7
    trained(problem, RULES["mean+adam"](), tmp_path, on_step=lambda step, z, s: step < 5)
    seen = problem.scalarization.failures
    assert trained(problem_of("fused", "epo"), RULES["mean+adam"](), tmp_path).failures >= seen >= 7


def test_without_annealing_it_is_the_rule_step_by_step(tmp_path: Path) -> None:
    problem, rule = problem_of("fused"), RULES["mgda+adam"]()
    z, state = problem.initial_parameters([3]), rule.initial_state(1, 2, problem.layout)
    for step in range(STEPS):
        z, state, _ = rule.step(Oracle(problem, generator("paretoset training", 3, step)), z, state)
    assert torch.equal(trained(problem_of("fused"), rule, tmp_path, final_lr=1.0).parameters, z)


def test_annealing_shortens_the_steps_along_a_cosine(tmp_path: Path) -> None:
    assert annealed(0.1, 0, 101) == 1
    assert annealed(0.1, 50, 101) == pytest.approx(0.55)
    assert annealed(0.1, 25, 101) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert annealed(0.1, 100, 101) == pytest.approx(0.1)
    assert annealed(0.1, 0, 1) == 1
    # torch's Adam with torch's cosine: one objective's worth of Jacobian, the same batches
    problem, rule = problem_of("fused"), RULES["mean+adam"]()
    z = problem.initial_parameters([3])[0].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=0.01)
    for step in range(STEPS):
        batch = problem.sample_batch(generator("paretoset training", 3, step))
        z.grad = problem.jacobian(z.detach()[None], batch)[0].mean(dim=1)[0]
        share = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / (STEPS - 1)))
        optimizer.param_groups[0]["lr"] = 0.01 * share
        optimizer.step()
    torch.testing.assert_close(trained(problem_of("fused"), rule, tmp_path).parameters[0], z.detach())


def test_a_controller_judges_the_steps_that_were_taken(tmp_path: Path) -> None:
    moves: list[Tensor] = []
    before = [problem_of("fused").initial_parameters([3])]

    def note(step: int, z: Tensor, seconds: float) -> bool:
        moves.append(z - before[-1])
        before.append(z)
        return True

    trained(problem_of("fused"), RULES["controlled"](), tmp_path, on_step=note)
    saved = load_checkpoint(tmp_path / f"step_{STEPS:06d}").tensors
    update = saved[f"rule.alignment.{Alignment._fields.index('update')}"]
    directions = (each.flatten() / each.norm() for each in (update, moves[-1]))
    torch.testing.assert_close(*directions)


@pytest.mark.parametrize("other", [{"name": "b"}, {"name": "a", "more": 1}, {}])
def test_another_fingerprint_begins_anew(other: dict[str, Any], tmp_path: Path) -> None:
    trained(problem_of("fused"), RULES["mean+adam"](), tmp_path, checkpoint_every=STEPS)
    seen: list[int] = []
    again = trained(
        problem_of("fused"),
        RULES["mgda+adam"](),
        tmp_path,
        fingerprint=other,
        checkpoint_every=STEPS,
        on_step=lambda step, z, s: seen.append(step) is None,
    )
    assert seen == list(range(1, STEPS + 1))
    expected = trained(problem_of("fused"), RULES["mgda+adam"](), tmp_path / "fresh")
    assert torch.equal(again.parameters, expected.parameters)
    # and its checkpoint is its own, though the other had one of the same step
    newest = load_checkpoint(tmp_path / f"step_{STEPS:06d}")
    assert newest.state["fingerprint"] == other
    assert torch.equal(newest.tensors["parameters"], expected.parameters)


def test_a_fingerprint_is_compared_as_json(tmp_path: Path) -> None:
    trained(problem_of("fused"), RULES["mean+adam"](), tmp_path, fingerprint={"classes": (3, 3)})
    seen: list[int] = []
    trained(
        problem_of("fused"),
        RULES["mean+adam"](),
        tmp_path,
        fingerprint={"classes": [3, 3]},
        on_step=lambda step, z, s: seen.append(step) is None,
    )
    assert not seen  # finished before


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_torn_checkpoint_is_passed_over(file: str, tmp_path: Path) -> None:
    expected = trained(problem_of("normed"), RULES["mgda+adam"](), tmp_path / "calm")
    trained(problem_of("normed"), RULES["mgda+adam"](), tmp_path / "a", on_step=lambda step, z, s: step < 8)
    torn = tmp_path / "a" / "step_000008" / file
    torn.write_bytes(torn.read_bytes()[:-20])
    seen: list[int] = []
    after = trained(
        problem_of("normed"), RULES["mgda+adam"](), tmp_path / "a", on_step=lambda step, z, s: seen.append(step) is None
    )
    assert seen == [7, 8, 9]
    assert torch.equal(after.parameters, expected.parameters)


def test_two_checkpoints_are_kept_and_time_adds_up(tmp_path: Path) -> None:
    first = trained(problem_of("fused"), RULES["mean+adam"](), tmp_path, on_step=lambda step, z, s: step < 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000006", "step_000007"]
    state = json.loads((tmp_path / "step_000007" / "state.json").read_text())
    assert state["seconds"] == pytest.approx(first.seconds)
    assert trained(problem_of("fused"), RULES["mean+adam"](), tmp_path).seconds > first.seconds > 0


def test_what_diverges_is_told_with_its_step(tmp_path: Path) -> None:
    huge = HandDesigned("mean", "sgd", 1e39).rule(CPU, torch.float32)
    with pytest.raises(Diverged, match=r"parameter.*not finite.*step \d of 9"):
        trained(problem_of("normed"), huge, tmp_path)
    assert not list(tmp_path.glob("step_*"))
