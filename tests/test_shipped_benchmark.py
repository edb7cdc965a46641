"""benchmarks/shipped.py: what its long part is made of, and its tables, by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from ml2o_dist.artifact import save_artifact
from ml2o_dist.config import RuleSettings
from ml2o_dist.evaluation.suites import load_suite
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork

RATIOS = {
    "mean+adam": 1.0,
    "mgda+adam": 0.9,
    "pcgrad+adam": 0.95,
    "nashmtl+adam": 1.2,
    "dssmg": 2.0,
    "upgrad+adam": 0.97,
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import shipped

    yield shipped
    sys.modules.pop("shipped")


def row(optimizer, role, losses, rate=None, accuracy=(0.5, 0.7)):
    return {
        "optimizer": optimizer,
        "label": f"{optimizer}@{rate}",
        "role": role,
        "problem": "p[net=mlp]",
        "loss": None if None in losses else sum(losses) / len(losses),
        "seed_losses": list(losses),
        "learning_rate": rate,
        "test_accuracy": list(accuracy),
        "ms_per_step": 2.0,
    }


def answer(ours):
    rows = [row(name, "baseline", [ratio, 3 * ratio], 0.003) for name, ratio in RATIOS.items()]
    rows += [row(ours, "learned", [0.7, 2.3], accuracy=(0.6, 0.7)), row(f"gml2o:{ours}", "learned", [2.0, None])]
    standing = {name: {"estimate": 0.5, "low": 0.4, "high": 0.6} for name in ("to_best", "diverged")}
    standing |= {"speedup": 1.5, "ratio_at_time": 1.0, "ratio_at_evaluations": None}
    ratios = [(name, "baseline", ratio) for name, ratio in RATIOS.items()] + [(ours, "learned", 0.8)]
    standings = [
        standing | {"optimizer": name, "role": role, "ratio": {"estimate": ratio, "low": ratio, "high": ratio}}
        for name, role, ratio in ratios
    ]
    return {"summary": {"rows": rows, "standings": standings}}


def test_the_long_part_has_the_strongest_baselines_and_rates_round_the_best(script, tmp_path):
    chosen = yaml.safe_load(script.long_evaluation(answer("w"), tmp_path).read_text())
    assert chosen["baselines"] == ["mean+adam", "mgda+adam", "pcgrad+adam", "upgrad+adam"]
    assert chosen["learning_rates"] == [0.0003, 0.001, 0.003, 0.01]
    assert (chosen["seeds"], chosen["steps"], chosen["problems"]) == (5, 1000, list(load_suite("paper").problems))


def test_the_tables_are_of_paired_differences_to_the_best_baseline(script, tmp_path, monkeypatch):
    weights = str(save_artifact(tmp_path / "run", ML2ONetwork(RuleSettings()).state_dict(), RuleSettings(), {}).path)
    asked = []
    monkeypatch.setattr(script, "evaluate", lambda source, *more: (asked.append((source, more)), answer(weights))[1])
    result = CliRunner().invoke(script.main, ["--weights", weights, "--parts", "paper", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    ((source, (optimizers, settings, _)),) = asked
    assert (source, optimizers) == (["--suite", "paper"], [weights, f"gml2o:{weights}", "initial"])
    assert {"rule.features=adam", "rule.hidden=16"} <= set(settings)
    lines = result.output.splitlines()
    ours, guarded = (line for line in lines if line.startswith("| `p[net=mlp]`"))
    # 0.7 - 0.9 and 2.3 - 2.7: mean -0.3, standard error 0.1; accuracies 0.65 against 0.6
    assert "| mgda+adam@0.003 | 1.800 | 1.500 | 0.833 | -0.300 ± 0.100 | 2 of 2 | +5.0 | 1.0 x |" in ours
    assert "| 1.800 | inf | inf |" in guarded
    assert f"{weights}: lower on 1 of 1, by more than 2 standard errors on 1; accuracy +5.00 points" in lines
    assert f"gml2o:{weights}: lower on 0 of 1, by more than 2 standard errors on 0; accuracy +0.00 points" in lines
    assert "--parts" in CliRunner().invoke(script.main, ["--weights", weights, "--parts", "papre"]).output
