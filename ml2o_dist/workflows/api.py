"""The package from Python: what the commands do, as functions that return results.

    from ml2o_dist import evaluate

    result = evaluate(optimizers=["pretrained", "mean+adam@0.01"], problems=["fonseca"], seeds=3)
    result.to_pandas()
    result.plot()

No Ray needs to run: one is started and ended, unless this process is connected to one already. Nothing is printed
unless `progress` is set. Errors in names, settings, data or weights are raised as `UserError`; the other exceptions
are those of `ml2o_dist.runtime.errors`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from ml2o_dist.config import EvaluateSettings, MetaTrainSettings
from ml2o_dist.config_file import (
    DEFAULT_CONFIG,
    checked,
    dump_settings,
    laid_over,
    load_evaluation,
    load_named,
    load_settings,
    overridden,
    put,
    read_settings,
    read_tree,
)
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.registry import check_known_elsewhere
from ml2o_dist.runtime.shown_text import ForeignTextConsole
from ml2o_dist.workflows.results import EvaluationResult, MetaTrainResult, ParetoSetResult, SweepResult

if TYPE_CHECKING:
    from rich.console import Console

    from ml2o_dist.paretoset.settings import ParetoSetSettings
    from ml2o_dist.sweeping.settings import SweepSettings

Model = TypeVar("Model", bound=BaseModel)

Overrides = Mapping[str, Any] | Iterable[str]
"""Values by dotted key, `{"rule.lr": 0.01}`; or `key=value` texts, whose values are YAML."""


def meta_train(
    settings: MetaTrainSettings | Mapping[str, Any] | str | Path | None = None,
    run_dir: str | Path | None = None,
    *,
    overrides: Overrides = (),
    plugins: Iterable[str | Path] = (),
    resume: bool = False,
    address: str = "auto",
    progress: bool = False,
    console: Console | None = None,
) -> MetaTrainResult:
    """Meta-train a learned optimizer, compare it with baselines, register it in MLflow.

    Args:
        settings: an object, a mapping (without a `family`, over the embedded default), a YAML file or a run directory;
            None: the embedded default, or with `resume` those of the run.
        run_dir: a folder, or the URI of one; None: runs/<time>.
        overrides: values that override the settings.
        plugins: files or modules that register problems, rules and the like.
        resume: resume from the newest checkpoint in `run_dir`.
        address: of Ray: auto, local, or HOST:PORT.
        progress: print the command's output.
        console: the console to print to, instead of `progress`.

    Raises:
        UserError: an input is invalid; Aborted, Interrupted: the run was cut short, and can be resumed;
        Incomplete: the run is done, except for the comparison.
    """
    load_named(map(str, plugins))
    if resume and run_dir is None:
        raise UserError("--resume needs --run-dir, the directory of the run to go on with")
    place: Any = f"runs/{datetime.now():%Y%m%d-%H%M%S}" if run_dir is None else str(run_dir)
    words = _words(overrides)
    if resume and settings is None:
        from ml2o_dist.rundir.directory import resumed_settings
        from ml2o_dist.rundir.storage import open_storage

        place = open_storage(place, resume=True)
        found = resumed_settings(place, words)
    elif isinstance(settings, Mapping):
        base = {} if "family" in settings else read_tree(DEFAULT_CONFIG)
        found = _from_mapping(MetaTrainSettings, laid_over(base, dict(settings)), overrides)
    elif isinstance(settings, MetaTrainSettings):
        found = _changed(settings, overrides)
    else:
        found = load_settings(None if settings is None else Path(settings), words)
    check_known_elsewhere(dump_settings(found))
    from ml2o_dist.workflows.meta_train import meta_train as run  # late: settings are checked without torch

    return MetaTrainResult(run(found, place, resume=resume, address=address, console=_console(console, progress)))


def evaluate(
    settings: EvaluateSettings | Mapping[str, Any] | str | Path | None = None,
    run_dir: str | Path | None = None,
    *,
    optimizers: Sequence[str] | None = None,
    problems: Sequence[str] | None = None,
    suite: str | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    overrides: Overrides = (),
    plugins: Iterable[str | Path] = (),
    address: str = "auto",
    progress: bool = False,
    console: Console | None = None,
) -> EvaluationResult:
    """Run optimizers on problems, all from the same starting points and batches, and compare them.

    Args:
        settings: an object, a mapping, a YAML file or the run directory of an evaluation; None: the other arguments.
        run_dir: the folder for the results; None: they go to MLflow only.
        optimizers, problems, suite, seeds, steps: as `ml2o evaluate` takes them; they win over `settings`.
        overrides, plugins, address, progress, console: as for `meta_train`.

    Raises:
        UserError, Interrupted; Incomplete: cells failed.
    """
    from ml2o_dist.evaluation.optimizer_words import check_optimizers
    from ml2o_dist.evaluation.suites import load_suite
    from ml2o_dist.runtime.errors import Incomplete

    load_named(map(str, plugins))
    if suite is not None and settings is not None:
        raise UserError("--suite is a configuration itself: give it or --config, not both")
    given = {"optimizers": optimizers, "problems": problems, "seeds": seeds, "steps": steps}
    words = {key: list(v) if isinstance(v, Sequence) else v for key, v in given.items() if v is not None}
    if isinstance(settings, Mapping):
        found = _changed(_from_mapping(EvaluateSettings, dict(settings), overrides), words)
    elif isinstance(settings, EvaluateSettings):
        found = _changed(_changed(settings, overrides), words)
    else:
        texts = [*_words(overrides), *_words(words)]
        file = None if settings is None else Path(settings)
        found = load_evaluation(file, texts) if suite is None else load_suite(suite, tuple(texts))
    check_known_elsewhere(dump_settings(found))
    check_optimizers([*found.baselines, *found.optimizers])

    from ml2o_dist.workflows.evaluate import failures, run_evaluation  # late: words are checked without torch

    evaluation, answer, lacking = run_evaluation(
        found, None if run_dir is None else str(run_dir), address=address, console=_console(console, progress)
    )
    if wrong := [*failures(evaluation), *lacking]:
        raise Incomplete("; ".join(wrong), answer)
    return EvaluationResult(answer, evaluation)


def sweep(
    settings: SweepSettings | Mapping[str, Any] | str | Path | None = None,
    run_dir: str | Path | None = None,
    *,
    overrides: Overrides = (),
    plugins: Iterable[str | Path] = (),
    resume: bool = False,
    address: str = "auto",
    progress: bool = False,
    console: Console | None = None,
) -> SweepResult:
    """Meta-train with settings drawn from a search space, keep the best.

    Args:
        settings: an object, a mapping, a YAML file or a sweep's run directory; None with `resume`: those of the run.
        run_dir: a folder that all machines share; None: runs/sweep-<time>.
        overrides, plugins, resume, address, progress, console: as for `meta_train`.

    Raises:
        UserError, Aborted, Interrupted; Incomplete: trials failed.
    """
    from ml2o_dist.sweeping.settings import SweepSettings
    from ml2o_dist.sweeping.space import load_sweep, parse_sweep

    load_named(map(str, plugins))
    if resume and run_dir is None:
        raise UserError("--resume needs --run-dir, the directory of the sweep to go on with")
    place = f"runs/sweep-{datetime.now():%Y%m%d-%H%M%S}" if run_dir is None else str(run_dir)
    if resume and settings is None:
        from ml2o_dist.workflows.sweep import resumed_sweep

        found = resumed_sweep(place, _words(overrides))
    elif isinstance(settings, SweepSettings):
        found = _changed(settings, overrides)
    elif isinstance(settings, Mapping):
        load_named(settings.get("plugins", ()))
        tree = {key: value for key, value in settings.items() if key != "plugins"}
        found = parse_sweep(tree, Path(), _words(overrides))
    else:
        found = load_sweep(None if settings is None else Path(settings), _words(overrides))
    check_known_elsewhere(dump_settings(found))
    from ml2o_dist.workflows.sweep import sweep as run_sweep  # late: settings are checked without torch

    return SweepResult(run_sweep(found, place, resume=resume, address=address, console=_console(console, progress)))


def train_pareto_set(
    settings: ParetoSetSettings | Mapping[str, Any] | str | Path | None = None,
    run_dir: str | Path | None = None,
    *,
    overrides: Overrides = (),
    plugins: Iterable[str | Path] = (),
    resume: bool = False,
    address: str = "auto",
    progress: bool = False,
    console: Console | None = None,
) -> ParetoSetResult:
    """Fine-tune experts, fuse them into one network that takes a preference, and compare it with other ways.

    Args:
        settings: an object, a mapping or a YAML file; None: the defaults, or with `resume` those of the run.
        run_dir: a folder that all machines share; None: runs/pareto-<time>.
        overrides, plugins, resume, address, progress, console: as for `meta_train`.

    Raises:
        UserError, Aborted, Interrupted; Incomplete: comparators failed.
    """
    from ml2o_dist.paretoset.settings import ParetoSetSettings

    load_named(map(str, plugins))
    if resume and run_dir is None:
        raise UserError("--resume needs --run-dir, the directory to go on in")
    place = f"runs/pareto-{datetime.now():%Y%m%d-%H%M%S}" if run_dir is None else str(run_dir)
    if resume and settings is None:
        from ml2o_dist.workflows.train_pareto_set import resumed_set

        found = resumed_set(place, _words(overrides))
    elif isinstance(settings, ParetoSetSettings):
        found = _changed(settings, overrides)
    elif isinstance(settings, Mapping):
        found = _from_mapping(ParetoSetSettings, dict(settings), overrides)
    else:
        file = None if settings is None else Path(settings)
        found = read_settings(ParetoSetSettings, file, _words(overrides), "pareto_set.yaml")
    check_known_elsewhere(dump_settings(found))
    from ml2o_dist.workflows.train_pareto_set import train_set  # late: settings are checked without torch

    return ParetoSetResult(train_set(found, place, resume=resume, address=address, console=_console(console, progress)))


def _words(overrides: Overrides) -> tuple[str, ...]:
    """Return overrides as `key=value` texts."""
    if not isinstance(overrides, Mapping):
        return tuple(overrides)
    import json

    return tuple(f"{key}={json.dumps(value)}" for key, value in overrides.items())


def _from_mapping(kind: type[Model], tree: dict[str, Any], overrides: Overrides) -> Model:
    """Check the settings in a mapping, after loading the plug-ins that it names."""
    load_named(tree.pop("plugins", ()))
    return checked(kind, _overridden(tree, overrides))


def _changed(settings: Model, overrides: Overrides) -> Model:
    """Return settings with overrides applied."""
    if not overrides:
        return settings
    tree = settings.model_dump(mode="json", by_alias=True)
    return checked(type(settings), _overridden(tree, overrides))


def _overridden(tree: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    if not isinstance(overrides, Mapping):
        return overridden(tree, overrides)
    for key, value in overrides.items():
        put(tree, key, value, f"overrides[{key!r}]")
    return tree


def _console(console: Console | None, progress: bool) -> Console:
    if console is not None:
        return console
    if progress:
        return ForeignTextConsole()
    return ForeignTextConsole(file=open(os.devnull, "w"))  # lives as long as the console
