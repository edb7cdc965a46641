"""Joins the rooms for `ml2o pareto-set`: settings, Ray, MLflow and the run directory."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ml2o_dist.cluster_connection import connected
from ml2o_dist.config import DataSettings, EvaluateSettings
from ml2o_dist.config_file import dump_settings, flat_settings, read_settings, settings_hash
from ml2o_dist.errors import Aborted, Incomplete, Interrupted, UserError
from ml2o_dist.evaluation.contestants import Contestant, Guarded, HandDesigned, Learned, Stochastic
from ml2o_dist.evaluation.optimizer_names import parse_optimizers
from ml2o_dist.files import home_folder, replacing
from ml2o_dist.metatrain.checkpoint import newest_checkpoint, newest_manifest
from ml2o_dist.paretoset.approaches import OURS, Work, all_work
from ml2o_dist.paretoset.experts import Stage, fingerprint, network_of
from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.image_tasks import load_tasks
from ml2o_dist.paretoset.pieces import Stopped, run_stages, run_works
from ml2o_dist.paretoset.plots import plot_fronts
from ml2o_dist.paretoset.preferences import checked_preference
from ml2o_dist.paretoset.results import ApproachResult, assembled, best_first, cells, columns, markdown
from ml2o_dist.paretoset.saved_set import FILE, SetCard, load_set, save_plain, save_set
from ml2o_dist.paretoset.scalarization import Scalarization
from ml2o_dist.paretoset.settings import ParetoSetSettings
from ml2o_dist.paretoset.states import about_state, read_state
from ml2o_dist.paretoset.tasks import TaskSet
from ml2o_dist.problems.image_files import data_folder
from ml2o_dist.progress import StepDisplay
from ml2o_dist.remote_files import is_uri
from ml2o_dist.run_directory import check_folder, check_writable, logged_to
from ml2o_dist.run_report import write_report
from ml2o_dist.stopping import StopRequest, own_handlers_kept, stop_on_signals
from ml2o_dist.tracked_run import CLOSE_LIMIT_S, STOP_LIMIT_S, git_commit
from ml2o_dist.tracking.records import Status
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.store import redacted, tracking_uri_to_keep

SETTINGS, FRONTS, TABLE = "pareto_set.yaml", "fronts.json", "fronts.md"

OPERATIONAL = ("comparators", "resources", "data", "tracking")
"""Keys that a resumed run may change; so may it checkpoint_every and max_failures."""

log = logging.getLogger(__name__)


def settings_for(run_dir: str, config: Path | None, overrides: Sequence[str], *, resume: bool) -> ParetoSetSettings:
    """Read the settings: of the file, or of what lies in `run_dir` where that is gone on with. Raises UserError."""
    if resume and config is None:
        config = set_folder(run_dir) / SETTINGS
        if not config.exists():
            raise UserError(f"nothing to resume: {config.parent} holds no {SETTINGS}")
    return read_settings(ParetoSetSettings, config, overrides)


def set_folder(run_dir: str) -> Path:
    """Return the folder of a run; raises UserError."""
    if not run_dir:
        raise UserError("--run-dir is empty (a variable of the shell that is not set?)")
    if is_uri(run_dir):
        raise UserError(f"--run-dir {run_dir!r}: a Pareto set needs a folder that all its machines share, not a URI")
    folder = home_folder() / run_dir
    check_folder(folder)
    return folder


def train_set(
    settings: ParetoSetSettings,
    run_dir: str,
    *,
    resume: bool = False,
    address: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a Pareto set and its comparators; return what `ml2o pareto-set train --json` prints.

    Raises:
        UserError: settings, data, cluster or run directory are not as they must be (exit code 2).
        Incomplete: comparators failed; Interrupted: stopped by a signal; Aborted: ours failed, a disk that is full.
    """
    console = console or Console(stderr=True)
    settings = _resolved(settings)
    uri = tracking_uri_to_keep(settings.tracking.uri)
    folder = set_folder(run_dir)
    _check_place(folder, settings, resume)
    check_writable(folder)
    console.print(f"run directory  {folder}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"tracking URI   {redacted(uri)}", highlight=False, soft_wrap=True)
    contestant = _contestant(settings, uri)
    tasks = load_tasks(settings.tasks, settings.data.root)
    _check_network(settings, tasks)
    last_words = f"go on with: {resume_command(folder)}"
    with (
        stop_on_signals(at_once=True, last_words=lambda: last_words) as stop,
        logged_to(folder, console),
        _resumable(last_words),
        connected(address) as where,
    ):
        console.print(f"Ray            {where}", highlight=False, soft_wrap=True)
        stop.at_once = False
        with replacing(folder / SETTINGS) as stream:
            stream.write(dump_settings(settings).encode())
        with _tracked(settings, folder, uri, console, stop, resume) as sink:
            answer, wrong = _run(settings, tasks, contestant, folder, sink, uri, console, stop, last_words)
    if wrong:
        raise Incomplete("; ".join([*wrong, f"to try again: {resume_command(folder)}"]), answer)
    return answer


def resume_command(folder: Path) -> str:
    """Return what goes on with the run in `folder`."""
    return f"ml2o pareto-set train --run-dir {shlex.quote(str(folder))} --resume"


def _run(
    settings: ParetoSetSettings,
    tasks: TaskSet,
    contestant: Contestant,
    folder: Path,
    sink: MlflowSink,
    uri: str,
    console: Console,
    stop: StopRequest,
    last_words: str,
) -> tuple[dict[str, Any], list[str]]:
    stages = expert_stages(settings, tasks.count, folder)
    files = settings.experts.files or tuple(str(folder / "experts" / f"{stage.name}.safetensors") for stage in stages)
    files = tuple(str(home_folder() / file) for file in files)
    works = all_work(settings, tasks.count, contestant, str(folder), files)
    (folder / "training").mkdir(exist_ok=True)
    left = [stage for stage in stages if not _is_done(stage, folder)]
    total = sum(stage.tuning.steps for stage in stages) + sum(work.steps(tasks.count) for work in works)
    outcomes: dict[str, dict[str, Any]] = {}
    with StepDisplay(console, "steps", max(1, total)) as display, own_handlers_kept():

        def on_poll() -> bool:
            done = sum(_stage_steps(stage, folder) for stage in stages)
            done += sum(work.done(tasks.count, work.name in outcomes) for work in works)
            trained = sum(_is_done(stage, folder) for stage in stages)
            figures = f"{trained} of {len(stages)} networks, {len(outcomes)} of {len(works)} approaches"
            display.update(done, figures)
            return not stop()

        def on_outcome(work: Work, outcome: dict[str, Any]) -> None:
            outcomes[work.name] = outcome

        try:
            for group in ([stage for stage in left if not stage.start], [stage for stage in left if stage.start]):
                run_stages(group, folder / "experts", settings.resources, on_poll)
            failed = run_works(works, settings.resources, on_outcome, on_poll)
        except Stopped:
            raise Interrupted(stop.signal_number, f"stopped by {stop.name}; {last_words}") from None
        on_poll()
    results = assembled([outcomes[work.name] for work in works if work.name in outcomes])
    if OURS not in {result.approach for result in results if result.fronts}:
        reason = next((reason for work, reason in failed if work.name == OURS), "it diverged")
        raise Aborted(f"the routers were not trained: {reason}; {last_words}")
    digest = _save(settings, tasks, folder, files, results)
    table = Table(*columns(), title=f"Pareto set {folder.name}: {settings.tasks}, test split")
    for result in best_first(results):
        table.add_row(*cells(result), style="bold" if result.approach == OURS else None)
    console.print(table)
    version = _publish(settings, folder, results, sink, uri, console)
    answer = {
        "run_dir": str(folder),
        "tasks": list(tasks.names),
        "weights_sha256": digest,
        "registered_version": version,
        "approaches": [result.to_json() for result in results],
    }
    return answer, [f"{work.name} failed: {reason}" for work, reason in failed]


def expert_stages(settings: ParetoSetSettings, tasks: int, folder: Path) -> list[Stage]:
    """Return the trainings of start and experts; [] where they are read from files."""
    if settings.experts.files:
        return []

    def stage(name: str, weights: tuple[float, ...], start: str) -> Stage:
        tuning = settings.experts if start else settings.start
        return Stage(
            name, settings.tasks, settings.data.root, settings.network, weights, start, settings.seed, settings.device,
            tuning,
        )  # fmt: skip

    begin = stage("start", (1 / tasks,) * tasks, "")
    at = str(folder / "experts" / "start.safetensors")
    corners = [tuple(float(t == own) for t in range(tasks)) for own in range(tasks)]
    return [begin, *(stage(f"expert_{t + 1}", corner, at) for t, corner in enumerate(corners))]


def _is_done(stage: Stage, folder: Path) -> bool:
    return about_state(folder / "experts" / f"{stage.name}.safetensors").get("stage") == fingerprint(stage)


def _stage_steps(stage: Stage, folder: Path) -> int:
    if _is_done(stage, folder):
        return stage.tuning.steps
    newest = newest_manifest(folder / "experts" / stage.name)
    return int(newest.parent.name.removeprefix("step_")) if newest else 0


def _save(
    settings: ParetoSetSettings, tasks: TaskSet, folder: Path, files: Sequence[str], results: Sequence[ApproachResult]
) -> str:
    """Write the set, the fronts and their pictures; return the sha256 over the set's tensors."""
    newest, _ = newest_checkpoint(folder / "training" / OURS)
    start, *experts = [read_state(file) for file in files]
    network = network_of(tasks, settings.network, settings.seed)
    fusion = Fusion(network, start, experts, modules=settings.modules, heads=network.head_names, scale=settings.scale)
    if newest is not None:  # none where routers.steps is 0
        nn.utils.vector_to_parameters(newest.tensors["parameters"][0], fusion.routers.parameters())
    ours = next(result for result in results if result.approach == OURS)
    card = SetCard(
        tasks=settings.tasks,
        names=tasks.names,
        classes=tasks.classes,
        side=tasks.side,
        mean=tasks.mean,
        deviation=tasks.deviation,
        network=settings.network,
        modules=settings.modules,
        scale=settings.scale,
        seed=settings.seed,
        front=ours.fronts["test"].to_json(),
    )
    digest = save_set(folder / FILE, card, start, experts, fusion.routers.state_dict())
    about = {"tasks": tasks.names, "data_sha256": tasks.sha256, "git": git_commit()}
    fronts = about | {"approaches": [result.to_json() for result in results]}
    contents = {FRONTS: json.dumps(fronts) + "\n", TABLE: markdown(results, f"Fronts of {settings.tasks}")}
    for name, content in contents.items():
        with replacing(folder / name) as stream:
            stream.write(content.encode())
    plot_fronts(results, tasks.names, folder / "plots" / "fronts.png")
    return digest


def _publish(
    settings: ParetoSetSettings,
    folder: Path,
    results: Sequence[ApproachResult],
    sink: MlflowSink,
    uri: str,
    console: Console,
) -> int | None:
    """Send figures and files to MLflow and register the set; return its version, None where there is none."""
    from ml2o_dist.tracking.pareto_sets import register_set  # late: MLflow takes 2 s

    figures: dict[str, float] = {}
    for result in results:
        for split, front in result.fronts.items():
            figures[f"{result.approach}_{split}_hypervolume"] = front.hypervolume
            if front.monotonicity is not None:
                figures[f"{result.approach}_{split}_monotonicity"] = front.monotonicity
        figures[f"{result.approach}_seconds"] = result.seconds
    sink.log(figures, 0)
    report = Path(write_report(folder)["path"])
    for file in (folder / SETTINGS, folder / FRONTS, folder / TABLE, report):
        sink.log_artifact(file)
    sink.log_artifact(folder / "plots" / "fronts.png", "plots")
    sink.flush()
    if not settings.tracking.register_version:
        return None
    try:
        description = markdown(results, f"Fronts of {settings.tasks}")
        version = register_set(uri, settings.tracking.model, folder / FILE, sink.run_id, settings.tracking.experiment,
                               description)  # fmt: skip
    except UserError as error:
        console.print(f"[yellow]not registered:[/] {error}", highlight=False, soft_wrap=True)
        return None
    console.print(f"registered     {settings.tracking.model} version {version}", highlight=False)
    return version


def query_set(
    place: str,
    preference: Sequence[float],
    *,
    out: Path | None,
    data_root: str,
    measure: bool,
    tracking_uri: str,
    console: Console,
) -> dict[str, Any]:
    """Take the plain network of one preference out of a set; return what `ml2o pareto-set query --json` prints.

    Raises:
        UserError: there is no set, the preference is none, data are missing, or `out` cannot be written.
    """
    if place.startswith("models:/"):
        from ml2o_dist.tracking.pareto_sets import resolve_set  # late: MLflow takes 2 s

        file = resolve_set(tracking_uri_to_keep(tracking_uri), place)
    else:
        file = home_folder() / place
    found = load_set(file)
    card, fusion = found.card, found.fusion
    ray = checked_preference(preference, len(card.names))
    network = fusion.export(ray)
    answer: dict[str, Any] = {"preference": ray.tolist(), "tasks": list(card.names), "out": None}
    if measure:
        tasks = load_tasks(card.tasks, data_root)
        losses, accuracies = tasks.measure(network, "test", torch.device("cpu"))
        answer |= {"test_losses": losses.tolist(), "test_accuracies": accuracies.tolist()}
        for name, r, loss, right in zip(card.names, ray.tolist(), losses.tolist(), accuracies.tolist(), strict=True):
            console.print(f"{name:16} preference {r:.3f}  loss {loss:.4f}  accuracy {right:.4f}", highlight=False)
    if out is not None:
        target = home_folder() / out
        if target.suffix != ".safetensors":
            raise UserError(f"--out {str(out)!r} must end in .safetensors")
        try:
            save_plain(target, network, card, ray.tolist())
        except OSError as error:
            raise UserError(f"--out {str(out)!r} cannot be written: {error.strerror or error}") from error
        answer["out"] = str(target)
        console.print(f"written        {target}", highlight=False, soft_wrap=True)
    return answer


def written_preference(text: str) -> list[float]:
    """Read `R1,R2,...`; raises UserError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--preference {text!r} is not numbers joined by ',', as in 0.3,0.7") from error


def _resolved(settings: ParetoSetSettings) -> ParetoSetSettings:
    """Write out what depends on this process, as for a meta-training."""
    device = "cuda" if settings.resources.num_gpus > 0 else "cpu"
    return settings.model_copy(
        update={
            "data": DataSettings(root=str(data_folder(settings.data.root))),
            "device": device if settings.device == "auto" else settings.device,
        }
    )


def _check_place(folder: Path, settings: ParetoSetSettings, resume: bool) -> None:
    """Raise UserError where the folder holds something else, or this and nobody has asked to go on with it."""
    if not (folder / SETTINGS).exists():
        for name, what in (("sweep.yaml", "a sweep"), ("evaluation.json", "an evaluation"), ("config.yaml", "a run")):
            if (folder / name).exists():
                raise UserError(f"{folder} holds {what}; choose another --run-dir for the Pareto set")
        if resume:
            raise UserError(f"nothing to resume: {folder} holds no {SETTINGS}")
        return
    difference = _difference(settings, read_settings(ParetoSetSettings, folder / SETTINGS, ()))
    if difference:
        raise UserError(f"{folder} holds a Pareto set of other settings ({difference}); choose another --run-dir")
    if not resume:
        raise UserError(f"{folder} holds this Pareto set; add --resume to go on, or choose another --run-dir")


def _difference(ours: ParetoSetSettings, theirs: ParetoSetSettings) -> str:
    left, right = flat_settings(ours), flat_settings(theirs)
    for key in sorted(left.keys() | right.keys()):
        free = key.split(".")[0] in OPERATIONAL or key.split(".")[-1] in ("checkpoint_every", "max_failures")
        if not free and left.get(key) != right.get(key):
            return f"{key} is {left.get(key)!r} here and {right.get(key)!r} there"
    return ""


def _contestant(settings: ParetoSetSettings, uri: str) -> Contestant:
    """Return what trains the routers; raises UserError for a name that is not whole, or does not suit the loss."""
    from ml2o_dist.tracking.registry import resolve_model  # late: MLflow takes 2 s

    name = settings.routers.optimizer
    (entrant,) = parse_optimizers(EvaluateSettings(optimizers=(name,)), lambda reference: resolve_model(uri, reference))
    if entrant.tuned:
        raise UserError(f"routers.optimizer {name!r} needs a learning rate: write {name}@0.01")
    contestant = entrant.contestant(None)
    guarded = isinstance(contestant, Guarded | Stochastic) or (
        isinstance(contestant, Learned) and contestant.settings.guard is not None
    )
    looks_back = isinstance(contestant, HandDesigned) and contestant.aggregator == "famo"
    if (guarded or looks_back) and not Scalarization(settings.routers.loss).constant:
        raise UserError(
            f"routers.loss {settings.routers.loss!r} has other weights at every point, so that {name} cannot compare "
            "two points by it: use routers.loss=ls, or another optimizer"
        )
    return contestant


def _check_network(settings: ParetoSetSettings, tasks: TaskSet) -> None:
    """Raise UserError, before anything is trained, for a network, files or modules that do not go together."""
    network = network_of(tasks, settings.network, settings.seed)
    if settings.experts.files:
        if len(settings.experts.files) != tasks.count + 1:
            raise UserError(
                f"experts.files must name the start and {tasks.count} experts of task set {settings.tasks!r}, "
                f"not {len(settings.experts.files)} files"
            )
        start, *experts = [read_state(home_folder() / file) for file in settings.experts.files]
    else:
        start = network.state_dict()
        experts = [start] * tasks.count
    Fusion(network, start, experts, modules=settings.modules, heads=network.head_names)


@contextmanager
def _resumable(last_words: str) -> Iterator[None]:
    """Say how to go on when the `with` block is cut short by something that no setting would mend."""
    try:
        yield
    except (UserError, Interrupted, Aborted, Incomplete):
        raise
    except Exception as error:
        log.info("aborted", exc_info=True)  # the traceback belongs into run.log, the line on the screen
        raise Aborted(f"{type(error).__name__}: {' '.join(str(error).split())}; {last_words}") from error


@contextmanager
def _tracked(
    settings: ParetoSetSettings, folder: Path, uri: str, console: Console, stop: StopRequest, resume: bool
) -> Iterator[MlflowSink]:
    """Open the MLflow run, or go on with it, and end it as the `with` block ended."""
    sink = MlflowSink.open(
        uri,
        settings.tracking.experiment,
        run_name=folder.name,
        params={key: str(value)[:500] for key, value in flat_settings(settings).items()},
        tags={"config_hash": settings_hash(settings), "git": git_commit(), "run_dir": str(folder)},
        run_dir=folder,
        go_on=resume,
        stop=stop,
    )
    status: Status = "FINISHED"
    try:
        yield sink
    except BaseException as error:
        status = "KILLED" if isinstance(error, Interrupted) else "FAILED"
        raise
    finally:
        if unsent := sink.close(status, STOP_LIMIT_S if stop() else CLOSE_LIMIT_S):
            console.print(
                f"[yellow]not sent to MLflow:[/] {unsent} values; when {redacted(uri)} answers: "
                f"{resume_command(folder)}",
                highlight=False,
                soft_wrap=True,
            )
