"""Settings: what is wrong is said in one line that names key, value, what is allowed and the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ml2o_dist.config import RuleSettings
from ml2o_dist.config_file import (
    DEFAULT_CONFIG,
    changed_settings,
    dump_settings,
    first_difference,
    flat_settings,
    load_evaluation,
    load_settings,
    parse_settings,
    settings_hash,
)
from ml2o_dist.runtime.errors import UserError
from tests.wording import says

FOLDER = Path(__file__).parents[1] / "jobs" / "configs"
CONFIGS = sorted(file for file in FOLDER.glob("*.yaml") if file.stem != "sweep" and "pareto" not in file.stem)


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_settings(None, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("meta_stps=5", ["'meta_stps'", "did you mean 'meta_steps'?", "allowed:", "horizon"]),
        ("rule.ouput=scaled", ["'rule.ouput'", "did you mean 'rule.output'?", "rule.hidden"]),
        ("rule.output=cubic", ["'rule.output'", "'cubic'", "'residual'", "'scaled'"]),
        ("workers=0", ["'workers'", "greater than or equal to 1", "0"]),
        ("workers=many", ["'workers'", "valid integer", "'many'"]),
        ("estimator.gamma=1.5", ["'estimator.gamma'", "less than or equal to 1", "1.5"]),
        ("staleness=-1", ["'staleness'", "0", "-1"]),
        ("resources={start_workers: 1, min_workers: 2}", ["resources.start_workers=1", "resources.min_workers"]),
        ("backward=driver", ["'backward'", "'driver'", "'worker' or 'learner'"]),
        ("backward=learner", ["backward=learner", "estimator.kind=replay", "exact"]),
        ("horizon=0", ["'horizon'", "at least 1"]),
        ("family.test=[multidigitz]", ["family.test", "'multidigitz'", "did you mean 'multidigits'?"]),
        ("family.test=['multidigits[nett=mlp]']", ["'nett'", "did you mean 'net'?"]),
        ("family.train=[{problem: quadratik}]", ["family.train", "'quadratik'", "did you mean 'quadratic'?"]),
        ("family.train=[{problem: quadratic, choices: {mm: [2]}}]", ["'mm'", "allowed: batch, condition, m, n, noise"]),
        ("family.train=[{problem: quadratic, choices: {m: []}}]", ["choices.m is empty"]),
        ("family.train=[]", ["'family.train'", "at least 1 item"]),
        ("estimator.truncated=true", ["estimator.truncated", "unroll >= 1"]),
        ("estimator={kind: exact, coordinates: 0.5}", ["estimator.kind=exact", "coordinates"]),
        ("device=gpuu", ["'device'", "'gpuu'", "cuda"]),
        ("device=cuda", ["device=cuda", "resources.num_gpus > 0"]),
        ("learner.lr=.inf", ["'learner.lr'", "finite"]),
        ("comparison.learning_rates=[-1]", ["comparison.learning_rates", "greater than 0"]),
        ("rule", ["dotted.key=value"]),
        ("seed.x=1", ["'seed' is a value"]),
        ("rule={", ["not YAML"]),
    ],
)
def test_a_wrong_setting_is_named(override, parts):
    message = refused(override)
    for part in parts:
        assert part in message


def test_a_missing_file_a_broken_file_and_a_list_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml'.*No such file"):
        load_settings(tmp_path / "nowhere.yaml")
    for content, why in (("a: [", "is not YAML"), ("- a", "`key: value`.*list")):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(UserError, match=why):
            load_settings(tmp_path / "bad.yaml")


@pytest.fixture
def here_and_home(tmp_path, monkeypatch):
    here, home = tmp_path / "here", tmp_path / "home"
    for folder in (here, home):
        (folder / "runs" / "a").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("ML2O_HOME", str(home))
    return here, home


def write_seed(file, seed):
    file.write_text(f"extends: {DEFAULT_CONFIG}\nseed: {seed}\n")


def test_a_file_is_looked_for_in_the_current_folder_then_in_the_home(here_and_home):
    here, home = here_and_home
    write_seed(home / "x.yaml", 2)
    assert load_settings(Path("x.yaml")).seed == 2
    write_seed(here / "x.yaml", 1)
    assert load_settings(Path("x.yaml")).seed == 1
    with pytest.raises(UserError) as caught:
        load_settings(Path("y.yaml"))
    assert "\n" not in str(caught.value)
    assert says(str(caught.value), "'y.yaml'", str(here), "ML2O_HOME", str(home))


def test_of_a_run_directory_the_settings_of_its_run_are_read(here_and_home):
    here, home = here_and_home
    write_seed(home / "runs" / "a" / "config.yaml", 3)  # here, too, is a folder of that name, without a run in it
    assert load_settings(Path("runs/a")).seed == load_settings(home / "runs" / "a").seed == 3
    with pytest.raises(UserError, match=r"'runs/a'.*without evaluate\.yaml"):
        load_evaluation(Path("runs/a"))
    (here / "runs" / "a" / "evaluate.yaml").write_text("seed: 4\n")
    assert load_evaluation(Path("runs/a")).seed == 4


def test_a_file_that_says_too_little_is_told_how_to_build_on_another(tmp_path):
    (tmp_path / "part.yaml").write_text("rule: {hidden: 8}\n")
    with pytest.raises(UserError, match=r"'family'.*missing.*`extends: FILE`.*digits\.yaml"):
        load_settings(tmp_path / "part.yaml")


def test_a_file_can_extend_another(tmp_path):
    (tmp_path / "base.yaml").write_text("workers: 3\nrule: {hidden: 7, lr: 0.5}\nfamily: {train: [{problem: fonseca}], "
                                        "validation: [fonseca], test: [zdt1]}\n")  # fmt: skip
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nrule: {lr: 0.1}\nfamily: {test: [zdt2]}\n")
    settings = load_settings(tmp_path / "top.yaml")
    assert (settings.workers, settings.rule.hidden, settings.rule.lr) == (3, 7, 0.1)
    assert (settings.family.validation, settings.family.test) == (("fonseca",), ("zdt2",))
    for name, base in (("self", "self"), ("one", "two"), ("two", "one")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {base}.yaml\n")
    for name in ("self", "one"):
        with pytest.raises(UserError, match="extends itself"):
            load_settings(tmp_path / f"{name}.yaml")


def test_overrides_apply_in_order_and_reach_nested_keys():
    settings = load_settings(None, ["workers=3", "workers=4", "rule.output=scaled", "data.root=/x=y", "horizon=7"])
    assert (settings.workers, settings.rule.output, settings.data.root) == (4, "scaled", "/x=y")
    assert settings.horizon == (7,)
    assert load_settings(None, ["tracking.register=false"]).tracking.register_version is False


@pytest.mark.parametrize("file", [None, *CONFIGS], ids=lambda f: f.name if f else "default")
def test_every_shipped_config_is_valid_and_survives_a_round_trip(file):
    settings = load_settings(file)
    again = parse_settings(yaml.safe_load(dump_settings(settings)))
    assert again == settings
    assert settings_hash(again) == settings_hash(settings)


def test_what_may_change_on_resume_is_told_from_what_may_not():
    base = load_settings(None)
    how = load_settings(
        None, ["workers=7", "data.root=/d", "compare=false", "tracking.uri=http://h", "checkpoint_every=3"]
    )
    what = load_settings(None, ["learner.lr=0.5"])
    assert settings_hash(how) != settings_hash(base)
    assert first_difference(how, base) == ""
    assert says(first_difference(what, base), "learner.lr", "0.5", str(base.learner.lr))


def test_a_value_of_an_older_version_has_its_present_name():
    assert RuleSettings(features="agreement") == RuleSettings(features="alignment")
    assert load_settings(None, ["rule.features=agreement"]).rule.features == "alignment"


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        load_settings(None).workers = 5


def test_changed_settings_of_a_run_without_options_are_none():
    """What a run writes out by itself, where its data is and the device, is no difference."""
    run = load_settings(None, ["data.root=/somewhere", "device=cpu"])
    assert changed_settings(run) == ("the embedded default", {})


def test_changed_settings_of_a_run_with_options_are_the_options():
    options = ["learner.lr=0.003", "rule.hidden=9", "tracking.register=false", "device=cuda:1", "resources.num_gpus=1"]
    base, changed = changed_settings(load_settings(None, [*options, "family.rescale=1"]))
    assert base == "the embedded default"
    assert changed == {
        "learner.lr": 0.003,
        "rule.hidden": 9,
        "tracking.register": False,
        "device": "cuda:1",
        "resources.num_gpus": 1.0,
        "family.rescale": 1.0,
    }


def test_changed_settings_of_a_configuration_of_one_s_own_are_against_the_defaults_of_the_library():
    settings = load_settings(Path("jobs/configs/multimnist.yaml"), ["workers=2", "data.root=/somewhere"])
    base, changed = changed_settings(settings)
    assert base == "the defaults of config.py"
    assert "workers" not in changed, "2 is the default of config.py"
    assert changed["rule.features"] == "alignment"
    assert "learner.clip" not in changed
    assert changed["family.test"] == list(settings.family.test)
    every = flat_settings(settings)
    assert changed.items() <= every.items()
    assert every["trajectories.meta_steps"] == 20


def test_changed_settings_name_every_key_of_a_group_that_is_off_by_default():
    settings = load_settings(None, ["rule.guard.margin=2", "estimator.kind=replay"])
    _, changed = changed_settings(settings)
    assert changed["rule.guard.margin"] == 2.0
    assert changed["estimator.kind"] == "replay"


def test_a_group_that_is_off_can_be_set_key_by_key(tmp_path):
    file = tmp_path / "written.yaml"
    file.write_text(dump_settings(load_settings()))
    assert "guard: null" in file.read_text()
    settings = load_settings(file, ["estimator.kind=replay", "rule.guard.eps=0.5", "rule.guard.margin=2"])
    assert (settings.rule.guard.eps, settings.rule.guard.margin) == (0.5, 2.0)


def test_an_evaluation_is_read_with_the_names_of_its_own_settings(tmp_path):
    settings = load_evaluation(None, ["optimizers=[initial]", "problems=['quadratic[n=2]']", "guard.eps=0.5"])
    assert settings.optimizers == ("initial",)
    assert settings.guard.eps == 0.5
    assert (settings.tracking.experiment, settings.rule.guard) == ("ml2o/evaluate", None)
    file = tmp_path / "written.yaml"
    file.write_text(dump_settings(settings))
    assert load_evaluation(file) == settings
    with pytest.raises(UserError) as caught:
        load_evaluation(None, ["resources.num_cpu=2"])
    assert "did you mean 'resources.num_cpus'?" in str(caught.value)
    assert "start_timeout_s" not in str(caught.value)


def test_what_a_guard_decides_cannot_be_differentiated():
    with pytest.raises(UserError, match=r"estimator\.kind=exact.*replay or es"):
        load_settings(None, ["rule.guard={}", "estimator.kind=exact"])


def test_what_an_alias_stands_for_is_changed_alone(tmp_path: Path) -> None:
    """An override of one place must not change the others that were written with the same alias."""
    text = (tmp_path / "small.yaml").write_text
    text(f"extends: {DEFAULT_CONFIG}\nresources: &r {{num_cpus: 0.5}}\nlearner: {{resources: *r}}\n")
    settings = load_settings(tmp_path / "small.yaml", ["resources.num_cpus=2"])
    assert (settings.resources.num_cpus, settings.learner.resources.num_cpus) == (2, 0.5)


def test_files_that_extend_each_other_end_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: ../link/a.yaml")
    (tmp_path.parent / "link").unlink(missing_ok=True)
    (tmp_path.parent / "link").symlink_to(tmp_path)
    for i in range(40):
        (tmp_path / f"c{i}.yaml").write_text(f"extends: c{i + 1}.yaml")
    for name, why in (
        ("a", "extends itself"),
        ("c0", "extends.*20 files"),
        ("d", "extends.*file"),
    ):
        (tmp_path / "d.yaml").write_text("extends: [a.yaml]")
        with pytest.raises(UserError, match=why):
            load_settings(tmp_path / f"{name}.yaml")


def test_a_folder_of_trust_is_not_left(tmp_path: Path) -> None:
    (tmp_path / "secret.yaml").write_text("the secret: 1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("extends: ../secret.yaml")
    with pytest.raises(UserError, match="is a link out of") as caught:
        load_settings(tmp_path / "run" / "config.yaml", within=tmp_path / "run")
    assert "the secret" not in str(caught.value)
