"""Time of a step in a training loop of one's own: the weights in the wheel beside Adam and torchjd's MGDA with Adam.

    .venv/bin/python benchmarks/optimizer_step.py

The LeNet of Multi-MNIST (36 x 36 pixels, two heads, 42,350 parameters), then MLPs of other sizes and numbers of heads;
random images, one torch thread. All optimizers step in turn, so that other work beside them is the same for all.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from torchjd.aggregation import MGDA
from torchjd.autojac import jac_to_grad, mtl_backward

from ml2o_dist import GML2O, ML2O
from ml2o_dist.paretoset.networks import MultiHead, build_multi_head

SIDE, CLASSES, BATCH = 36, 10, 256
WIDTHS, HEADS = (2, 8, 32, 128), (1, 3, 5)
"""Of the MLPs: hidden units, at two heads; other numbers of heads, at 32 hidden units."""


def network(net: str, tasks: int = 2, hidden: int = 32) -> MultiHead:
    """Return the LeNet of the Multi-MNIST literature, or an MLP of one hidden layer."""
    return build_multi_head(net, side=SIDE, classes=(CLASSES,) * tasks, seed=0, hidden=hidden)


def losses_of(logits: Sequence[Tensor], labels: Tensor, reduction: str = "none") -> list[Tensor]:
    """Return the cross-entropies of each task, labels [tasks, B]."""
    return [F.cross_entropy(each, label, reduction=reduction) for each, label in zip(logits, labels, strict=True)]


def steps_of(build: Callable[[], MultiHead], batch: int) -> dict[str, Callable[[], object]]:
    """Return a step of each optimizer, each on a network of its own."""
    found: dict[str, Callable[[], object]] = {}
    tasks = len(build().heads)
    x, labels = torch.randn(batch, 1, SIDE, SIDE), torch.randint(CLASSES, (tasks, batch))

    summed = build()
    adam = torch.optim.Adam(summed.parameters())

    def by_adam() -> None:
        adam.zero_grad()
        torch.stack(losses_of(summed(x), labels, "mean")).sum().backward()
        adam.step()

    found["Adam on the sum"] = by_adam

    other = build()
    inner, mgda = torch.optim.Adam(other.parameters()), MGDA()

    def by_mgda() -> None:
        features = other.trunk(x)
        logits = [head(features) for head in other.heads]
        mtl_backward(losses_of(logits, labels, "mean"), features=features)
        jac_to_grad(other.trunk.parameters(), mgda)
        inner.step()
        inner.zero_grad()

    found["MGDA"] = by_mgda
    for kind in (ML2O, GML2O)[: 1 if tasks == 1 else 2]:
        model = build()
        learned = kind(model.parameters())

        def by_learned(model: MultiHead = model, learned: ML2O = learned) -> None:
            learned.step(lambda: losses_of(model(x), labels))

        found[kind.__name__] = by_learned
    return found


def medians(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median of the milliseconds that each step takes."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(each) for name, each in times.items()}


@click.command()
@click.option("--rounds", default=40, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(rounds: int, as_json: bool) -> None:
    """Milliseconds of a step of each optimizer, one torch thread, and their ratio to MGDA's."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases: list[tuple[str, Callable[[], MultiHead], int]]
    cases = [(f"LeNet, batch {batch}", partial(network, "lenet5"), batch) for batch in (32, BATCH)]
    cases += [(f"MLP-{width}, 2 heads, batch 32", partial(network, "mlp", hidden=width), 32) for width in WIDTHS]
    cases += [(f"MLP-32, {tasks} heads, batch 32", partial(network, "mlp", tasks), 32) for tasks in HEADS]
    table = []
    for name, build, batch in cases:
        times = medians(steps_of(build, batch), rounds)
        size = sum(p.numel() for p in build().parameters())
        table.append({"network": name, "parameters": size, "ms": times})
        if not as_json:
            line = "   ".join(f"{key} {ms:7.2f} ({ms / times['MGDA']:.2f})" for key, ms in times.items())
            click.echo(f"{name:28} {size:8,}   {line}")
    if as_json:
        click.echo(json.dumps(table))


if __name__ == "__main__":
    main()
