"""Commands with hostile or damaged input end with exit code 2 and one line: no traceback, no hang, no Ray started."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from ml2o_dist.artifact import save_artifact
from ml2o_dist.cli import main
from ml2o_dist.config import RuleSettings
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from tests.wording import says

LONG = "a" * 300
EVALUATE = ("evaluate", "--optimizer", "initial", "--problem", "fonseca")
QUERY = ("--preference", "0.5,0.5", "--no-measure", "--out", "x.safetensors")
BOMB = "a0: &a0 {k: 1}\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))


def answer(*words: str) -> str:
    """Return the one line that a command ends with."""
    began = time.monotonic()
    result = CliRunner().invoke(main, list(words))
    assert isinstance(result.exception, SystemExit), (words, result.exception)
    assert result.exit_code == 2, result.output
    assert time.monotonic() - began < 60
    lines = [line for line in result.stderr.splitlines() if line.startswith("ml2o: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture(autouse=True)
def without_ray(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr("ray.init", lambda *words, **settings: pytest.fail("Ray was started"))


SETTINGS = [
    (("problems", "show", "quadratic[n=1000000000000]"), "quadratic: n is 1000000000000 ... integers >= 1"),
    (("problems", "show", "quadratic[n=1e12]"), "quadratic: n is 1000000000000.0 ... integers"),
    (("problems", "show", "quadratic[m=1000,n=10000]"), "m is 1000 ... n is 10000 ... m * n^2"),
    (("problems", "show", "quadratic[noise=1,batch=1000000,n=1000]"), "batch is 1000000, m 2, n 1000"),
    (("problems", "show", "quadratic[condition=nan]"), "quadratic: condition is nan"),
    (("problems", "show", "quadratic[condition=1e400]"), "quadratic: condition is inf"),
    (("problems", "show", "fonseca[n=99999999999999999999]"), "n is 99999999999999999999"),
    (("problems", "show", f"fonseca[n={'9' * 5000}]"), "fonseca"),
    (("problems", "show", "zdt1[n=1000000000]"), "n is 1000000000"),
    (("problems", "show", "dtlz2[m=1000000000]"), "m is 1000000000"),
    (("problems", "show", "multidigits[net=mlp,hidden=999999999]"), "hidden 999999999"),
    (("problems", "show", "multidigits[net=mlp,hidden=60000-60000]"), "parameters (allowed: 100,000,000)"),
    (("problems", "show", f"multidigits[net=mlp,hidden={'9' * 5000}]"), "is not a width"),
    (("problems", "show", "multidigits[net=cnn,channels=²]"), "is not a width"),
    (("problems", "show", "multidigits[batch=1000000000000]"), "batch 1000000000000 of multidigits"),
    (("problems", "show", "tabular[hidden=60000-60000]"), "parameters (allowed: 100,000,000)"),
    (("problems", "show", "tabular[columns=99999999999999999999]"), "columns 99999999999999999999 of tabular"),
    (("problems", "show", LONG), "unknown problem"),
    (("problems", "show", "a\nb"), "control character" ),
    ((*EVALUATE, "--seeds", "1000000000"), "'seeds' ... less than or equal to 10000 ... 1000000000"),
    ((*EVALUATE, "--seeds", "9" * 50), "40 digits"),
    ((*EVALUATE, "--steps", "1000000000000"), "'steps' ... less than or equal to 10000000 ... 1000000000000"),
    ((*EVALUATE, "--seed", "9" * 39), "'seed' ... less than or equal to"),
    (("evaluate", "--optimizer", "initial", "--problem", "fonseca@²"), "@ ... steps"),
    (("evaluate", "--optimizer", "initial", "--problem", "fonseca@99999999999"), "from 1 to 10000000"),
    ((*EVALUATE, "--set", "rule.count=1000000000"), "'rule.num_objectives' ... less than or equal to 1000"),
    ((*EVALUATE, "--set", "rule.hidden=999999999"), "'rule.hidden' ... less than or equal to 1024"),
    ((*EVALUATE, "--set", "rule={objectives: per_objective, count: 1000, hidden: 1024}"), "num_objectives * hidden^2"),
    ((*EVALUATE, "--set", "rule.lr=1e400"), "'rule.lr'"),
    ((*EVALUATE, "--set", "rule.lr=.nan"), "'rule.lr' ... finite"),
    ((*EVALUATE, "--set", "rule.lr=-0.0"), "'rule.lr' ... greater than 0"),
    (("evaluate", "--optimizer", "initial", "--seeds", "10000", "--set", f"problems={['fonseca'] * 999}"),
     "999 problems ... seeds=10000 ... tuning_seeds=1 ... 5 learning_rates ... 9994995 cells"),
    ((*EVALUATE, "--set", "data.root=\"a\\0b\""), "NUL character"),
    ((*EVALUATE, "--set", f"data.root={'x' * 5000}"), "at most 4096 characters"),
    ((*EVALUATE, "--set", "tracking.experiment=\"a\\nb\""), r"tracking.experiment: experiment 'a\nb'"),
    ((*EVALUATE, "--set", "data.root=2001-02-30"), "is not YAML"),
    ((*EVALUATE, "--set", "data.root=2001-02-03"), "write it in quotes"),
    ((*EVALUATE, "--set", "a" * 100_000 + "=1"), "unknown setting"),
    ((*EVALUATE, "--set", ".".join("a" * 3000) + "=1"), "2999 groups"),
    ((*EVALUATE, "--set", "rule=" + "[" * 5000), "nested ... 64 levels"),
    (("meta-train", "--set", "workers=1000000000"), "'workers' ... less than or equal to 100000"),
    (("meta-train", "--set", "slots=1000000000"), "'meta_batch_size' ... less than or equal to 100000"),
    (("meta-train", "--set", "horizon=1000000000000"), "horizon ... at least 1 ... at most 10000000"),
    (("meta-train", "--set", "resources.start_timeout_s=1e300"), "'resources.start_timeout_s'"),
    (("meta-train", "--set", "staleness=1000000000"), "'staleness' ... less than or equal to 1000"),
    (("sweep", "--set", "space={seed: {randint: [0, 5]}}", "--set", "trials=1000000000"), "'trials'"),
    (("pareto-set", "train", "--set", "routers.batch=1000000000000"), "'routers.batch'"),
    (("pareto-set", "train", "--set", "network={name: vit, width: 16000, depth: 900}"), "width 16000 and depth 900"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "part"), SETTINGS, ids=range(len(SETTINGS)))
def test_a_setting_that_asks_for_too_much_is_one_line(words: tuple[str, ...], part: str) -> None:
    assert says(answer(*words), part)


NAMES = [
    ("report", LONG),
    ("report", f"{LONG}/x"),
    ("trajectories", LONG),
    ("meta-train", "--run-dir", LONG),
    ("meta-train", "--run-dir", "/dev/null/x"),
    ("meta-train", "--run-dir", "/dev/null"),
    ("meta-train", "--resume", "--run-dir", LONG),
    ("meta-train", "--run-dir", "a\nb"),
    ("meta-train", "--run-dir", "a\0b"),
    ("meta-train", "--config", LONG),
    ("meta-train", "--set", f"begin={LONG}"),
    ("meta-train", "--set", "begin=~nobody-at-all/x"),
    ("meta-train", "--set", "begin=/dev/zero.safetensors"),
    (*EVALUATE, "--run-dir", LONG),
    (*EVALUATE, "--run-dir", "a\x1bb"),
    ("evaluate", "--suite", LONG, "--optimizer", "initial"),
    ("evaluate", "--suite", f"{LONG}.yaml", "--optimizer", "initial"),
    ("evaluate", "--suite", "../quick", "--optimizer", "initial"),
    ("evaluate", "--optimizer", LONG, "--problem", "fonseca"),
    ("evaluate", "--optimizer", f"{LONG}/x", "--problem", "fonseca"),
    ("sweep", "--config", LONG),
    ("sweep", "--resume", "--run-dir", LONG),
    ("pareto-set", "query", LONG, *QUERY),
    ("pareto-set", "query", "a\0b", *QUERY),
    ("pareto-set", "query", "/dev/zero", *QUERY),
    ("pareto-set", "train", "--resume", "--run-dir", LONG),
    ("models", "import", LONG),
    ("models", "import", "/dev/zero"),
]


@pytest.mark.parametrize("words", NAMES, ids=range(len(NAMES)))
def test_a_name_that_no_file_has_is_one_line(words: tuple[str, ...]) -> None:
    answer(*words)


@pytest.mark.parametrize("root", [LONG, "/dev/null", "/dev/zero/x"])
def test_a_folder_of_data_that_cannot_be_is_told(root: str) -> None:
    result = CliRunner().invoke(main, ["data", "status", "--data-root", root])
    assert result.exit_code in (0, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit)


def fifo(file: Path) -> None:
    os.mkfifo(file)


def zeros(file: Path) -> None:
    file.symlink_to("/dev/zero")


def huge(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(2**40)


@pytest.mark.parametrize("make", [fifo, zeros, Path.mkdir, huge])
def test_what_is_no_file_hangs_no_command(make: Callable[[Path], None], home: Path) -> None:
    make(home / "x.yaml")
    for words in (
        ("meta-train", "--config", "x.yaml"),
        ("sweep", "--config", "x.yaml"),
        ("pareto-set", "train", "--config", "x.yaml"),
        (*EVALUATE, "--config", "x.yaml"),
        ("evaluate", "--suite", "x.yaml", "--optimizer", "initial"),
        ("models", "promote", "--suite", "x.yaml"),
    ):
        answer(*words)
    make(home / "x.safetensors")
    answer("pareto-set", "query", "x.safetensors", *QUERY)
    answer("models", "import", "x.safetensors")
    answer("evaluate", "--optimizer", "x.safetensors", "--problem", "fonseca")
    run = home / "run"
    (run / "trajectories").mkdir(parents=True)
    make(run / "trajectories" / "step_000001.parquet")
    answer("trajectories", "run")


@pytest.mark.parametrize("make", [fifo, zeros, huge])
def test_a_report_names_what_is_no_file_and_shows_the_rest(make: Callable[[Path], None], home: Path) -> None:
    (home / "run").mkdir()
    (home / "run" / "config.yaml").write_text(BOMB)
    for name in ("metrics.parquet", "comparison.json", "weights.json", "run.log"):
        make(home / "run" / name)
    result = CliRunner().invoke(main, ["report", "run"])
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    for name in ("config.yaml", "metrics.parquet", "comparison.json", "weights.json", "run.log"):
        assert sum(name in line for line in lines) == 1


def test_a_bomb_is_one_line_of_every_command_that_reads_settings(home: Path) -> None:
    (home / "x.yaml").write_text(BOMB)
    for command in (("meta-train",), ("sweep",), ("pareto-set", "train"), EVALUATE):
        assert "50000 values" in answer(*command, "--config", "x.yaml")


@pytest.mark.parametrize("make", [fifo, zeros, Path.mkdir])
def test_an_output_that_is_no_file_is_left_alone(make: Callable[[Path], None], home: Path) -> None:
    (home / "run").mkdir()
    (home / "run" / "config.yaml").write_text("a: 1")
    make(home / "out.html")
    before = (home / "out.html").lstat()
    answer("report", "run", "--output", "out.html")
    assert (home / "out.html").lstat().st_mode == before.st_mode
    assert (home / "out.html").lstat().st_ino == before.st_ino


def test_links_out_of_a_run_are_not_followed(home: Path) -> None:
    (home / "secret.yaml").write_text("the secret: 1")
    (home / "run").mkdir()
    (home / "run" / "config.yaml").symlink_to(home / "secret.yaml")
    assert "is a link out of" in answer("meta-train", "--resume", "--run-dir", "run")
    (home / "run" / "config.yaml").unlink()
    (home / "run" / "config.yaml").write_text("extends: ../secret.yaml")
    assert "is a link out of" in answer("meta-train", "--resume", "--run-dir", "run")
    result = CliRunner().invoke(main, ["report", "run"])
    assert "is a link out of" in result.stderr
    assert "the secret" not in result.output + (home / "run" / "report.html").read_text()


def test_weights_that_are_hostile_are_one_line_of_a_command(home: Path) -> None:
    rule = RuleSettings(hidden=3)
    save_artifact(home / "run", ML2ONetwork(rule).state_dict(), rule, {})
    card = home / "run" / "weights.json"
    for content in ("{}", "[" * 100_000, '{"format": NaN}', "9" * 5000, '{"format": 1e400}', '{"format": "1"}', "\0"):
        card.write_text(content)
        assert "weights.json" in answer("evaluate", "--optimizer", "run", "--problem", "fonseca")
