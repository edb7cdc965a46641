"""The examples of the drop-in optimizers run as they are written, and learn."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("plain_loop", request.param):
        sys.modules.pop(name, None)
    return importlib.import_module(request.param)


@pytest.mark.parametrize("example", ["plain_loop"], indirect=True)
def test_the_plain_loop(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = example.main(steps=120)
    assert accuracies[0] > 0.8
    assert accuracies[1] > 0.85
    assert "learned steps" in capsys.readouterr().out


@pytest.mark.parametrize("example", ["lightning_manual"], indirect=True)
def test_lightning_by_manual_optimization(example: ModuleType) -> None:
    module = example.main(steps=80)
    assert module.optimizers().optimizer.steps == 80
    assert float(module.trainer.callback_metrics["digit"]) < 0.8


@pytest.mark.parametrize("example", ["hugging_face_trainer"], indirect=True)
def test_the_trainer_of_hugging_face(example: ModuleType) -> None:
    trainer = example.main(steps=60)
    reported = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(reported) == 6
    assert reported[-1] < 0.6 * reported[0]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == sorted(rates, reverse=True)
    assert trainer.optimizer.optimizer.steps == 60


def test_every_example_says_how_it_is_run() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) == 3
    for file in files:
        assert f"python examples/{file.name}" in file.read_text()
