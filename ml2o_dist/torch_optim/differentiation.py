"""Gradients of single losses by autograd, and errors for graphs that it cannot differentiate in this way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ml2o_dist.runtime.errors import UserError

REENTRANT = (
    "uses torch.utils.checkpoint with use_reentrant=True, which hides the parameters inside it from "
    "torch.autograd.grad: write use_reentrant=False, with Hugging Face's models "
    'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
)
"""Error text for a closure with a reentrant checkpoint."""


def gradients_of(losses: Sequence[Tensor], i: int, inputs: Sequence[Tensor], name: str) -> Sequence[Tensor | None]:
    """Return the gradient of loss `i` by each of the `inputs`, None where it does not depend on one.

    The graph is kept until the last loss. `name` is the closure's name in error messages.

    Raises:
        UserError: the loss depends on none of them, or its graph cannot be differentiated.
    """
    gradients: Sequence[Tensor | None] = [None] * len(inputs)
    if losses[i].requires_grad:
        try:
            gradients = torch.autograd.grad(losses[i], inputs, retain_graph=i + 1 < len(losses), allow_unused=True)
        except RuntimeError as error:
            said = str(error)
            if ".grad()" in said and "heckpoint" in said:  # torch: "checkpoint is incompatible with .grad()"
                raise UserError(f"the {name} {REENTRANT}") from error
            if "second time" not in said:  # in torch's words: of a graph that is freed
                raise
            raise UserError(
                f"the graph of loss {i + 1} of the {name} is gone: the closure must not call backward, and must "
                "compute its losses anew each time"
            ) from error
    if all(gradient is None for gradient in gradients):
        refuse_reentrant_checkpoints([losses[i]], name)
        raise UserError(
            f"loss {i + 1} of the {name} has no gradient with respect to any parameter of the optimizer: does the "
            "closure compute it, without torch.no_grad, without detaching it, and without backward? For a task that "
            "has no labels in this batch return (output * 0).sum(), not a constant 0"
        )
    return gradients


def refuse_reentrant_checkpoints(losses: Sequence[Tensor], name: str) -> None:
    """Raise UserError where a reentrant checkpoint is in the graph of one of the `losses`."""
    waiting = [loss.grad_fn for loss in losses]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise UserError(f"the {name} {REENTRANT}")
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
