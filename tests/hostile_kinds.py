"""Every kind of file that is read: a good one, its reader, and how it is changed with digests that agree."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load, save

from ml2o_dist.artifact import save_artifact, weights_sha256
from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.config_file import dump_settings, load_evaluation, load_settings, read_settings
from ml2o_dist.evaluation.cell_cache import CellCache
from ml2o_dist.evaluation.cells import Cell, run_cell
from ml2o_dist.evaluation.optimizer_specs import HandDesigned
from ml2o_dist.evaluation.suites import load_suite
from ml2o_dist.metatrain.episode import run_episode
from ml2o_dist.metatrain.history import read_history
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.metatrain.trajectories import read_trajectories, recorded_problems
from ml2o_dist.paretoset.conditioned import Plain
from ml2o_dist.paretoset.fronts import Front
from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.networks import MultiHead, build_multi_head
from ml2o_dist.paretoset.preference_problem import PreferenceProblem
from ml2o_dist.paretoset.results import ApproachResult
from ml2o_dist.paretoset.saved_set import SetCard, load_set, save_set
from ml2o_dist.paretoset.scalarization import Scalarization
from ml2o_dist.paretoset.settings import NetworkSettings, ParetoSetSettings
from ml2o_dist.paretoset.states import about_state, read_state, save_state
from ml2o_dist.paretoset.training import train
from ml2o_dist.problems import ProblemSpec, images
from ml2o_dist.problems.image_files import read_idx
from ml2o_dist.problems.pairs import ImagePool, build_pairs
from ml2o_dist.reporting.pareto_set_page import render_set, set_page_sections
from ml2o_dist.rundir.log import read_log
from ml2o_dist.sweeping.record import Report, SweepRecord
from ml2o_dist.sweeping.space import load_sweep
from ml2o_dist.tracking.identity import RunIdentity, load_identity, save_identity
from ml2o_dist.tracking.records import Point
from ml2o_dist.tracking.spool import Spool, unsent_values
from ml2o_dist.workflows.meta_train_end import RESULT_FILE, finished_answer
from ml2o_dist.workflows.report import load_evaluation_record, load_record, load_set_record, write_report
from ml2o_dist.workflows.sweep_end import finished_answer as finished_sweep
from ml2o_dist.workflows.sweep_end import keep_answer
from tests.evaluation.synthetic import DIGITS_ROWS, evaluation
from tests.hostile_changes import changed_tensors, changed_value
from tests.metatrain.settings import small
from tests.paretoset.small import separate_noise, small_multi_head, start_and_experts


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it lies below its folder, what reads it, and how it is changed besides by its bytes.

    `change` writes the folder's file(s) anew with a change of what they mean.
    """

    file: str
    read: Callable[[Path], object]
    change: Callable[[Path, random.Random], object] | None = None


def written(value: Any) -> bytes:
    return json.dumps(value).encode()


def json_change(name: str) -> Callable[[Path, random.Random], object]:
    def change(folder: Path, draw: random.Random) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_bytes(written(changed_value(value, draw)))

    return change


def yaml_change(name: str) -> Callable[[Path, random.Random], object]:
    def change(folder: Path, draw: random.Random) -> None:
        value = yaml.safe_load((folder / name).read_text())
        (folder / name).write_text(yaml.safe_dump(changed_value(value, draw)))

    return change


def card_change(folder: Path, draw: random.Random) -> None:
    """Change the card, or the tensors, with digests that agree."""
    card = json.loads((folder / "weights.json").read_text())
    if draw.random() < 0.5:
        card = changed_value(card, draw)
    else:
        tensors = changed_tensors(load((folder / "weights.safetensors").read_bytes()), draw)
        (folder / "weights.safetensors").write_bytes(save(tensors))
        digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
        card |= {"file_sha256": digest, "weights_sha256": weights_sha256(tensors)}
    if isinstance(card, dict):
        card.pop("card_sha256", None)
        card["card_sha256"] = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
    (folder / "weights.json").write_bytes(written(card))


def checkpoint_change(where: str) -> Callable[[Path, random.Random], object]:
    """Change state, tensors or manifest of the newest checkpoint, with digests that agree."""

    def change(folder: Path, draw: random.Random) -> None:
        newest = max((folder / where).glob("step_*"))
        state = json.loads((newest / "state.json").read_text())
        tensors = load((newest / "tensors.safetensors").read_bytes())
        what = draw.randrange(3)
        if what == 0:
            (newest / "state.json").write_bytes(written(changed_value(state, draw)))
        elif what == 1:
            (newest / "tensors.safetensors").write_bytes(save(changed_tensors(tensors, draw)))
        hashes = {
            name: hashlib.sha256((newest / name).read_bytes()).hexdigest()
            for name in ("state.json", "tensors.safetensors")
        }
        manifest = {"format": 2, "sha256": hashes}
        (newest / "manifest.json").write_bytes(written(changed_value(manifest, draw) if what == 2 else manifest))
        for older in (folder / where).glob("step_*"):
            if older != newest:
                shutil.rmtree(older)

    return change


def set_change(folder: Path, draw: random.Random) -> None:
    content = (folder / "pareto_set.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["ml2o_dist"])
    tensors = load(content)
    if draw.random() < 0.5:
        tensors = changed_tensors(tensors, draw)
        about["weights_sha256"] = weights_sha256(tensors)
    else:
        about = changed_value(about, draw)
    if isinstance(about, dict):
        about.pop("card_sha256", None)
        about["card_sha256"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    (folder / "pareto_set.safetensors").write_bytes(save(tensors, {"ml2o_dist": json.dumps(about)}))


def cell_change(folder: Path, draw: random.Random) -> None:
    (file,) = folder.rglob("*.safetensors")
    tensors = load(file.read_bytes())
    del tensors["sha256"]
    record = json.loads(bytes(tensors["record"].tolist()))
    if draw.random() < 0.5:
        tensors = changed_tensors(tensors, draw)
    else:
        tensors["record"] = torch.tensor(list(written(changed_value(record, draw))), dtype=torch.uint8)
    tensors["sha256"] = torch.tensor(list(weights_sha256(tensors).encode()), dtype=torch.uint8)
    file.write_bytes(save(tensors))


def state_change(folder: Path, draw: random.Random) -> None:
    tensors = changed_tensors(read_state(folder / "state.safetensors"), draw)
    torch.save(
        draw.choice((tensors, {"state_dict": tensors}, [tensors], {"a": 1}, {1: torch.ones(1)})), folder / "state.pt"
    )
    save_state(folder / "state.safetensors", tensors, {"stage": changed_value({"a": [1]}, draw)})


SETTINGS = small(meta_steps=2, slots=2, horizon=[3], validation={"every": 1, "horizon": 3, "instances": 1},
                 trajectories={"meta_steps": 2, "slots": 2}, compare=False)  # fmt: skip
CELL_KEY = "ab" * 32
SWEEP = "tests/small_sweep.yaml"


def make_run(folder: Path) -> None:
    trainer = Trainer(SETTINGS, folder)
    trainer.run(lambda items, weights: lambda: [run_episode(weights, item.spec) for item in items])
    (folder / "config.yaml").write_text(dump_settings(SETTINGS))
    saved = save_artifact(folder, trainer.best_weights, SETTINGS.rule, {"git": "0123456789ab", "best_meta_step": 1})
    (folder / "comparison.json").write_text(json.dumps(evaluation(DIGITS_ROWS[:1]).to_json(curves=True)))
    (folder / "run.log").write_text("2026-11-24 20:00:01,123 WARNING ml2o_dist.x: a warning\n")
    asked = SETTINGS.model_dump(mode="json", by_alias=True, include={"compare", "comparison", "tracking"})
    answer = {
        "run_dir": "x", "meta_steps": 2, "weights_sha256": saved.weights_sha256, "inner_steps_per_s": 1.0,
        "registered_version": 1, "comparison": evaluation(DIGITS_ROWS[:1]).to_json(),
    }  # fmt: skip
    (folder / RESULT_FILE).write_bytes(written({"answer": answer, "asked": asked}))


def resume(folder: Path) -> object:
    trainer = Trainer(SETTINGS, folder)
    trainer.resume()
    return finished_answer(trainer)


def make_evaluation(folder: Path) -> None:
    found = evaluation(DIGITS_ROWS[:2])
    (folder / "evaluation.json").write_text(json.dumps(found.to_json(curves=True)))
    (folder / "evaluate.yaml").write_text(dump_settings(found.settings))
    (folder / "suite.yaml").write_text(dump_settings(load_suite("quick")))


def network_of_set() -> MultiHead:
    return build_multi_head("mlp", side=12, classes=(10, 10), seed=0, hidden="3")


def make_set(folder: Path) -> None:
    network = network_of_set()
    start, experts = start_and_experts(network, 2)
    fusion = Fusion(network, start, experts, heads=network.head_names)
    rays = torch.eye(2, dtype=torch.float64)
    front = Front(rays, rays + 0.5, rays / 2)
    card = SetCard("multidigits", ("a", "b"), (10, 10), 12, (30.0,), (40.0,), NetworkSettings(name="mlp", hidden="3"),
                   "all", 0.3, 0, front.to_json())  # fmt: skip
    save_set(folder / "pareto_set.safetensors", card, start, experts, fusion.routers.state_dict())
    (folder / "pareto_set.yaml").write_text(dump_settings(ParetoSetSettings()))
    result = ApproachResult("pwe", {"validation": front, "test": front}, 5, 1.0, 22, 100.0, 0, 0, 0.1)
    other = ApproachResult("soup", {"test": front}, 0, 0.0, 0, 100.0, 0, 1)
    fronts = {
        "tasks": ["a", "b"],
        "data_sha256": {"x": "0"},
        "git": "0",
        "approaches": [result.to_json(), other.to_json()],
    }
    (folder / "fronts.json").write_bytes(written(fronts))


def read_set_page(folder: Path) -> object:
    record = load_set_record(folder)
    return render_set(record, set_page_sections(record))


def make_states(folder: Path) -> None:
    state = network_of_set().state_dict()
    save_state(folder / "state.safetensors", state, {"stage": {"a": [1]}})
    torch.save(state, folder / "state.pt")


def trained(folder: Path, steps: int = 2) -> object:
    """Train from what lies in the folder; at the end of a training there is nothing to do but to read it."""
    problem = PreferenceProblem(
        Plain(small_multi_head()), separate_noise(), Scalarization("ls"), batch=4, device=torch.device("cpu"),
        preference=torch.tensor([0.5, 0.5], dtype=torch.float64),
    )  # fmt: skip
    rule = HandDesigned("mean", "adam", 0.01).rule(torch.device("cpu"), problem.dtype)
    return train(problem, rule, steps=steps, seed=0, folder=folder / "training", fingerprint={"a": 1})


def make_sweep(folder: Path) -> None:
    settings = load_sweep(Path(SWEEP))
    (folder / "sweep.yaml").write_text(dump_settings(settings))
    record = SweepRecord(folder)
    record.begin("a_1", {"learner.lr": 0.01, "rule.hidden": 2})
    record.report("a_1", Report(2, 0.5, 0.4, 1, 3.0, {"learner.lr": 0.01, "rule.hidden": 2}))
    record.end("a_1", "finished")
    answer = {"run_dir": "x", "trials": [t.to_json() for t in record.in_order], "best": None, "registered_version": 1}
    keep_answer(folder, settings, answer, 0)


def read_sweep_answer(folder: Path) -> object:
    return finished_sweep(folder, load_sweep(folder / "sweep.yaml", within=folder))


def make_cell(folder: Path) -> None:
    cell = Cell(
        HandDesigned.parse("mean+sgd@0.1"), ProblemSpec.parse("quadratic[n=3]"), (1,), "r", 5, criticality_batches=1
    )
    CellCache(folder).keep(CELL_KEY, run_cell(cell))


def make_pairs(folder: Path) -> None:
    images._write(folder / "pairs.arrow", build_pairs(*_pool(), images._SMALL, 12, 0), "pairs")


def _pool() -> tuple[ImagePool, ImagePool]:
    drawn = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 17, (40, 8, 8), generator=drawn, dtype=torch.uint8).numpy()
    rows = torch.arange(40).numpy()
    pool = ImagePool(pictures, (torch.arange(40) % 10).numpy(), rows)
    return pool, pool


def make_idx(folder: Path) -> None:
    content = bytes((0, 0, 8, 3, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0, 4)) + bytes(range(80))
    (folder / "images.gz").write_bytes(gzip.compress(content))


def make_tracking(folder: Path) -> None:
    save_identity(folder, RunIdentity("sqlite:///x.db", "experiment", run_id="0" * 32, config={"a": 1}))
    spool = Spool(folder / "spool")
    spool.append([Point("loss", 0.5, 1, 1)])
    spool.close()


FOLDERS: dict[str, Callable[[Path], object]] = {
    "run": make_run,
    "evaluation": make_evaluation,
    "set": make_set,
    "states": make_states,
    "trained": trained,
    "sweep": make_sweep,
    "cells": make_cell,
    "pairs": make_pairs,
    "idx": make_idx,
    "tracking": make_tracking,
}

KINDS: dict[str, tuple[str, Kind]] = {
    "card": ("run", Kind("weights.json", load_artifact, card_change)),
    "weights": ("run", Kind("weights.safetensors", load_artifact, card_change)),
    "config": (
        "run",
        Kind("config.yaml", lambda f: load_settings(f / "config.yaml", within=f), yaml_change("config.yaml")),
    ),
    "manifest": ("run", Kind("checkpoints/step_000002/manifest.json", resume, checkpoint_change("checkpoints"))),
    "state": ("run", Kind("checkpoints/step_000002/state.json", resume, checkpoint_change("checkpoints"))),
    "tensors": ("run", Kind("checkpoints/step_000002/tensors.safetensors", resume, checkpoint_change("checkpoints"))),
    "result": ("run", Kind(RESULT_FILE, resume, json_change(RESULT_FILE))),
    "metrics": ("run", Kind("metrics.parquet", lambda f: read_history(f / "metrics.parquet", within=f))),
    "trajectories": (
        "run",
        Kind("trajectories/step_000001.parquet", lambda f: recorded_problems(read_trajectories(f).rows)),
    ),
    "log": ("run", Kind("run.log", lambda f: read_log(f / "run.log"))),
    "comparison": ("run", Kind("comparison.json", load_record, json_change("comparison.json"))),
    "evaluation": ("evaluation", Kind("evaluation.json", load_evaluation_record, json_change("evaluation.json"))),
    "evaluate": (
        "evaluation",
        Kind("evaluate.yaml", lambda f: load_evaluation(f / "evaluate.yaml"), yaml_change("evaluate.yaml")),
    ),
    "suite": (
        "evaluation",
        Kind("suite.yaml", lambda f: load_suite(str(f / "suite.yaml")), yaml_change("suite.yaml")),
    ),
    "fronts": ("set", Kind("fronts.json", read_set_page, json_change("fronts.json"))),
    "pareto set": ("set", Kind("pareto_set.safetensors", load_set, set_change)),
    "pareto settings": (
        "set",
        Kind(
            "pareto_set.yaml",
            lambda f: read_settings(ParetoSetSettings, f / "pareto_set.yaml", (), within=f),
            yaml_change("pareto_set.yaml"),
        ),
    ),
    "state dict": ("states", Kind("state.safetensors", lambda f: read_state(f / "state.safetensors"), state_change)),
    "about a state": (
        "states",
        Kind("state.safetensors", lambda f: about_state(f / "state.safetensors"), state_change),
    ),
    "torch state dict": ("states", Kind("state.pt", lambda f: read_state(f / "state.pt"), state_change)),
    "training": ("trained", Kind("training/step_000002/state.json", trained, checkpoint_change("training"))),
    "sweep settings": (
        "sweep",
        Kind("sweep.yaml", lambda f: load_sweep(f / "sweep.yaml", within=f), yaml_change("sweep.yaml")),
    ),
    "sweep result": ("sweep", Kind("result.json", read_sweep_answer, json_change("result.json"))),
    "trials": ("sweep", Kind("trials.jsonl", SweepRecord)),
    "cell": ("cells", Kind(f"ab/{CELL_KEY}.safetensors", lambda f: CellCache(f).find(CELL_KEY), cell_change)),
    "pairs": ("pairs", Kind("pairs.arrow", lambda f: images._read(f / "pairs.arrow", 12))),
    "image file": ("idx", Kind("images.gz", lambda f: read_idx(f / "images.gz", (5, 4, 4)))),
    "identity": ("tracking", Kind("mlflow.json", load_identity, json_change("mlflow.json"))),
    "spool": ("tracking", Kind("spool/records.jsonl", lambda f: unsent_values(f / "spool"))),
}
"""By name: the folder that it lies in, and the kind."""

PAGES: dict[str, tuple[str, Kind]] = {
    "comparison of a page": ("run", Kind("comparison.json", write_report, json_change("comparison.json"))),
    "evaluation of a page": ("evaluation", Kind("evaluation.json", write_report, json_change("evaluation.json"))),
    "card of a page": ("run", Kind("weights.json", write_report, card_change)),
    "state of a page": (
        "run",
        Kind("checkpoints/step_000002/state.json", write_report, checkpoint_change("checkpoints")),
    ),
    "trajectories of a page": ("run", Kind("trajectories/step_000001.parquet", write_report)),
    "settings of a page": ("run", Kind("config.yaml", write_report, yaml_change("config.yaml"))),
    "trials of a page": ("sweep", Kind("sweep.yaml", write_report, yaml_change("sweep.yaml"))),
}
"""What becomes a whole page, which takes a second."""
