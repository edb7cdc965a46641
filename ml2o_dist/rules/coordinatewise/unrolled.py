"""The ML2O network over many steps of a block of coordinates, and back-propagation through them by hand.

The steps are those of `lstm_cell`. Here they share buffers, which live as long as an `Unrolled`, and every step writes
its state where the next step reads it. Nothing is recorded for autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ml2o_dist.config import RuleSettings
from ml2o_dist.rules.coordinatewise.lstm_cell import BackwardScratch, amplified, backward, forward
from ml2o_dist.rules.coordinatewise.rule import StackedWeights


class Unrolled:
    """The network over up to T steps of up to `rows` coordinates.

    With fewer coordinates the last columns keep their values; they have no gradient, so they contribute nothing.
    """

    def __init__(self, weights: StackedWeights, settings: RuleSettings, objectives: int, steps: int, rows: int) -> None:
        self._tied, self._objectives, self._rows = settings.objectives == "tied", objectives, rows
        columns = objectives * rows if self._tied else rows
        self._specific = [_Layer(each, steps, columns, to_inputs=False) for each in weights.specific]
        self._shared = _Layer(weights.shared, steps, rows, to_inputs=True)
        self._layers = [*self._specific, self._shared]
        self._head, self._to_hidden = weights.head, weights.head[:, :-1].T
        self._by_head = torch.zeros_like(weights.head)

    @property
    def gradients(self) -> StackedWeights:
        """The gradients by the stacked weights, summed over all calls of `backward`."""
        *specific, shared = (amplified(layer.by_weights) for layer in self._layers)
        return StackedWeights(tuple(specific), shared, self._by_head)

    def forward(self, inputs: Tensor, *, restart: bool) -> Tensor:
        """Run the steps of `inputs`, features [T, c, m, R], from zero states or from where the last call ended.

        Returns:
            outputs [T, o, R].
        """
        steps, _, objectives, rows = inputs.shape
        for layer in self._layers:
            layer.begin(steps, restart)
        if self._tied:
            every = self._specific[0].inputs[:steps].view(steps, -1, objectives, self._rows)
            every[..., :rows] = inputs
        else:
            for i, layer in enumerate(self._specific):
                layer.inputs[:steps, :, :rows] = inputs[:, :, i]
        outputs = inputs.new_empty(steps, len(self._head), self._rows)
        for step in range(steps):
            for layer in self._specific:
                layer.forward(step)
            self._pool(step)
            self._shared.forward(step)
            torch.mm(self._head, self._shared.answers[step + 1], out=outputs[step])
        return outputs[..., :rows]

    def backward(self, by_outputs: Tensor) -> None:
        """Add the gradients of <by_outputs [T, o, R], outputs> over the steps of the last `forward`, and no others."""
        by_outputs = torch.nn.functional.pad(by_outputs, (0, self._rows - by_outputs.shape[2]))
        for layer in self._layers:
            layer.begin_backward()
        for step in range(len(by_outputs) - 1, -1, -1):
            by_output, shared = by_outputs[step], self._shared
            self._by_head.addmm_(by_output, shared.answers[step + 1].T)
            torch.addmm(shared.by_recurrence, self._to_hidden, by_output, out=shared.by_hidden)
            shared.backward(step)
            for i, layer in enumerate(self._specific):
                self._unpool(i, layer)
                layer.backward(step)

    def _pool(self, step: int) -> None:
        """Hand the specific LSTMs' hidden states to the shared one: their mean, or all of them (per_objective)."""
        into = self._shared.inputs[step]
        if self._tied:
            hidden = self._specific[0].hidden[step + 1]
            torch.mean(hidden.view(-1, self._objectives, self._rows), dim=1, out=into)
        else:
            torch.cat([layer.hidden[step + 1] for layer in self._specific], out=into)

    def _unpool(self, index: int, layer: _Layer) -> None:
        """Give the specific LSTM `index` its share of the gradient by what `_pool` handed on."""
        by_inputs = self._shared.by_inputs
        if self._tied:
            shape = (-1, self._objectives, self._rows)
            share, out = by_inputs.unsqueeze(1), layer.by_hidden.view(shape)
            torch.add(layer.by_recurrence.view(shape), share, alpha=1 / self._objectives, out=out)
        else:
            size = len(layer.by_hidden)
            torch.add(layer.by_recurrence, by_inputs[index * size : (index + 1) * size], out=layer.by_hidden)


class _Layer:
    """One LSTM over up to T steps, c inputs, H hidden, of `columns` coordinates.

    Attributes:
        inputs: [T + 1, c, columns]; hidden: [T + 1, H, columns], that of step t (from 0) at t + 1.
        answers: (hidden, ones) [T + 1, H + 1, columns].
        by_hidden: what `backward` starts from, the gradient by the hidden state after the step, [H, columns].
        by_inputs, by_recurrence: what it leaves, the gradients by the inputs of the step (where they are wanted) and by
            the hidden state before it.
        by_weights: sum of all steps, not `amplified` yet.
    """

    def __init__(self, weights: Tensor, steps: int, columns: int, to_inputs: bool) -> None:
        size = len(weights) // 4
        channels = weights.shape[1] - size - 1
        stacked = weights.new_ones(steps + 1, weights.shape[1], columns)
        memory = weights.new_empty(steps + 1, size, columns)
        self._weights, self._stacked, self._memory = weights, list(stacked), list(memory)
        self.inputs, self.hidden = stacked[:, :channels], stacked[:, channels:-1]
        self.answers, self._last = stacked[:, channels:], 0
        self._states = list(zip(self.hidden, memory, strict=True))
        self._scratch = BackwardScratch(memory[0])
        self._to_stacked = amplified(weights)[:, 0 if to_inputs else channels : -1].T.contiguous()
        self._by_stacked = weights.new_empty(len(self._to_stacked), columns)
        self.by_inputs, self.by_recurrence = self._by_stacked[:-size], self._by_stacked[-size:]
        self.by_hidden, self._by_memory = torch.empty_like(memory[0]), torch.empty_like(memory[0])
        self.by_weights = torch.zeros_like(weights)

    def begin(self, steps: int, restart: bool) -> None:
        """Start a pass of so many steps from zero states, or from those after the last pass."""
        for first, last in zip(self._states[0], self._states[self._last], strict=True):
            if restart:
                first.zero_()
            else:
                first.copy_(last)
        self._last = steps

    def forward(self, step: int) -> None:
        forward(self._weights, self._stacked[step], self._memory[step], self._scratch, self._states[step + 1])

    def begin_backward(self) -> None:
        """Set the gradients that come from beyond the last step to zero."""
        self.by_recurrence.zero_()
        self._by_memory.zero_()

    def backward(self, step: int) -> None:
        stacked, scratch = self._stacked[step], self._scratch
        memory, after = self._memory[step], self._memory[step + 1]
        backward(self._weights, stacked, memory, after, self.by_hidden, self._by_memory, scratch)
        torch.mm(self._to_stacked, scratch.by_gates, out=self._by_stacked)
        self.by_weights.addmm_(scratch.by_gates, stacked.T)
