"""The workflow of `ml2o pareto-set`: joins settings, Ray, MLflow and the run directory."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ml2o_dist.config_file import read_settings
from ml2o_dist.evaluation.optimizer_specs import OptimizerSpec
from ml2o_dist.paretoset.approaches import OURS, Outcome, Work, all_work, finished
from ml2o_dist.paretoset.checks import check_network, check_place, resolved, router_trainer
from ml2o_dist.paretoset.experts import Stage, expert_stages, is_done, steps_done
from ml2o_dist.paretoset.image_tasks import load_tasks
from ml2o_dist.paretoset.pieces import run_stages, run_works
from ml2o_dist.paretoset.results import ApproachResult, assembled, best_first, cells, columns, markdown
from ml2o_dist.paretoset.saved_set import FILE
from ml2o_dist.paretoset.settings import FRONTS, PICTURE, SETTINGS, TABLE, ParetoSetSettings
from ml2o_dist.paretoset.tasks import TaskSet
from ml2o_dist.rundir.directory import check_writable, logged_to
from ml2o_dist.runtime.cluster import RayEnded, connected
from ml2o_dist.runtime.errors import Aborted, Incomplete, Interrupted, UserError
from ml2o_dist.runtime.files import home_folder
from ml2o_dist.runtime.progress import StepDisplay
from ml2o_dist.runtime.shown_text import ForeignTextConsole, headed
from ml2o_dist.runtime.stopping import Stopped, StopRequest, own_handlers_kept, stop_on_signals
from ml2o_dist.tracking.named_servers import check_resumed, remember
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.store import tracking_uri_to_keep
from ml2o_dist.workflows.lifecycle import (
    aborted_in_a_line,
    git_commit,
    resume_command,
    shared_folder,
    show_places,
    tracked_run,
    write_settings,
)
from ml2o_dist.workflows.pareto_set_files import save_results
from ml2o_dist.workflows.report import write_report

log = logging.getLogger(__name__)


def resumed_set(run_dir: str, overrides: Sequence[str]) -> ParetoSetSettings:
    """Read the settings of the run in `run_dir`, to resume it; raises UserError if there is none."""
    within = shared_folder(run_dir, "a Pareto set")
    config = within / SETTINGS
    if not config.exists():
        raise UserError(f"nothing to resume: {config.parent} holds no {SETTINGS}")
    settings = read_settings(ParetoSetSettings, config, overrides, SETTINGS, within)
    check_resumed(settings.tracking.uri, overrides, config)
    return settings


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
        UserError: settings, data, cluster or run directory are invalid (exit code 2).
        Incomplete: comparators failed; Interrupted: stopped by a signal; Aborted: ours failed, or the disk is full.
    """
    console = console or ForeignTextConsole(stderr=True)
    settings = resolved(settings)
    uri = tracking_uri_to_keep(settings.tracking.uri)
    folder = shared_folder(run_dir, "a Pareto set")
    check_place(folder, settings, resume)
    check_writable(folder)
    show_places(console, folder, uri)
    optimizer = router_trainer(settings, lambda reference: _weights_of(uri, reference))
    tasks = load_tasks(settings.tasks, settings.data.root)
    check_network(settings, tasks)
    plan = _plan(settings, tasks, optimizer, folder)
    ray = connected(address) if plan.stages or plan.works else nullcontext("not needed, nothing is left to train")
    again = resume_command("pareto-set train", folder)
    last_words = f"go on with: {again}"
    with (
        stop_on_signals(at_once=True, last_words=lambda: last_words) as stop,
        logged_to(folder, console),
        aborted_in_a_line(again, lambda: last_words),
        ray as where,
    ):
        console.print(f"Ray            {where}", highlight=False, soft_wrap=True)
        stop.at_once = False
        remember(uri)  # before the folder can be resumed
        write_settings(folder / SETTINGS, settings)
        with tracked_run(
            settings,
            settings.tracking.experiment,
            folder,
            uri,
            console,
            stop,
            title=folder.name,
            place=str(folder),
            again=again,
            go_on=resume,
        ) as sink:
            answer, wrong = _run(settings, tasks, plan, folder, sink, uri, console, stop, last_words)
    if wrong:
        raise Incomplete("; ".join([*wrong, f"to try again: {again}"]), answer)
    return answer


def _weights_of(uri: str, reference: str) -> Path:
    from ml2o_dist.tracking.registry import resolve_model  # late: MLflow takes 2 s

    return resolve_model(uri, reference)


@dataclass(frozen=True)
class _Plan:
    """The parts of a run; `stages` and `works` are still to do, `outcomes` are the finished ones, by name."""

    every_stage: list[Stage]
    every_work: list[Work]
    files: tuple[str, ...]
    stages: list[Stage]
    works: list[Work]
    outcomes: dict[str, Outcome]


def _plan(settings: ParetoSetSettings, tasks: TaskSet, optimizer: OptimizerSpec, folder: Path) -> _Plan:
    place = folder / "experts"
    stages = expert_stages(settings, tasks.count, place)
    files = settings.experts.files or tuple(str(place / f"{stage.name}.safetensors") for stage in stages)
    files = tuple(str(home_folder() / file) for file in files)
    works = all_work(settings, tasks.count, optimizer, str(folder), files)
    left = [stage for stage in stages if not is_done(stage, place)]
    outcomes = {} if left else finished(works)
    return _Plan(stages, works, files, left, [work for work in works if work.name not in outcomes], outcomes)


def _phase(left: Sequence[Stage]) -> str:
    """Return in a word what is being trained, judging by the remaining stages."""
    if not left:
        return "fronts"
    return "experts" if left[0].start else "start"


def _run(
    settings: ParetoSetSettings,
    tasks: TaskSet,
    plan: _Plan,
    folder: Path,
    sink: MlflowSink,
    uri: str,
    console: Console,
    stop: StopRequest,
    last_words: str,
) -> tuple[dict[str, Any], list[str]]:
    place, stages, works, outcomes = folder / "experts", plan.every_stage, plan.every_work, dict(plan.outcomes)
    (folder / "training").mkdir(exist_ok=True)
    total = sum(stage.tuning.steps for stage in stages) + sum(work.steps(tasks.count) for work in works)
    with StepDisplay(console, "steps", max(1, total)) as display, own_handlers_kept():

        def on_poll() -> bool:
            done = sum(steps_done(stage, place) for stage in stages)
            done += sum(work.done(tasks.count, work.name in outcomes) for work in works)
            left = [stage for stage in stages if not is_done(stage, place)]
            networks = f"{len(stages) - len(left)} of {len(stages)} networks"
            display.update(done, f"{_phase(left)}: {networks}, {len(outcomes)} of {len(works)} approaches")
            return not stop()

        def on_outcome(work: Work, outcome: Outcome) -> None:
            outcomes[work.name] = outcome

        try:
            for later in (False, True):  # the start, then the experts
                group = [stage for stage in plan.stages if bool(stage.start) is later]
                if group:
                    run_stages(group, place, settings.resources, on_poll)
            failed = run_works(plan.works, settings.resources, on_outcome, on_poll) if plan.works else []
        except Stopped:
            raise Interrupted(stop.signal_number, f"stopped by {stop.name}; {last_words}") from None
        except RayEnded as error:
            raise Aborted(f"{error}; {last_words}") from error
        on_poll()
    results = assembled([outcomes[work.name] for work in works if work.name in outcomes])
    if OURS not in {result.approach for result in results if result.fronts}:
        reason = next((reason for work, reason in failed if work.name == OURS), "it diverged")
        raise Aborted(f"the routers were not trained: {reason}; {last_words}")
    digest = save_results(settings, tasks, folder, plan.files, results, git_commit())
    table = Table(*columns(), title=f"Pareto set {folder.name}: {settings.tasks}, test split")
    for result in best_first(results):
        table.add_row(*cells(result), style="bold" if result.approach == OURS else None)
    console.print(table)
    version = _publish(settings, folder, results, sink, uri, console)
    even = ",".join([f"{1 / tasks.count:.3g}"] * (tasks.count - 1))
    even += f",{1 - sum(map(float, even.split(','))):.3g}"
    console.print(f"the dial       {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"a network      ml2o pareto-set query {shlex.quote(str(folder))} --preference {even} --out plain.safetensors",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    answer = {
        "run_dir": str(folder),
        "tasks": list(tasks.names),
        "weights_sha256": digest,
        "registered_version": version,
        "approaches": [result.to_json() for result in results],
    }
    return answer, [f"{work.name} failed: {reason}" for work, reason in failed]


def _publish(
    settings: ParetoSetSettings,
    folder: Path,
    results: Sequence[ApproachResult],
    sink: MlflowSink,
    uri: str,
    console: Console,
) -> int | None:
    """Send figures and files to MLflow and register the set; return its version, None if there is none."""
    from ml2o_dist.workflows.register_pareto_set import register_set  # late: MLflow takes 2 s

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
    sink.log_artifact(folder / PICTURE, "plots")
    sink.flush()
    if not settings.tracking.register_version:
        return None
    try:
        description = markdown(results, f"Fronts of {settings.tasks}")
        version = register_set(uri, settings.tracking.model, folder / FILE, sink.run_id, settings.tracking.experiment,
                               description)  # fmt: skip
    except UserError as error:
        console.print(headed("not registered:", str(error)), soft_wrap=True)
        return None
    console.print(f"registered     {settings.tracking.model} version {version}", highlight=False)
    return version
