"""`ml2o models promote` from words to aliases: who passes the gate, who does not, and what is written down."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
from click.testing import CliRunner

from ml2o_dist.artifact import save_artifact
from ml2o_dist.cli import main
from ml2o_dist.config import RuleSettings
from ml2o_dist.evaluation.cells import CellFailure, run_cell
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from ml2o_dist.tracking.champion import champion_of, promote_version
from ml2o_dist.tracking.registry import find_version, register_version
from ml2o_dist.workflows import promote as promotions
from tests.wording import says

SUITE = """
problems: ["quadratic[n=3]", "quadratic[n=5]"]
baselines: [mean+adam]
learning_rates: [0.01]
seeds: 4
steps: 30
criticality_batches: 2
"""


@pytest.fixture
def home(home, fresh_cache):
    (home / "gate.yaml").write_text(SUITE)
    return home


@pytest.fixture
def ran(monkeypatch):
    """The cells that were run: here, in this process, one by one."""
    cells = []

    def here(missing, on_outcome, **options):
        for index, cell in enumerate(missing):
            cells.append(cell)
            on_outcome(index, run_cell(cell))

    monkeypatch.setattr("ml2o_dist.workflows.evaluate.connected", lambda address: nullcontext("nowhere"))
    monkeypatch.setattr("ml2o_dist.workflows.benchmark_run.run_outcomes_on_ray", here)
    monkeypatch.setattr("ml2o_dist.workflows.evaluate.plot_evaluation", lambda *words: [])  # nobody looks at them
    return cells


def uri(home) -> str:
    return f"sqlite:///{home}/mlflow.db"


def register(home, lr: float) -> int:
    """A version that is Adam on the sum at this learning rate."""
    rule = RuleSettings(hidden=3, lr=lr)
    saved = save_artifact(home / f"lr{lr}", ML2ONetwork(rule).state_dict(), rule, {"meta_steps": 0})
    return register_version(uri(home), "ml2o", saved.path, description="Adam, really")


def promote(*words: str):
    return CliRunner().invoke(main, ["models", "promote", *words, "--suite", "gate.yaml", "--json"])


def test_better_ones_are_promoted_worse_ones_refused_and_a_rollback_restores(home, ran):
    slow, good, worse, best = (register(home, lr) for lr in (0.001, 0.05, 0.02, 0.2))
    refused = promote(f"ml2o/{slow}")
    assert refused.exit_code == 5, refused.output
    line = refused.stderr.splitlines()[-1]
    assert says(line, "ml2o: ml2o/1 is worse", "mean+adam: 1.")
    assert says(line, "mean+adam's loss", "gate", "2 problems", "4 paired seeds")
    assert refused.stdout == ""
    assert champion_of(uri(home), "ml2o") is None

    first = promote(f"models:/ml2o/{good}")
    assert first.exit_code == 0, first.output
    answer = json.loads(first.stdout)
    assert (answer["champion"], answer["previous"], answer["forced"]) == (good, None, False)
    assert answer["ratio"][2] < 1

    refused = promote(f"ml2o/{worse}")
    assert refused.exit_code == 5
    assert refused.stderr.splitlines()[-1].startswith(f"ml2o: ml2o/{worse} is worse than ml2o/{good}: ")
    assert champion_of(uri(home), "ml2o") == good

    ran.clear()
    forced = promote(f"ml2o/{worse}", "--force")
    assert forced.exit_code == 0, forced.output
    assert ran == [], "every cell was found"
    assert json.loads(forced.stdout)["forced"] is True
    tags = find_version(uri(home), "models:/ml2o@champion")["tags"]
    assert tags["forced"].startswith(f"ml2o/{worse} is worse than ml2o/{good}")
    assert tags["promoted_over"] == str(good)

    back = CliRunner().invoke(main, ["models", "rollback", "--json"])
    assert json.loads(back.stdout) == {"name": "ml2o", "champion": good, "previous": worse}

    newest = promote()
    assert newest.exit_code == 0, newest.output
    assert json.loads(newest.stdout)["champion"] == best, "without a name: the candidate"
    champion = find_version(uri(home), "models:/ml2o@champion")
    assert (champion["version"], champion["tags"]["promoted_over"]) == (best, str(good))
    assert champion["tags"]["promotion"].startswith(f"ml2o/{best} is better than ml2o/{good}: 0.")
    assert champion["description"].splitlines()[0] == "Adam, really"
    assert "gate: " in champion["description"]
    assert "of tuned mean+adam's loss" in champion["description"]
    assert find_version(uri(home), "models:/ml2o@previous")["version"] == good

    again = promote()
    assert again.exit_code == 2
    assert says(again.stderr, f"ml2o/{best}", "champion already")


@pytest.mark.long
def test_a_champion_that_changed_meanwhile_is_compared_with_anew(home, ran, monkeypatch):
    first, second, third = (register(home, lr) for lr in (0.02, 0.05, 0.2))
    promote_version(uri(home), "ml2o", first, expected=None, note="by hand")
    real, calls = promotions.promote_version, []

    def late(*words, **options):
        calls.append(options["expected"])
        if len(calls) == 1:
            promote_version(uri(home), "ml2o", second, expected=first, note="quicker")
        return real(*words, **options)

    monkeypatch.setattr(promotions, "promote_version", late)
    result = promote(f"ml2o/{third}")
    assert result.exit_code == 0, result.output
    assert calls == [first, second]
    answer = json.loads(result.stdout)
    assert (answer["champion"], answer["previous"]) == (third, second)
    assert f"than ml2o/{second}" in answer["reason"]
    assert "compared again" in result.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["ml2o/9"], "version ... 'ml2o' ... '9'"),
        (["ml2o@champion"], "alias ... 'ml2o' ... 'champion'"),
        (["--name", "m12o"], "'m12o' ... 'ml2o'"),
        (["--set", "seedz=3"], "unknown setting 'seedz'"),
    ],
)
def test_wrong_words_are_one_line(home, ran, words, line):
    register(home, 0.01)
    result = promote(*words)
    assert result.exit_code == 2, result.output
    assert says(result.stderr.splitlines()[-1], line)
    assert ran == []


def test_a_cell_that_fails_promotes_nobody(home, ran, monkeypatch):
    def failing(cells, on_outcome, **options):
        for index in range(len(cells)):
            on_outcome(index, CellFailure(RuntimeError("out of memory")))

    monkeypatch.setattr("ml2o_dist.workflows.benchmark_run.run_outcomes_on_ray", failing)
    number = register(home, 0.05)
    result = promote()
    assert result.exit_code == 3, result.output
    assert f"ml2o/{number} is not promoted: " in result.stderr.splitlines()[-1]
    assert "out of memory" in result.stderr
    assert champion_of(uri(home), "ml2o") is None
