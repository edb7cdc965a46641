"""Every kind of file that is read, changed at random: reading it ends in a value or in one line, never otherwise.

While a file is read, no file outside of its folder is opened, no code is run that a file brought, and memory is short.
What a file holds is changed as a text (bytes flipped, cut, repeated) and as a value (other types, huge numbers, deep
nesting, markup, paths); digests that a file has of itself are made to agree, as a careful forger would.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from ml2o_dist.artifact import load_artifact, save_artifact, weights_sha256
from ml2o_dist.config_file import dump_settings, load_evaluation, load_settings, read_settings
from ml2o_dist.errors import UserError
from ml2o_dist.evaluation.cell_cache import CellCache
from ml2o_dist.evaluation.cells import Cell, run_cell
from ml2o_dist.evaluation.contestants import HandDesigned
from ml2o_dist.evaluation.suites import load_suite
from ml2o_dist.finishing import RESULT_FILE, finished_answer
from ml2o_dist.metatrain.episode import run_episode
from ml2o_dist.metatrain.history import read_history
from ml2o_dist.metatrain.trainer import Trainer
from ml2o_dist.metatrain.trajectories import read_trajectories, recorded_problems
from ml2o_dist.paretoset.conditioned import Plain
from ml2o_dist.paretoset.fronts import Front
from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.networks import MultiHead, build_multi_head
from ml2o_dist.paretoset.page import render_set, set_page_sections
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
from ml2o_dist.run_log import read_log
from ml2o_dist.run_report import load_evaluation_record, load_record, load_set_record
from ml2o_dist.sweeping.outcome import finished_answer as finished_sweep
from ml2o_dist.sweeping.outcome import keep_answer
from ml2o_dist.sweeping.record import Report, SweepRecord
from ml2o_dist.sweeping.space import load_sweep
from ml2o_dist.tracking.identity import RunIdentity, load_identity, save_identity
from ml2o_dist.tracking.records import Point
from ml2o_dist.tracking.spool import Spool, unsent_values
from tests.evaluation.synthetic import DIGITS_ROWS, evaluation
from tests.metatrain.settings import small
from tests.paretoset.small import separate_noise, small_multi_head, start_and_experts

MEMORY = 2**30
"""Bytes that reading may take beside what the process has."""

SECRET = "the secret of another folder"


class Watch:
    """Notes what must not happen while a file of a folder is read: an audit hook, which Python never takes away."""

    _RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class",
             "socket.connect", "urllib.Request")  # fmt: skip

    def __init__(self) -> None:
        self.folders: tuple[str, ...] = ()
        self.seen: list[str] = []
        self._thread = 0
        self._libraries = tuple({os.path.realpath(each) for each in (sys.prefix, sys.base_prefix)})
        self._package = os.path.realpath(Path(load_artifact.__code__.co_filename).parent)
        sys.addaudithook(self._hear)

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Watch the `with` block; raise AssertionError at its end for what was seen."""
        self.seen, self._thread = [], threading.get_ident()
        self.folders = (os.path.realpath(folder), self._package, *self._libraries)
        try:
            yield
        finally:
            self.folders = ()
        assert not self.seen

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folders or threading.get_ident() != self._thread:
            return
        folders, self.folders = self.folders, ()  # what this does itself is not watched
        try:
            if event in self._RUNS:
                self.seen.append(f"{event} {args}")
            elif event == "open" and isinstance(args[0], str | bytes):
                path = os.path.realpath(os.fsdecode(args[0]))
                if not any(path == each or path.startswith(f"{each}/") for each in folders):
                    self.seen.append(f"open {path}")
            elif event == "exec" and not args[0].co_filename.startswith((*self._libraries, self._package, "<")):
                self.seen.append(f"exec {args[0].co_filename}")
        except ValueError:
            pass  # a name that no file can have
        finally:
            self.folders = folders


WATCH = Watch()


@contextmanager
def little_memory() -> Iterator[None]:
    """Let the process have no more than `MEMORY` bytes beside those that it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


TEXTS = (
    "", "x" * 5000, "\0", "a\nb", "\x1b[31mred", "<script>alert(1)</script>", "../secret", "../../etc/passwd",
    "/etc/passwd", "/dev/zero", "[bold]", "'; DROP TABLE", "é", "\u202e", "nan", "1e400", "null", "models:/x@y",
    "~nobody/x", "s3://bucket/x", "__class__", "ml2o_dist.rules.ml2o:ML2OState", "builtins:eval", "uint8", "cuda:99",
    "module", "tensor",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 10**6, 2**31, 2**63, -(2**63), 10**30, 10**39, 0.5, -0.0, 1e-320, 1e308,
    float("inf"),
    float("nan"), [], {}, [[]], [{}], {"": None}, [1, 2, 3], ["a"], {"kind": "tuple", "items": []}, {"format": 1},
)  # fmt: skip


def changed_value(value: Any, draw: random.Random) -> Any:
    """Return a copy of a JSON value in which one place is another value, gone, doubled or nested."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        holder: dict[str, Any] = {"it": value}
        parent, key = draw.choice(list(_places(holder)))
        what = draw.randrange(8)
        if what == 0 and parent is not holder:
            del parent[key]
        elif what == 1:
            deep: Any = parent[key]
            for _ in range(draw.choice((1, 3, 70))):
                deep = draw.choice(([deep], {"a": deep}))
            parent[key] = deep
        elif what == 2 and isinstance(parent[key], list) and parent[key]:
            parent[key] = parent[key] * draw.choice((2, 3))
        elif what == 3 and isinstance(parent, dict):
            parent[draw.choice(TEXTS)] = parent[key]
        elif what == 4 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = draw.choice(
                (-parent[key], parent[key] * 10, parent[key] + 1, str(parent[key]), [parent[key]])
            )
        elif what == 5:
            parent[key] = draw.choice(TEXTS)
        else:
            parent[key] = copy.deepcopy(draw.choice(VALUES))
        value = holder["it"]
    return value


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    for key in holder if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key])


SNIPPETS = (b"\0", b"\xff\xff", b"[" * 500, b"9" * 500, b"{}", b"\n", b"*a", b"&a ", b"<<: *a", b"!!int ''")


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """Return bytes in which some are flipped, cut off, repeated, or put in."""
    made = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(made) + 1)
        what = draw.randrange(6)
        if what == 0:
            del made[at:]
        elif what == 1:
            made[at:at] = made[at : at + draw.choice((1, 8, 100))]
        elif what == 2:
            made[at:at] = draw.choice(
                (b"\0", b"\xff\xff", b"[" * 500, b"9" * 500, b"{}", b"\n", b"*a", b"&a ", b"!!int ''")
            )
        elif what == 3:
            del made[at : at + draw.choice((1, 2, 30))]
        elif at < len(made):
            made[at] = draw.choice((made[at] ^ 1 << draw.randrange(8), 0, 255, draw.randrange(256)))
    return bytes(made)


def changed_tensors(tensors: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    """Return tensors of which one is of another shape or type, not finite, gone, or new."""
    made = dict(tensors)
    name = draw.choice(sorted(made))
    what = draw.randrange(7)
    if what == 0:
        del made[name]
    elif what == 1:
        made[draw.choice(TEXTS) or "x"] = made[name].clone()
    elif what == 2:
        made[name] = torch.zeros(draw.choice([(), (0,), (1,), (3, 0, 5), (1, 2, 3, 4)]))
    elif what == 3:
        made[name] = made[name].to(draw.choice((torch.bool, torch.int8, torch.int64, torch.float16, torch.float64)))
    elif what == 4 and made[name].is_floating_point():
        made[name] = made[name] * draw.choice((float("nan"), float("inf"), 1e30))
    elif what == 5:
        made[name] = made[name].flatten()
    else:
        made[name] = made[name].unsqueeze(0)
    return made


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
    "cell": ("cells", Kind(f"ab/{CELL_KEY}.safetensors", lambda f: CellCache(f).find(CELL_KEY), cell_change)),
    "pairs": ("pairs", Kind("pairs.arrow", lambda f: images._read(f / "pairs.arrow", 12))),
    "image file": ("idx", Kind("images.gz", lambda f: read_idx(f / "images.gz", (5, 4, 4)))),
}
"""By name: the folder that it lies in, and the kind."""

OTHERS: dict[str, tuple[str, Kind]] = {
    "trials": ("sweep", Kind("trials.jsonl", SweepRecord)),
    "identity": ("tracking", Kind("mlflow.json", load_identity, json_change("mlflow.json"))),
    "spool": ("tracking", Kind("spool/records.jsonl", lambda f: unsent_values(f / "spool"))),
}
"""Kinds whose readers are not held to this yet."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole folder of each kind, written by the package, each read once; a secret lies beside them."""
    place = tmp_path_factory.mktemp("good")
    for name, make in FOLDERS.items():
        (place / name).mkdir()
        make(place / name)
    for folder, kind in (KINDS | OTHERS).values():
        kind.read(place / folder)
    (place / "secret").write_text(SECRET)
    return place


@dataclass
class Outcomes:
    """How often reading ended in a value and in a line: both must come, or the test says nothing."""

    values: int = 0
    lines: list[str] = field(default_factory=list)


def read_changed(good: Path, place: Path, folder: str, kind: Kind, seed: int, outcomes: Outcomes) -> None:
    """Change a file of a copy of the folder, and read it."""
    draw = random.Random(seed)
    here = place / "here"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(good / folder, here)
    if kind.change is None or draw.random() < 0.4:
        (here / kind.file).write_bytes(changed_bytes((here / kind.file).read_bytes(), draw))
    else:
        kind.change(here, draw)
    with little_memory(), WATCH.over(here):
        try:
            kind.read(here)
        except UserError as error:
            line = str(error)
        else:
            outcomes.values += 1
            return
    outcomes.lines.append(line)
    assert len(line.splitlines()) == 1
    assert len(line) < 3000
    assert SECRET not in line


def try_kind(good: Path, place: Path, folder: str, kind: Kind, examples: int) -> None:
    outcomes = Outcomes()

    @settings(max_examples=examples, deadline=None, database=None, derandomize=examples < 100,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.integers(0, 2**32))
    def run(seed: int) -> None:
        read_changed(good, place, folder, kind, seed, outcomes)

    run()
    assert outcomes.values + len(outcomes.lines) >= examples / 2


@pytest.mark.parametrize("name", KINDS)
def test_a_changed_file_ends_in_a_value_or_one_line(name: str, good: Path, tmp_path: Path) -> None:
    try_kind(good, tmp_path, *KINDS[name], examples=12)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_a_file_changed_in_many_ways_ends_in_a_value_or_one_line(name: str, good: Path, tmp_path: Path) -> None:
    try_kind(good, tmp_path, *KINDS[name], examples=250)
