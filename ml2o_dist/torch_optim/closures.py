"""A user's closures as a `Problem`, so that the rules of this package can optimize whatever they compute.

P = 1 instance, m objectives, n parameters, B samples. A batch is what a closure computes its losses on. Within a step
a closure may be called several times, at other values of the parameters: every time it draws the same random numbers
(dropout), and leaves no trace in the buffers of modules (BatchNorm's running moments) but the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ml2o_dist.errors import UserError
from ml2o_dist.problems.base import Batch, Problem
from ml2o_dist.torch_optim.layout import Layout

MOST = 8
"""A bare tensor of more rows is taken for a mistake: one loss by its samples, or [B, m]. A list may have any number."""

Closure = Callable[[], "Tensor | Sequence[Tensor]"]
"""Returns the m losses of one batch, the same one whenever it is called within a step: scalars, or one vector [B] each
with the losses of single samples."""


class ClosureBatch:
    """One batch, in as many parts as its losses are accumulated over; each part is a closure.

    Attributes:
        name: what error messages call it.  traces: whether its first call may change the buffers of modules.
    """

    def __init__(self, closures: Closure | Sequence[Closure], name: str, *, traces: bool) -> None:
        self.closures = list(closures) if isinstance(closures, Sequence) else [closures]
        if not self.closures or not all(callable(each) for each in self.closures):
            raise UserError(f"the {name} must be a function that returns losses, or a list of such functions")
        self.name, self.traces = name, traces
        self._randomness: dict[int, dict[torch.device, Tensor]] = {}  # of each part, as its first call found it

    @contextmanager
    def part(self, i: int, devices: Sequence[torch.device]) -> Iterator[list[Tensor]]:
        """Give the m losses of part `i` at the parameters as they are, all scalars or all [B], with their graph.

        Raises:
            UserError: something else than losses comes back.
        """
        first = i not in self._randomness
        if first:
            self._randomness[i] = _random_states(devices)
        randomness = nullcontext() if first else _random_states_of(self._randomness[i])
        with randomness, _no_traces(not (first and self.traces)):
            yield self._losses(self._called(self.closures[i]))

    def _called(self, closure: Closure) -> Any:
        try:
            return closure()
        except RuntimeError as error:
            if torch.is_grad_enabled() or "does not require grad" not in str(error):
                raise
            raise UserError(
                f"the {self.name} must not call backward, nor differentiate otherwise: the guard calls it without "
                "gradients, too"
            ) from error

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
                "vectors over the same samples"
            )
        return losses


class ClosureProblem(Problem):
    """min over the parameters of `layout` of (f_1, ..., f_m), as the closures of one step compute them.

    Weight decay adds d_p |z_p|^2 / (2 k_p) to each of the k_p objectives that have a gradient by parameter p: their sum
    has the usual penalty, as torch's Adam has it on the summed loss. An objective that does not depend on p, as
    another task's on a head, must not come to do so by its penalty: features are free of a gradient's scale.

    Attributes:
        reached: for each parameter whether the first `jacobian` found a gradient; all before it.
        plain: the losses [m] of the first `jacobian`, without penalties.
        samples: whether losses of single samples came back, not scalars.
    """

    instances = 1

    def __init__(
        self, layout: Layout, training: ClosureBatch, guard: ClosureBatch | None, decay: Tensor | None, fewest: int = 1
    ) -> None:
        """Without a `guard` batch the training batch stands for it; it takes `fewest` samples to compare by it.

        `decay`: [1, n] of d, or None for no decay.
        """
        self._layout, self._coming, self._after = layout, training, guard or training
        self.device, self.dtype = layout.device, layout.dtype
        self.dimension, self.objectives = layout.dimension, 0  # the first call tells how many
        self.samples, self.fewest = False, fewest
        self.reached = [True] * len(layout.parameters)
        self.plain = torch.zeros(0)
        self._decay = decay
        self._shares: Tensor | None = None  # [m, n], of d, from the first `jacobian` on; None without decay
        self._devices = sorted({p.device for p in layout.parameters if p.device.type == "cuda"}, key=str)

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        """Return the parameters as they are."""
        return self._layout.read()

    def sample_batch(self, generator: torch.Generator) -> ClosureBatch:
        """Return the training batch, later the guard batch: closures draw their samples themselves."""
        batch, self._coming = self._coming, self._after
        return batch

    def exact(self, batch: Batch) -> bool:
        """Tell whether there is one value for each objective only: no error of it can be estimated."""
        return not self.samples

    def sample_losses(self, parameters: Tensor, batch: ClosureBatch) -> Tensor:
        """Return the losses of every sample [1, B, m], or [1, 1, m] where the closure returns scalars, detached.

        Raises:
            UserError: of fewer samples than can be compared by.
        """
        parts = []
        with self._at(parameters), torch.no_grad():
            for i in range(len(batch.closures)):
                with batch.part(i, self._devices) as losses:
                    parts.append(torch.stack(self._checked(losses, batch), dim=-1))
        values = torch.cat(parts) if self.samples else torch.stack(parts).mean(dim=0, keepdim=True)
        if self.samples and batch is self._after and len(values) < self.fewest:
            raise UserError(
                f"the {batch.name} returned the losses of {len(values)} samples, to tell worse from noise takes "
                f"{self.fewest} or more: leave out a smaller last batch (drop_last=True), or return scalars"
            )
        return (values + self._penalty(parameters)).unsqueeze(0)

    def jacobian(self, parameters: Tensor, batch: ClosureBatch) -> tuple[Tensor, Tensor]:
        """Return (J [1, m, n], losses [1, m]), detached.

        Raises:
            UserError: an objective without a gradient, a loss or a gradient that is not finite.
        """
        rows, totals, found = self._differentiated(parameters, batch)
        if not len(self.plain):
            self.plain, self.reached = totals, [any(column) for column in zip(*found, strict=True)]
            self._shares = self._shared_out(found)
        if self._shares is not None:
            rows = rows + self._shares * parameters
        return rows.unsqueeze(0), (totals + self._penalty(parameters)).unsqueeze(0)

    def gradient(self, parameters: Tensor, batch: ClosureBatch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return (J^T weights [1, n], losses [1, m]), detached; `weights` [1, m]. Raises UserError as `jacobian`."""
        rows, totals, _ = self._differentiated(parameters, batch, weights[0])
        if self._shares is not None:
            rows = rows + weights @ self._shares * parameters
        return rows, (totals + self._penalty(parameters)).unsqueeze(0)

    def _differentiated(
        self, parameters: Tensor, batch: ClosureBatch, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[list[bool]]]:
        """Return rows of gradients (of each objective [m, n], or of the weighted sum [1, n]), losses [m], reached.

        Reached is, for each row, which parameters have a gradient.
        """
        wanted = [i for i, parameter in enumerate(self._layout.parameters) if parameter.requires_grad]
        found: list[list[bool]] = []
        rows: list[Tensor] = []
        sums: list[Tensor] = []
        count = 0
        with self._at(parameters), torch.enable_grad():
            for k in range(len(batch.closures)):
                with batch.part(k, self._devices) as losses:
                    values = self._checked(losses, batch)
                    _check_finite(values, batch)
                    totals = [value.sum() for value in values]
                    if weights is not None:
                        roots = [torch.stack([w * total for w, total in zip(weights, totals, strict=True)]).sum()]
                    else:
                        roots = totals
                    found = found or [[False] * len(self._layout.parameters) for _ in roots]
                    rows.append(torch.stack([self._row(roots, i, wanted, found[i], batch) for i in range(len(roots))]))
                sums.append(torch.stack([total.detach() for total in totals]))
                count += len(values[0]) if self.samples else 1
        jacobian = torch.stack(rows).sum(dim=0) / count
        if not bool(jacobian.isfinite().all()):
            raise UserError(f"a gradient of the {batch.name} is not finite, though its losses are; no step was taken")
        return jacobian, torch.stack(sums).sum(dim=0) / count, found

    def _row(
        self, roots: Sequence[Tensor], i: int, wanted: Sequence[int], found: list[bool], batch: ClosureBatch
    ) -> Tensor:
        gradients: Sequence[Tensor | None] = [None] * len(wanted)
        if roots[i].requires_grad:
            inputs = [self._layout.parameters[w] for w in wanted]
            try:
                gradients = torch.autograd.grad(roots[i], inputs, retain_graph=i + 1 < len(roots), allow_unused=True)
            except RuntimeError as error:
                if "second time" not in str(error):  # in torch's words: of a graph that is freed
                    raise
                raise UserError(
                    f"the graph of loss {i + 1} of the {batch.name} is gone: the closure must not call backward, and "
                    "must compute its losses anew each time"
                ) from error
        if all(gradient is None for gradient in gradients):
            raise UserError(
                f"loss {i + 1} of the {batch.name} has no gradient with respect to any parameter of the optimizer: "
                "does the closure compute it, without torch.no_grad, without detaching it, and without backward?"
            )
        parts: list[Tensor | None] = [None] * len(self._layout.parameters)
        for w, gradient in zip(wanted, gradients, strict=True):
            parts[w] = gradient
            found[w] = found[w] or gradient is not None
        return self._layout.flat(parts)

    def _checked(self, losses: list[Tensor], batch: ClosureBatch) -> list[Tensor]:
        """Return the losses in the precision of z, on its device; raise UserError where they are not as before."""
        if not self.objectives:
            self.objectives, self.samples = len(losses), losses[0].dim() == 1
        if len(losses) != self.objectives:
            raise UserError(f"the {batch.name} returned {len(losses)} losses, before there were {self.objectives}")
        if (losses[0].dim() == 1) != self.samples:
            raise UserError(f"the {batch.name} must return scalars, or vectors, as the one before it did")
        return [loss.to(self.device, self.dtype) for loss in losses]

    def _shared_out(self, found: list[list[bool]]) -> Tensor | None:
        """Return each objective's share of the decay [m, n]: alike for those that reach a parameter."""
        if self._decay is None:
            return None
        counts = [max(1, sum(column)) for column in zip(*found, strict=True)]
        shares = [[there / k for there, k in zip(row, counts, strict=True)] for row in found]
        return torch.cat([self._layout.spread(row) for row in shares]) * self._decay

    def _penalty(self, parameters: Tensor) -> Tensor | float:
        """Return what the decay adds to each objective [m]."""
        return 0.0 if self._shares is None else (self._shares * parameters.square()).sum(dim=1) / 2

    @contextmanager
    def _at(self, parameters: Tensor) -> Iterator[None]:
        """Run the block at `parameters` [1, n]; the user's parameters are as they were afterwards, whatever happens."""
        before = [parameter.detach().clone() for parameter in self._layout.parameters]
        try:
            self._layout.write(parameters)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._layout.parameters, before, strict=True):
                    parameter.copy_(value)


def _check_finite(losses: Sequence[Tensor], batch: ClosureBatch) -> None:
    for i, loss in enumerate(losses):
        values = loss.detach().flatten()
        bad = values[~values.isfinite()]
        if len(bad):
            raise UserError(f"loss {i + 1} of the {batch.name} is not finite: {float(bad[0])}; no step was taken")


def _random_states(devices: Sequence[torch.device]) -> dict[torch.device, Tensor]:
    """Return the states of torch's generators: the CPU's, and those of the CUDA devices."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    return states | {device: torch.cuda.get_rng_state(device) for device in devices}


def _set_random_states(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


@contextmanager
def _random_states_of(states: dict[torch.device, Tensor]) -> Iterator[None]:
    """Run the block from these states of the generators; they go on afterwards as if it had not been run."""
    now = _random_states([device for device in states if device.type == "cuda"])
    _set_random_states(states)
    try:
        yield
    finally:
        _set_random_states(now)


@contextmanager
def _no_traces(wanted: bool) -> Iterator[None]:
    """With `wanted`, undo what the block changes in the buffers of the modules in training mode that it calls."""
    if not wanted:
        yield
        return
    saved: dict[tuple[int, str], tuple[nn.Module, Tensor, Tensor]] = {}

    def save(module: nn.Module, _: Any) -> None:
        if module.training:
            for name, buffer in module._buffers.items():
                if buffer is not None and (id(module), name) not in saved:
                    saved[id(module), name] = (module, buffer, buffer.detach().clone())

    hook = register_module_forward_pre_hook(save)
    try:
        yield
    finally:
        hook.remove()
        with torch.no_grad():
            for (_, name), (module, buffer, value) in saved.items():
                buffer.copy_(value)
                module._buffers[name] = buffer
