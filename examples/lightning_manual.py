"""The same two tasks in PyTorch Lightning, by manual optimization.

pip install pytorch-lightning
python examples/lightning_manual.py runs/first
"""

from __future__ import annotations

import sys

import pytorch_lightning as lightning
import torch
from plain_loop import Network, batches, data, task_losses
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ml2o_dist import GML2O


class TwoTasks(lightning.LightningModule):
    """Each training batch is a pair: what to learn from, and what the guard compares by."""

    def __init__(self, weights: str = "pretrained") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network: nn.Module = Network()
        self.weights = weights

    def configure_optimizers(self) -> GML2O:
        """Return the optimizer; Lightning's checkpoints hold its state."""
        return GML2O(self.parameters(), self.weights)

    def training_step(self, pair: list[list[Tensor]], _: int) -> None:
        """Take one step."""
        batch, guard_batch = pair
        optimizer = self.optimizers()
        losses = optimizer.step(
            closure=lambda: task_losses(self.network, batch),
            guard_closure=lambda: task_losses(self.network, guard_batch),
        )
        self.log_dict({"digit": losses[0], "even": losses[1]}, prog_bar=True)


def main(weights: str = "pretrained", steps: int = 300) -> TwoTasks:
    """Train; return the module."""
    torch.manual_seed(0)
    train, _ = data()
    module = TwoTasks(weights)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(module, DataLoader(list(batches(train, 64, steps)), batch_size=None))
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
