"""The T tasks: images, labels, and the cross-entropy of each task.

Tasks share their images (two digits in one picture) or have images of their own; one forward pass of the network
serves one `Group`. The network returns the logits of every head for any images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ml2o_dist.runtime.errors import unknown

Logits = Sequence[Tensor]
"""One network's answer to images [B, 1, H, W]: for each task its logits [B, classes]."""

SPLITS = ("train", "validation", "test")
_CHUNK = 500  # images made float at a time, as in problems/multitask.py


@dataclass(frozen=True, eq=False)
class Group:
    """Images that some tasks share.

    Attributes:
        tasks: which of the T tasks, by number from 0.
        images: uint8 [N, H, W].  labels: int64 [N, len(tasks)].
    """

    tasks: tuple[int, ...]
    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """Standardised images [B, 1, H, W] for the `tasks` of one group, and their labels [B, len(tasks)]."""

    tasks: tuple[int, ...]
    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class TaskSet:
    """T classification tasks with a training, a validation and a test split.

    Attributes:
        names: of the tasks.  classes: how many each has.  side: of the square images.
        splits: the groups of each split; the same tasks in the same order in all three.
        mean, deviation: moments of each group's training pixels, in grey levels, by which images are standardised.
        sha256: hashes of the data, by the name of the data.
    """

    names: tuple[str, ...]
    classes: tuple[int, ...]
    side: int
    splits: Mapping[str, tuple[Group, ...]]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    sha256: Mapping[str, str]

    @property
    def count(self) -> int:
        """T, how many tasks there are."""
        return len(self.names)

    def draw(
        self, split: str, batch: int, generator: torch.Generator, device: torch.device, tasks: Sequence[int] = ()
    ) -> list[TaskBatch]:
        """Draw `batch` samples with replacement from each group of `split`; with `tasks` only those groups that have
        one of them.
        """
        drawn = []
        for g, group in enumerate(self._groups(split)):
            rows = torch.randint(len(group.images), (batch,), generator=generator)
            if not tasks or set(tasks) & set(group.tasks):
                drawn.append(self._batch(g, group, rows, device))
        return drawn

    @torch.no_grad()
    def measure(
        self, answer: Callable[[Tensor], Logits], split: str, device: torch.device, samples: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropies [T] and accuracies [T], float64 on the CPU, over `split`.

        `answer` maps images to the logits of all tasks. With `samples`, only that many evenly spaced images of each
        group are used, the same at every call.
        """
        losses = torch.zeros(self.count, dtype=torch.float64)
        accuracies = torch.zeros_like(losses)
        for g, group in enumerate(self._groups(split)):
            count = len(group.images) if samples is None else min(samples, len(group.images))
            rows = torch.arange(count) * len(group.images) // count
            for chunk in torch.split(rows, _CHUNK):
                batch = self._batch(g, group, chunk, device)
                logits = answer(batch.images)
                for column, t in enumerate(batch.tasks):
                    labels = batch.labels[:, column]
                    losses[t] += float(F.cross_entropy(logits[t], labels, reduction="sum")) / count
                    accuracies[t] += float((logits[t].argmax(dim=1) == labels).sum()) / count
        return losses, accuracies

    def _groups(self, split: str) -> tuple[Group, ...]:
        if split not in self.splits:
            raise unknown("split", split, SPLITS)
        return self.splits[split]

    def _batch(self, g: int, group: Group, rows: Tensor, device: torch.device) -> TaskBatch:
        images = group.images[rows].to(device, torch.float32)
        images = images.sub_(self.mean[g]).div_(self.deviation[g]).unsqueeze(1)
        return TaskBatch(group.tasks, images, group.labels[rows].to(device))


def sample_losses(answers: Sequence[Logits], batches: Sequence[TaskBatch]) -> Tensor:
    """Return the cross-entropies of every sample [B, T']; T' are the batches' tasks, in order of their number.

    `answers` has the logits of all tasks for each batch.
    """
    columns: dict[int, Tensor] = {}
    for logits, batch in zip(answers, batches, strict=True):
        for column, t in enumerate(batch.tasks):
            columns[t] = F.cross_entropy(logits[t], batch.labels[:, column], reduction="none")
    return torch.stack([columns[t] for t in sorted(columns)], dim=1)
