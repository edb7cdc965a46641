"""Call a user's closures with the same random numbers each time, and check what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.torch_optim.random_states import RandomStates, random_states, replayed

MOST = 8
"""Most rows of a bare tensor; more look like one loss's samples or [B, m], by mistake. A list may have any number."""

Closure = Callable[[], "Tensor | Sequence[Tensor]"]
"""Returns the m losses of one batch, which is the same for all calls within a step. Each loss is a scalar, or a vector
[B] with the losses of single samples."""


class ClosureBatch:
    """One batch in one or more parts over which its losses are accumulated; each part is a closure.

    Attributes:
        name: its name in error messages.
    """

    def __init__(self, closures: Closure | Sequence[Closure], name: str) -> None:
        self.closures = list(closures) if isinstance(closures, Sequence) else [closures]
        if not self.closures or not all(callable(each) for each in self.closures):
            raise UserError(f"the {name} must be a function that returns losses, or a list of such functions")
        self.name = name
        self._watched: Sequence[Tensor] = ()
        self._randomness: dict[int, RandomStates] = {}  # of each part, as of its first call

    @contextmanager
    def part(self, i: int, devices: Sequence[torch.device]) -> Iterator[list[Tensor]]:
        """Return the m losses of part `i` at the current parameters, all scalars or all [B], with their graph.

        Raises:
            UserError: the closure returns something other than losses.
        """
        first = i not in self._randomness
        if first:
            self._randomness[i] = random_states(devices)
        with nullcontext() if first else replayed(self._randomness[i]):
            gradients = [(p, p.grad, 0 if p.grad is None else p.grad._version) for p in self._watched]
            returned = self.closures[i]()
            if any(_was_written(*each) for each in gradients):
                raise UserError(self._without_backward())
            yield self._losses(returned)

    def forbid_backward(self, parameters: Sequence[Tensor]) -> None:
        """Raise UserError from now on if a call of a closure writes into the `grad` of one of the `parameters`."""
        self._watched = parameters

    def _without_backward(self) -> str:
        line = (
            f"the {self.name} called backward: it must only return the losses, with their graph, as in "
            "optimizer.step(lambda: [loss_1, loss_2]); the optimizer differentiates each of them"
        )
        if any(_is_of_lightning(closure) for closure in self.closures):
            line += (
                ". In Lightning set self.automatic_optimization = False and call self.optimizers().step(closure) in "
                "training_step"
            )
        return line

    @property
    def repeats_wrongly(self) -> str:
        """The error text for a closure that gives other losses when it is called again."""
        return (
            f"the {self.name} gave other losses when it was called again in the same step: it must use the same batch "
            "and the same random numbers each time. Draw the batch before the step. Numbers of torch's own generator "
            "are repeated; those of another torch.Generator, of Python's random and of numpy are not"
        )

    def _losses(self, returned: Any) -> list[Tensor]:
        if isinstance(returned, Tensor) and returned.dim() == 0:
            returned = [returned]
        if not isinstance(returned, Tensor | Sequence):
            found = type(returned).__name__
            raise UserError(f"the {self.name} returned {found}; allowed are a list of losses, or a tensor")
        if isinstance(returned, Tensor) and len(returned) > MOST:
            raise UserError(
                f"the {self.name} returned a tensor of shape {list(returned.shape)}, which would be {len(returned)} "
                "losses: one loss by its samples is a list of one vector; return a list if there are so many"
            )
        losses = list(returned)
        for i, loss in enumerate(losses):
            if not isinstance(loss, Tensor) or loss.dim() > 1 or loss.numel() == 0:
                shown = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise UserError(
                    f"loss {i + 1} of the {self.name} is {shown}; allowed are a scalar or a vector with the loss of "
                    "each sample"
                )
        if not losses:
            raise UserError(f"the {self.name} returned no loss")
        shapes = {tuple(loss.shape) for loss in losses}
        if len(shapes) > 1:
            raise UserError(
                f"the losses of the {self.name} have shapes {sorted(map(list, shapes))}: all must be scalars, or "
                "vectors over the same samples; for a sample without a label for a task let the loss be 0"
            )
        return losses


def _was_written(parameter: Tensor, before: Tensor | None, version: int) -> bool:
    """Tell whether a parameter's `grad` has changed; a new one of zeros may come from zero_grad."""
    now = parameter.grad
    return now is not None and (now is not before or now._version != version) and bool(now.any())


def _is_of_lightning(closure: Any) -> bool:
    function = getattr(closure, "func", closure)  # Lightning hands over a partial
    module = str(getattr(function, "__module__", None) or type(function).__module__)
    return module.split(".")[0] in ("lightning", "pytorch_lightning")
