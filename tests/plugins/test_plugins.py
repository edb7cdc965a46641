"""Plug-ins: found, loaded once, sent along, and refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from ml2o_dist import UserError, load_plugin, load_settings
from ml2o_dist.cli import main
from ml2o_dist.config_file import dump_settings, parse_settings
from ml2o_dist.evaluation.cell_cache import cell_key
from ml2o_dist.evaluation.cells import Cell
from ml2o_dist.evaluation.optimizer_specs import HandDesigned
from ml2o_dist.plugins import Carried, loaded
from ml2o_dist.problems import ProblemSpec, problem_names
from tests.plugins.conftest import EXAMPLES
from tests.wording import says

pytestmark = pytest.mark.usefixtures("examples")

COUNT = """
from ml2o_dist import register_problem
from ml2o_dist.problems.quadratic import Quadratic

@register_problem("{name}")
def build(context, *, factor: float = {factor}):
    "A quadratic that is multiplied."
    class Multiplied(Quadratic):
        def sample_losses(self, parameters, batch):
            return factor * super().sample_losses(parameters, batch)

        def jacobian(self, parameters, batch):
            jacobian, losses = super().jacobian(parameters, batch)
            return factor * jacobian, factor * losses
    return Multiplied(context, n=3)
"""


def script(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text)
    return file


def in_new_process(code: str, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, cwd=cwd, timeout=120
    )


def refused(*words: str) -> str:
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ml2o: ")]
    assert "Traceback" not in result.output
    return line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_of_the_kind\n", "line 1: ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("\n\nx = = 1\n", "line 3: SyntaxError"),
        ("raise SystemExit(7)\n", "line 1: SystemExit: 7"),
        ("def f():\n    return 1 / 0\nf()\n", "line 2: ZeroDivisionError"),
        ("\xff", "is not UTF-8 text"),
    ],
)
def test_one_that_cannot_be_imported_is_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_bytes(text.encode("latin-1"))
    for command in (["problems", "list"], ["evaluate", "--problem", "quadratic"], ["meta-train"], ["data", "status"]):
        line = refused(*command, "--plugin", str(file))
        assert "broken.py" in line
        assert said in line


def test_a_misspelt_file_or_module_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"'nowhere.py' does not exist in {tmp_path}" in refused("problems", "list", "--plugin", "nowhere.py")
    assert "neither a file NAME.py nor an installed module" in refused("problems", "list", "--plugin", "no.such")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (
            "register_problem('quadratic')(lambda context: None)",
            "the problem 'quadratic' is there already, from ml2o_dist",
        ),
        (
            "register_problem('two-moons')(lambda context: None)",
            "the problem 'two-moons' is there already, from the plug-in 'problem.py'",
        ),
        ("register_aggregator('mgda')(lambda j: j.sum(0))", "the aggregator 'mgda' is there already, from ml2o_dist"),
        ("register_estimator('exact')(lambda e: None)", "the estimator.kind 'exact' is there already, from ml2o_dist"),
        ("register_comparator('soup')(lambda g: None)", "the comparator 'soup' is there already, from ml2o_dist"),
        (
            "register_optimizer('nadam')(lambda p: None)",
            "the optimizer 'nadam' is there already, from the plug-in 'optimizer.py'",
        ),
    ],
)
def test_a_name_that_is_taken_is_refused_and_nothing_of_the_file_stays(line: str, what: str, tmp_path: Path) -> None:
    name = line.split("(")[0]
    text = (
        f"from ml2o_dist import register_problem, {name}\nregister_problem('left-over')(lambda context: None)\n{line}\n"
    )
    file = script(tmp_path, "taken.py", text)
    with pytest.raises(UserError, match=r"taken\.py") as raised:
        load_plugin(str(file))
    assert what in str(raised.value)
    assert "left-over" not in problem_names()
    assert all(each.name != "taken.py" for each in loaded())


def test_it_is_loaded_once_and_another_file_of_its_name_is_refused(tmp_path: Path) -> None:
    file = script(tmp_path, "once.py", "import builtins\nbuiltins.times = getattr(builtins, 'times', 0) + 1\n")
    first = load_plugin(str(file))
    assert load_plugin(str(file)) is first
    import builtins

    assert builtins.times == 1  # type: ignore[attr-defined]
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match=r"'once.py' is loaded already, with another content"):
        load_plugin(str(script(other, "once.py", "x = 1\n")))


def test_what_is_sent_brings_its_plug_ins_along() -> None:
    """A fresh process reads settings whose class is the plug-in's, from their pickle alone."""
    settings = load_settings(None, ["rule.kind=by-kind"])
    sent = pickle.dumps(Carried(settings)).hex()
    code = (
        "import pickle, sys\n"
        "sent = pickle.loads(bytes.fromhex(sys.stdin.read())).value\n"
        "from ml2o_dist import learned_rule\n"
        "from ml2o_dist.problems import problem_names\n"
        "print(type(sent.rule).__name__, type(learned_rule(sent.rule)).__name__, 'two-moons' in problem_names())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run(
        [sys.executable, "-c", code], input=sent, capture_output=True, text=True, env=environment, timeout=120
    )
    assert found.stdout.split() == ["ByKindSettings", "ByKind", "True"], found.stderr


def test_a_module_is_loaded_by_its_name_and_another_version_elsewhere_is_refused(tmp_path: Path) -> None:
    script(tmp_path, "my_module.py", COUNT.format(name="of-module", factor=1.0))
    code = "import sys; sys.path.insert(0, sys.argv[1])\n"
    made = in_new_process(
        code + "import pickle\nfrom ml2o_dist.plugins import Carried, load_plugin\nload_plugin('my_module')\n"
        "print(pickle.dumps(Carried(1)).hex())",
        str(tmp_path),
    )
    read = code + "import pickle\nprint(pickle.loads(bytes.fromhex(sys.argv[2])).value)"
    assert in_new_process(read, str(tmp_path), made.stdout.strip()).stdout.strip() == "1", made.stderr
    script(tmp_path, "my_module.py", COUNT.format(name="of-module", factor=2.0))
    assert "'my_module' is another version here" in in_new_process(read, str(tmp_path), made.stdout.strip()).stderr


def test_an_installed_package_names_its_own(tmp_path: Path) -> None:
    script(tmp_path, "their_module.py", COUNT.format(name="of-package", factor=1.0))
    metadata = tmp_path / "their-1.0.dist-info"
    metadata.mkdir()
    script(metadata, "METADATA", "Metadata-Version: 2.1\nName: their\nVersion: 1.0\n")
    script(metadata, "entry_points.txt", "[ml2o_dist.plugins]\nmine = their_module\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.argv = ['ml2o', 'problems', 'list', '--json']\n"
        "from ml2o_dist.cli import main; main()"
    )
    found = in_new_process(code, str(tmp_path))
    assert "of-package" in {each["name"] for each in json.loads(found.stdout)}, found.stderr


def test_a_yaml_file_names_files_beside_it(tmp_path: Path) -> None:
    script(tmp_path, "beside.py", COUNT.format(name="beside", factor=1.0))
    tree = {"plugins": ["beside.py"], "extends": str(EXAMPLES.parents[1] / "tests" / "small_run.yaml")}
    tree["family"] = {"train": [{"problem": "beside[factor=3]"}]}
    settings = load_settings(script(tmp_path, "run.yaml", yaml.safe_dump(tree)))
    assert "beside.py" in {each.name for each in settings.plugins}
    again = parse_settings(yaml.safe_load(dump_settings(settings)))
    assert again == settings
    shown = yaml.safe_load(dump_settings(settings))["plugins"]
    assert all(each.keys() == {"name", "sha256"} for each in shown)


def test_settings_of_another_content_are_refused_by_name() -> None:
    tree = yaml.safe_load(dump_settings(load_settings(None)))
    tree["plugins"][0]["sha256"] = "0" * 64
    name = tree["plugins"][0]["name"]
    with pytest.raises(UserError, match=rf"plug-in '{name}' has sha256 .* made with 000000000000"):
        parse_settings(tree)
    tree["plugins"][0]["name"] = "unknown.py"
    with pytest.raises(UserError, match=r"made with the plug-in 'unknown.py' .* --plugin unknown.py"):
        parse_settings(tree)


def test_a_run_directory_loads_nothing(tmp_path: Path, home: Path) -> None:
    """What a folder names is not run, whichever command reads it."""
    folder = tmp_path / "runs" / "theirs"
    folder.mkdir(parents=True)
    mark = tmp_path / "ran"
    script(folder, "evil.py", f"open({str(mark)!r}, 'w')\n")
    tree = yaml.safe_load((EXAMPLES.parents[1] / "tests" / "small_run.yaml").read_text())
    script(folder, "config.yaml", yaml.safe_dump({"plugins": ["evil.py"], **tree}))
    for words in (
        ["meta-train", "--run-dir", str(folder), "--resume"],
        ["meta-train", "--config", str(folder)],
        ["report", str(folder)],
        ["evaluate", "--optimizer", str(folder), "--problem", "quadratic"],
        ["sweep", "--config", str(folder)],
        ["pareto-set", "train", "--config", str(folder)],
    ):
        CliRunner().invoke(main, words)
        assert not mark.exists(), words
    assert "'evil.py' is not loaded here" in refused("meta-train", "--config", str(folder))


def test_a_cells_key_has_the_plug_ins_and_the_versions_of_what_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(HandDesigned("mean", "adam", 0.01), ProblemSpec.parse("quadratic"), (0,), "report", 5)
    before = cell_key(cell, {})
    assert cell_key(cell, {}) == before
    monkeypatch.setattr("ml2o_dist.evaluation.cell_cache.loaded", lambda: loaded()[1:])
    fewer = cell_key(cell, {})
    assert fewer != before
    monkeypatch.setattr("ml2o_dist.evaluation.cell_cache._version", lambda library: f"{library} of tomorrow")
    assert cell_key(cell, {}) != fewer


def test_aggregators_and_optimizers_of_plug_ins_follow_torch(tmp_path: Path) -> None:
    """`nadam` and `normalized+nadam` against the loop that a user would write."""
    import torch

    from ml2o_dist import Oracle, ProblemContext
    from ml2o_dist.runtime.seeding import generator

    problem = ProblemSpec.parse("tabular[data=iris,tasks=2,hidden=4]").build(ProblemContext(2))
    for text, direction in (
        ("nadam@0.01", lambda jacobian: jacobian.mean(dim=0)),
        ("normalized+nadam@0.01", lambda jacobian: (jacobian / jacobian.norm(dim=1, keepdim=True)).mean(dim=0)),
    ):
        rule = HandDesigned.parse(text).rule(torch.device("cpu"), torch.float32)
        start = problem.initial_parameters([0, 1])
        point, state = start, rule.initial_state(2, problem.objectives, problem.layout)
        oracle = Oracle(problem, generator("a"))
        rows = [torch.nn.Parameter(row.clone()) for row in start]
        theirs = [torch.optim.NAdam([row], lr=0.01) for row in rows]
        again = Oracle(problem, generator("a"))
        for _ in range(6):
            batch = again.draw()
            jacobian, _ = problem.jacobian(torch.stack([row.detach() for row in rows]), batch)
            for row, optimizer, matrix in zip(rows, theirs, jacobian, strict=True):
                row.grad = direction(matrix)
                optimizer.step()
            before = state
            point, state, _ = rule.step(oracle, point, state)
            assert before.steps + 1 == state.steps
            torch.testing.assert_close(point, torch.stack([row.detach() for row in rows]), rtol=1e-6, atol=1e-7)


def test_an_image_set_is_a_problem_and_wrong_data_are_refused() -> None:
    import numpy as np

    from ml2o_dist import ProblemContext
    from ml2o_dist.problems import image_sets

    problem = ProblemSpec.parse("stripes[net=cnn,channels=4,batch=8]").build(ProblemContext(2))
    assert (problem.objectives, problem.network.head.outputs) == (2, 3)
    assert problem.data_hashes(test=True).keys() == {"stripes[size=0]", "stripes[size=0] test"}
    figures = problem.test_metrics(problem.initial_parameters([0, 1]))
    assert figures["test_accuracy"].shape == (2, 2)
    pooled = ProblemSpec.parse("stripes[size=6]").build(ProblemContext())
    images, _ = image_sets.IMAGE_SETS["stripes"].load("train", "")
    means = images.reshape(600, 6, 2, 6, 2).mean(axis=(2, 4))
    assert np.abs(pooled._images.numpy() - means).max() <= 0.5
    for size, tasks in ((5, 2), (0, 3)):
        with pytest.raises(UserError, match="stripes"):
            ProblemSpec.parse(f"stripes[size={size},tasks={tasks}]").build(ProblemContext())
    good = images, np.zeros((600, 2), dtype=np.int64)
    known = image_sets.IMAGE_SETS["stripes"]
    for wrong, said in (
        ((images.astype(np.float32), good[1]), "images must be uint8"),
        ((images[:, :11], good[1]), r"not uint8 \[600, 11, 12\]"),
        ((images, good[1][:, :1]), r"labels must be integers \[600, 2\]"),
        ((images, good[1] + 3), r"labels must lie in 0..2, not in 3..3"),
    ):
        with pytest.raises(UserError, match=said):
            image_sets._check("stripes", "train", known, *wrong)


def test_what_is_registered_in_a_script_alone_is_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from ml2o_dist import evaluate, register_problem
    from ml2o_dist.problems.spec import FACTORIES
    from ml2o_dist.runtime import registry

    monkeypatch.setattr(registry, "_local", [])
    register_problem("in-a-script")(lambda context: None)
    try:
        with pytest.raises(UserError, match=r"'in-a-script' is registered in this process alone.*plugins="):
            evaluate(optimizers=["mean+adam@0.01"], problems=["in-a-script"], seeds=1, steps=1)
    finally:
        FACTORIES.remove("in-a-script")


def test_the_configuration_of_the_page_names_a_rule_and_a_problem_of_plug_ins() -> None:
    settings = load_settings(EXAMPLES / "two_moons.yaml")
    assert (settings.rule.kind, settings.rule.model_dump()["lr"]) == ("by-kind", 0.05)
    assert {str(spec) for member in settings.family.training().members for spec in member.specs()} == {
        f"two-moons[hidden={hidden}]" for hidden in (4, 8, 16)
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--problem", "my-lines"], "'my-lines'"),
        (["--problem", "fonseca", "--optimizer", "mean+adm"], "'mean+adm'"),
        (["--problem", "fonseca", "--optimizer", "mgd+adam"], "'mgd'"),
        (["--problem", "fonseca", "--set", "rule.kind=mine"], "'mine'"),
    ],
)
def test_an_unknown_name_is_said_to_be_a_plug_ins_perhaps(words: list[str], said: str) -> None:
    line = refused("evaluate", "--optimizer", "smg", *words)
    assert says(line, said)
    assert "--plugin FILE.py" in line


def test_a_text_for_a_number_is_refused_before_the_problem_is_built() -> None:
    line = refused("evaluate", "--optimizer", "smg", "--problem", "quadratic[n=abc]")
    assert says(line, "quadratic", "n must be a number", "'abc'")
