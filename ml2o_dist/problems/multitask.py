"""Multi-task classification of two-image data as Problems: one network, one cross-entropy for each task.

f_i(z) = E[-log softmax(head_i(trunk(x)))[y_i]], over the pairs (x, (y_1, y_2)) of the training split. P instances
differ by their starting points and their batches only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ml2o_dist.problems.base import Batch, Problem, ProblemContext
from ml2o_dist.problems.closed_form import LARGEST
from ml2o_dist.problems.image_sets import image_classes, image_side, image_tasks, load_images
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.problems.networks import Network, build_network
from ml2o_dist.problems.spec import register_problem
from ml2o_dist.runtime.errors import UserError

TEST_SAMPLES = 2000
"""How many test pairs `test_metrics` uses: a standard error of about one point of accuracy, for a second of work."""
_TEST_CHUNK = 500  # images made float at a time: memory stays small, and longer chunks are no faster


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """One batch for each instance: images [P, B, 1, H, W] standardised, labels int64 [P, B, m]."""

    images: Tensor
    labels: Tensor


class MultiTaskImages(Problem):
    """A network with one head for each task, trained on the two-image data set `data`.

    Pixels are standardised with the mean and deviation of the training pairs, as is usual on these data. The losses'
    reference point is the (2, 2) of the published hypervolumes on these data.

    Attributes:
        network: shapes and forward function.  data, size, data_root: what `load_images` is called with.
        data_sha256: of the training pairs.
    """

    positive = True

    def __init__(
        self,
        data: str,
        network: Network,
        context: ProblemContext,
        *,
        size: int = 0,
        batch: int = 64,
        init: float = 1.0,
        vectorized: bool | None = None,
    ) -> None:
        """Load the training pairs; with a GPU, onto the device.

        `vectorized`: whether the instances go through the network together or in a loop. By default they go together on
        a GPU, and on a CPU if all layers are dense: on a CPU vmap over convolutions is up to twice as slow as the loop.
        """
        self.instances, self.device, self.dtype = context.instances, context.device, context.dtype
        self.objectives, self.dimension = network.tasks, network.dimension
        self.reference_point = torch.full((self.objectives,), 2.0, dtype=self.dtype, device=self.device)
        self.network, self.data, self.size, self.data_root = network, data, size, context.data_root
        pairs = load_images(data, "train", size, context.data_root)
        self.data_sha256 = pairs.sha256
        self._images = pairs.images.to(self.device)
        self._labels = pairs.labels[:, : self.objectives].to(self.device)
        self._mean, self._deviation = pairs.mean, pairs.deviation
        self._batch, self._init = batch, init
        together = self.device.type != "cpu" or not network.convolutional
        self._vectorized = together if vectorized is None else vectorized

    @property
    def layout(self) -> ParameterLayout:
        """The network's tensors."""
        return self.network.layout

    def data_hashes(self, *, test: bool) -> dict[str, str]:
        """Return the sha256 of the training pairs, with `test` of the test pairs too, by name."""
        name = f"{self.data}[size={self.size}]"
        hashes = {name: self.data_sha256}
        if test:
            hashes[f"{name} test"] = load_images(self.data, "test", self.size, self.data_root).sha256
        return hashes

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        """Return starting points [P, n]: torch's default initialisation, row i drawn from `seeds[i]`."""
        rows = [self.network.initial_parameters(seed, self._init) for seed in seeds]
        return torch.stack(rows).to(self.device, self.dtype)

    def sample_batch(self, generator: torch.Generator) -> ImageBatch:
        """Draw B training pairs with replacement for each instance."""
        rows = torch.randint(len(self._images), (self.instances, self._batch), generator=generator)
        rows = rows.to(self.device)
        return ImageBatch(self._floats(self._images[rows]), self._labels[rows])

    def sample_losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropies [P, B, m]; `parameters` [P, n]."""
        losses = []
        for group in self._groups(len(parameters)):
            tensors = self.network.split(parameters[group])
            logits = self.network.logits(tensors, self._features(tensors.trunk, batch.images[group]))
            losses.append(-_log_likelihoods(logits, batch.labels[group]).mT)
        return torch.cat(losses)

    def jacobian(self, parameters: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (J [P, m, n], losses [P, m]), detached."""
        jacobian = parameters.new_zeros(len(parameters), self.objectives, self.dimension)
        losses = parameters.new_empty(len(parameters), self.objectives)
        for group in self._groups(len(parameters)):
            self._write_jacobian(
                parameters[group].detach(), batch.images[group], batch.labels[group], jacobian[group], losses[group]
            )
        return jacobian, losses

    def test_metrics(
        self, parameters: Tensor, *, split: str = "test", samples: int | None = TEST_SAMPLES
    ) -> dict[str, Tensor]:
        """Return `test_loss` and `test_accuracy`, each [P, m], on fixed pairs of `split`.

        The pairs are `samples` evenly spaced ones (all with None): the same at every call, for every method.
        """
        pairs = load_images(self.data, split, self.size, self.data_root)
        count = len(pairs.images) if samples is None else min(samples, len(pairs.images))
        rows = torch.arange(count) * len(pairs.images) // count
        loss = torch.zeros(len(parameters), self.objectives, dtype=torch.float64, device=self.device)
        correct = torch.zeros_like(loss)
        with torch.no_grad():
            for start in range(0, count, _TEST_CHUNK):
                chunk = rows[start : start + _TEST_CHUNK]
                images = self._floats(pairs.images[chunk].to(self.device))
                labels = pairs.labels[chunk, : self.objectives].to(self.device)
                for p, row in enumerate(parameters.detach()):
                    tensors = self.network.split(row)
                    logits = self.network.logits(tensors, self.network.features(tensors.trunk, images))
                    loss[p] -= _log_likelihoods(logits, labels).sum(dim=1)
                    correct[p] += (logits.argmax(dim=2) == labels.mT).sum(dim=1)
        return {"test_loss": (loss / count).to(self.dtype), "test_accuracy": (correct / count).to(self.dtype)}

    def _floats(self, images: Tensor) -> Tensor:
        """Return uint8 `images` [..., H, W] as [..., 1, H, W], standardised as the training pairs are."""
        return images.to(self.dtype).sub_(self._mean).div_(self._deviation).unsqueeze(-3)

    def _groups(self, instances: int) -> list[slice]:
        """Return the instances that go through the network together: all of them, or each on its own."""
        return [slice(None)] if self._vectorized else [slice(p, p + 1) for p in range(instances)]

    def _features(self, trunk: list[Tensor], images: Tensor) -> Tensor:
        """Return the trunk's features [G, B, F] of one group: `trunk` tensors and `images` have G in front."""
        if self._vectorized and not self.network.convolutional:
            return self.network.features(trunk, images)
        if self._vectorized:
            features: Tensor = torch.func.vmap(self.network.features)(trunk, images)
            return features
        one = images.squeeze(0)
        if self.network.convolutional:
            one = one.to(memory_format=torch.channels_last)  # halves the time of convolution and pooling on a CPU
        return self.network.features([tensor.squeeze(0) for tensor in trunk], one).unsqueeze(0)

    def _write_jacobian(
        self, parameters: Tensor, images: Tensor, labels: Tensor, jacobian: Tensor, losses: Tensor
    ) -> None:
        """Write one group's rows into `jacobian` [G, m, n], zero so far, and `losses` [G, m].

        The heads are differentiated by hand, all at once, and autograd starts at the features: with softmax
        probabilities p of a task, the mean loss has the gradient (p - onehot(y)) / B with respect to the logits.
        So nothing is computed for a head that an objective does not depend on.
        """
        network, tensors = self.network, self.network.split(parameters)
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_(True) for tensor in tensors.trunk]
            features = self._features(leaves, images)
        with torch.no_grad():
            logits = network.logits(tensors, features)
            losses.copy_(-_log_likelihoods(logits, labels).mean(dim=-1))
            slopes = logits.softmax(dim=-1)
            slopes.scatter_add_(-1, labels.mT.unsqueeze(-1), slopes.new_full((), -1.0).expand(*slopes.shape[:-1], 1))
            slopes /= labels.shape[1]
            to_features = slopes @ tensors.head_weight
            to_weights = (slopes.mT @ features.unsqueeze(1)).flatten(2)
            to_heads = torch.cat([to_weights, slopes.sum(dim=2)], dim=2)
        shared = network.trunk_dimension
        for i in range(self.objectives):
            more = i + 1 < self.objectives
            gradients = torch.autograd.grad(features, leaves, to_features[:, i], retain_graph=more)
            torch.cat([gradient.flatten(1) for gradient in gradients], dim=1, out=jacobian[:, i, :shared])
            own = shared + i * network.head_dimension
            jacobian[:, i, own : own + network.head_dimension] = to_heads[:, i]


def _log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-likelihoods [..., m, B] of `labels` [..., B, m] under `logits` [..., m, B, classes]."""
    return logits.log_softmax(dim=-1).gather(-1, labels.mT.unsqueeze(-1)).squeeze(-1)


@register_problem(
    "multimnist",
    "Two overlapping MNIST digits on 36x36 pixels, one classification task for each.",
    data="multimnist",
)
@register_problem(
    "multifashion",
    "Two overlapping Fashion-MNIST articles on 36x36 pixels, one classification task for each.",
    data="multifashion",
)
@register_problem(
    "multifashionmnist",
    "A Fashion-MNIST article (task 1) overlapping an MNIST digit (task 2) on 36x36 pixels.",
    data="multifashionmnist",
)
@register_problem(
    "multidigits",
    "Two overlapping 8x8 digits of scikit-learn on 12x12 pixels: small, and needs no download.",
    data="multidigits",
)
def build(
    context: ProblemContext,
    *,
    data: str,
    net: str = "mlp",
    hidden: str | int = "24",
    channels: str | int = "8-16",
    kernel: int = 3,
    variant: str = "cosmos",
    activation: str = "relu",
    batch: int = 64,
    size: int = 0,
    tasks: int = 2,
    init: float = 1.0,
) -> Problem:
    """net: mlp (uses hidden), cnn (channels, kernel 3 or 5), lenet5 (variant cosmos or paretomtl), vgg (channels, one
        width for each block). Settings that the net does not use are ignored.
    hidden, channels: widths joined by '-', as in 24 or 40-40.  activation: relu, tanh or gelu.
    batch: pairs in a batch, for each instance.  size: side after average pooling, a divisor of the canvas; 0 keeps it.
    tasks: 2, one for each image; 1 for the top-left one only; 3 for both and, as a third task (ours), the sum of the
        two class indices modulo 10.  init: factor on torch's default initialisation.
    """
    for setting, value, least in (("batch", batch, 1), ("tasks", tasks, 1), ("size", size, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            raise UserError(f"{setting} {value!r} of {data} is not an integer >= {least} (and <= {LARGEST})")
    if tasks > image_tasks(data):
        raise UserError(f"tasks {tasks} of {data} is not one of 1 to {image_tasks(data)}")
    if isinstance(init, bool) or not isinstance(init, int | float) or not 0 < init < float("inf"):
        raise UserError(f"init {init!r} of {data} is not a positive number")
    network = build_network(
        str(net),
        side=image_side(data, size),
        classes=image_classes(data),
        tasks=tasks,
        hidden=hidden,
        channels=channels,
        kernel=kernel,
        variant=str(variant),
        activation=str(activation),
    )
    return MultiTaskImages(data, network, context, size=size, batch=batch, init=init)
