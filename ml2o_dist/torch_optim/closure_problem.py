"""A user's closures as a `Problem`, so that the rules of this package can optimize whatever they compute.

P = 1 instance, m objectives, n parameters, B samples. A batch is the data that a closure computes its losses on. A step
may call a closure several times, at different values of the parameters. Every call draws the same random numbers
(dropout) and starts with the same module buffers (BatchNorm's running moments). After the step the buffers have the
values that the closure's first call left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ml2o_dist.problems.base import Batch, Problem
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.torch_optim.buffers import ModuleBuffers, Snapshot
from ml2o_dist.torch_optim.closures import ClosureBatch
from ml2o_dist.torch_optim.differentiation import gradients_of, refuse_reentrant_checkpoints
from ml2o_dist.torch_optim.flat_parameters import FlatParameters

CPU_ROUNDING, ROUNDING = 1e-5, 1e-3
"""How much the losses of two calls of a closure may differ, relative to the largest of their samples: on the CPU, where
nearly everything repeats exactly, and on other devices, where atomic sums do not."""

MOST_INSPECTED = 256
"""Most sets of reached parameters whose graphs are searched: a model that skips parts at random has a new set each
step."""

MISSING_LABELS = (
    "Where samples lack a label, put a number in its place before the loss, torch.where(mask, label, 0), leave the "
    "loss out after it, torch.where(mask, loss, 0), and divide by no count that can be 0"
)
"""Error text for a NaN loss or gradient: if only the loss is masked out, its gradient is 0 times NaN."""


class ClosureProblem(Problem):
    """min over the parameters of `layout` of (f_1, ..., f_m), as the closures of one step compute them.

    Weight decay adds d_p |z_p|^2 / (2 k_p) to each of the k_p objectives that have a gradient by parameter p. Their sum
    then has the usual penalty of torch's Adam on the summed loss. An objective that does not depend on p, such as
    another task's on a head, gets no penalty: features ignore a gradient's scale, so any penalty would seem large.

    Attributes:
        reached: for each parameter whether `begin` found a gradient.
        plain: the losses [m] of `begin`, without penalties.
        samples: whether the closure returned losses of single samples, not scalars.
    """

    instances = 1

    def __init__(
        self,
        flat: FlatParameters,
        training: ClosureBatch,
        guard: ClosureBatch | None,
        decay: Tensor | None,
        *,
        fewest: int = 1,
        buffers: ModuleBuffers | None = None,
    ) -> None:
        """Without a `guard` batch, use the training batch for it; a comparison needs at least `fewest` samples.

        `decay`: d for each number, [1, n], or None for no decay. `buffers`: restored when closures are called again.
        """
        self._flat, self._training, self._after, self._drawn = flat, training, guard or training, 0
        self.device, self.dtype = flat.device, flat.dtype
        self.dimension, self.objectives = flat.dimension, 0  # the first call tells how many
        self.samples, self.fewest = False, fewest
        self.reached = [True] * len(flat.parameters)
        self.plain = torch.zeros(0)
        self._decay, self._buffers = decay, buffers
        self._shares: Tensor | None = None  # shares of d [m, n], set by `begin`; None without decay
        self._devices = sorted({p.device for p in flat.parameters if p.device.type == "cuda"}, key=str)
        self._start = self._left = flat.read()  # before the first call and after it
        self._before: Snapshot | None = None  # the buffers as the step found them
        self._first: Snapshot | None = None  # the buffers as the first call left them
        self._seen: list[list[Tensor]] = []  # from a careful `begin`, the losses of each part

    @property
    def layout(self) -> ParameterLayout:
        """The parameters by name."""
        return self._flat.layout(modules=None if self._buffers is None else self._buffers.modules())

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run a step in the block, which starts with `begin`; after the block the caller writes the parameters.

        After the block, buffers have the values that the first call of the training closure left. On an error,
        parameters and restored buffers get the values that they had before the block.
        """
        if self._buffers is not None:
            self._before = self._buffers.snapshot()
        try:
            yield
        except BaseException:
            self._flat.write(self._start)
            if self._before is not None:
                self._before.restore()
            raise
        if self._first is not None:
            self._first.restore()

    def begin(self, inspected: set[tuple[bool, ...]], *, careful: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Call the training closure for the first time; return (z [1, n], J [1, m, n], losses [1, m]), detached.

        z is the starting point of the step: the parameters after the call, as the closure may write some of them in
        place (an embedding with max_norm does).

        Args:
            inspected: sets of parameters reached by graphs already found free of reentrant checkpoints; it grows.
            careful: whether to look for a closure that calls backward, and to prepare `check_repeats`.

        Raises:
            UserError: an objective without a gradient, a loss or a gradient that is not finite, what `careful` finds.
        """
        torch.clear_autocast_cache()
        if careful:
            self._training.forbid_backward(self._flat.parameters)
        found = self._differentiated(self._training, inspected=inspected)
        left = self._left = self._flat.read()
        self.plain, self.reached = found.losses, [any(column) for column in zip(*found.reached, strict=True)]
        if self._buffers is not None and self._before is not None:
            self._before.add(self._buffers.strangers())
            self._first = self._buffers.snapshot()
        self._seen = found.values if careful else []
        self._shares = self._shared_out(found.reached)
        rows = found.rows if self._shares is None else found.rows + self._shares * left
        return left, rows.unsqueeze(0), (found.losses + self._penalty(left)).unsqueeze(0)

    def check_repeats(self) -> None:
        """Raise UserError if a closure gives other losses when it is called again at the same point.

        Call it after a careful `begin`. Either the point before the first call or the point after it may match: some
        models write their parameters in their first forward only.
        """
        first = self._joined([_stacked(values) for values in self._seen])
        points = (self._start, self._left)
        if not any(_equal(first, self._values(point, self._training)) for point in points):
            raise UserError(self._training.repeats_wrongly)
        self._seen = []
        if self._after is not self._training:
            one, other = (self._values(self._left, self._after) for _ in range(2))
            if not _equal(one, other):
                raise UserError(self._after.repeats_wrongly)

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        """Return the current parameters."""
        return self._flat.read()

    def sample_batch(self, generator: torch.Generator) -> ClosureBatch:
        """Return the training batch, at later calls the guard batch: closures draw their samples themselves."""
        self._drawn += 1
        return self._training if self._drawn == 1 else self._after

    def exact(self, batch: Batch) -> bool:
        """Tell whether there is only one value for each objective, so that its error cannot be estimated."""
        return not self.samples

    def sample_losses(self, parameters: Tensor, batch: ClosureBatch) -> Tensor:
        """Return the losses of every sample [1, B, m], or [1, 1, m] where the closure returns scalars, detached.

        Raises:
            UserError: the batch has too few samples for a comparison.
        """
        values = self._values(parameters, batch)
        if self.samples and batch is self._after and len(values) < self.fewest:
            raise UserError(
                f"the {batch.name} returned the losses of {len(values)} samples, to tell worse from noise takes "
                f"{self.fewest} or more: leave out a smaller last batch (drop_last=True), or return scalars"
            )
        if not self.samples:
            values = values.mean(dim=0, keepdim=True)
        return (values + self._penalty(parameters)).unsqueeze(0)

    def jacobian(self, parameters: Tensor, batch: ClosureBatch) -> tuple[Tensor, Tensor]:
        """Return (J [1, m, n], losses [1, m]), detached. Raises UserError as `begin`."""
        with self._at(parameters):
            found = self._differentiated(batch)
        rows = found.rows if self._shares is None else found.rows + self._shares * parameters
        return rows.unsqueeze(0), (found.losses + self._penalty(parameters)).unsqueeze(0)

    def gradient(self, parameters: Tensor, batch: ClosureBatch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return (J^T weights [1, n], losses [1, m]), detached; `weights` [1, m]. Raises UserError as `begin`."""
        with self._at(parameters):
            found = self._differentiated(batch, weights[0])
        rows = found.rows if self._shares is None else found.rows + weights @ self._shares * parameters
        return rows, (found.losses + self._penalty(parameters)).unsqueeze(0)

    @contextmanager
    def _at(self, parameters: Tensor) -> Iterator[None]:
        """Run the block at `parameters` [1, n], with the buffers that the step began with.

        Gradients are always enabled, even if none is needed: a closure may differentiate by itself, and torch.compile
        then compiles it only once.
        """
        torch.clear_autocast_cache()  # an autocast around the whole step keeps copies of other values
        self._flat.write(parameters)
        if self._before is not None:
            self._before.restore()
        with torch.enable_grad():
            yield

    def _values(self, parameters: Tensor, batch: ClosureBatch) -> Tensor:
        """Return the losses of every sample [B, m], or of every part [parts, m] if these are scalars, detached."""
        parts = []
        with self._at(parameters):
            for k in range(len(batch.closures)):
                with batch.part(k, self._devices) as losses:
                    parts.append(_stacked(self._checked(losses, batch)))
                del losses  # frees the part's graph before the next part's is built
        return self._joined(parts)

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)) if self.samples else torch.stack(list(parts))

    def _differentiated(
        self, batch: ClosureBatch, weights: Tensor | None = None, inspected: set[tuple[bool, ...]] | None = None
    ) -> _Differentiated:
        """Differentiate each objective, or their weighted sum, at the current parameters."""
        wanted = [i for i, parameter in enumerate(self._flat.parameters) if parameter.requires_grad]
        inputs = [self._flat.parameters[i] for i in wanted]
        reached: list[list[bool]] = []
        rows: list[Tensor] = []
        sums: list[Tensor] = []
        every: list[list[Tensor]] = []
        count = 0
        with torch.enable_grad():
            for k in range(len(batch.closures)):
                with batch.part(k, self._devices) as losses:
                    values = self._checked(losses, batch)
                    _check_finite(values, batch)
                    totals = roots = [value.sum() for value in values]
                    if weights is not None:
                        roots = [torch.stack([w * total for w, total in zip(weights, totals, strict=True)]).sum()]
                    reached = reached or [[False] * len(self._flat.parameters) for _ in roots]
                    found = []
                    for i, row in enumerate(reached):
                        gradients = gradients_of(roots, i, inputs, batch.name)
                        parts: list[Tensor | None] = [None] * len(row)
                        for w, gradient in zip(wanted, gradients, strict=True):
                            parts[w], row[w] = gradient, row[w] or gradient is not None
                        found.append(self._flat.flat(parts))
                    rows.append(torch.stack(found))
                    pattern = tuple(any(column) for column in zip(*reached, strict=True))
                    if inspected is not None and pattern not in inspected and len(inspected) < MOST_INSPECTED:
                        refuse_reentrant_checkpoints(roots, batch.name)
                        inspected.add(pattern)
                every.append([value.detach() for value in values])
                sums.append(torch.stack([total.detach() for total in totals]))
                count += len(values[0]) if self.samples else 1
                del losses, values, totals, roots, found, gradients  # frees the graph before the next part's
        jacobian = torch.stack(rows).sum(dim=0) / count
        if not bool(jacobian.isfinite().all()):
            what = f"a gradient of the {batch.name} is not finite, though its losses are"
            raise UserError(f"{what}; no step was taken. {MISSING_LABELS}")
        return _Differentiated(jacobian, torch.stack(sums).sum(dim=0) / count, reached, every)

    def _checked(self, losses: list[Tensor], batch: ClosureBatch) -> list[Tensor]:
        """Return the losses in the precision of z, on its device; raise UserError if their form changed."""
        if not self.objectives:
            self.objectives, self.samples = len(losses), losses[0].dim() == 1
        if len(losses) != self.objectives:
            raise UserError(f"the {batch.name} returned {len(losses)} losses, before there were {self.objectives}")
        if (losses[0].dim() == 1) != self.samples:
            raise UserError(f"the {batch.name} must return scalars, or vectors, as the one before it did")
        return [loss.to(self.device, self.dtype) for loss in losses]

    def _shared_out(self, found: list[list[bool]]) -> Tensor | None:
        """Return each objective's share of the decay [m, n]: equal for all objectives that reach a parameter."""
        if self._decay is None:
            return None
        counts = [max(1, sum(column)) for column in zip(*found, strict=True)]
        shares = [[there / k for there, k in zip(row, counts, strict=True)] for row in found]
        return torch.cat([self._flat.spread(row) for row in shares]) * self._decay

    def _penalty(self, parameters: Tensor) -> Tensor | float:
        """Return the decay's penalty on each objective [m]."""
        return 0.0 if self._shares is None else (self._shares * parameters.square()).sum(dim=1) / 2


class _Differentiated(NamedTuple):
    """The results of one pass over a batch, detached.

    Attributes:
        rows: the gradients of the objectives [m, n], or of their weighted sum [1, n].
        losses: [m].
        reached: for each row, which parameters have a gradient.
        values: the m losses of each part of the batch, scalars or [B].
    """

    rows: Tensor
    losses: Tensor
    reached: list[list[bool]]
    values: list[list[Tensor]]


def _stacked(losses: Sequence[Tensor]) -> Tensor:
    """Return m losses, scalars or [B], as one tensor [m] or [B, m], detached."""
    return torch.stack([loss.detach() for loss in losses], dim=-1)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether the losses of two calls, [B, m] or [parts, m], are equal up to rounding."""
    rounding = CPU_ROUNDING if one.device.type == "cpu" else ROUNDING
    return one.shape == other.shape and not bool(((one - other).abs() > rounding * one.abs().amax(dim=0)).any())


def _check_finite(losses: Sequence[Tensor], batch: ClosureBatch) -> None:
    for i, loss in enumerate(losses):
        values = loss.detach().flatten()
        bad = values[~values.isfinite()]
        if len(bad):
            hint = f". {MISSING_LABELS}" if bool(bad[0].isnan()) else ""
            raise UserError(f"loss {i + 1} of the {batch.name} is not finite: {float(bad[0])}; no step was taken{hint}")
