"""benchmarks/guard.py at tiny size: its numbers against runs by hand, its tables, going on where it was stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from ml2o_dist.artifact import save_artifact
from ml2o_dist.config import GuardSettings, RuleSettings
from ml2o_dist.evaluation.measured_runs import Course, measured_run
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.adversaries import AdversaryRule
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, ML2ORule
from ml2o_dist.rules.guarded import GuardedRule
from ml2o_dist.rules.stochastic import DSSMG
from tests.tracking.empty_store import new_store
from tests.wording import says

STEPS = 30


@pytest.fixture
def script(monkeypatch):
    """The benchmark's three modules."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import guard
    import guard_parts
    import guard_runs

    yield SimpleNamespace(guard=guard, parts=guard_parts, runs=guard_runs)
    for name in ("guard", "guard_parts", "guard_runs"):
        sys.modules.pop(name)


def call(script, *words):
    result = CliRunner().invoke(script.guard.main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def drift(script, out, *words):
    return call(script, "--parts", "drift", "--steps", STEPS, "--seeds", 2, "--out", out, *words)


@pytest.mark.long
def test_the_drifts_figures_are_those_of_runs_by_hand(script, tmp_path):
    answer = json.loads(drift(script, tmp_path, "--json").stdout)
    runs = answer["drift"]["runs"]
    assert len(runs) == 18
    accepted = []
    for entry in (run for run in runs if "m=2" in run["unit"]["problem"]):
        course = Course.build(ProblemSpec.parse(entry["unit"]["problem"]), (0, 1), torch.float64)
        rule = DSSMG()
        if entry["unit"]["guard"] is not None:
            guard = GuardSettings(**{"budget": 0.0, **dict(entry["unit"]["guard"])})
            rule = GuardedRule(AdversaryRule("drift"), rule, guard)
        oracle, point = course.oracle(), course.start
        state, passed = rule.initial_state(2, 2, ParameterLayout.vector(10)), 0.0
        for _ in range(STEPS):
            point, state, info = rule.step(oracle, point, state)
            passed += info.accepted.double().mean().item() if entry["unit"]["guard"] is not None else 0.0
        assert entry["losses"][-1] == pytest.approx(course.judge.losses(point, None).sum(dim=1).tolist(), rel=1e-12)
        assert entry["evaluations"] == [oracle.forwards, oracle.backwards]
        if entry["unit"]["guard"] is not None:
            assert entry["acceptance"] == pytest.approx(passed / STEPS)
            accepted.append(entry["acceptance"])
    assert len(accepted) == 12
    assert all(low <= high for low, high in zip(accepted[3::4], accepted[::4], strict=True))  # z = 3 and z = 0


@pytest.mark.long
def test_a_second_call_computes_only_what_is_missing(script, tmp_path, monkeypatch):
    first = json.loads(drift(script, tmp_path, "--json").stdout)
    computed, compute = [], script.guard.compute
    monkeypatch.setattr(script.guard, "compute", lambda unit, root: (computed.append(unit), compute(unit, root))[1])
    lost = sorted((tmp_path / "drift").glob("*.json"))[3]
    unit = json.loads(lost.read_text())["unit"]
    lost.unlink()
    again = json.loads(drift(script, tmp_path, "--json").stdout)
    assert [(each.rule, each.problem, each.steps) for each in computed] == [(unit["rule"], unit["problem"], STEPS)]
    assert again["drift"]["summary"] == first["drift"]["summary"]
    drift(script, tmp_path, "--seeds", 1)
    assert len(computed) == 1 + 18


def test_the_networks_are_judged_by_their_ratio_to_dssmg(script, tmp_path, monkeypatch):
    problems = ("multidigits[batch=8,hidden=4,net=mlp]",)
    monkeypatch.setattr(script.parts, "NETWORKS", problems)
    answer = json.loads(
        call(script, "--parts", "networks", "--steps", 3, "--seeds", 2, "--out", tmp_path, "--json").stdout
    )
    runs = {(run["unit"]["rule"], run["unit"]["guard"] is None): run for run in answer["networks"]["runs"]}
    alone = runs["dssmg", True]["losses"][-1]
    ratios = {
        rule: sum(a / b for a, b in zip(run["losses"][-1], alone, strict=True)) / 2
        for (rule, unguarded), run in runs.items()
        if not unguarded
    }
    assert set(ratios) == set(script.parts.RULES)
    table = (tmp_path / "networks.md").read_text()
    for rule, ratio in ratios.items():
        (line,) = [line for line in table.splitlines() if f"| {rule} |" in line]
        assert f"| {ratio:.3f} |" in line
    worst = max(ratio for rule, ratio in ratios.items() if rule != "initial")
    assert answer["networks"]["summary"] == {"worst ratio 0 multidigits": pytest.approx(worst)}


def test_the_step_times_are_medians_of_both_rules(script, monkeypatch):
    units = script.parts.time_units(script.parts.Scale(None, None))
    assert [unit.problem for unit in units] == ["multimnist[batch=64,net=lenet5]", "multimnist[batch=256,net=lenet5]"]
    monkeypatch.setattr(script.runs, "time", fake_time(steps=4))
    course = Course.build(ProblemSpec.parse("multidigits[batch=8,hidden=4,net=mlp]"), (0,))
    unit = script.runs.Unit("time", "", "initial", (), 4, 1, 1)
    times = script.runs.step_times(course, unit)
    assert times["unguarded_ms"] == pytest.approx(2.5e3)  # of 1, 2, 3, 4 s; the first step's 0 s is left out
    assert times["guarded_ms"] == pytest.approx(25e3)
    assert times["ratio"] == pytest.approx(10.0)


def fake_time(steps):
    """A clock in which step k takes k s without a guard, and 10 k s with one."""
    readings = []
    now = 0.0
    for number in range(steps + 1):
        for cost in (number, 10 * number):
            readings += [now, now + cost]
            now += cost
    cpu = iter(readings)
    wall = iter(range(10**6))
    return SimpleNamespace(process_time=lambda: next(cpu), perf_counter=lambda: float(next(wall)))


def test_the_sensitivity_table_has_a_row_for_every_run(script):
    units = script.parts.sensitivity_units(script.parts.Scale(None, None))
    assert len(units) == len(set(units)) == 2 * (1 + 2 * 3 * 3 * 2 + 4 + 6) + 2
    results = script.runs.Results()
    for number, unit in enumerate(units):
        results[unit] = {
            "objectives": [[number, 1.0], [number + 2.0, 1.0]],
            "losses": [[0.0, 0.0], [number + 1.0, number + 3.0]],
            "criticality": [[0.25, 0.75]],
            "acceptance": 0.5,
            "guard_share": 0.125,
        }
    rows = script.parts.sensitivity_table(results).splitlines()[2:]
    assert len(rows) == len(units)
    assert rows[0] == "| initial | - | - | - | - | - | - | 1.000 | 1.000 | 0.500 | - | - |"
    last = max(number for number, unit in enumerate(units) if unit.guard is not None)
    assert rows[-1] == f"| ascent | dssmg | 3 | 5 | 0 | 1 | 128 | {last + 1:.3f} | 1.000 | 0.500 | 50% | 12% |"
    assert rows[-7].startswith("| ascent | dssmg | 1 | 0 | 0 | 1 | 128 |")
    assert rows[-11].startswith("| ascent | mgda+sgd@0.1 | 3 | 0 | 0.01 | 20 | 128 |")
    assert script.parts.sensitivity_summary(results)["loss initial"] == 2.0


def test_curves_are_tabled_and_drawn(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.parts, "CURVES", ("quadratic[m=2,n=3]",))
    monkeypatch.setattr(script.parts, "RULES", ("ascent", "nan"))
    monkeypatch.setattr(script.parts, "PICTURES", ("quadratic",))
    result = call(script, "--parts", "curves", "--steps", 20, "--seeds", 2, "--out", tmp_path)
    assert "| `quadratic[m=2,n=3]` | ascent |" in result.stdout
    assert (tmp_path / "guard-quadratic.png").read_bytes().startswith(b"\x89PNG")
    rows = {line.split(" | ")[1]: line.split(" | ") for line in (tmp_path / "curves.md").read_text().splitlines()[2:]}
    assert rows["nan"][2] == "nan"
    assert float(rows["ascent"][2]) > 2 * float(rows["ascent"][3])
    assert rows["ascent"][3] == rows["ascent"][4]  # always rejected: DSSMG's own run


def test_a_call_is_a_run_in_mlflow_and_a_second_one_the_same(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.parts, "CURVES", ("quadratic[m=2,n=3]",))
    monkeypatch.setattr(script.parts, "RULES", ("ascent",))
    monkeypatch.setattr(script.parts, "PICTURES", ("quadratic",))
    uri = new_store(tmp_path)
    words = ("--parts", "curves", "--steps", 5, "--seeds", 1, "--out", tmp_path / "out", "--tracking-uri", uri)
    for _ in range(2):
        call(script, *words)
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ml2o/evaluate").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["curves/worst ratio 0 quadratic"] == pytest.approx(1.0)
    artifacts = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"answer.json", "curves.md", "guard-quadratic.png"}


def test_an_unknown_part_is_refused(script):
    result = CliRunner().invoke(script.guard.main, ["--parts", "drift,tme"])
    assert result.exit_code == 2
    assert says(result.output, "'tme'", "drift, sensitivity, curves, networks, time")


@pytest.mark.long
def test_a_learned_optimizer_is_measured_guarded_and_not(script, tmp_path, monkeypatch):
    import guard_learned

    rule = RuleSettings(hidden=2, output="controlled", features="alignment")
    save_artifact(tmp_path, ML2ONetwork(rule).state_dict(), rule, {})
    problem = "quadratic[batch=32,m=2,n=4,noise=0.5]"
    plain, scaled = guard_learned.Setting("plain", problem), guard_learned.Setting("x 1000", problem, 1000.0)
    monkeypatch.setattr(guard_learned, "SETTINGS", (plain, scaled, guard_learned.Setting("longer", problem, longer=2)))
    words = [str(tmp_path), "--steps", "12", "--seeds", "3"]
    rows = json.loads(CliRunner().invoke(guard_learned.main, [*words, "--json"]).stdout)["rows"]
    found = {(row["setting"], row["rule"]): row for row in rows}
    assert len(found) == 3 * (2 + len(guard_learned.GUARDS))
    course = Course.build(ProblemSpec.parse(problem), (0, 1, 2))
    for name, alone in (("dssmg", DSSMG()), ("learned", ML2ORule.from_weights(rule, ML2ONetwork(rule).state_dict()))):
        run = measured_run(alone, course, 12, every=12)
        assert found["plain", name]["loss"][0] == pytest.approx(float(run.losses[-1].sum(dim=1).mean()))
        assert found["plain", name]["acceptance"] is None
    assert found["x 1000", "learned"]["loss"][0] == pytest.approx(found["plain", "learned"]["loss"][0], rel=1e-3)
    assert found["longer", "dssmg"]["loss"][0] < found["plain", "dssmg"]["loss"][0]
    budget = found["plain", "guarded, z = 3, budget 1, guard batch 32"]["acceptance"]
    assert budget > found["plain", "guarded, z = 3, guard batch 32"]["acceptance"]
    table = CliRunner().invoke(guard_learned.main, words).stdout.splitlines()
    assert len(table) == 2 + len(rows)
