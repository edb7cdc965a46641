"""`ml2o evaluate`, its words and its answer."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from ml2o_dist.cli import main

DIGITS = "multidigits[net=mlp,hidden=4,batch=8]"


def ml2o(*words: str):
    return CliRunner().invoke(main, ["evaluate", *words])


def named(optimizers, problems) -> list[str]:
    words = [word for name in optimizers for word in ("--optimizer", name)]
    return [*words, *(word for name in problems for word in ("--problem", name))]


TWO = ["--set", "resources.num_cpus=2"]
"""Two cells at a time on a Ray of 4 CPUs: every process that runs them takes seconds to start."""
QUICK = [*named(["dssmg"], ["quadratic[n=3]"]), *TWO, "--seeds", "2", "--steps", "5"]


def strict(text: str):
    """Read JSON that has no NaN and no infinity in it, which Python would let through."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
