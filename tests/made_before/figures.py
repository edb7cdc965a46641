"""What the package computes, in figures of which no bit may change."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from ml2o_dist import load_artifact
from ml2o_dist.cli import main
from ml2o_dist.config import split_steps
from ml2o_dist.config_file import load_settings
from ml2o_dist.evaluation.cells import Cell, run_cell
from ml2o_dist.evaluation.optimizer_specs import HandDesigned, Learned
from ml2o_dist.evaluation.suites import load_suite
from ml2o_dist.metatrain.trainer import Trainer
from tests.meta_train_command import CONFIG
from tests.metatrain.executing import digests, in_process, later
from tests.metatrain.settings import small
from tests.torch_optim.small import KINDS, TwoTasks, flat, makers, take

NETWORKS: dict[str, Any] = {
    "family": {
        "train": [
            {"problem": "multidigits[net=cnn,channels=2-2,batch=8]"},
            {"problem": "multidigits[hidden=4,batch=8]"},
        ],
        "validation": ["multidigits[hidden=5,batch=8]"],
        "test": ["multidigits[hidden=6,batch=8]"],
        "rescale": 2.0,
    },
    "rule": {"features": "alignment", "output": "controlled"},
    "meta_steps": 3,
}

TRAININGS: dict[str, dict[str, Any]] = {
    "twelve meta-steps": {},
    "of staleness 2": {"staleness": 2},
    "networks, replay": NETWORKS | {"estimator": {"kind": "replay"}},
    "networks, exact": NETWORKS | {"estimator": {"kind": "exact"}},
    "es": {"meta_steps": 3, "estimator": {"kind": "es"}},
    "per objective, as the paper": {
        "meta_steps": 3,
        "family": {"train": [{"problem": "quadratic[n=4,noise=0.1,batch=4]"}]},
        "rule": {"output": "scaled", "features": "log_sign", "objectives": "per_objective", "count": 2},
    },
    "under a guard": {"meta_steps": 3, "rule": {"guard": {}}, "estimator": {"kind": "replay"}},
}
"""Meta-trainings whose weights are compared: settings that differ from those of `small`."""


RECIPE = Path(__file__).parents[2] / "jobs" / "configs" / "ml2o_small.yaml"

GATE = ["--set", "problems=['quadratic[n=3]']", "--set", "seeds=2", "--set", "steps=5"]
"""Words that make the gate of a promotion small."""


def cpu() -> str:
    """Return what kind of CPU this is, as far as rounding depends on it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__.partition('+')[0]}"


def hashes(data_root: str) -> dict[str, Any]:
    """Return all that is compared to the last bit; the recipe's is of the real images at `data_root`."""
    trainings = {name: trained(name) for name in TRAININGS}
    return {"trained": trainings, "quick": quick(), "recipe": recipe(data_root)}


def whole_run(home: Path) -> dict[str, Any]:
    """Run `ml2o meta-train` with the tests' small settings into runs/a of `home`; return its answer."""
    words = ["meta-train", "--config", str(CONFIG), "--run-dir", "runs/a", "--set", "keep_checkpoints=2", "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def trained(name: str) -> list[str]:
    """Return the sha256 of the last and the best weights."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(small(**TRAININGS[name]), Path(folder))
        trainer.run(later(in_process))
    return list(digests(trainer))


def recipe(data_root: str) -> list[str]:
    """Return the sha256 of the last and the best weights of the shipped weights' recipe, shortened."""
    short = ["meta_steps=2", "slots=4", "horizon=[6]", "validation.horizon=5", "validation.instances=1"]
    settings = load_settings(RECIPE, [f"data.root={data_root}", "device=cpu", *short])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(settings, Path(folder))
        trainer.run(later(in_process))
    return list(digests(trainer))


def quick() -> dict[str, str]:
    """Return the sha256 of the losses of short cells of the suite `quick`, by optimizer and problem."""
    shipped = load_artifact("pretrained")
    learned = Learned("pretrained", shipped.rule, shipped.weights)
    entrants = {
        "pretrained": learned,
        "mean+adam@0.01": HandDesigned.parse("mean+adam@0.01"),
        "mgda+adam@0.01": HandDesigned.parse("mgda+adam@0.01"),
    }
    found = {}
    for problem in load_suite("quick").problems:
        for name, entrant in entrants.items():
            result = run_cell(Cell(entrant, split_steps(problem)[0], (0, 1), "report", 15))
            found[f"{name} on {problem}"] = hashlib.sha256(result.losses.numpy().tobytes()).hexdigest()
    return found


def optimizer_states(place: Path) -> dict[str, Any]:
    """Return, for each kind of optimizer, what is saved after five steps, and the parameters after five further."""
    states = {}
    for kind in KINDS:
        model = TwoTasks()
        optimizer = makers(place)[kind](model)
        for step in range(5):
            take(optimizer, model, step)
        saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        states[kind] = saved | {"after": gone_on(kind, saved, place)}
    return states


def gone_on(kind: str, saved: dict[str, Any], place: Path) -> torch.Tensor:
    """Load what was saved into a fresh model and optimizer; return the parameters after five further steps."""
    model = TwoTasks(seed=5)
    model.load_state_dict(saved["model"])
    optimizer = makers(place)[kind](model)
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(5, 10):
        take(optimizer, model, step)
    return flat(model)
