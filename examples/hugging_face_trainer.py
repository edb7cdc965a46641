"""The same two tasks with the Trainer of Hugging Face's transformers.

pip install transformers accelerate
python examples/hugging_face_trainer.py runs/first
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from plain_loop import Network, data, task_losses
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments

from ml2o_dist import ML2O


class StepOfTrainer(ML2O):
    """The Trainer calls `step` without a closure, after `training_step` has taken the step with one."""

    def step(self, closure: Any = None, guard_closure: Any = None) -> Tensor | None:
        """Take a step where there is a closure."""
        return None if closure is None else super().step(closure, guard_closure)


class TwoTaskTrainer(Trainer):
    """A Trainer whose step is the learned optimizer's: it differentiates each task's loss by itself."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Take one step; return the summed loss, as the Trainer reports it."""
        if self.args.gradient_accumulation_steps > 1:
            raise ValueError("each call is a step of the optimizer: take a larger batch, or a list of closures")
        model.train()
        batch = self._prepare_inputs(inputs)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper
        losses: Tensor = optimizer.step(lambda: [loss.mean() for loss in task_losses(model, batch)])
        return losses.sum()


def main(weights: str = "pretrained", steps: int = 300) -> Trainer:
    """Train; return the Trainer, whose log has the losses."""
    torch.manual_seed(0)
    train, _ = data()
    model = Network()
    optimizer = StepOfTrainer(model.parameters(), weights)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)  # the rule finds its own
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=64,
        max_grad_norm=0,  # there is no `grad` to clip
        logging_steps=max(1, steps // 6),
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
    )
    trainer = TwoTaskTrainer(
        model,
        arguments,
        train_dataset=TensorDataset(*train),
        data_collator=lambda rows: tuple(torch.stack(column) for column in zip(*rows, strict=True)),
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
