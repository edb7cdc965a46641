"""Any torch module with its losses and data as a problem."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ml2o_dist.problems.base import Batch, Problem, ProblemContext
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import derive_seed

Losses = Callable[..., Tensor | Sequence[Tensor]]
"""(model, *batch) -> the m losses of every sample: m vectors [B], or one tensor [B, m]."""

Metrics = Callable[..., Mapping[str, Tensor | Sequence[float]]]
"""(model, *samples) -> name -> a figure for each objective, [m]."""

TEST_CHUNK = 1024
"""Number of test samples that go through the module at a time."""


@dataclass(frozen=True)
class ModuleBatch:
    """A batch for each instance: tensors [P, B, ...], and the seed of what the module draws, such as dropout."""

    tensors: tuple[Tensor, ...]
    seed: int


class ModuleProblem(Problem):
    """P instances of a module: the same data and losses, starting points and batches of their own.

        @register_problem("moons")
        def moons(context: ProblemContext, *, hidden: int = 16) -> Problem:
            def losses(model, x, label, angle):
                logits, guess = model(x)
                return F.cross_entropy(logits, label, reduction="none"), (guess - angle).square()

            train, test = made_data()
            return ModuleProblem(context, lambda: Net(hidden), losses, train, test=test, batch=32, positive=True)

    The module keeps its training mode. Random numbers that it draws (dropout) are a function of the batch, so that two
    points are compared with the same numbers. Buffers keep their initial values: layers with running statistics
    (BatchNorm) use the batch's statistics, also in tests. Tied weights count once.
    """

    def __init__(
        self,
        context: ProblemContext,
        make: Callable[[], nn.Module],
        losses: Losses,
        data: Tensor | Sequence[Tensor] | Iterable[Any],
        *,
        test: Tensor | Sequence[Tensor] | Iterable[Any] | None = None,
        batch: int = 64,
        positive: bool = False,
        metrics: Metrics | None = None,
    ) -> None:
        """Make the module once, to see what it has, and call the losses once.

        Args:
            make: returns the module with its initial weights; torch's random numbers are seeded while it is made.
            losses: returns a batch's losses, sample by sample; `model` is called like the module.
            data: the training samples, tensors [N, ...] or a data loader, which is read to its end once.
            test: unseen samples, for `test_loss`; None: there are none.
            batch: B, samples in a batch, drawn with replacement.
            positive: every loss is >= 0 by construction.
            metrics: further figures on the test samples, such as `test_accuracy`.

        Raises:
            UserError: data that are no tensors of one length, losses that are not [B] each, a module without
                trainable parameters.
        """
        self.instances, self.device, self.dtype = context.instances, context.device, context.dtype
        self.positive = positive
        self._make, self._losses, self._metrics, self._size = make, losses, metrics, batch
        if batch < 1:
            raise UserError(f"a module problem needs batch >= 1, not {batch}")
        self._module = self._made("module").to(self.device, self.dtype)
        self._layout = _layout_of(self._module)
        if not self._layout.dimension:
            raise UserError(f"{type(self._module).__name__} has no parameter that requires a gradient")
        self.dimension = self._layout.dimension
        self._train = self._tensors(data, "data")
        self._test = None if test is None else self._tensors(test, "test")
        few = tuple(tensor[:2] for tensor in self._train)
        self.objectives = 0  # unknown until the losses were called once
        with torch.no_grad():
            found = self._evaluated(self._flat(self._module), few, seed=0)
        self.objectives = found.shape[1]

    @property
    def layout(self) -> ParameterLayout:
        """The module's parameters by name."""
        return self._layout

    def data_hashes(self, *, test: bool) -> dict[str, str]:
        """Return the sha256 of the training samples, and of the test samples."""
        name = type(self._module).__name__
        hashes = {f"{name} data": _sha256(self._train)}
        if test and self._test is not None:
            hashes[f"{name} test"] = _sha256(self._test)
        return hashes

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        """Return starting points [P, n]: the weights of a fresh module each, row i made under `seeds[i]`."""
        rows = [self._flat(self._made("start", seed)) for seed in seeds]
        return torch.stack(rows).to(self.device, self.dtype)

    def sample_batch(self, generator: torch.Generator) -> ModuleBatch:
        """Draw B training samples with replacement for each instance."""
        rows = torch.randint(len(self._train[0]), (self.instances, self._size), generator=generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        rows = rows.to(self.device)
        return ModuleBatch(tuple(tensor[rows] for tensor in self._train), seed)

    def sample_losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Return the losses [P, B, m], one instance after the other."""
        parts = zip(parameters, *batch.tensors, strict=True)
        return torch.stack([self._evaluated(row, each, batch.seed + p) for p, (row, *each) in enumerate(parts)])

    def test_metrics(self, parameters: Tensor) -> dict[str, Tensor]:
        """Return `test_loss` and what `metrics` gives, each [P, m], on the test samples."""
        if self._test is None:
            return {}
        training = [(module, module.training) for module in self._module.modules()]
        for module, _ in training:
            module.train(hasattr(module, "running_mean"))
        try:
            with torch.no_grad():
                each = [self._measured(row) for row in parameters]
        finally:
            for module, mode in training:
                module.training = mode
        return {name: torch.stack([one[name] for one in each]).to(self.dtype) for name in each[0]}

    def _measured(self, row: Tensor) -> dict[str, Tensor]:
        assert self._test is not None
        chunks = zip(*(torch.split(tensor, TEST_CHUNK) for tensor in self._test), strict=True)
        total = sum(self._evaluated(row, chunk, seed=0).double().sum(dim=0) for chunk in chunks)
        found = {"test_loss": torch.as_tensor(total) / len(self._test[0])}
        if self._metrics is not None:
            for name, values in self._metrics(self._model(row), *self._test).items():
                found[name] = torch.as_tensor(values, dtype=torch.float64, device=self.device)
                if found[name].shape != (self.objectives,):
                    raise UserError(
                        f"metric {name!r} must have {self.objectives} values, not {list(found[name].shape)}"
                    )
        return found

    def _evaluated(self, row: Tensor, tensors: Sequence[Tensor], seed: int) -> Tensor:
        """Return the losses [B, m] of one instance."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.cuda.default_generators[device.index or 0].manual_seed(seed)
            found = self._losses(self._model(row), *tensors)
        losses = found if isinstance(found, Tensor) else torch.stack(tuple(found), dim=-1)
        wanted = len(tensors[0]), self.objectives
        if losses.dim() != 2 or len(losses) != wanted[0] or losses.shape[1] != (wanted[1] or losses.shape[1]):
            raise UserError(
                f"the losses of {type(self._module).__name__} must be m vectors of one value for each of the "
                f"{len(tensors[0])} samples, not {list(losses.shape)}: use reduction='none'"
            )
        return losses

    def _model(self, row: Tensor) -> Callable[..., Any]:
        parts = {t.name: part for t, part in zip(self._layout.tensors, self._layout.split(row), strict=True)}
        return lambda *args, **kwargs: functional_call(self._module, parts, args, kwargs)

    def _made(self, *stream: str | int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed("module", *stream))
            return self._make()

    def _flat(self, module: nn.Module) -> Tensor:
        named = dict(module.named_parameters())
        return torch.cat([named[t.name].detach().flatten() for t in self._layout.tensors])

    def _tensors(self, data: Tensor | Sequence[Tensor] | Iterable[Any], what: str) -> tuple[Tensor, ...]:
        if isinstance(data, Tensor):
            tensors: tuple[Any, ...] = (data,)
        elif isinstance(data, tuple | list) and all(isinstance(each, Tensor) for each in data):
            tensors = tuple(data)
        else:
            batches = [each if isinstance(each, tuple | list) else (each,) for each in data]
            if not batches or not all(isinstance(part, Tensor) for batch in batches for part in batch):
                raise UserError(f"{what} of a module problem must be tensors, or a data loader of tuples of tensors")
            tensors = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1 or not lengths.pop():
            raise UserError(f"{what} of a module problem must be tensors of one length, at least 1")
        return tuple(
            tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype) for tensor in tensors
        )


def _layout_of(module: nn.Module) -> ParameterLayout:
    """Return the layout of the trainable parameters; the tables of embeddings are known as such."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return ParameterLayout.of((n, p.shape, "embedding") if id(p) in tables else (n, p.shape) for n, p in named)


def _sha256(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
