"""CPU time of one learned step over the number of parameters, beside what its arithmetic alone costs.

    .venv/bin/python benchmarks/step.py

The floor is measured in the same process on the same blocks of coordinates, each part alone: the matrix products of the
LSTMs and the head, the sigmoids, and reading and writing the states once. The exponent is that of a power law fitted to
the times from 3,000 to 300,000 parameters.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch

from ml2o_dist.config import RuleSettings
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, ML2ORule

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000)
FITTED = (3_000, 300_000)
ROUND_S = 0.1
"""CPU time of one round; a short step is repeated until it is filled."""


def cpu_ms(call: Callable[[], object], rounds: int) -> float:
    """Return the median over the rounds of the CPU milliseconds of one call."""
    call()
    began = time.process_time()
    call()
    repeats = max(1, int(ROUND_S / max(1e-6, time.process_time() - began)))
    times = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(repeats):
            call()
        times.append((time.process_time() - began) / repeats * 1e3)
    return statistics.median(times)


@torch.no_grad()
def floor(rule: ML2ORule, state: Any, rounds: int) -> dict[str, float]:
    """Return CPU milliseconds of the parts of a step that its formulas cannot do without, over all blocks."""
    weights = rule.network.stacked_weights().detach()
    layers = [*weights.specific, weights.shared]
    work = []
    for block in state.blocks:
        for matrix, (hidden, memory) in zip(layers, block.cells, strict=True):
            inputs = torch.randn(matrix.shape[1], hidden.shape[1])
            work.append((matrix, inputs, torch.empty(len(matrix), hidden.shape[1]), hidden.clone(), memory.clone()))

    def products() -> None:
        for matrix, inputs, gates, _, _ in work:
            torch.mm(matrix, inputs, out=gates)
        for *_, hidden, _ in work[len(layers) - 1 :: len(layers)]:
            weights.head[:, :-1] @ hidden

    def sigmoids() -> None:
        for _, _, gates, hidden, memory in work:
            torch.sigmoid(gates, out=gates)
            torch.sigmoid(memory, out=hidden)

    def copies() -> None:
        for _, _, _, hidden, memory in work:
            hidden.clone()
            memory.clone()

    parts = (("products", products), ("sigmoids", sigmoids), ("copies", copies))
    return {name: cpu_ms(call, rounds) for name, call in parts}


def measure(objectives: int, hidden: int, rounds: int) -> dict[str, Any]:
    """Return the rows of one table and the fitted exponent."""
    rule, rows = ML2ORule(ML2ONetwork(RuleSettings(hidden=hidden))), []
    for dimension in SIZES:
        jacobian = torch.randn(1, objectives, dimension, generator=torch.Generator().manual_seed(dimension))
        start = rule.initial_state(1, objectives, ParameterLayout.vector(dimension))
        _, state = rule.update(jacobian, start)
        step = cpu_ms(lambda jacobian=jacobian, state=state: rule.update(jacobian, state), rounds)  # type: ignore[misc]
        parts = floor(rule, state, rounds)
        rows.append({"n": dimension, "step_ms": step, **parts, "over_floor": step / sum(parts.values())})
    fitted = [(row["n"], row["step_ms"]) for row in rows if FITTED[0] <= row["n"] <= FITTED[1]]
    exponent = float(np.polyfit(*np.log(np.array(fitted)).T, 1)[0])
    return {"rows": rows, "exponent": exponent}


@click.command()
@click.option("--hidden", default=16, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(hidden: int, rounds: int, as_json: bool) -> None:
    """CPU milliseconds of one learned step, one torch thread, and its floor."""
    torch.set_num_threads(1)
    answer = {f"m={objectives}": measure(objectives, hidden, rounds) for objectives in (1, 2)}
    if as_json:
        click.echo(json.dumps(answer))
        return
    for name, table in answer.items():
        click.echo(f"{name}, H = {hidden}: CPU ms, median of {rounds} rounds")
        click.echo("        n     step  products  sigmoids  copies  step / floor")
        for row in table["rows"]:
            click.echo(
                f"{row['n']:9,} {row['step_ms']:8.3f} {row['products']:9.3f} {row['sigmoids']:9.3f} "
                f"{row['copies']:7.3f} {row['over_floor']:13.2f}"
            )
        click.echo(f"exponent from {FITTED[0]:,} to {FITTED[1]:,}: {table['exponent']:.3f}")


if __name__ == "__main__":
    main()
