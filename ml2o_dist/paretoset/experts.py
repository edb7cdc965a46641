"""The common start and the experts, trained as Ray Train runs.

A stage is one training of the network on a weighted sum of the tasks' losses: equal weights from the first values
give theta_0, the weights e_t from theta_0 give expert t. Its ranks are data-parallel (gloo on CPUs, NCCL on GPUs).

The batch of a step and rank depends only on the seed, the stage, the step and the rank. A training that was killed and
resumed from its checkpoint therefore ends like one that was not killed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ml2o_dist.metatrain.checkpoint import Checkpoint, newest_checkpoint, newest_manifest, save_checkpoint
from ml2o_dist.paretoset.image_tasks import load_tasks
from ml2o_dist.paretoset.networks import MultiHead, build_multi_head
from ml2o_dist.paretoset.settings import FineTuning, NetworkSettings, ParetoSetSettings
from ml2o_dist.paretoset.states import about_state, read_state, save_state
from ml2o_dist.paretoset.tasks import TaskSet, sample_losses
from ml2o_dist.paretoset.training import annealed
from ml2o_dist.plugins import Carrying, loaded
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.reading import one_line
from ml2o_dist.runtime.seeding import generator


@dataclass(frozen=True)
class Stage(Carrying):
    """One training, as the plain values that a rank needs.

    Attributes:
        name: `start`, `expert_1`, ...; also the name of its folder.
        weights: weights of the tasks' losses.
        start: the file with its initial parameters; "" for initial values from the seed.
        device: cpu or cuda.
    """

    name: str
    tasks: str
    data_root: str
    network: NetworkSettings
    weights: tuple[float, ...]
    start: str
    seed: int
    device: str
    tuning: FineTuning


def network_of(tasks: TaskSet, settings: NetworkSettings, seed: int) -> MultiHead:
    """Build the network for a task set; raises UserError."""
    rest = settings.model_dump()
    return build_multi_head(rest.pop("name"), side=tasks.side, classes=tasks.classes, seed=seed, **rest)


def expert_stages(settings: ParetoSetSettings, tasks: int, folder: Path) -> list[Stage]:
    """Return the trainings of start and experts, whose states lie in `folder`; [] if they are read from files."""
    if settings.experts.files:
        return []

    def stage(name: str, weights: tuple[float, ...], start: str) -> Stage:
        tuning = settings.experts if start else settings.start
        return Stage(
            name, settings.tasks, settings.data.root, settings.network, weights, start, settings.seed, settings.device,
            tuning,
        )  # fmt: skip

    begin = stage("start", (1 / tasks,) * tasks, "")
    at = str(folder / "start.safetensors")
    corners = [tuple(float(t == own) for t in range(tasks)) for own in range(tasks)]
    return [begin, *(stage(f"expert_{t + 1}", corner, at) for t, corner in enumerate(corners))]


def is_done(stage: Stage, folder: Path) -> bool:
    """Tell whether `folder` holds the finished state of the stage."""
    return about_state(folder / f"{stage.name}.safetensors").get("stage") == fingerprint(stage)


def steps_done(stage: Stage, folder: Path) -> int:
    """Return how many of the stage's steps are done, according to its checkpoints."""
    if is_done(stage, folder):
        return stage.tuning.steps
    newest = newest_manifest(folder / stage.name)
    return int(newest.parent.name.removeprefix("step_")) if newest else 0


def fit_stage(stage: Stage, folder: Path, *, num_cpus: float = 1.0, num_gpus: float = 0.0) -> float:
    """Train a stage as a Ray Train run with its checkpoints in `folder`, and write `folder/NAME.safetensors`.

    Resumes from a checkpoint if there is one; returns the total seconds of training. Ray must be connected.

    Raises:
        ray.train.TrainingFailedError: the ranks failed more often than `max_failures`.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # Ray Train's own files of an earlier run are not read again; the run resumes from our checkpoints.
    shutil.rmtree(folder / "ray" / stage.name, ignore_errors=True)
    config = {"stage": stage, "folder": str(folder / stage.name)}
    each: dict[str, float] = {"CPU": num_cpus}
    if num_gpus:
        each["GPU"] = num_gpus
    TorchTrainer(
        train_rank,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=stage.tuning.ranks,
            use_gpu=num_gpus > 0,
            resources_per_worker=each,
        ),
        run_config=RunConfig(
            name=stage.name,
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=stage.tuning.max_failures),
        ),
    ).fit()
    checkpoint, refused = newest_checkpoint(folder / stage.name)
    if checkpoint is None or checkpoint.meta_step != stage.tuning.steps:
        raise RuntimeError(f"training {stage.name} left no whole checkpoint of its end: {'; '.join(refused)}")
    weights = {name.removeprefix("model/"): t for name, t in checkpoint.tensors.items() if name[:6] == "model/"}
    save_state(folder / f"{stage.name}.safetensors", weights, {"stage": fingerprint(stage)})
    return float(checkpoint.state["seconds"])


def fingerprint(stage: Stage) -> dict[str, Any]:
    """Return the JSON values that determine the final weights of a stage."""
    tuning = stage.tuning.model_dump(exclude={"checkpoint_every", "max_failures", "files"})
    kept = asdict(stage) | {"network": stage.network.model_dump(), "tuning": tuning, "weights": list(stage.weights)}
    plugins = sorted(each.sha256 for each in loaded())
    return kept | {"plugins": plugins} if plugins else kept


def train_rank(config: Mapping[str, Any]) -> None:
    """Train one rank of a stage."""
    import ray.train
    import ray.train.torch

    stage: Stage = config["stage"]
    folder = Path(config["folder"])
    rank, ranks = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    device = ray.train.torch.get_device() if stage.device != "cpu" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    tasks = load_tasks(stage.tasks, stage.data_root)
    network = network_of(tasks, stage.network, stage.seed)
    if stage.start:
        network.load_state_dict(read_state(stage.start))
    own = [t for t, weight in enumerate(stage.weights) if weight]
    for t, head in enumerate(network.heads):
        head.requires_grad_(t in own)
    network.to(device)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=stage.tuning.lr)
    mark = fingerprint(stage)
    done, seconds = _resume(folder, mark, network, optimizer)
    model = nn.parallel.DistributedDataParallel(network) if ranks > 1 else network
    share = stage.tuning.batch // ranks
    weights = torch.tensor([stage.weights[t] for t in own], device=device)
    if stage.tuning.steps == 0 and rank == 0:
        _save(folder, mark, 0, 0.0, network, optimizer)
    while done < stage.tuning.steps:
        began = time.perf_counter()
        draws = generator("expert", stage.seed, stage.name, done, rank)
        batches = tasks.draw("train", share, draws, device, own)
        answers = [model(batch.images) for batch in batches]
        present = sorted(t for batch in batches for t in batch.tasks)
        losses = sample_losses(answers, batches).mean(dim=0)[[present.index(t) for t in own]]
        optimizer.param_groups[0]["lr"] = stage.tuning.lr * annealed(stage.tuning.final_lr, done, stage.tuning.steps)
        optimizer.zero_grad()
        torch.autograd.backward((weights * losses).sum())
        optimizer.step()
        done += 1
        seconds += time.perf_counter() - began
        if done % stage.tuning.checkpoint_every == 0 or done == stage.tuning.steps:
            if rank == 0:
                _save(folder, mark, done, seconds, network, optimizer)
            ray.train.report({"step": done, "loss": float((weights * losses.detach()).sum())})


def _save(
    folder: Path, mark: Mapping[str, Any], done: int, seconds: float, network: nn.Module, optimizer: torch.optim.Adam
) -> None:
    tensors = {f"model/{name}": tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{i}/{name}": tensor.detach().cpu().clone() for name, tensor in moments.items()}
    save_checkpoint(folder, Checkpoint(done, tensors, {"fingerprint": dict(mark), "seconds": seconds}), keep=2)


def _resume(
    folder: Path, mark: Mapping[str, Any], network: nn.Module, optimizer: torch.optim.Adam
) -> tuple[int, float]:
    """Resume from the newest checkpoint of the same stage; return the steps done and the seconds they took.

    Raises:
        UserError: the checkpoint is marked as this stage's, but its tensors do not fit.
    """
    saved, _ = newest_checkpoint(folder)
    if saved is None or saved.state.get("fingerprint") != json.loads(json.dumps(mark)):
        return 0, 0.0
    shown = f"checkpoint {str(folder / f'step_{saved.meta_step:06d}')!r}"
    seconds = saved.state.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise UserError(f"{shown} cannot be gone on with: its seconds are no number")
    weights = {name[6:]: tensor for name, tensor in saved.tensors.items() if name[:6] == "model/"}
    _check_alike(shown, weights, network.state_dict())
    state = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fresh = {f"{i}/{moment}": p for i, p in enumerate(parameters) for moment in ("exp_avg", "exp_avg_sq")}
    fresh |= {f"{i}/step": torch.zeros(()) for i in range(len(parameters))}
    moments = {name[5:]: tensor for name, tensor in saved.tensors.items() if name[:5] == "adam/"}
    _check_alike(shown, moments, {name: tensor for name, tensor in fresh.items() if saved.meta_step})
    for name, tensor in moments.items():
        i, _, moment = name.partition("/")
        state["state"].setdefault(int(i), {})[moment] = tensor
    network.load_state_dict(weights)
    optimizer.load_state_dict(state)
    return saved.meta_step, float(seconds)


def _check_alike(shown: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise UserError unless both have tensors of the same names, shapes and kinds."""
    kinds, ours = ({name: (t.shape, t.dtype) for name, t in each.items()} for each in (found, wanted))
    if kinds != ours:
        name = min(key for key in kinds.keys() | ours.keys() if kinds.get(key) != ours.get(key))
        raise UserError(f"{shown} cannot be gone on with: its tensor {one_line(name)!r} is missing, or another's")
