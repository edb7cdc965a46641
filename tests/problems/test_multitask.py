"""Multi-task networks as Problems: the contract, both ways through the instances, metrics, settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ml2o_dist.problems import ProblemContext, ProblemSpec, problem_description, problem_names, problem_settings
from ml2o_dist.problems.base import autograd_jacobian
from ml2o_dist.problems.images import load_pairs
from ml2o_dist.problems.multitask import TEST_SAMPLES, MultiTaskImages
from ml2o_dist.problems.networks import build_network
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator
from tests.problems.contract import check_named_problem, check_problem

NAMES = ("multidigits", "multifashion", "multifashionmnist", "multimnist")
NETS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": "12-8"},
    "cnn": {"channels": "3-4"},
    "vgg": {"channels": "2-3"},
    "lenet5": {},
}


def build(text: str, instances: int = 2, dtype: torch.dtype = torch.float32, data_root: str = "") -> MultiTaskImages:
    problem = ProblemSpec.parse(text).build(ProblemContext(instances=instances, dtype=dtype, data_root=data_root))
    assert isinstance(problem, MultiTaskImages)
    return problem


def start_and_batch(problem: MultiTaskImages) -> tuple[Tensor, Any]:
    return problem.initial_parameters(range(problem.instances)), problem.sample_batch(generator("batch"))


@pytest.mark.parametrize(
    "text",
    [
        "multidigits[batch=8,hidden=6]",
        "multidigits[batch=8,hidden=6-5,activation=tanh,tasks=1]",
        "multidigits[batch=6,net=cnn,channels=2-3,activation=gelu]",
        "multidigits[batch=8,hidden=6,tasks=3]",
    ],
)
def test_digits_keep_the_contract(text: str) -> None:
    check_named_problem(text)


@pytest.mark.parametrize("text", ["multimnist[batch=4,net=lenet5,size=18]", "multifashionmnist[batch=8,size=12]"])
def test_real_data_keep_the_contract(text: str, real_data_root: str) -> None:
    check_problem(build(text, data_root=real_data_root))
    check_problem(build(text, dtype=torch.float64, data_root=real_data_root))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("tasks", [1, 2])
def test_both_ways_through_the_instances_agree(net: str, tasks: int, real_data_root: str) -> None:
    network = build_network(net, side=18, classes=10, tasks=tasks, **NETS[net])
    context = ProblemContext(instances=3, dtype=torch.float64, data_root=real_data_root)
    loop, together = (
        MultiTaskImages("multimnist", network, context, size=18, batch=4, vectorized=way) for way in (False, True)
    )
    start, batch = start_and_batch(loop)
    torch.testing.assert_close(loop.sample_losses(start, batch), together.sample_losses(start, batch))
    expected = autograd_jacobian(loop.losses, start, batch)
    for problem in (loop, together):
        for ours, plain in zip(problem.jacobian(start, batch), expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


def test_losses_are_cross_entropies_of_the_labels() -> None:
    problem = build("multidigits[batch=5]", instances=2)
    start, batch = start_and_batch(problem)
    network, losses = problem.network, problem.sample_losses(start, batch)
    for p in range(2):
        tensors = network.split(start[p])
        logits = network.logits(tensors, network.features(tensors.trunk, batch.images[p]))
        for i in range(2):
            expected = F.cross_entropy(logits[i], batch.labels[p, :, i], reduction="none")
            torch.testing.assert_close(losses[p, :, i], expected)


def test_a_task_has_no_gradient_in_the_other_tasks_head() -> None:
    problem = build("multidigits")
    jacobian, _ = problem.jacobian(*start_and_batch(problem))
    shared, head = problem.network.trunk_dimension, problem.network.head_dimension
    assert (jacobian[:, 0, shared + head :] == 0).all()
    assert (jacobian[:, 1, shared : shared + head] == 0).all()
    assert (jacobian[:, 0, shared : shared + head] != 0).any()
    assert (jacobian[:, 1, shared + head :] != 0).any()


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("vectorized", [False, True])
def test_losses_can_be_differentiated_twice(net: str, vectorized: bool) -> None:
    network = build_network(net, side=12, classes=10, tasks=2, hidden="5", channels="2-2", activation="tanh")
    context = ProblemContext(instances=2, dtype=torch.float64)
    problem = MultiTaskImages("multidigits", network, context, batch=4, vectorized=vectorized)
    start, batch = start_and_batch(problem)
    direction = torch.randn(start.shape, generator=generator("direction"), dtype=torch.float64)
    direction /= direction.norm()

    def slope(point: Tensor) -> Tensor:
        return (autograd_jacobian(problem.losses, point, batch, create_graph=True)[0] * direction.unsqueeze(1)).sum()

    attached = start.clone().requires_grad_(True)
    (product,) = torch.autograd.grad(slope(attached), attached)
    step = 1e-5
    ahead, behind = (slope((start + s * direction).requires_grad_(True)) for s in (step, -step))
    difference = float((ahead - behind).detach()) / (2 * step)
    assert float((product * direction).sum()) == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_batches_are_training_pairs_standardised() -> None:
    problem = build("multidigits[batch=16]", instances=3)
    _, batch = start_and_batch(problem)
    assert batch.images.shape == (3, 16, 1, 12, 12)
    assert batch.labels.shape == (3, 16, 2)
    pairs = load_pairs("multidigits", "train")
    known = {bytes(image.numpy().tobytes()): tuple(label.tolist()) for image, label in zip(*_rows(pairs), strict=True)}
    grey = pairs.images.double()
    pixels = (batch.images * grey.std(correction=0) + grey.mean()).round().to(torch.uint8).squeeze(2)
    for p in range(3):
        for image, label in zip(pixels[p], batch.labels[p], strict=True):
            assert known[image.numpy().tobytes()] == tuple(label.tolist())
    assert not torch.equal(batch.images[0], batch.images[1])


def _rows(pairs: Any) -> tuple[Tensor, Tensor]:
    return pairs.images, pairs.labels


def test_metrics_are_the_mean_over_unseen_pairs() -> None:
    problem = build("multidigits", instances=2)
    start = problem.initial_parameters([1, 2])
    pairs = load_pairs("multidigits", "test")
    metrics = problem.test_metrics(start, samples=None)
    grey = load_pairs("multidigits", "train").images.double()
    images = ((pairs.images.double() - grey.mean()) / grey.std(correction=0)).float().unsqueeze(1)
    for p in range(2):
        tensors = problem.network.split(start[p])
        logits = problem.network.logits(tensors, problem.network.features(tensors.trunk, images))
        for i in range(2):
            torch.testing.assert_close(metrics["test_loss"][p, i], F.cross_entropy(logits[i], pairs.labels[:, i]))
            right = (logits[i].argmax(1) == pairs.labels[:, i]).float().mean()
            torch.testing.assert_close(metrics["test_accuracy"][p, i], right)
    few = problem.test_metrics(start)
    assert torch.equal(few["test_loss"], problem.test_metrics(start)["test_loss"])
    assert torch.equal(few["test_loss"], problem.test_metrics(start, samples=TEST_SAMPLES)["test_loss"])
    assert not torch.equal(few["test_loss"], metrics["test_loss"])
    assert not torch.equal(few["test_loss"], problem.test_metrics(start, split="validation")["test_loss"])


def test_training_learns_what_carries_over_to_unseen_pairs() -> None:
    problem = build("multidigits", instances=2)
    point = problem.initial_parameters([0, 1]).requires_grad_(True)
    optimizer, stream = torch.optim.Adam([point], lr=0.01), generator("training")
    before = problem.test_metrics(point)
    for _ in range(250):
        jacobian, _ = problem.jacobian(point, problem.sample_batch(stream))
        point.grad = jacobian.sum(dim=1)
        optimizer.step()
    after = problem.test_metrics(point)
    assert (before["test_accuracy"] < 0.3).all()
    assert (after["test_accuracy"] > 0.6).all()
    assert (after["test_loss"] < before["test_loss"] / 1.5).all()


def test_one_task_is_the_top_left_image() -> None:
    one, two = build("multidigits[tasks=1]"), build("multidigits")
    assert one.objectives == 1
    assert torch.equal(start_and_batch(one)[1].labels, start_and_batch(two)[1].labels[..., :1])
    start = two.initial_parameters([0, 1])
    cut = start[:, : one.dimension]
    expected = two.test_metrics(start)["test_accuracy"][:, :1]
    assert torch.equal(one.test_metrics(cut)["test_accuracy"], expected)


def test_the_third_task_is_the_sum_of_the_two_modulo_ten() -> None:
    two, three = build("multidigits"), build("multidigits[tasks=3]")
    labels, more = start_and_batch(two)[1].labels.numpy(), start_and_batch(three)[1].labels.numpy()
    assert (more[..., :2] == labels).all()
    assert (more[..., 2] == (labels[..., 0] + labels[..., 1]) % 10).all()
    start = three.initial_parameters([0, 1])
    pairs = load_pairs("multidigits", "test")
    sums = (pairs.labels[:, 0] + pairs.labels[:, 1]) % 10
    third = start.clone()
    bias = third.view(2, -1)[:, -10:]  # of the last head: it names class 3 whatever it sees
    bias[:, 3] += 1e4
    accuracy = three.test_metrics(third, samples=None)["test_accuracy"][:, 2]
    torch.testing.assert_close(accuracy, (sums == 3).float().mean().expand(2))


def test_settings_names_and_descriptions() -> None:
    assert set(NAMES) <= set(problem_names())
    for name in NAMES:
        assert problem_settings(name) == {
            "net": "mlp",
            "hidden": "24",
            "channels": "8-16",
            "kernel": 3,
            "variant": "cosmos",
            "activation": "relu",
            "batch": 64,
            "size": 0,
            "tasks": 2,
            "init": 1.0,
        }
        assert len(problem_description(name).splitlines()[0]) > 30
    assert build("multidigits[hidden=40-40]").dimension == 144 * 40 + 40 + 40 * 40 + 40 + 2 * 410
    smaller = build("multidigits[init=0.5]").initial_parameters([0, 1])
    torch.testing.assert_close(smaller, build("multidigits").initial_parameters([0, 1]) / 2)
    assert build("multidigits").data_sha256 == load_pairs("multidigits", "train").sha256


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("batch=0", "batch 0 of multidigits.*integer >= 1"),
        ("batch=1.5", "batch 1.5"),
        ("batch=many", "batch .*'many'"),
        ("tasks=4", r"tasks 4 of multidigits.*1 to 3"),
        ("size=5", "size 5 of multidigits"),
        ("init=-1", "init -1"),
        ("init=true", "init True"),
        ("net=5", "unknown net '5'"),
        ("net=lenet5", "12x12.*too small.*lenet5"),
        ("hiden=3", "did you mean 'hidden'"),
    ],
)
def test_wrong_settings_are_named(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(f"multidigits[{setting}]")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_agrees_with_the_cpu() -> None:
    network = build_network("cnn", side=12, classes=10, tasks=2)
    contexts = (ProblemContext(instances=2, device=torch.device(device)) for device in ("cpu", "cuda"))
    here, there = (MultiTaskImages("multidigits", network, context) for context in contexts)
    (start, batch), (gpu_start, gpu_batch) = start_and_batch(here), start_and_batch(there)
    torch.testing.assert_close(gpu_start.cpu(), start)
    torch.testing.assert_close(gpu_batch.images.cpu(), batch.images)
    for gpu, cpu in zip(there.jacobian(gpu_start, gpu_batch), here.jacobian(start, batch), strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-3, atol=1e-5)
    for name, value in here.test_metrics(start).items():
        torch.testing.assert_close(there.test_metrics(gpu_start)[name].cpu(), value, rtol=1e-3, atol=2e-3)
