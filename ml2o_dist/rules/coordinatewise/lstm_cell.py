"""One LSTM step for many coordinates at once, coordinates along the last axis, and its backward pass by hand.

All tensors are [size, columns], so that every gate is one contiguous slab. Input, hidden state and a row of ones are
stacked in one matrix, so that one product computes all gates, recurrence and bias. tanh(x) is computed as
2 sigmoid(2x) - 1: on a CPU torch's sigmoid is nearly ten times as fast as its tanh (0.20 against 1.9 ns a number,
float32, one core). The factors of two are moved into the weights and the state, where they cost nothing and round
nothing: a `Cell` keeps half the hidden state and twice the memory.

The backward pass recomputes the gates instead of keeping them, which needs a third of the memory for a sequence. The
cost is largely offset by fewer reads (20 steps: a tenth of the replay; 200 steps: nothing measurable).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Cell = tuple[Tensor, Tensor]
"""An LSTM's state (h / 2, 2 c), each [H, columns]."""

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
"""(by, s, grad_input=out): by * s * (1 - s) in one pass."""


def stacked_weights(lstm: nn.Module, halved_inputs: bool) -> Tensor:
    """Return a one-layer nn.LSTM's weights [4H, c + H + 1] for the stacked (x, h / 2, 1), attached to its parameters.

    Gates in nn.LSTM's order i, f, g, o, the rows of g doubled for the tanh that is a sigmoid. `halved_inputs`: the
    inputs are halves too, because they are another LSTM's hidden state.
    """
    weights = dict(lstm.named_parameters())
    size = weights["weight_hh_l0"].shape[1]
    double = torch.ones_like(weights["bias_ih_l0"])
    double[2 * size : 3 * size] = 2
    bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]
    columns = (weights["weight_ih_l0"] * (2 if halved_inputs else 1), 2 * weights["weight_hh_l0"], bias[:, None])
    return torch.cat(columns, dim=1) * double[:, None]


def lstm_cell(inputs: Tensor, cell: Cell, weights: Tensor) -> Cell:
    """Return the next state for inputs [c, columns] and `stacked_weights`; once differentiable in everything."""
    hidden, memory = cell
    stacked = torch.cat((inputs, hidden, hidden.new_ones(1, hidden.shape[1])))
    if torch.is_grad_enabled():
        return _Step.apply(stacked, memory, weights)  # type: ignore[no-any-return,no-untyped-call]  # torch's is untyped
    after = torch.empty_like(memory), torch.empty_like(memory)
    forward(weights, stacked, memory, Scratch(memory), after)
    return after


class Scratch:
    """Buffers of a step for states shaped `like` [H, columns]; reuse them for many steps of one shape."""

    def __init__(self, like: Tensor) -> None:
        size, columns = like.shape
        self.gates = like.new_empty(4 * size, columns)
        self.enter, self.keep, self.candidate, self.leave = self.gates.chunk(4)
        self.squashed = torch.empty_like(like)


class BackwardScratch(Scratch):
    """`Scratch` with buffers for the backward pass, which writes its gradient by the gates into `by_gates`."""

    def __init__(self, like: Tensor) -> None:
        super().__init__(like)
        self.by_gates = torch.empty_like(self.gates)
        self.by_enter, self.by_keep, self.by_candidate, self.by_leave = self.by_gates.chunk(4)
        self.product = torch.empty_like(like)


def forward(weights: Tensor, stacked: Tensor, memory: Tensor, scratch: Scratch, after: Cell) -> None:
    """Write the next state into `after`: c' = f c + i g, h' = o tanh(c'); `stacked` is (x, h / 2, 1).

    With (i, f, s, o) = sigmoid(weights @ stacked) and g = 2s - 1.
    """
    torch.mm(weights, stacked, out=scratch.gates).sigmoid_()
    scratch.candidate.sub_(0.5)
    hidden, memory_after = after
    torch.mul(scratch.keep, memory, out=memory_after).addcmul_(scratch.enter, scratch.candidate, value=4)
    torch.sigmoid(memory_after, out=scratch.squashed).sub_(0.5)
    torch.mul(scratch.leave, scratch.squashed, out=hidden)


def backward(
    weights: Tensor,
    stacked: Tensor,
    memory: Tensor,
    memory_after: Tensor,
    by_hidden: Tensor,
    by_memory: Tensor,
    scratch: BackwardScratch,
) -> None:
    """Back-propagate through a step from its inputs and its result's memory.

    `by_hidden` and `by_memory` are the gradients by the state after the step; `by_memory` is overwritten with the
    gradient by the memory before it. `scratch.by_gates` becomes the gradient by `weights @ stacked`, except that the
    rows of i and g must still be multiplied by 4: `amplified` does this later, where it is cheaper.
    """
    torch.mm(weights, stacked, out=scratch.gates).sigmoid_()
    squashed, product = torch.sigmoid(memory_after, out=scratch.squashed), scratch.product
    torch.mul(by_hidden, scratch.leave, out=product)
    by_memory.add_(_sigmoid_backward(product, squashed, grad_input=product))
    torch.mul(by_hidden, squashed.sub_(0.5), out=scratch.by_leave)
    torch.mul(by_memory, torch.sub(scratch.candidate, 0.5, out=product), out=scratch.by_enter)
    torch.mul(by_memory, memory, out=scratch.by_keep)
    torch.mul(by_memory, scratch.enter, out=scratch.by_candidate)
    _sigmoid_backward(scratch.by_gates, scratch.gates, grad_input=scratch.by_gates)
    by_memory.mul_(scratch.keep)


def amplified(rows: Tensor) -> Tensor:
    """Return `rows` [4H, ...] with the rows of the gates i and g multiplied by 4 (see `backward`)."""
    gates = rows.reshape(4, -1, *rows.shape[1:])
    factors = rows.new_tensor((4, 1, 4, 1)).view(4, *(1 for _ in rows.shape))
    return (gates * factors).view(rows.shape)


class _Step(torch.autograd.Function):
    """One step's `forward` and `backward` above as an autograd function; the second-order estimator uses it."""

    @staticmethod
    def forward(ctx: Any, stacked: Tensor, memory: Tensor, weights: Tensor) -> Cell:
        after = torch.empty_like(memory), torch.empty_like(memory)
        forward(weights, stacked, memory, Scratch(memory), after)
        ctx.save_for_backward(stacked, memory, after[1], weights)
        return after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_hidden: Tensor, by_after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stacked, memory, memory_after, weights = ctx.saved_tensors
        scratch, by_memory = BackwardScratch(memory), by_after.clone()
        backward(weights, stacked, memory, memory_after, by_hidden, by_memory, scratch)
        return amplified(weights).T @ scratch.by_gates, by_memory, amplified(scratch.by_gates @ stacked.T)
