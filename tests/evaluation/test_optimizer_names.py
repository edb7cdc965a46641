"""Optimizers by name: what each name builds, and that a wrong one ends with the nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ml2o_dist.artifact import save_artifact
from ml2o_dist.config import GuardSettings, RuleSettings
from ml2o_dist.config_file import load_evaluation
from ml2o_dist.evaluation.optimizer_names import Entrant, parse_optimizers
from ml2o_dist.rules.adversaries import ADVERSARIES, AdversaryRule
from ml2o_dist.rules.aggregated import AggregatedRule
from ml2o_dist.rules.base import UpdateRule
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, ML2ORule
from ml2o_dist.rules.guarded import GuardedRule
from ml2o_dist.rules.stochastic import DSSMG, SMG
from ml2o_dist.runtime.errors import UserError


def parse(*names: str, overrides: tuple[str, ...] = (), files: dict[str, Path] | None = None) -> list[Entrant]:
    settings = load_evaluation(None, [f"optimizers={list(names)}", *overrides])
    return parse_optimizers(settings, lambda reference: (files or {})[reference])


def rule(entrant: Entrant, lr: float | None = None) -> UpdateRule:
    return entrant.optimizer(lr).rule(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", sorted(ADVERSARIES))
def test_adversaries(name: str) -> None:
    (entrant,) = parse(name)
    made = rule(entrant)
    assert isinstance(made, AdversaryRule)
    assert made.name == name
    assert (entrant.name, entrant.tuned, entrant.learning_rate) == (name, False, None)


def test_stochastic_rules_have_the_decay_of_the_guard() -> None:
    smg, dssmg = (rule(entrant) for entrant in parse("smg", "dssmg", overrides=("guard.p=0.8",)))
    assert type(smg) is SMG
    assert type(dssmg) is DSSMG
    assert (smg.p, dssmg.p) == (0.8, 0.8)


def test_initial_has_the_settings_of_the_rule() -> None:
    made = rule(parse("initial", overrides=("rule.hidden=3",))[0])
    assert isinstance(made, ML2ORule)
    assert made.network.settings.hidden == 3


@pytest.mark.parametrize("name", ["initial", "ascent", "smg", "mgda+sgd@0.1"])
def test_any_of_them_under_the_guard(name: str) -> None:
    entrant, plain = parse(f"gml2o:{name}", name, overrides=("guard.eps=0.5", "guard.p=0.7", "guard.fallback=smg"))
    made = rule(entrant)
    assert isinstance(made, GuardedRule)
    assert made.settings == GuardSettings(eps=0.5, p=0.7, fallback="smg")
    assert type(made.learned) is type(rule(plain))
    assert isinstance(made.fallback, SMG)
    assert made.fallback.p == 0.7
    assert entrant.name == f"gml2o:{name}"


@pytest.mark.parametrize(
    ("name", "aggregator", "optimizer", "lr"),
    [
        ("mgda", "mgda", "adam", None),
        ("pcgrad+momentum", "pcgrad", "momentum", None),
        ("mean+sgd@0.5", "mean", "sgd", 0.5),
        ("gml2o:mean+sgd", "mean", "sgd", None),
    ],
)
def test_hand_designed_ones_are_tuned_where_no_rate_is_written(
    name: str, aggregator: str, optimizer: str, lr: float | None
) -> None:
    (entrant,) = parse(name)
    assert (entrant.tuned, entrant.learning_rate) == (lr is None, lr)
    made = rule(entrant, 0.25 if lr is None else None)
    made = made.learned if isinstance(made, GuardedRule) else made
    assert isinstance(made, AggregatedRule)
    assert (made.aggregator, made.optimizer, made.lr) == (aggregator, optimizer, 0.25 if lr is None else lr)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory `runs/a` and a file `b.safetensors` of the same weights, in a home of their own."""
    monkeypatch.setenv("ML2O_HOME", str(tmp_path))
    settings = RuleSettings(hidden=3, guard=GuardSettings(margin=7.0))
    weights = {name: tensor + 0.5 for name, tensor in ML2ONetwork(settings).state_dict().items()}
    for place in ("runs/a", "b.safetensors", "c"):
        save_artifact(tmp_path / place, weights, settings, {})
    return tmp_path


def test_weights_by_file_folder_or_registry(trained: Path) -> None:
    names = ["runs/a", "b.safetensors", "c", str(trained / "runs/a"), "models:/ml2o@candidate"]
    entrants = parse(*names, files={"models:/ml2o@candidate": trained / "runs/a/weights.safetensors"})
    assert [entrant.name for entrant in entrants] == names
    for entrant in entrants:
        made = rule(entrant)
        assert isinstance(made, GuardedRule), "as it was meta-trained"
        assert made.settings.margin == 7.0
        assert isinstance(made.learned, ML2ORule)
        assert made.learned.network.head.bias[0].item() == 0.5


def test_the_guard_that_is_asked_for_replaces_that_of_the_weights(trained: Path) -> None:
    made = rule(parse("gml2o:runs/a", overrides=("guard.eps=2",))[0])
    assert isinstance(made, GuardedRule)
    assert isinstance(made.learned, ML2ORule)
    assert made.settings.eps == 2.0


def test_names_are_taken_once_and_before_files_of_that_name(trained: Path) -> None:
    (trained / "initial").mkdir()
    assert [entrant.name for entrant in parse("initial", "dssmg", "initial")] == ["initial", "dssmg"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("randon", ["'randon'", "did you mean 'random'?"]),
        ("gml2o:ascnt", ["'gml2o:ascnt'", "did you mean 'gml2o:ascent'?"]),
        ("gmlo2:nan", ["did you mean 'gml2o:nan'?"]),
        ("dsmg", ["did you mean 'dssmg'?", "gml2o:NAME", "models:/NAME@ALIAS", "weights file", "run directory"]),
        ("Initial", ["did you mean 'initial'?"]),
        ("mgad", ["did you mean 'mgda'?"]),
        ("mgdaa+adam@0.01", ["'mgdaa'", "did you mean 'mgda'?"]),
        ("mgda+adm", ["'adm'", "did you mean 'adam'?"]),
        ("mgda@fast", ["learning rate 'fast'", "positive"]),
        ("runs/nothing", ["runs/nothing/weights.safetensors'", "missing"]),
        ("nothing.safetensors", ["nothing.safetensors'", "missing"]),
        ("", ["unknown optimizer ''"]),
        ("gml2o:", ["unknown optimizer 'gml2o:'"]),
        ("gml2o:gml2o:nan", ["unknown optimizer 'gml2o:gml2o:nan'"]),
    ],
)
def test_a_wrong_name_is_one_line_with_the_nearest_valid_one(name: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(name)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
