"""All approaches to a front, ours and the comparators, on the same tasks and network, as pieces of work for Ray.

| name | what | trained |
|---|---|---|
| experts | the T experts themselves | |
| average, arithmetic, ties | one merged network; lambda of the latter two is chosen on the validation split | |
| soup | rewarded soup | |
| pwe | ours: the fusion's routers | routers.steps by routers.optimizer |
| ls, epo | a network for each ray of the grid | start.steps + experts.steps by Adam, each |
| mgda | one network, which knows no preference | the same |
| phn-ls, phn-epo | Pareto hypernetwork | as many steps as start, experts and routers took together |
| cosmos, pamal | preference as input; weight line | the same |
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter
from torch import Tensor
from torch.func import functional_call

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.config import AnyRule, LearnedRuleSettings
from ml2o_dist.evaluation.optimizer_specs import HandDesigned, OptimizerSpec
from ml2o_dist.paretoset.comparators.base import COMPARATORS, Ingredients, Merged, State, Training
from ml2o_dist.paretoset.conditioned import Conditioned, Fused, trainable
from ml2o_dist.paretoset.experts import network_of
from ml2o_dist.paretoset.fronts import Front, front_from_json
from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.image_tasks import load_tasks
from ml2o_dist.paretoset.networks import MultiHead
from ml2o_dist.paretoset.preference_problem import PreferenceProblem
from ml2o_dist.paretoset.preferences import evaluation_rays
from ml2o_dist.paretoset.scalarization import Scalarization
from ml2o_dist.paretoset.settings import ParetoSetSettings
from ml2o_dist.paretoset.states import read_state
from ml2o_dist.paretoset.tasks import TaskSet
from ml2o_dist.paretoset.training import Diverged, train
from ml2o_dist.plugins import Carrying
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import replacing
from ml2o_dist.runtime.reading import read_bytes, read_json_object, validated

OURS, EXPERTS = "pwe", "experts"

TOLD_EVERY = 50
"""Steps between two progress reports of a training."""

Outcome = dict[str, Any]
"""The outcome of a piece of work, as JSON values."""


class _OutcomeJson(BaseModel):
    name: str
    approach: str
    steps: int
    seconds: float
    trained_parameters: int
    peak_mb: float
    failures: int
    diverged: str


_OUTCOME = TypeAdapter(_OutcomeJson)


@dataclass(frozen=True)
class Work(Carrying):
    """One piece: a whole approach, or one ray of it.

    Attributes:
        approach: see the table above.
        ray: the row of `evaluation_rays`, for approaches that train a network for each; None: all rays.
        settings: the settings, with the device and the data folder resolved.
        optimizer: the update rule that trains it.
        folder: the run directory; states of start and experts lie in `experts/`.
        files: the files of the start and each expert.
    """

    approach: str
    ray: int | None
    settings: ParetoSetSettings
    optimizer: OptimizerSpec
    anneals: bool
    folder: str
    files: tuple[str, ...]

    @property
    def name(self) -> str:
        """The approach, with the ray's number if it has one."""
        return self.approach if self.ray is None else f"{self.approach}_{self.ray:02d}"

    @property
    def training(self) -> Training:
        """How a comparator is trained."""
        return "none" if self.approach == EXPERTS else COMPARATORS[self.approach].training

    def steps(self, tasks: int) -> int:
        """Return the number of its training steps; 0 if it is not trained. `tasks`: T."""
        settings = self.settings
        if self.approach == OURS:
            return settings.routers.steps
        if self.training == "none":
            return 0
        if self.training == "all":
            return settings.start.steps + tasks * settings.experts.steps + settings.routers.steps
        return settings.start.steps + settings.experts.steps

    def done(self, tasks: int, finished: bool) -> int:
        """Return how many of its steps are done, by its last progress report."""
        try:
            return self.steps(tasks) if finished else int(read_bytes(self.told, "count", 20, self.told.parent))
        except (OSError, ValueError):  # not begun, or just being written
            return 0

    @property
    def told(self) -> Path:
        """The file of a training's progress reports."""
        return Path(self.folder) / "training" / f"{self.name}.step"

    @property
    def result(self) -> Path:
        """The file of its outcome."""
        return Path(self.folder) / "fronts" / f"{self.name}.json"


def all_work(
    settings: ParetoSetSettings, tasks: int, optimizer: OptimizerSpec, folder: str, files: tuple[str, ...]
) -> list[Work]:
    """Return every piece of work of a run, ours first; `optimizer` trains the routers."""
    anneals = isinstance(optimizer, HandDesigned)
    found = [Work(OURS, None, settings, optimizer, anneals, folder, files)]
    for name in (EXPERTS, *settings.comparators):
        aggregator = "mean" if name == EXPERTS else COMPARATORS[name].aggregator
        work = Work(name, None, settings, HandDesigned(aggregator, "adam", settings.comparator_lr), True, folder, files)
        each = range(len(evaluation_rays(tasks, settings.divisions))) if work.training == "ray" else [None]
        found += [replace(work, ray=ray) for ray in each]
    return found


def run_work(work: Work) -> Outcome:
    """Do or resume one piece of work and store its outcome; an outcome that is stored already is returned.

    Raises:
        UserError: invalid data, state dict or name; OSError: the disk cannot be written.
    """
    settings = work.settings
    device = torch.device(settings.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    tasks = load_tasks(settings.tasks, settings.data.root)
    states = [read_state(file) for file in work.files]
    mark = _fingerprint(work, states)
    if (kept := kept_outcome(work.result, mark)) is not None:
        return kept
    network = network_of(tasks, settings.network, settings.seed)
    rays = evaluation_rays(tasks.count, settings.divisions)

    def measure(state: State, split: str) -> tuple[Tensor, Tensor]:
        answer: Callable[[Tensor], list[Tensor]] = lambda images: functional_call(network, state, (images,))  # noqa: E731
        return tasks.measure(answer, split, device, settings.test_samples)

    made: Merged | Conditioned
    if work.approach == OURS:
        made = _fused(settings, network, states)
    elif work.training == "none":
        network.to(device).eval()
        start, *experts = [{key: tensor.to(device) for key, tensor in state.items()} for state in states]
        given = Ingredients(settings, tasks, network, start, experts, rays, measure)
        made = _experts(given) if work.approach == EXPERTS else COMPARATORS[work.approach].make(given)
    else:
        start, *experts = states
        made = COMPARATORS[work.approach].make(Ingredients(settings, tasks, network, start, experts, rays, measure))
    if isinstance(made, Merged):
        fronts = {
            split: _front(made.rays, [measure(s, split) for s in made.states]) for split in ("validation", "test")
        }
        outcome: Outcome = {**fronts, **_UNTRAINED, **made.chosen}
    else:
        outcome = _trained(work, made, tasks, device, mark)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    outcome = {"name": work.name, "approach": work.approach, "fingerprint": mark, "peak_mb": peak, **outcome}
    with replacing(work.result) as stream:
        stream.write(json.dumps(outcome).encode())
    return outcome


def finished(works: Sequence[Work]) -> dict[str, Outcome]:
    """Return the outcomes of the finished `works` of one run, by name; none before the run has its experts."""
    if not all(Path(file).exists() for file in works[0].files):
        return {}
    states = [read_state(file) for file in works[0].files]
    outcomes = {work.name: kept_outcome(work.result, _fingerprint(work, states)) for work in works}
    return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


def kept_outcome(file: Path, mark: Mapping[str, Any] | None = None) -> Outcome | None:
    """Return the outcome in `file`; None if it is missing, torn, or does not match a given `mark`."""
    try:
        outcome: Outcome = read_json_object(file, "outcome", within=file.parent)
        if mark is not None and _current(outcome.get("fingerprint")) != mark:
            return None
        validated(_OUTCOME, outcome, "the outcome")
        if not outcome["diverged"]:
            for split in ("validation", "test"):
                front_from_json(outcome.get(split))
    except (FileNotFoundError, UserError):
        return None
    return outcome


def _fingerprint(work: Work, states: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Return the values that determine the outcome, as JSON values."""
    settings = work.settings
    kept = settings.model_dump(
        mode="json", exclude={"plugins", "comparators", "resources", "data", "tracking"}, by_alias=True
    )
    for part in ("start", "experts", "routers"):
        for key in ("checkpoint_every", "max_failures", "files"):
            kept[part].pop(key, None)
    if work.approach != OURS:
        for key in ("begin", "loss", "optimizer"):
            kept["routers"].pop(key)
    return {
        "settings": kept,
        **({"plugins": sorted(each.sha256 for each in settings.plugins)} if settings.plugins else {}),
        "trainer": json.loads(json.dumps(work.optimizer.identity)),
        "states": [weights_sha256(state) for state in states],
    }


def _current(fingerprint: Any) -> Any:
    """Return a saved fingerprint with the present names of a learned rule's settings."""
    trainer = fingerprint.get("trainer") if isinstance(fingerprint, dict) else None
    if not isinstance(trainer, dict) or not isinstance(trainer.get("learned"), dict):
        return fingerprint
    learned = validated(_RULE, trainer["learned"], "the outcome").model_dump(mode="json")
    return {**fingerprint, "trainer": {**trainer, "learned": learned}}


_RULE: TypeAdapter[LearnedRuleSettings] = TypeAdapter(AnyRule)

_UNTRAINED = {"steps": 0, "seconds": 0.0, "trained_parameters": 0, "failures": 0, "diverged": ""}


def _experts(given: Ingredients) -> Merged:
    """Return the experts themselves, each for its own task."""
    names = given.vectors.names
    states = [names.whole(names.fitted(expert, f"expert {t + 1}")) for t, expert in enumerate(given.experts)]
    return Merged(torch.eye(given.tasks.count, dtype=torch.float64), states)


def _trained(work: Work, model: Conditioned, tasks: TaskSet, device: torch.device, mark: Mapping[str, Any]) -> Outcome:
    settings = work.settings
    rays = evaluation_rays(tasks.count, settings.divisions)
    even = torch.full((tasks.count,), 1 / tasks.count, dtype=torch.float64)
    fixed = None
    if work.approach != OURS and work.training != "all":
        fixed = even if work.ray is None else rays[work.ray]
        rays = fixed.unsqueeze(0)
    problem = PreferenceProblem(
        model, tasks, Scalarization(_loss(work)), batch=_batch(work), device=device, preference=fixed
    )
    steps = work.steps(tasks.count)
    outcome = {"steps": steps, "trained_parameters": trainable(model), "diverged": ""}
    try:
        trained = train(
            problem,
            work.optimizer.rule(device, problem.dtype),
            steps=steps,
            seed=settings.seed,
            folder=Path(work.folder) / "training" / work.name,
            fingerprint=mark,
            final_lr=settings.routers.final_lr if work.anneals else 1.0,
            checkpoint_every=settings.routers.checkpoint_every,
            on_step=_told(work),
        )
    except Diverged as error:
        return outcome | {"diverged": str(error), "seconds": 0.0, "failures": 0}
    fronts = {
        split: _front(rays, [problem.measure(trained.parameters, r, split, settings.test_samples) for r in rays])
        for split in ("validation", "test")
    }
    return {**outcome, **fronts, "seconds": trained.seconds, "failures": trained.failures}


def _fused(settings: ParetoSetSettings, network: MultiHead, states: list[dict[str, Tensor]]) -> Conditioned:
    start, *experts = states
    return Fused(
        Fusion(
            network,
            start,
            experts,
            modules=settings.modules,
            heads=network.head_names,
            scale=settings.scale,
            begin=settings.routers.begin,
            seed=settings.seed,
        )
    )


def _loss(work: Work) -> str:
    return work.settings.routers.loss if work.approach == OURS else COMPARATORS[work.approach].loss


def _batch(work: Work) -> int:
    per_ray = work.approach != OURS and work.training != "all"
    return work.settings.experts.batch if per_ray else work.settings.routers.batch


def _front(rays: Tensor, measured: list[tuple[Tensor, Tensor]]) -> dict[str, object]:
    losses, accuracies = zip(*measured, strict=True)
    return Front(rays, torch.stack(losses), torch.stack(accuracies)).to_json()


def _told(work: Work) -> Callable[[int, Tensor, float], bool]:
    def told(step: int, parameters: Tensor, seconds: float) -> bool:
        if step % TOLD_EVERY == 0:
            with replacing(work.told) as stream:
                stream.write(str(step).encode())
        return True

    return told
