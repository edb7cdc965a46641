"""`ml2o meta-train` with a configuration of seconds, and the line in which it refuses."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from ml2o_dist.cli import main

CONFIG = Path(__file__).parent / "small_run.yaml"
ONE = ["--set", "workers=1"]
"""What a test runs with if the number of workers makes no difference to it: each costs seconds to start."""
QUICK = ["--config", str(CONFIG), *ONE, "--set", "compare=false", "--set", "tracking.register=false"]
QUIET = [*QUICK, "--quiet"]


def ml2o(*words: str):
    return CliRunner().invoke(main, ["meta-train", *words])


def refusal(*words: str) -> str:
    result = ml2o(*words)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("ml2o: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.output
    return lines[0]
