"""The README and the pages say what works: their Python runs, their commands, targets, files and settings exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ml2o_dist.artifact import save_artifact
from ml2o_dist.cli import main
from ml2o_dist.config import RuleSettings
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {page.stem: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
EVERYTHING = "\n".join([README, *PAGES.values()])
STARTS_RAY = re.compile(r"\b(evaluate|meta_train|sweep|train_pareto_set)\(")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def block_with(text: str, word: str) -> str:
    (block,) = [each for each in python_blocks(text) if word in each]
    return block


def commands(text: str) -> set[str]:
    """The `ml2o` words of indented lines and of shell blocks, up to the first option or argument."""
    found = set()
    for line in text.splitlines():
        match = re.match(r"^(?:    )?ml2o ((?:[a-z]+-?)+)(?: ([a-z]+))?", line)
        if match:
            group, word = match.groups()
            found.add(
                f"{group} {word}" if group in ("data", "models", "problems", "optimizers", "pareto-set") else group
            )
    return found


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 10_000


def test_the_readmes_optimizer_trains(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(block_with(README, "GML2O"), names)
    assert names["optimizer"].steps == 50
    assert "tensor" in capsys.readouterr().out
    assert float(names["values"].sum()) < 2.1  # at first log 3 + 1


def test_the_programs_of_the_page_for_training_loops_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in python_blocks(PAGES["torch"]):
        exec(block, names)
    assert names["optimizer"].steps > 0


def test_the_fusion_of_the_example_is_a_plain_network() -> None:
    names: dict[str, object] = {}
    exec(block_with(PAGES["pareto-sets"], "Fusion("), names)
    assert type(names["plain"]) is type(names["network"])
    assert len(list(names["fusion"].parameters())) == 4
    first = names["Fusion"](names["network"], names["start"], names["experts"], modules="all")
    pairs = zip(first.parameters(), names["fusion"].parameters(), strict=True)
    assert all(not torch.equal(before, after) for before, after in pairs)
    assert names["plain"].state_dict().keys() == names["start"].keys()


def test_a_saved_rule_trains_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = RuleSettings(hidden=4)
    save_artifact(tmp_path / "runs/first", ML2ONetwork(rule).state_dict(), rule, {})
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block_with(PAGES["meta-training"], "ML2ORule").replace("range(200)", "range(40)"), names)
    assert "tensor" in capsys.readouterr().out
    assert float(names["info"].losses.mean()) < 2.3


def ray_blocks() -> list[tuple[str, str]]:
    texts = {"README": README, **PAGES}
    blocks = [(name, block) for name, text in texts.items() for block in python_blocks(text)]
    return [(name, block) for name, block in blocks if STARTS_RAY.search(block)]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("page", "block"), ray_blocks(), ids=[name for name, _ in ray_blocks()])
def test_a_program_that_runs_a_command_runs_as_it_stands(page: str, block: str, home: Path) -> None:
    """In a folder that has the examples, as a checkout has."""
    (home / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run([sys.executable, "-c", block], cwd=home, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr


def test_the_notebook_runs_cell_by_cell(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 4
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in cells:
        exec(cell, names)


@pytest.mark.parametrize("words", sorted(commands(EVERYTHING)))
def test_every_command_exists(words: str) -> None:
    assert CliRunner().invoke(main, [*words.split(), "--help"]).exit_code == 0


def test_every_make_target_and_file_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^    |^)make ([a-z-]+)\b", EVERYTHING, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    places = r"(?:jobs|docs|benchmarks|ml2o_dist|examples|cluster)/[\w/.-]+\.(?:py|yaml|png|md|ipynb)"
    for path in set(re.findall(rf"(?<![\w/.]){places}", EVERYTHING)):
        assert (ROOT / path).exists(), path


def test_the_list_of_settings_is_that_of_the_package() -> None:
    written = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "settings.py")], capture_output=True, text=True, timeout=120, check=True
    )
    assert written.stdout == PAGES["settings"], "run `make docs`"


def test_nothing_cites_a_document_that_a_reader_has_not() -> None:
    sources = [EVERYTHING, *(file.read_text() for file in (ROOT / "ml2o_dist").rglob("*.py"))]
    for words in ("DESIGN section", "design page", "@@", "/work/"):
        assert all(words not in text for text in sources), words
