"""What the README says works: its Python example runs, its commands, targets and files exist."""

from __future__ import annotations

import re
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


def python_block(word):
    (block,) = [each for each in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if word in each]
    return block


def test_the_fusion_of_the_example_is_a_plain_network():
    fusion_block = python_block("Fusion")
    names = {}
    exec(fusion_block, names)
    assert type(names["plain"]) is type(names["network"])
    assert len(list(names["fusion"].parameters())) == 4
    first = names["Fusion"](names["network"], names["start"], names["experts"], modules="all")
    pairs = zip(first.parameters(), names["fusion"].parameters(), strict=True)
    assert all(not torch.equal(before, after) for before, after in pairs)
    assert names["plain"].state_dict().keys() == names["start"].keys()


def test_the_python_example_runs_and_trains(tmp_path, monkeypatch, capsys):
    rule = RuleSettings(hidden=4)
    save_artifact(tmp_path / "runs/first", ML2ONetwork(rule).state_dict(), rule, {})
    monkeypatch.chdir(tmp_path)
    block = python_block("ML2ORule")
    names: dict[str, object] = {}
    exec(block.replace("range(200)", "range(40)"), names)
    assert "tensor" in capsys.readouterr().out
    assert float(names["info"].losses.mean()) < 2.3


def test_the_loop_of_a_users_own_trains(tmp_path, monkeypatch):
    rule = RuleSettings(hidden=4)
    save_artifact(tmp_path / "runs/mm", ML2ONetwork(rule).state_dict(), rule, {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import plain_loop

    torch.manual_seed(0)
    names = {
        "model": plain_loop.Network(),
        "loader": plain_loop.data()[0],
        "pairs": lambda whole: plain_loop.batches(whole, 64, 60),
        "task_losses": plain_loop.task_losses,
    }
    exec(python_block("GML2O"), names)
    assert names["optimizer"].steps == 60
    assert float(names["task_losses"](names["model"], names["loader"])[0].detach().mean()) < 1.5


@pytest.mark.parametrize(
    "words", sorted(set(re.findall(r"^    ml2o ((?:[a-z]+-?)+(?: (?:list|fetch|show|train|query))?)", README, re.M)))
)
def test_every_command_exists(words):
    assert CliRunner().invoke(main, [*words.split(), "--help"]).exit_code == 0


def test_every_make_target_and_file_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^    make ([a-z-]+)", README, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for path in set(re.findall(r"(?:jobs|docs|benchmarks|ml2o_dist)/[\w/]+\.(?:py|yaml|png)", README)):
        assert (ROOT / path).exists(), path


def test_no_placeholder_is_left():
    assert "@@" not in README
