"""The weights in the wheel: found by name without a network, made as their card says, never trained on the suites."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
import torch

from ml2o_dist import GML2O, ML2O
from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.config import EvaluateSettings, split_steps
from ml2o_dist.config_file import load_settings
from ml2o_dist.evaluation.optimizer_names import parse_optimizers
from ml2o_dist.evaluation.optimizer_specs import Guarded, Learned
from ml2o_dist.evaluation.suites import load_suite, suite_sha256
from ml2o_dist.pretrained import SHIPPED, shipped_names
from ml2o_dist.problems import ProblemSpec
from tests.torch_optim.small import Batch, TwoTasks, drawn, flat, losses

ROOT = Path(__file__).parents[1]
NAMES = shipped_names()[1:]

FROZEN = {
    "paper": "7870873da18cf8f50f95cab177525f367f4f4d0a624e6f9356c3cba9dc62b802",
    "shift": "36d244e26e5ddc64f53bb7b240fdba72a98533fddb26247f1a2c1f8a329bfb4b",
}
"""Of the suites that the weights are shown on: what they measure does not change behind the figures in the README."""


MADE_BEFORE = {"ml2o-small": "the controller's memory, no epsilon in the features, no step without a gradient"}
"""Weights whose recipe gives others by now, and why."""


def provenance(name: str) -> dict:
    return load_artifact(name).card["provenance"]


def test_there_are_some_and_they_are_small() -> None:
    assert NAMES
    for name in NAMES:
        assert (SHIPPED / f"{name}.safetensors").stat().st_size < 65_536
    assert load_artifact("pretrained").weights_sha256 == load_artifact("ml2o-small").weights_sha256


def test_they_serve_where_none_are_named_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(socket, "socket", lambda *words, **more: pytest.fail("asked for a socket"))
    monkeypatch.chdir(tmp_path)
    for kind in (ML2O, GML2O):
        ends = []
        for words in ((), ("ml2o-small",)):
            model = TwoTasks()
            optimizer = kind(model.parameters(), *words)
            for step in range(3):
                optimizer.step(lambda model=model, step=step: losses(model, drawn(step), "none"))
            ends.append(flat(model))
        assert torch.equal(*ends)
        assert not torch.equal(ends[0], flat(TwoTasks()))


def of_a_teacher(step: object) -> Batch:
    """A batch whose labels another network of the kind gives."""
    x, *_ = drawn(step, 32)
    with torch.no_grad():
        first, second = (answer.argmax(dim=1) for answer in TwoTasks(seed=9)(3 * x))
    return x, first, second


@pytest.mark.long
def test_guarded_they_train_a_network_that_they_never_saw() -> None:
    model = TwoTasks()
    optimizer = GML2O(model.parameters())
    for step in range(150):
        batch, other = of_a_teacher(step), of_a_teacher(f"guard {step}")
        optimizer.step(
            lambda batch=batch: losses(model, batch, "none"), lambda other=other: losses(model, other, "none")
        )
    unseen = of_a_teacher("unseen")
    assert sum(map(float, losses(model, unseen))) < 0.6 * sum(map(float, losses(TwoTasks(), unseen)))
    assert optimizer.accepted_steps > 100


@pytest.mark.parametrize("name", ["pretrained", *NAMES])
def test_an_evaluation_takes_them_by_name_guarded_and_not(name: str) -> None:
    entrants = parse_optimizers(EvaluateSettings(optimizers=(name, f"gml2o:{name}")), pytest.fail)
    plain, guarded = (entrant.optimizer(None) for entrant in entrants)
    assert isinstance(plain, Learned)
    assert isinstance(guarded, Guarded)
    assert plain.identity["weights_sha256"] == load_artifact(name).weights_sha256
    assert [entrant.role for entrant in entrants] == ["learned", "learned"]


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_how_they_came_about(name: str) -> None:
    card = provenance(name)
    settings = load_settings(ROOT / card["recipe"])
    assert card["training_problems"] == [member.problem for member in settings.family.train]
    assert (card["seed"], card["meta_steps"]) == (settings.seed, settings.meta_steps)
    assert card["cpu_hours"] > 0
    assert card["never_trained_on"]
    assert load_artifact(name).rule == settings.rule


@pytest.mark.parametrize("suite", FROZEN)
def test_the_suites_are_frozen(suite: str) -> None:
    assert suite_sha256(load_suite(suite)) == FROZEN[suite]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_they_are_shown_on_is_in_their_family(name: str) -> None:
    settings = load_settings(ROOT / provenance(name)["recipe"])
    shown = [split_steps(text)[0] for suite in FROZEN for text in load_suite(suite).problems]
    for member in settings.family.training().members:
        choices = {key: {str(value) for value in values} for key, values in member.choices}
        assert choices.get("net", set()) <= {"mlp", "cnn"}
        for problem in shown:
            assert not drawable(problem, member.name, choices), (problem, member)
    assert all(ProblemSpec.parse(text) not in shown for text in settings.family.validation)
    assert not any("multifashionmnist" in str(member) for member in settings.family.train)


def drawable(problem: ProblemSpec, name: str, choices: dict[str, set[str]]) -> bool:
    """Tell whether a member of a family can be this problem's network: batch, activation and start do not matter."""
    if problem.name != name:
        return False
    wanted = {key: str(value) for key, value in problem.settings}
    shape = {"mlp": {"net", "hidden", "tasks"}, "cnn": {"net", "channels", "tasks"}}.get(
        wanted.get("net", ""), set(wanted)
    )
    return all(wanted[key] in choices.get(key, {wanted[key]}) for key in shape & wanted.keys())


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_gives_the_same_first_steps(
    name: str, real_data_root: Path, monkeypatch: pytest.MonkeyPatch, cluster: None
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ship

    card = provenance(name)
    try:
        if ship.cpu() != card["cpu"]:
            pytest.skip(f"the weights were made on {card['cpu']}, this is {ship.cpu()}")
        if name in MADE_BEFORE:
            pytest.skip(f"the rule has changed since the weights were made: {MADE_BEFORE[name]}")
        promised = card["first_steps"]
        found = ship.first_steps(
            ship.recipe_settings(ROOT / card["recipe"], str(real_data_root)), promised["meta_steps"]
        )
        assert found == promised["weights_sha256"]
    finally:
        sys.modules.pop("ship")
