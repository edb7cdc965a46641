"""The examples of the drop-in optimizers run as they are written, and learn."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from ml2o_dist import GML2O, ML2O, UserError

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


def test_automatic_optimization_of_lightning_is_refused() -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Automatic(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.net(torch.ones(4, 2)).square().mean()

        def configure_optimizers(self) -> GML2O:
            return GML2O(self.parameters())

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    with pytest.raises(UserError, match=r"called backward.*Lightning.*self\.automatic_optimization = False"):
        trainer.fit(Automatic(), torch.utils.data.DataLoader([0, 1]))


@pytest.mark.parametrize("example", ["hugging_face_trainer"], indirect=True)
def test_the_trainer_of_hugging_face(example: ModuleType) -> None:
    trainer = example.main(steps=60)
    reported = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(reported) == 6
    assert reported[-1] < 0.6 * reported[0]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == sorted(rates, reverse=True)
    assert trainer.optimizer.optimizer.steps == 60


def test_a_trainer_that_steps_by_itself_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.net(x).square().mean()}

    model = Model()
    optimizer = ML2O(model.parameters())
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True),
        train_dataset=[{"x": torch.ones(2)}] * 4,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    )
    with pytest.raises(UserError, match=r"closure.*Hugging Face.*training_step"):
        trainer.train()


def test_every_example_says_how_it_is_run() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) == 3
    for file in files:
        assert f"python examples/{file.name}" in file.read_text()
