"""The search space: read from YAML and `--set`, and refused in one line before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ml2o_dist.config_file import dump_settings, load_settings
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.sweeping.space import as_sampled, as_values, load_sweep, sweep_difference, trial_settings
from tests.wording import says

LR = "space={learner.lr: {loguniform: [0.001, 0.1]}}"
FOLDER = Path(__file__).parents[1]


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_sweep(None, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("space", "parts"),
    [
        ("{}", ["'space'", "empty"]),
        ("{learner.rl: {uniform: [0, 1]}}", ["space: ", "'learner.rl'", "did you mean 'learner.lr'?", "learner.ema"]),
        ("{learnr: {lr: {uniform: [0, 1]}}}", ["space: ", "'learnr'", "did you mean 'learner'?"]),
        ("{meta_stps: {randint: [1, 4]}}", ["'meta_stps'", "did you mean 'meta_steps'?"]),
        ("{rule.hidden: {choice: [8, 0]}}", ["space: ", "'rule.hidden'", "greater than or equal to 1", "0"]),
        ("{rule.hidden: {choice: [8, 16.5]}}", ["'rule.hidden'", "integer", "16.5"]),
        ("{rule.output: {choice: [residual, cubic]}}", ["'rule.output'", "'scaled'", "'cubic'"]),
        ("{learner.ema: {uniform: [0, 1]}}", ["'learner.ema'", "less than 1", "1.0"]),
        ("{learner.lr: {uniform: [-1, 1]}}", ["'learner.lr'", "greater than 0", "-1.0"]),
        ("{learner.lr: {uniform: [1, 0.5]}}", ["space.learner.lr", "low < high", "[1, 0.5]"]),
        ("{learner.lr: {uniform: [1, 1]}}", ["space.learner.lr", "low < high"]),
        ("{learner.lr: {loguniform: [0, 1]}}", ["space.learner.lr", "low > 0", "0"]),
        ("{learner.lr: {uniform: [1]}}", ["space.learner.lr.uniform"]),
        ("{learner.lr: {uniform: [0.1, .inf]}}", ["space.learner.lr.uniform", "finite"]),
        ("{learner.lr: {unifrom: [0, 1]}}", ["'space.learner.lr.unifrom'", "did you mean 'space.learner.lr.uniform'?"]),
        ("{learner.lr: {uniform: [0.1, 1], choice: [1]}}", ["space.learner.lr", "exactly one of", "uniform", "choice"]),
        ("{learner.lr: {}}", ["space.learner.lr", "exactly one of"]),
        ("{learner.lr: 0.1}", ["space.learner.lr"]),
        ("{slots: {choice: []}}", ["space.meta_batch_size", "empty"]),
        ("{slots: {choice: [4, 4]}}", ["space.meta_batch_size", "twice"]),
        ("{slots: {uniform: [1.5, 4]}}", ["'meta_batch_size'", "integer", "1.5"]),
        ("{slots: {grid: [1, 2]}}", ["space.meta_batch_size", "grid", "search=grid"]),
        ("{compare: {choice: [true, false]}}", ["space: compare", "no effect"]),
        ("{tracking.model: {choice: [a, b]}}", ["space: tracking.model", "no effect"]),
        ("{validation.horizon: {choice: [10, 20]}}", ["space: validation.horizon", "cannot be compared"]),
        ("{family.validation: {choice: [[fonseca], [zdt1]]}}", ["space: family.validation", "cannot be compared"]),
        ("{family.train: {choice: [[{problem: quadratik}]]}}", ["'quadratik'", "did you mean 'quadratic'?"]),
        ("{seed.x: {choice: [1]}}", ["space.seed.x", "'seed' is a value"]),
        ("{estimator: {choice: [{kind: replay}]}, estimator.gamma: {uniform: [0.5, 1]}}",
         ["estimator.gamma", "part of estimator"]),
    ],
)  # fmt: skip
def test_a_wrong_space_is_named(space, parts):
    message = refused(f"space={space}")
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([], ["a sweep needs a `space`", "jobs/configs/sweep.yaml"]),
        (["spice={}"], ["'spice'", "did you mean 'space'?"]),
        (["seed=1", "workers=2"], ["a sweep needs a `space`", "looks like a meta-training's", "`meta_train`"]),
        ([LR, "serach=grid"], ["'serach'", "did you mean 'search'?"]),
        ([LR, "search=bayes"], ["'search'", "'optuna'", "'bayes'"]),
        ([LR, "trials=0"], ["'trials'", "0"]),
        ([LR, "name=a/b"], ["'name'", "a/b"]),
        ([LR, "scheduler=hyperband"], ["'scheduler'", "'asha'", "'hyperband'"]),
        ([LR, "asha.reducton=2"], ["'asha.reducton'", "did you mean 'asha.reduction'?"]),
        ([LR, "asha.reduction=1"], ["'asha.reduction'", "greater than 1"]),
        ([LR, "search=grid"], ["search=grid", "grid or choice", "space.learner.lr", "loguniform"]),
        (["space={slots: {grid: [1, 2]}}", "search=grid", "trials=3"], ["every combination (2)", "trials=3"]),
        ([LR, "scheduler=pbt", "search=optuna"], ["scheduler=pbt", "random", "optuna"]),
        ([LR, "scheduler=pbt", "trials=1"], ["trials >= 2"]),
        ([LR, "scheduler=pbt", "pbt.quantile=0.7"], ["'pbt.quantile'", "0.5", "0.7"]),
        ([LR, "scheduler=pbt", "pbt.interval=15"], ["pbt.interval=15", "validation.every=10"]),
        ([LR, "scheduler=asha", "asha.grace=50"], ["asha.grace=50", "meta_steps=20"]),
        ([LR, "scheduler=asha", "meta_train.validation.every=20"], ["validation.every=20", "meta_steps=20"]),
        ([LR, "meta_train.rule.hiden=3"], ["'meta_train.rule.hiden'", "did you mean 'meta_train.rule.hidden'?"]),
        ([LR, "meta_train.workers=0"], ["'meta_train.workers'", "0"]),
    ],
)
def test_a_wrong_setting_of_the_sweep_is_named(overrides, parts):
    message = refused(*overrides)
    for part in parts:
        assert part in message, message


def test_the_values_of_a_grid_must_go_together():
    grid = "space={workers: {grid: [1, 2]}, resources.min_workers: {grid: [1, 2]}}"
    message = refused(grid, "search=grid")
    assert "space: workers=1, resources.min_workers=2: " in message


@pytest.mark.parametrize("key", ["rule.hidden", "rule.lr", "staleness", "meta_steps", "seed", "workers"])
def test_pbt_refuses_what_cannot_change_on_the_way(key):
    message = refused(f"space={{{key}: {{choice: [1, 2]}}}}", "scheduler=pbt", "meta_train.meta_steps=40")
    assert says(message, f"space: {key}", "cannot change")
    assert "learner.lr" in message


@pytest.mark.parametrize("key", ["learner.lr", "learner.ema", "estimator.gamma", "estimator.clip"])
def test_pbt_takes_what_may_change(key):
    settings = load_sweep(None, [f"space={{{key}: {{uniform: [0.5, 0.9]}}}}", "scheduler=pbt"])
    assert settings.scheduler == "pbt"


def test_nested_and_dotted_spaces_are_the_same_and_set_replaces_a_key():
    nested = load_sweep(None, ["space={learner: {lr: {uniform: [0.1, 0.2]}, ema: {choice: [0, 0.5]}}}"])
    dotted = load_sweep(None, ["space={learner.lr: {uniform: [0.1, 0.2]}, learner.ema: {choice: [0, 0.5]}}"])
    assert nested == dotted
    replaced = load_sweep(None, [LR, "space.learner.lr={choice: [0.5]}"])
    assert replaced.space["learner.lr"].choice == (0.5,)


def test_the_base_is_the_embedded_default_or_a_file_or_settings_over_one(tmp_path):
    assert load_sweep(None, [LR]).meta_train == load_settings()
    (tmp_path / "base.yaml").write_text((FOLDER / "small_run.yaml").read_text())
    space = "space: {learner.lr: {loguniform: [0.001, 0.1]}}\n"
    for meta_train, lr in (("base.yaml", 0.003), ("{extends: base.yaml, learner: {lr: 0.5}}", 0.5)):
        (tmp_path / "sweep.yaml").write_text(f"{space}meta_train: {meta_train}\n")
        settings = load_sweep(tmp_path / "sweep.yaml", ["meta_train.seed=7"])
        expected = load_settings(tmp_path / "base.yaml", [f"learner.lr={lr}", "seed=7"])
        assert settings.meta_train == expected
    (tmp_path / "sweep.yaml").write_text(f"{space}meta_train: nowhere.yaml\n")
    with pytest.raises(UserError, match=r"nowhere\.yaml'.*cannot be read"):
        load_sweep(tmp_path / "sweep.yaml")


def test_of_a_run_directory_the_settings_of_its_sweep_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("ML2O_HOME", str(tmp_path))
    settings = load_sweep(FOLDER / "small_sweep.yaml", ["trials=7"])
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "sweep.yaml").write_text(dump_settings(settings))
    (tmp_path / "runs" / "a" / "config.yaml").write_text("seed: 5\n")  # its best trial's
    assert load_sweep(Path("runs/a")) == settings


def test_settings_that_were_written_out_are_read_back_equal(tmp_path):
    settings = load_sweep(FOLDER / "small_sweep.yaml", ["space.horizon={choice: [[4], [4, 8]]}", "scheduler=asha"])
    (tmp_path / "sweep.yaml").write_text(dump_settings(settings))
    assert load_sweep(tmp_path / "sweep.yaml") == settings
    assert sweep_difference(settings, load_sweep(tmp_path / "sweep.yaml")) == ""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trials=4", "trials ... 4 ... 3"),
        ("space.rule.hidden={choice: [3]}", "space.rule.hidden.choice ... [3] ... [2, 4]"),
        ("meta_train.learner.ema=0.1", "meta_train.learner.ema ... 0.1 ... 0.9"),
        ("max_concurrent=1", ""),
        ("meta_train.faults.on_error=skip", ""),
        ("tracking.uri=sqlite:///other.db", ""),
    ],
)
def test_the_first_difference_of_two_sweeps_is_named(override, said):
    before = load_sweep(FOLDER / "small_sweep.yaml")
    found = sweep_difference(load_sweep(FOLDER / "small_sweep.yaml", [override]), before)
    assert says(found, said) if said else found == ""


def test_a_trial_has_the_base_with_its_values_and_nothing_else_changed():
    settings = load_sweep(FOLDER / "small_sweep.yaml", ["space.rule.guard.budget={uniform: [0, 1]}"])
    trial = trial_settings(settings, {"learner.lr": 0.02, "rule.hidden": 2, "rule.guard.budget": 0.5})
    expected = load_settings(
        FOLDER / "small_sweep_base.yaml", ["learner.lr=0.02", "rule.hidden=2", "rule.guard.budget=0.5"]
    )
    assert trial == expected
    assert settings.meta_train.rule.guard is None


def test_values_of_every_json_kind_come_back_from_what_was_sampled():
    values = [[4], [4, 8]], ["adam", "log_sign"], [None, {"budget": 1}], [4, 8]
    keys = ["horizon", "rule.features", "rule.guard", "meta_batch_size"]
    texts = [f"space.{key}={{choice: {json.dumps(each)}}}" for key, each in zip(keys, values, strict=True)]
    settings = load_sweep(None, [LR, *texts, "meta_train.estimator.kind=replay"])
    for place in (0, 1):
        chosen = {key: each[place] for key, each in zip(keys, values, strict=True)} | {"learner.lr": 0.01}
        sampled = {key: as_sampled(settings.space[key], value) for key, value in chosen.items()}
        assert all(isinstance(value, str | float) for value in sampled.values())
        assert as_values(settings, sampled) == chosen


def test_the_example_is_read(tmp_path):
    example = FOLDER.parent / "jobs" / "configs" / "sweep.yaml"
    settings = load_sweep(example)
    assert settings.count > 1
    assert yaml.safe_load(example.read_text())["space"]
