"""Task steps per CPU-second of meta-training, one process, one torch thread: rollout and meta-gradient by replay.

    .venv/bin/python benchmarks/metatrain_throughput.py

Single-objective softmax MLPs 64-32-10 (2,410 parameters) and 784-32-10 (25,450) on synthetic data, batch 128, 8
episodes of 20 steps, ML2O with m = 1 and H = 20, which is two LSTM(20) one after the other. All coordinates are
replayed, or 20 % of them. Beside it: what google/learned_optimization (JAX, TruncatedGrad with full back-propagation,
coordinatewise LSTM(20, 20), the same networks, batch, tasks and unroll) did on a 2-core machine without GPU when it was
measured for this project, 183 and 14.4 task steps per CPU-second: not measured again here.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click
import torch
from torch import Tensor

from ml2o_dist.config import EstimatorSettings, RuleSettings
from ml2o_dist.metatrain.episode import EpisodeSpec, run_episode
from ml2o_dist.metatrain.estimators.base import roll_out
from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec
from ml2o_dist.problems.networks import build_network
from ml2o_dist.problems.spec import register_problem
from ml2o_dist.rules.base import Oracle
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, ML2ORule
from ml2o_dist.runtime.seeding import generator

BATCH, CLASSES, SAMPLES = 128, 10, 2048
EPISODES, STEPS = 8, 20
PEER = {8: 183.0, 28: 14.4}
"""By the images' side: 8 x 8 and 28 x 28 inputs."""


class SyntheticMlp(Problem):
    """Softmax classification of fixed random images by an MLP with one hidden layer of 32: n parameters, m = 1."""

    positive = True

    def __init__(self, context: ProblemContext, side: int) -> None:
        self.instances, self.device, self.dtype = context.instances, context.device, context.dtype
        self.network = build_network("mlp", side=side, classes=CLASSES, tasks=1, hidden="32")
        self.objectives, self.dimension = 1, self.network.dimension
        source = generator("throughput data", side)
        self._images = torch.randn(SAMPLES, side * side, generator=source)
        self._labels = torch.randint(CLASSES, (SAMPLES,), generator=source)

    def initial_parameters(self, seeds: Any) -> Tensor:
        return torch.stack([self.network.initial_parameters(seed) for seed in seeds]).to(self.device, self.dtype)

    def sample_batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(SAMPLES, (self.instances, BATCH), generator=generator)
        return self._images[rows], self._labels[rows]

    def sample_losses(self, parameters: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        split = self.network.split(parameters)
        logits = self.network.logits(split, self.network.features(split.trunk, batch[0]))[:, 0]
        return -logits.log_softmax(-1).gather(-1, batch[1].unsqueeze(-1))


@register_problem("synthetic_mlp")
def build_synthetic(context: ProblemContext, *, side: int = 8) -> Problem:
    """A synthetic classification problem for this benchmark."""
    return SyntheticMlp(context, side)


def cpu_seconds(call: Callable[[], object], rounds: int) -> list[float]:
    """Return the CPU time of each of `rounds` calls, after one that warms up."""
    call()
    times = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return times


def measure(side: int, rounds: int) -> dict[str, Any]:
    """Return task steps per CPU-second with all and 20 % of the coordinates, and ms of the parts of a step."""
    rule = RuleSettings(hidden=20)
    weights = ML2ONetwork(rule).state_dict()
    base = EpisodeSpec(ProblemSpec.parse(f"synthetic_mlp[side={side}]"), 0, STEPS, 1, rule, EstimatorSettings())

    def episodes(share: float) -> Callable[[], object]:
        specs = [replace(base, seed=seed, estimator=EstimatorSettings(coordinates=share)) for seed in range(EPISODES)]
        return lambda: [run_episode(weights, spec) for spec in specs]

    problem = base.problem.build(ProblemContext())
    start, learned = problem.initial_parameters([0]), ML2ORule.from_weights(rule, weights)

    def jacobians() -> None:
        oracle, point = Oracle(problem, torch.Generator().manual_seed(0)), start
        for _ in range(EPISODES * (STEPS + 1)):
            oracle.jacobian(point, oracle.draw())

    def rollouts() -> None:
        for _ in range(EPISODES):
            roll_out(learned, Oracle(problem, torch.Generator().manual_seed(0)), start, STEPS, None)

    total = EPISODES * STEPS
    rates = {share: [total / t for t in cpu_seconds(episodes(share), rounds)] for share in (1.0, 0.2)}
    parts = {name: statistics.median(cpu_seconds(call, rounds)) / total * 1e3
             for name, call in (("jacobian", jacobians), ("rollout", rollouts))}  # fmt: skip
    full, fifth = (statistics.median(rates[share]) for share in (1.0, 0.2))
    step = {"jacobian": parts["jacobian"], "rule": parts["rollout"] - parts["jacobian"],
            "replay": 1e3 / full - parts["rollout"]}  # fmt: skip
    return {
        "parameters": problem.dimension,
        "task_steps_per_cpu_s": {"all": full, "20 %": fifth},
        "spread": {"all": [min(rates[1.0]), max(rates[1.0])], "20 %": [min(rates[0.2]), max(rates[0.2])]},
        "peer": PEER[side],
        "all_over_peer": full / PEER[side],
        "20_over_all": fifth / full,
        "ms_per_task_step": step,
    }


@click.command()
@click.option("--rounds", default=9, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(rounds: int, as_json: bool) -> None:
    """Task steps per CPU-second with all and with 20 % of the coordinates replayed."""
    torch.set_num_threads(1)
    answer = {f"{side * side}-32-10": measure(side, rounds) for side in PEER}
    if as_json:
        click.echo(json.dumps(answer))
        return
    click.echo(f"task steps per CPU-second, median of {rounds} rounds of {EPISODES} episodes of {STEPS} steps")
    for name, row in answer.items():
        rate, spread, parts = row["task_steps_per_cpu_s"], row["spread"], row["ms_per_task_step"]
        click.echo(f"{name}, {row['parameters']:,} parameters")
        for share in ("all", "20 %"):
            click.echo(f"  {share:4} of the coordinates {rate[share]:8.1f}  ({spread[share][0]:.1f} to "
                       f"{spread[share][1]:.1f})")  # fmt: skip
        click.echo(f"  JAX peer, measured before   {row['peer']:8.1f}  all / peer {row['all_over_peer']:.2f}")
        click.echo(f"  20 % / all                  {row['20_over_all']:8.2f}")
        click.echo("  ms of a step, all: " + ", ".join(f"{part} {ms:.3f}" for part, ms in parts.items()))


if __name__ == "__main__":
    main()
