"""What a learned step, its replay and whole episodes take on a GPU.

    .venv/bin/python benchmarks/cuda.py

Steps and replays: wall milliseconds, the device awaited, over the number of parameters and the blocks they are walked
in; the package takes the blocks of the last column. Episodes: inner steps a second of one process, over the instances
that one episode advances together, on the GPU and on one thread of the CPU beside it, replay included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from unittest import mock

import click
import torch

from ml2o_dist.config import EstimatorSettings, RuleSettings
from ml2o_dist.metatrain.episode import EpisodeSpec, run_episode
from ml2o_dist.metatrain.estimators.replay import replay
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.coordinatewise import replay as replaying
from ml2o_dist.rules.coordinatewise import rule as ruling
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, ML2ORule
from ml2o_dist.rules.learned import Rollout

OBJECTIVES, STEPS = 2, 200
HIDDEN = RuleSettings().hidden
STEP_BLOCKS = (ruling.BLOCK // HIDDEN, 2**14, ruling.GPU_BLOCK)
REPLAY_COLUMNS = (replaying.REPLAY_BLOCK // HIDDEN, 2**12, replaying.GPU_REPLAY // STEPS)


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    """Return the median over the rounds, after two that are not counted."""
    times = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[2:])


def step_ms(network: ML2ONetwork, dimension: int, block: int) -> float:
    """Return what one step takes."""
    with mock.patch.object(ruling, "GPU_BLOCK", block):
        rule = ML2ORule(network)
        jacobian = torch.randn(1, OBJECTIVES, dimension, device="cuda")
        _, state = rule.update(jacobian, rule.initial_state(1, OBJECTIVES, ParameterLayout.vector(dimension)))
        return milliseconds(lambda: rule.update(jacobian, state), 20)


def replay_ms(network: ML2ONetwork, dimension: int, columns: int) -> float:
    """Return what the replay of one episode takes."""
    losses = torch.rand(STEPS + 1, 1, OBJECTIVES, device="cuda")
    gradients = torch.randn(STEPS + 1, 1, OBJECTIVES, dimension, device="cuda")
    ones = torch.ones(STEPS, 1, device="cuda")
    record = {"alignment": ones, "total": ones, "unit": ones}
    rollout = Rollout(losses, gradients, record, ones, 1.0, ParameterLayout.vector(dimension))
    rule = ML2ORule(network)
    with mock.patch.object(replaying, "GPU_REPLAY", columns * STEPS):
        return milliseconds(lambda: replay(rule, rollout, EstimatorSettings(), "log_sum", 0, None), 1)


def inner_steps_per_s(problem: str, instances: int, device: str) -> float:
    """Return the pace of the second of two equal episodes."""
    rule = RuleSettings()
    spec = EpisodeSpec(ProblemSpec.parse(problem), 1, 30, instances, rule, EstimatorSettings(), device=device)
    weights = ML2ONetwork(rule).state_dict()
    run_episode(weights, spec)
    result = run_episode(weights, spec)
    return result.inner_steps / result.seconds


@click.command()
@click.option("--problem", default="multidigits[net=cnn,channels=8-16]", show_default=True)
def main(problem: str) -> None:
    """Print the three tables."""
    torch.set_num_threads(1)
    network = ML2ONetwork(RuleSettings()).to("cuda")
    click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, m = {OBJECTIVES}, H = 16")
    click.echo(f"inner steps a second on {problem}; instances, GPU, CPU:")
    for instances in (1, 8, 64):
        paces = (inner_steps_per_s(problem, instances, device) for device in ("cuda", "cpu"))
        click.echo(f"{instances:>12,}" + "".join(f"{pace:12,.0f}" for pace in paces))
    click.echo("one step, ms; columns at a time:      " + "".join(f"{block:>12,}" for block in STEP_BLOCKS))
    for dimension in (1_000, 10_000, 42_000, 300_000, 1_000_000):
        times = (step_ms(network, dimension, block) for block in STEP_BLOCKS)
        click.echo(f"{dimension:>12,}" + " " * 26 + "".join(f"{ms:12.2f}" for ms in times))
    click.echo(
        f"replay of {STEPS} steps, ms; columns at a time:" + "".join(f"{block:>11,}" for block in REPLAY_COLUMNS)
    )
    for dimension in (1_000, 10_000, 42_000):
        times = (replay_ms(network, dimension, columns) for columns in REPLAY_COLUMNS)
        click.echo(f"{dimension:>12,}" + " " * 29 + "".join(f"{ms:11.0f}" for ms in times))


if __name__ == "__main__":
    main()
