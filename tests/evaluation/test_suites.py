"""Suites by name and by file: what they hold, and that results on one can be told from results on another."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from ml2o_dist.config import GRID, split_steps
from ml2o_dist.config_file import load_settings
from ml2o_dist.evaluation.optimizer_names import parse_optimizers
from ml2o_dist.evaluation.suites import comparison_settings, load_suite, suite_names, suite_sha256
from ml2o_dist.problems import ProblemContext
from ml2o_dist.runtime.errors import UserError
from tests.rules.torchjd_objects import SOLVERS

PAPER_GRID = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
JOBS = Path(__file__).parents[2] / "jobs" / "configs"


def lacking(name: str) -> list[str]:
    """Return what a baseline's solver needs and is not installed: the extra `solvers`."""
    return [package for package in SOLVERS.get(name.partition("+")[0], ()) if find_spec(package) is None]


def test_the_suites_of_the_package() -> None:
    assert suite_names() == ["analytic", "paper", "quick", "shift"]
    hashes = set()
    for name in suite_names():
        suite = load_suite(name)
        assert suite.suite == name
        assert suite.about
        assert suite.optimizers == ()
        assert suite.reference in suite.baselines
        assert suite.learning_rates == (PAPER_GRID if name == "paper" else GRID)
        assert len(set(suite.problems)) == len(suite.problems)
        here = tuple(name for name in suite.baselines if not lacking(name))
        parse_optimizers(suite.model_copy(update={"baselines": here}), lambda reference: pytest.fail(reference))
        hashes.add(suite_sha256(suite))
    assert len(hashes) == 4


def test_paper_is_every_data_set_with_every_network() -> None:
    suite = load_suite("paper")
    data = {text.partition("[")[0] for text in suite.problems}
    nets = {dict(split_steps(text)[0].settings)["net"] for text in suite.problems}
    assert (data, nets) == ({"multimnist", "multifashion", "multifashionmnist"}, {"mlp", "cnn", "lenet5", "vgg"})
    assert len(suite.problems) == len(data) * len(nets)
    assert (len(suite.baselines), suite.seeds, suite.steps, suite.tuning_seeds) == (9, 10, 200, 2)


def test_analytic_has_known_fronts() -> None:
    for text in load_suite("analytic").problems:
        problem = split_steps(text)[0].build(ProblemContext())
        assert problem.reference_point is not None or text.startswith("quadratic")
        assert len(problem.pareto_front(10)) >= 2


def test_shift_changes_horizon_width_depth_and_objectives() -> None:
    problems = [split_steps(text) for text in load_suite("shift").problems]
    plain, *others = problems
    assert others[0] == (plain[0], 2000)
    settings = [dict(problem.settings) for problem, _ in others if problem.name == plain[0].name]
    assert {str(each.get("hidden")) for each in settings} >= {"24", "96", "24-24"}
    assert any(problem.build(ProblemContext()).objectives == 3 for problem, _ in others)


def test_quick_is_what_the_embedded_default_ends_with() -> None:
    ending = comparison_settings(load_settings())
    assert ending.suite == "quick"
    assert suite_sha256(ending) == suite_sha256(load_suite("quick"))
    assert ending.data == load_settings().data


def test_other_problems_or_seeds_are_another_evaluation() -> None:
    for overrides in (["family.test=[fonseca]"], ["comparison.seeds=3"], ["comparison.baselines=[mean+adam]"]):
        ending = comparison_settings(load_settings(None, overrides))
        assert ending.suite == ""
        assert suite_sha256(ending) != suite_sha256(load_suite("quick"))
    real = comparison_settings(load_settings(JOBS / "multimnist.yaml"))
    assert real.problems == load_settings(JOBS / "multimnist.yaml").family.test
    assert (real.baselines, real.seeds) == (load_suite("quick").baselines, load_suite("quick").seeds)


def test_where_and_what_is_evaluated_is_no_part_of_the_suite() -> None:
    plain = load_suite("quick")
    words = ("optimizers=[initial]", "resources.num_cpus=2", "tracking.experiment=x", "data.root=/x", "guard.budget=1")
    other = load_suite("quick", words)
    assert other.suite == "quick"
    assert other.optimizers == ("initial",)
    assert suite_sha256(other) == suite_sha256(plain)
    assert load_suite("quick", ("steps=20",)).suite == ""


def test_a_suite_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ML2O_HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("problems: [fonseca]\nbaselines: [mean+adam]\nseeds: 3\n")
    suite = load_suite("mine.yaml")
    assert (suite.suite, suite.problems, suite.seeds) == ("mine", ("fonseca",), 3)
    (tmp_path / "empty.yaml").write_text("problems: [fonseca]\n")
    with pytest.raises(UserError, match=r"empty.yaml'.*baselines"):
        load_suite("empty.yaml")
    (tmp_path / "wrong.yaml").write_text("problems: [fonseca]\nbaselines: [mean+adam]\nseedz: 3\n")
    with pytest.raises(UserError, match=r"'seedz'.*'seed'"):
        load_suite("wrong.yaml")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("quik", ["unknown suite 'quik'", "'quick'", "analytic, paper, quick, shift", "ends in .yaml"]),
        ("nowhere.yaml", ["nowhere.yaml'", "cannot be read"]),
    ],
)
def test_an_unknown_suite_is_one_line(name: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_suite(name)
    for part in parts:
        assert part in str(caught.value)
