"""A Ray that dies under a command: exit code 4, a last line that says what is kept and how to go on, nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_chaos import started_with, until
from tests.wording import says

pytestmark = pytest.mark.long

HERE = Path(__file__).parent

META_TRAIN = ("meta-train", "--config", f"{HERE}/small_run.yaml", "--run-dir", "runs/a", "--set", "meta_steps=4000",
              "--set", "horizon=[60]", "--set", "checkpoint_every=4", "--set", "compare=false")  # fmt: skip
SWEEP = ("sweep", "--config", f"{HERE}/small_sweep.yaml", "--run-dir", "runs/a", "--set", "meta_train.meta_steps=4000")
PARETO_SET = ("pareto-set", "train", "--config", f"{HERE}/small_pareto_set.yaml", "--run-dir", "runs/a",
              "--set", "experts.steps=100000", "--set", "experts.checkpoint_every=20")  # fmt: skip
EVALUATE = (
    "evaluate",
    "--optimizer",
    "initial",
    "--problem",
    "multidigits[net=mlp,hidden=24]",
    "--seeds",
    "20",
    "--steps",
    "400",
)

COMMANDS = {
    "meta-train": (META_TRAIN, "runs/a/checkpoints/step_*", "meta-train --run-dir {home}/runs/a --resume"),
    "sweep": (SWEEP, "runs/a/tune/*/checkpoint_*", "sweep --run-dir {home}/runs/a --resume"),
    "pareto-set": (PARETO_SET, "runs/a/*/expert_1/step_*", "pareto-set train --run-dir {home}/runs/a --resume"),
    "evaluate": (EVALUATE, "cache/cells/*/*.safetensors", ""),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_ray_that_dies_ends_the_command_with_a_line_that_says_how_to_go_on(tmp_path: Path, name: str) -> None:
    words, kept, go_on = COMMANDS[name]
    stderr = tmp_path / "stderr"
    environment = {**os.environ, "ML2O_HOME": str(tmp_path), "ML2O_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "ml2o_dist", *words, "--address", "local", "--json"]
    with stderr.open("w") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
    try:
        until(lambda: any(tmp_path.glob(kept)) or child.poll() is not None, 240)
        lines = started_with(tmp_path)
        (raylet,) = [pid for pid, line in lines.items() if line.split(b"\0")[0].endswith(b"/raylet")]
        os.kill(raylet, signal.SIGKILL)
        assert child.wait(timeout=120) == 4, stderr.read_text()
    finally:
        child.kill()
    said = stderr.read_text()
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert says(last, "ml2o: Ray has ended", "raylet", "killed")
    if go_on:
        assert last.endswith(f": ml2o {go_on.format(home=tmp_path)}")
    else:
        assert says(last, " of 20 cells", "kept", "same command")
    until(lambda: not started_with(tmp_path), 60, lambda: started_with(tmp_path))
