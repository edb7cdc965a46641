"""Evaluations in a real sqlite store: what a run is told, and that it is one however often it is logged."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from ml2o_dist.config import EvaluateSettings
from ml2o_dist.evaluation.evaluated import Curve, EvaluatedCell, Evaluation, Front, Row, Standing
from ml2o_dist.evaluation.statistics import Interval
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking.evaluation_runs import Version, log_evaluation, metric_names
from ml2o_dist.tracking.store import connect
from tests.tracking.empty_store import new_store

PROBLEM = "quadratic[n=4]"
ROW = Row(
    optimizer="a", label="a", role="learned", problem=PROBLEM, steps=400, seeds=2, failed=0, diverged=1,
    loss=1.25, loss_standard_error=0.125, seed_losses=(1.0, 1.5), loss_at_evaluations=1.5, loss_at_time=math.inf,
    losses=(0.5, 0.75), test_accuracy=(0.25,), criticality=math.nan, criticality_standard_error=0.0,
    criticality_relative=0.5, acceptance=0.5, evaluations=60.0, ms_per_step=1.5, guard_share=None, conflicting=0.5,
    mean_cosine=-0.1, front=Front(0.5, 0.6, 1, 0.04, -0.08), learning_rate=0.03, tuning={0.03: 1.0}, note="",
    curve=Curve((200, 400), (3.0, 1.0), (0.1, 0.1), (0.25, 0.75)),
)  # fmt: skip
INTERVAL = Interval(0.9, 0.8, 0.95)
STANDING = Standing(
    optimizer="a", role="learned", problems=1, ratio=INTERVAL, to_best=INTERVAL, ratio_at_evaluations=0.91,
    ratio_at_time=math.nan, improvement=Interval(0.75, 0.5, 1.0), mean_rank=1.5, delta_m=-3.0, delta_m_accuracy=None,
    speedup=1.2, log_area=-0.1, diverged=Interval(0.5, 0.1, 0.9),
)  # fmt: skip
CELL = EvaluatedCell(
    optimizer="a", problem=PROBLEM, seed=7, steps=400, losses=(0.5, 0.25), test_accuracy=None, criticality=0.1,
    acceptance=None, evaluations=3, ms_per_step=1.0, diverged=False, learning_rate=None, test_loss=None,
    end_losses=(0.5, 0.25), criticality_relative=0.1, criticality_gap=0.0, guard_share=None, forwards=1, backwards=2,
    conflicting=0.0, mean_cosine=0.0,
)  # fmt: skip
OTHER = replace(ROW, optimizer="b", label="b", loss=2.0)
EVALUATION = Evaluation(
    EvaluateSettings(seeds=2, steps=400, suite="quick"), "quick", "5" * 64, {"digits": "a" * 64}, (CELL,),
    (ROW, OTHER), (STANDING, replace(STANDING, optimizer="b")), (), {},
)  # fmt: skip


def log(uri: str, evaluation: Evaluation = EVALUATION, files: tuple[Path, ...] = (), **changes: object):
    given = {
        "optimizers": ["a", "b"],
        "identities": {"a": "1", "b": "2"},
        "guards": {"b": "dssmg budget=1.0"},
        "versions": {"a": Version("ml2o", 3)},
        "git": "abc",
    }
    return log_evaluation(uri, evaluation, files, **given | changes)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return new_store(tmp_path)


def test_a_run_has_tags_to_sort_by_figures_inputs_and_files(uri: str, tmp_path: Path) -> None:
    files = (tmp_path / "evaluation.md", tmp_path / "curves.png")
    for file in files:
        file.write_text("x")
    runs = log(uri, files=files)
    client = connect(uri)
    run = client.get_run(runs["a"])
    assert run.info.run_name == "ml2o v3 on quick"
    tags = {"model": "ml2o", "model_version": "3", "suite": "quick", "suite_sha256": "5" * 64, "guard": "none",
            "git": "abc", "optimizer": "a", "role": "learned"}  # fmt: skip
    assert tags.items() <= run.data.tags.items()
    assert len(run.data.tags["config_hash"]) == 64
    assert (run.data.params["optimizer"], run.data.params["steps"]) == ("a", "400")
    place = "quadratic-n-4"
    assert run.data.metrics == {
        "ratio": 0.9, "ratio_low": 0.8, "ratio_high": 0.95, "to_best": 0.9, "to_best_low": 0.8, "to_best_high": 0.95,
        "improvement": 0.75, "improvement_low": 0.5, "improvement_high": 1.0, "ratio_at_evaluations": 0.91,
        "mean_rank": 1.5, "delta_m": -3.0, "speedup": 1.2, "log_area": -0.1, "diverged": 0.5,
        f"learning_rate/{place}": 0.03, f"acceptance/{place}": 0.5, f"loss/{place}": 1.25, f"evaluations/{place}": 60.0,
        f"ms_per_step/{place}": 1.5, f"loss_at_evaluations/{place}": 1.5, f"loss_1/{place}": 0.5,
        f"loss_2/{place}": 0.75, f"test_accuracy_1/{place}": 0.25, f"hypervolume/{place}": 0.5,
        f"igd_plus/{place}": 0.04, f"additive_epsilon/{place}": -0.08, f"curve/{place}": 1.0,
        f"acceptance_curve/{place}": 0.75, f"seed_loss/{place}": 0.75,
    }  # fmt: skip
    curve = client.get_metric_history(runs["a"], f"curve/{place}")
    assert [(point.step, point.value) for point in curve] == [(200, 3.0), (400, 1.0)]
    assert client.get_metric_history(runs["a"], f"seed_loss/{place}")[0].step == 7
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("digits", "a" * 36)
    assert {file.path for file in client.list_artifacts(runs["a"])} == {"evaluation.md", "plots"}
    other = client.get_run(runs["b"])
    assert (other.data.tags["guard"], other.info.run_name) == ("dssmg budget=1.0", "b on quick")
    assert "model_version" not in other.data.tags


def test_the_same_evaluation_is_one_run_whoever_else_takes_part(uri: str) -> None:
    first = log(uri)
    assert log(uri) == first
    alone = replace(EVALUATION, rows=(ROW,), standings=(STANDING,))
    assert log(uri, alone, optimizers=["a"]) == {"a": first["a"]}
    for changed in (
        replace(EVALUATION, suite_sha256="6" * 64),
        replace(EVALUATION, data_sha256={"digits": "b" * 64}),
        replace(EVALUATION, rows=(replace(ROW, loss=1.2), OTHER)),
    ):
        assert log(uri, changed, optimizers=["a"])["a"] != first["a"]
    assert log(uri, identities={"a": "3", "b": "2"})["a"] != first["a"]


def test_a_run_that_was_cut_short_is_written_anew(uri: str) -> None:
    first = log(uri)
    client = connect(uri)
    client.update_run(first["a"], status="RUNNING")
    again = log(uri)
    assert again["a"] != first["a"]
    assert again["b"] == first["b"]
    assert client.get_run(first["a"]).info.lifecycle_stage == "deleted"
    assert client.get_run(again["a"]).info.status == "FINISHED"


def test_a_server_that_is_away_is_one_line() -> None:
    with pytest.raises(UserError, match=r"MLflow at http://127.0.0.1:9 does not answer"):
        log("http://127.0.0.1:9")


def test_keys_are_those_that_mlflow_takes_and_differ() -> None:
    from mlflow.utils.validation import _validate_metric_name

    names = ["a[n=1]", "a n=1 ", "a-n-1", "../a/b", "multidigits[net=mlp,hidden=32]@2000", "é", "x" * 300]
    keys = metric_names(names)
    assert list(keys) == names
    assert len(set(keys.values())) == len(names)
    assert keys["multidigits[net=mlp,hidden=32]@2000"] == "multidigits-net-mlp-hidden-32-2000"
    for key in keys.values():
        _validate_metric_name(f"loss/{key}")
        assert len(key) <= 90
