"""A learned rule from outside the package, through all that the package does with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ml2o_dist import (
    GML2O,
    ML2O,
    LearnedRuleSettings,
    ProblemContext,
    ProblemSpec,
    UserError,
    learned_rule,
    load_artifact,
    register_rule,
    save_artifact,
)
from ml2o_dist.artifact import weights_sha256
from ml2o_dist.config import RULE_SETTINGS, EstimatorSettings, GuardSettings
from ml2o_dist.config_file import parse_settings
from ml2o_dist.evaluation.cells import Cell, run_cell
from ml2o_dist.evaluation.optimizer_specs import Learned
from ml2o_dist.metatrain.episode import EpisodeSpec, replay_episode, replayed, roll_out_episode, run_episode
from ml2o_dist.metatrain.estimators.base import Episode
from ml2o_dist.metatrain.estimators.exact import exact
from ml2o_dist.metatrain.estimators.replay import estimate as replay_estimate
from ml2o_dist.metatrain.meta_loss import episode_loss, step_weights
from ml2o_dist.metatrain.rollout_record import read_rollout, rollout_batch
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.problems.base import autograd_jacobian
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.learned import LearnedRule, initial_weights
from tests.metatrain.executing import Cut, cut_after, digests, in_process, later
from tests.metatrain.settings import TREE
from tests.torch_optim.small import TwoTasks, drawn, flat, jacobian, losses

pytestmark = pytest.mark.usefixtures("examples")
DOUBLE = torch.float64
PROBLEMS = ["quadratic[m=3,n=5,noise=0.3,batch=4]", "multidigits[hidden=3,size=6,batch=4,activation=tanh]"]


def settings(**changes: Any) -> Any:
    return RULE_SETTINGS["by-kind"].model_validate({"kind": "by-kind", **changes})


def rule_and_problem(text: str, instances: int = 2) -> tuple[LearnedRule, Any]:
    problem = ProblemSpec.parse(text).build(ProblemContext(instances, 3, dtype=DOUBLE))
    return learned_rule(settings(lr=0.05), None, dtype=DOUBLE), problem


def whole_episode(rule: LearnedRule, problem: Any, start: Tensor, batches: list[Any], second_order: bool) -> Tensor:
    """L of an episode by a plain loop under autograd; first order: the gradients are taken as constants."""
    point, state, seen = start, rule.initial_state(len(start), problem.objectives, problem.layout), []
    for batch in batches[:-1]:
        gradients, values = autograd_jacobian(problem.losses, point, batch, create_graph=True)
        seen.append(values)
        if not second_order:
            gradients, values = gradients.detach(), values.detach()
        update, state = rule.advance(gradients, values, state)
        point = point + update
    seen.append(problem.losses(point, batches[-1]))
    kind = "log_sum" if problem.positive else "normalised"
    return episode_loss(kind, step_weights("linear", len(batches) - 1, start), torch.stack(seen), problem.minima)


def drawn_batches(problem: Any, count: int) -> list[Any]:
    source = torch.Generator().manual_seed(0)
    return [problem.sample_batch(source) for _ in range(count)]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    scale = max(tensor.abs().max() for tensor in expected.values())
    assert scale > 0
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("text", PROBLEMS)
@pytest.mark.parametrize("steps", [400, 1, 3])
def test_exact_is_autograd_through_the_episode(text: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml2o_dist.metatrain.estimators.exact.STEPS", steps)
    rule, problem = rule_and_problem(text)
    start, batches = problem.initial_parameters([1, 2]).requires_grad_(True), drawn_batches(problem, 8)
    loss = whole_episode(rule, problem, start, batches, second_order=True)
    theta = rule.meta_parameters
    expected = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
    found, gradient, _ = exact(rule, problem, start.detach(), batches, EstimatorSettings(kind="exact"))
    assert found.item() == pytest.approx(loss.item(), rel=1e-12)
    assert_close(gradient, dict(zip(theta, expected, strict=True)))


def first_order(rule: LearnedRule, problem: Any, start: Tensor, batches: list[Any]) -> dict[str, Tensor]:
    theta = rule.meta_parameters
    loss = whole_episode(rule, problem, start.requires_grad_(True), batches, second_order=False)
    found = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
    return dict(zip(theta, found, strict=True))


def episode_of(rule: LearnedRule, problem: Any, estimator: EstimatorSettings, horizon: int, unroll: int = 0) -> Episode:
    start = problem.initial_parameters([1, 2])
    return Episode(rule, None, problem, start, horizon, estimator, unroll, seed=0)


@pytest.mark.parametrize("text", PROBLEMS)
def test_replay_is_first_order_back_propagation(text: str) -> None:
    rule, problem = rule_and_problem(text)
    episode = episode_of(rule, problem, EstimatorSettings(gamma=1.0), 7)
    oracle = episode.oracle()
    batches = [oracle.draw() for _ in range(8)]
    found = replay_estimate(episode)
    assert_close(found.gradient, first_order(rule, problem, episode.start.clone(), batches))
    assert found.losses.shape == (8, 2, problem.objectives)


def test_chunks_carry_the_state_and_cut_the_graph() -> None:
    rule, problem = rule_and_problem(PROBLEMS[0])
    whole = replay_estimate(episode_of(rule, problem, EstimatorSettings(), 6))
    for unroll in (6, 7):
        same = replay_estimate(episode_of(rule, problem, EstimatorSettings(), 6, unroll))
        assert_close(same.gradient, whole.gradient)
    cut = replay_estimate(episode_of(rule, problem, EstimatorSettings(), 6, 2))
    assert (cut.gradient["decay"] - whole.gradient["decay"]).abs() > 1e-6
    assert_close({"size": cut.gradient["size"]}, {"size": whole.gradient["size"]})  # goes through no state


def test_a_rejected_step_is_not_the_rules() -> None:
    """Under a guard that always rejects, nothing depends on the meta-parameters."""
    spec = spec_of(
        "replay", guard=GuardSettings(budget=0, eps=0, margin=1000.0), problem="quadratic[noise=1.0,batch=4]"
    )
    result, replayable = roll_out_episode(initial_weights(spec.rule), spec)
    assert replayable is not None
    assert replayable.rollout.accepted.sum() == 0
    done = replayed(result, *replay_episode(initial_weights(spec.rule), spec, replayable))
    assert done.gradient is not None
    assert not done.gradient.any()


def spec_of(
    kind: str, guard: GuardSettings | None = None, problem: str = "multidigits[hidden=4,batch=8]"
) -> EpisodeSpec:
    return EpisodeSpec(ProblemSpec.parse(problem), 5, 6, 2, settings(guard=guard), EstimatorSettings(kind=kind))


@pytest.mark.parametrize("kind", ["replay", "exact", "es", "forward-difference"])
def test_every_estimator_gives_a_finite_gradient_by_name(kind: str) -> None:
    spec = spec_of(kind)
    result = run_episode(initial_weights(spec.rule), spec)
    assert result.finite
    assert result.gradient is not None
    assert result.gradient.shape == (7,)  # 5 sizes, decay and progress
    again = run_episode(initial_weights(spec.rule), spec)
    assert np.array_equal(result.gradient, again.gradient)
    if kind in ("replay", "exact"):
        assert result.gradient.any()


def test_a_rollout_travels_with_the_rules_own_record_and_the_layout() -> None:
    spec = spec_of("replay", guard=GuardSettings(budget=1.0))
    weights = initial_weights(spec.rule)
    whole = run_episode(weights, spec)
    half, replayable = roll_out_episode(weights, spec)
    sent = read_rollout(rollout_batch(replayable), "cpu")
    assert sent.rollout.layout == replayable.rollout.layout
    assert sent.rollout.record.keys() == {"update"}
    both = replayed(half, *replay_episode(weights, spec, sent))
    assert np.array_equal(both.gradient, whole.gradient)


def test_some_parameters_alone_cannot_be_replayed() -> None:
    with pytest.raises(UserError, match=r"estimator.coordinates=0.5 .*rule.kind=by-kind cannot"):
        small_of(estimator={"coordinates": 0.5})


def small_of(**changes: Any) -> Any:
    """The small settings of meta-training with this rule in the place of the package's."""
    tree = {**TREE, "rule": {"kind": "by-kind", "lr": 0.05}, "meta_steps": 6}
    return parse_settings({**tree, **changes})


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_meta_training_that_was_cut_goes_on_to_the_same_weights(tmp_path: Path, staleness: int) -> None:
    run = small_of(staleness=staleness, checkpoint_every=1)
    straight = Trainer(run, tmp_path / "straight")
    straight.run(later(in_process))
    broken = Trainer(run, tmp_path / "broken")
    with pytest.raises(Cut):
        broken.run(later(cut_after(3)))
    resumed = Trainer(run, tmp_path / "broken")
    assert resumed.resume() == []
    resumed.run(later(in_process))
    assert digests(resumed) == digests(straight)
    assert weights_sha256(straight.learner.weights) != weights_sha256(initial_weights(run.rule))


def test_an_artifact_is_loaded_and_one_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    weights = {name: tensor + 0.5 for name, tensor in initial_weights(settings()).items()}
    save_artifact(tmp_path / "a", weights, settings(lr=0.1), {})
    found = load_artifact(tmp_path / "a")
    assert found.rule == settings(lr=0.1)
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in weights.items())
    with pytest.raises(UserError, match=r"size has shape \[4\], not \[5\]"):
        save_artifact(tmp_path / "b", {**weights, "size": torch.zeros(4)}, settings(), {})


def test_it_is_evaluated_also_under_a_guard() -> None:
    problem = ProblemSpec.parse("two-moons")
    for guard in (None, GuardSettings(budget=1.0)):
        entrant = Learned("by-kind", settings(guard=guard), initial_weights(settings()))
        result = run_cell(Cell(entrant, problem, (0, 1), "report", 30))
        assert result.losses[-5:].sum() < 0.8 * result.losses[:5].sum()
        assert (result.guard is not None) == (guard is not None)


def test_as_an_optimizer_of_torch_it_takes_the_rules_steps_and_goes_on_from_a_state_dict(tmp_path: Path) -> None:
    place = tmp_path / "a"
    save_artifact(place, initial_weights(settings()), settings(), {})
    model, twin = TwoTasks(), TwoTasks()
    optimizer, rule = ML2O(model.named_parameters(), place), learned_rule(settings())
    state: Any = None
    for step in range(8):
        batch = drawn(step)
        if state is None:
            layout = ParameterLayout.of((name, p.shape) for name, p in twin.named_parameters())
            state = rule.initial_state(1, 2, layout)
        values = torch.stack([loss.detach() for loss in losses(twin, batch)])[None]
        update, state = rule.update(jacobian(twin, batch), state, values)
        nn.utils.vector_to_parameters((flat(twin) + update)[0], twin.parameters())
        optimizer.step(lambda batch=batch: losses(model, batch))
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-6, atol=1e-7)
        if step == 3:
            saved = optimizer.state_dict()
            optimizer = ML2O(model.named_parameters(), place)
            optimizer.load_state_dict(saved)


def test_a_plug_ins_optimizer_serves_as_the_fallback_of_a_guard_and_its_state_is_saved() -> None:
    """The guard refuses every step of the adversary's kind, so that all steps are the fallback's, torch's NAdam."""
    guard = GuardSettings(fallback="mean+nadam@0.01", budget=0, eps=0, margin=1000.0)
    model, plain = TwoTasks(), TwoTasks()
    optimizer = GML2O(model.parameters(), "initial", guard=guard)
    nadam = torch.optim.NAdam(plain.parameters(), lr=0.01)
    for step in range(6):
        batch = drawn(step)
        if step == 3:
            saved = optimizer.state_dict()
            optimizer = GML2O(model.parameters(), "initial", guard=guard)
            optimizer.load_state_dict(saved)
        optimizer.step(lambda batch=batch: losses(model, batch))
        nadam.zero_grad()
        (sum(losses(plain, batch)) / 2).backward()
        nadam.step()
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-4, atol=1e-5)


def test_parameters_that_come_later_begin_then(tmp_path: Path) -> None:
    save_artifact(tmp_path / "a", initial_weights(settings()), settings(), {})
    model, extra = TwoTasks(), nn.Parameter(torch.ones(3, 2))
    optimizer = ML2O(model.parameters(), tmp_path / "a")
    optimizer.step(lambda: losses(model, drawn(0)))
    optimizer.add_param_group({"params": [extra]})
    optimizer.step(lambda: [*losses(model, drawn(1))[:1], losses(model, drawn(1))[1] + extra.square().sum()])
    assert (extra != 1).all()


def test_settings_without_a_kind_cannot_be_registered() -> None:
    class Nameless(LearnedRuleSettings):
        pass

    with pytest.raises(UserError, match="Nameless needs a line"):
        register_rule(Nameless)(LearnedRule)
