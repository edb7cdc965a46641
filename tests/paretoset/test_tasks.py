"""Task sets: batches, figures over a split, losses of samples; against loops written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ml2o_dist.paretoset.tasks import TaskBatch, TaskSet, sample_losses
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator
from tests.paretoset.small import separate_noise, shared_noise, small_multi_head

CPU = torch.device("cpu")
MAKERS = [separate_noise, shared_noise]


def cross_entropy(logits: Tensor, label: int) -> float:
    return float(torch.log(torch.exp(logits.double()).sum()) - logits.double()[label])


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("samples", [None, 7, 1, 1000])
def test_figures_are_those_of_a_loop(make: Callable[..., TaskSet], samples: int | None) -> None:
    tasks, network = make(3), small_multi_head(3)
    with torch.no_grad():
        losses, accuracies = tasks.measure(network, "validation", CPU, samples)
    assert losses.dtype == accuracies.dtype == torch.float64
    for g, group in enumerate(tasks.splits["validation"]):
        n = len(group.images)
        count = n if samples is None else min(samples, n)
        rows = [i * n // count for i in range(count)]
        for column, t in enumerate(group.tasks):
            total, right = 0.0, 0
            for row in rows:
                image = (group.images[row].float() - tasks.mean[g]) / tasks.deviation[g]
                with torch.no_grad():
                    logits = network(image[None, None])[t][0]
                label = int(group.labels[row, column])
                total += cross_entropy(logits, label)
                right += int(logits.argmax()) == label
            assert float(losses[t]) == pytest.approx(total / count, rel=1e-5)
            assert float(accuracies[t]) == pytest.approx(right / count)


def test_figures_over_many_chunks_are_those_over_all() -> None:
    tasks, network = shared_noise(2, count=1234), small_multi_head(2)
    losses, _ = tasks.measure(network, "test", CPU)
    (group,) = tasks.splits["test"]
    images = ((group.images.double() - tasks.mean[0]) / tasks.deviation[0]).unsqueeze(1)
    logits = network.double()(images)
    for t in range(2):
        expected = torch.nn.functional.cross_entropy(logits[t], group.labels[:, t])
        assert float(losses[t]) == pytest.approx(float(expected.detach()), rel=1e-6)


@pytest.mark.parametrize("make", MAKERS)
def test_batches_are_standardised_samples_with_their_labels(make: Callable[..., TaskSet]) -> None:
    tasks = make(2)
    for g, batch in enumerate(tasks.draw("train", 50, generator("batch"), CPU)):
        group = tasks.splits["train"][g]
        assert batch.tasks == group.tasks
        assert batch.images.shape == (50, 1, 4, 4)
        assert batch.images.dtype == torch.float32
        known = {image.numpy().tobytes(): label for image, label in zip(group.images, group.labels, strict=True)}
        for image, label in zip(batch.images, batch.labels, strict=True):
            pixels = (image[0] * tasks.deviation[g] + tasks.mean[g]).round().to(torch.uint8)
            assert torch.equal(known[pixels.numpy().tobytes()], label)


@pytest.mark.parametrize("make", MAKERS)
def test_draws_are_a_function_of_the_generator(make: Callable[..., TaskSet]) -> None:
    tasks, before = make(2), torch.get_rng_state()
    one, same, other = (tasks.draw("train", 8, generator("draw", i), CPU) for i in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    for a, b, c in zip(one, same, other, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert not torch.equal(a.images, c.images)


def test_a_task_alone_gets_the_batch_that_it_gets_in_company() -> None:
    tasks = separate_noise(3)
    every = tasks.draw("train", 8, generator("draw"), CPU)
    (alone,) = tasks.draw("train", 8, generator("draw"), CPU, tasks=[1])
    assert alone.tasks == (1,)
    assert torch.equal(alone.images, every[1].images)
    (shared,) = shared_noise(3).draw("train", 8, generator("draw"), CPU, tasks=[2])
    assert shared.tasks == (0, 1, 2)


def test_an_image_is_not_written_to() -> None:
    tasks = shared_noise(2)
    before = tasks.splits["train"][0].images.clone()
    tasks.draw("train", 100, generator("draw"), CPU)
    tasks.measure(small_multi_head(2), "train", CPU)
    assert torch.equal(tasks.splits["train"][0].images, before)


def test_losses_of_samples_are_in_the_order_of_the_tasks() -> None:
    draws = generator("losses")
    logits = [[torch.randn(4, 3, generator=draws) for _ in range(3)] for _ in range(2)]
    labels = torch.randint(0, 3, (4, 3), generator=draws)
    batches = [TaskBatch((2, 0), torch.empty(0), labels[:, :2]), TaskBatch((1,), torch.empty(0), labels[:, 2:])]
    losses = sample_losses(logits, batches)
    assert losses.shape == (4, 3)
    for i in range(4):
        expected = [(logits[0][0], labels[i, 1]), (logits[1][1], labels[i, 2]), (logits[0][2], labels[i, 0])]
        for t, (answers, label) in enumerate(expected):
            assert float(losses[i, t]) == pytest.approx(cross_entropy(answers[i], int(label)), rel=1e-5)


def test_an_unknown_split_is_named() -> None:
    tasks = shared_noise(2)
    with pytest.raises(UserError, match="unknown split 'valid'; did you mean 'validation'"):
        tasks.draw("valid", 1, generator("x"), CPU)
    with pytest.raises(UserError, match="unknown split 'tests'"):
        tasks.measure(small_multi_head(2), "tests", CPU)
