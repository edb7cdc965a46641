"""The command line: thin, every command is one call into the package."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ml2o_dist.cli.catalogue import optimizers, settings
from ml2o_dist.cli.command import command, run_options, say
from ml2o_dist.cli.models import models
from ml2o_dist.cli.pareto_set import pareto_set
from ml2o_dist.cli.sweep import sweep
from ml2o_dist.runtime.errors import MissingData, UserError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ml2o-dist")
def main() -> None:
    """Learned multi-objective optimizers: meta-train them on Ray, version them in MLflow."""


@main.command("meta-train")
@run_options(
    config="YAML settings, or a run directory that has some [default: the embedded digits].",
    run_dir="Where the run lives: a folder or a URI, s3://bucket/x [default: runs/<time>].",
    seed="Short for --set seed=N.",
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --run-dir.")
@command
def meta_train(
    console: Console,
    config: Path | None,
    overrides: tuple[str, ...],
    run_dir: str | None,
    seed: int | None,
    address: str,
    tracking_uri: str | None,
    resume: bool,
) -> dict[str, Any]:
    """Meta-train, compare with baselines, register in MLflow.

    Every setting is a key of the config file; `--set workers=4 --set rule.output=scaled` overrides it. Image problems
    need data: --set data.root=FOLDER or ML2O_DATA (`ml2o data fetch` downloads it); the default needs none.

    Exit codes: 0 done, 2 wrong words or settings, 3 done without the comparison, which failed, 4 aborted and 130 / 143
    stopped (checkpoint written: --resume).
    """
    from ml2o_dist.workflows import api

    if seed is not None:
        overrides += (f"seed={seed}",)
    if tracking_uri is not None:
        overrides += (f"tracking.uri={tracking_uri}",)
    return api.meta_train(config, run_dir, overrides=overrides, resume=resume, address=address, console=console).answer


@main.command("evaluate")
@click.option(
    "--optimizer", "optimizers", multiple=True, help="initial, dssmg, gml2o:ascent, mgda+adam ...; repeatable."
)
@click.option("--problem", "problems", multiple=True, help="As in `ml2o problems list`; repeatable.")
@click.option("--suite", help="quick, analytic, paper, shift, or a YAML file: problems, baselines and seeds.")
@click.option("--seeds", type=int, help="How many paired seeds [default: 5].")
@click.option("--steps", type=int, help="How many steps each optimizer takes [default: 200].")
@run_options(
    config="YAML settings, or the run directory of an evaluation.",
    run_dir="Write the results there, too: a folder or a URI [default: to MLflow alone].",
    seed="The first of the seeds [default: 0].",
)
@command
def evaluate(
    console: Console,
    optimizers: tuple[str, ...],
    problems: tuple[str, ...],
    suite: str | None,
    seeds: int | None,
    steps: int | None,
    config: Path | None,
    overrides: tuple[str, ...],
    run_dir: str | None,
    seed: int | None,
    address: str,
    tracking_uri: str | None,
) -> dict[str, Any]:
    """Run optimizers on problems and compare them.

    All have the same starting points and batches.

    Optimizers: `initial` (untrained), a run directory, a weights file, `models:/NAME@ALIAS`, `dssmg`, `smg`, the
    adversaries `random`, `ascent`, `nan`, `huge`, `frozen`, `drift`, `turncoat`, and hand-designed ones as
    AGGREGATOR[+sgd|+momentum|+adam][@LR], tuned where there is no @LR; any of them under the guard as `gml2o:NAME`
    (its settings: `--set guard.budget=1`).

    Finished cells are kept in ML2O_CACHE/cells: the same command goes on where it was stopped, and repeats nothing.

    Exit codes: 0 done, 2 wrong words or settings, 3 some cells failed, 4 aborted, 130 / 143 stopped.
    """
    from ml2o_dist.workflows import api

    if seed is not None:
        overrides += (f"seed={seed}",)
    if tracking_uri is not None:
        overrides += (f"tracking.uri={json.dumps(tracking_uri)}",)
    return api.evaluate(
        config,
        run_dir,
        optimizers=optimizers or None,
        problems=problems or None,
        suite=suite,
        seeds=seeds,
        steps=steps,
        overrides=overrides,
        address=address,
        console=console,
    ).answer


@main.command("sync")
@click.argument("run_dir")
@click.option("--tracking-uri", default="", help="MLflow [default: where the run was tracked].")
@command
def sync(console: Console, run_dir: str, tracking_uri: str) -> dict[str, Any]:
    """Send MLflow what it has not got of a run.

    A run says at its end if this is needed. It goes into the same MLflow run, each value once, and so does the
    learned optimizer into the registry. What a run at a URI has to send lies on the machine that ran it: run this
    there. Exit code 2: no run there, or MLflow does not answer; nothing is lost.
    """
    from ml2o_dist.rundir.storage import working_copy
    from ml2o_dist.runtime.files import home_folder
    from ml2o_dist.runtime.remote_files import is_uri
    from ml2o_dist.tracking.sync import sync as send

    folder = working_copy(run_dir) if is_uri(run_dir) else home_folder() / run_dir
    if is_uri(run_dir) and not folder.exists():
        raise UserError(
            f"this machine has nothing to send of {run_dir}: if it ran here, MLflow has everything, else run this there"
        )
    answer = send(folder, tracking_uri)
    if answer["status"] is None:
        line = f"nothing of {run_dir} is left to send to MLflow at {answer['tracking_uri']}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        return dict(answer)
    version = answer["registered_version"]
    console.print(
        f"sent {answer['values']} values, {answer['records']} records in all, to run {answer['run_id']} at "
        f"{answer['tracking_uri']}: {answer['status']}" + (f", registered version {version}" if version else ""),
        highlight=False,
        soft_wrap=True,
    )
    return dict(answer)


@main.command("report")
@click.argument("run_dir")
@click.option("--output", help="HTML file [default: RUN_DIR/report.html; ./report.html where RUN_DIR is a URI].")
@command
def report(console: Console, run_dir: str, output: str | None) -> dict[str, Any]:
    """Write a run as one page, RUN_DIR/report.html.

    It has the curves, the comparison and the configuration, and loads nothing.

    `ml2o meta-train` writes it when it is done; for a run that is not, it shows what is there and says what is missing.
    A file that cannot be read is named on stderr and on the page, which shows the rest.
    """
    from ml2o_dist.rundir.storage import read_run
    from ml2o_dist.runtime.files import home_folder
    from ml2o_dist.runtime.remote_files import is_uri
    from ml2o_dist.workflows.report import PAGE, write_report

    place = output or (PAGE if is_uri(run_dir) else None)
    with read_run(run_dir) as folder:
        answer = write_report(folder, home_folder() / place if place else None, run_dir if is_uri(run_dir) else "")
    for line in answer["unread"]:
        say(line)
    console.print(f"report         {answer['path']}", markup=False, highlight=False, soft_wrap=True)
    for name, why in answer["missing"].items():
        console.print(f"  {name}: {why}", markup=False, highlight=False)
    return answer


@main.command("trajectories")
@click.argument("run_dir")
@click.option("--problem", help="Draw this problem's trajectories [default: list what is recorded].")
@click.option("--output", help="PNG [default: RUN_DIR/plots/trajectories-<problem>.png; ./ where RUN_DIR is a URI].")
@command
def trajectories(
    console: Console, run_dir: str, problem: str | None, output: str | None
) -> list[dict[str, Any]] | dict[str, Any]:
    """List or draw the training episodes that a run recorded.

    The data set itself, RUN_DIR/trajectories/*.parquet, is plain Parquet for DuckDB, pandas or Ray Data. The settings
    `trajectories.meta_steps` and `trajectories.slots` say how much of a run is recorded.
    """
    from ml2o_dist.metatrain.trajectories import read_trajectories, recorded_problems
    from ml2o_dist.reporting.trajectory_plots import plot_trajectories, trajectories_file
    from ml2o_dist.rundir.storage import read_run
    from ml2o_dist.runtime.files import home_folder
    from ml2o_dist.runtime.remote_files import is_uri

    with read_run(run_dir) as folder:
        recorded = read_trajectories(folder, problem)
    for line in recorded.unread:
        say(f"{line.replace(str(folder), run_dir) if is_uri(run_dir) else line}; the other files are used")
    summaries = recorded_problems(recorded.rows)
    if problem is not None:
        path = trajectories_file(folder, summaries[0].problem)
        if output or is_uri(run_dir):
            path = home_folder() / (output or path.name)
        plot_trajectories(recorded.rows, path)
        console.print(f"picture        {path}", markup=False, highlight=False, soft_wrap=True)
        return {**asdict(summaries[0]), "path": str(path)}
    if output is not None:
        raise UserError("--output needs --problem, the problem to draw")
    table = Table("problem", "objectives", "episodes", "meta-steps", "inner steps", title=f"recorded in {run_dir}")
    for each in summaries:
        counts = (each.objectives, each.episodes, len(each.meta_steps), each.inner_steps)
        table.add_row(Text(each.problem), *map(str, counts))
    console.print(table)
    return [asdict(each) for each in summaries]


main.add_command(models)
main.add_command(pareto_set)
main.add_command(sweep)
main.add_command(settings)
main.add_command(optimizers)


@main.group()
def problems() -> None:
    """What can be optimized."""


@problems.command("list")
@command
def problems_list(console: Console) -> list[dict[str, Any]]:
    """List every problem with its settings and their defaults."""
    from ml2o_dist.problems import problem_description, problem_names, problem_settings

    table = Table("problem", "settings (defaults)", "what", title="problems", show_lines=False)
    answer = []
    for name in problem_names():
        settings, what = problem_settings(name), problem_description(name).splitlines()[0]
        table.add_row(name, ", ".join(f"{key}={value}" for key, value in settings.items()), what)
        answer.append({"name": name, "settings": settings, "description": what})
    console.print(table)
    return answer


@problems.command("show")
@click.argument("name")
@click.option("--data-root", default="", help="Folder of the image data [default: ML2O_DATA].")
@command
def problems_show(console: Console, name: str, data_root: str) -> dict[str, Any]:
    """Show one problem: `fonseca`, `quadratic[m=3]`, `multimnist[net=lenet5]`.

    The sizes of a problem of images are known only where its data is.
    """
    from ml2o_dist.problems import ProblemContext, ProblemSpec, problem_description, problem_settings
    from ml2o_dist.runtime.shown_text import headed

    spec = ProblemSpec.parse(name)
    settings = {**problem_settings(spec.name), **dict(spec.settings)}
    answer: dict[str, Any] = {
        "name": spec.name,
        "settings": settings,
        "description": problem_description(spec.name),
    }
    try:
        problem = spec.build(ProblemContext(data_root=data_root))
    except MissingData as error:
        answer["missing"] = str(error)
        console.print(headed(f"{spec}:", f"its sizes are not known: {error}", "bold"), soft_wrap=True)
    else:
        answer |= {
            "objectives": problem.objectives,
            "parameters": problem.dimension,
            "bounded": problem.bounds is not None,
            "reference_point": None if problem.reference_point is None else problem.reference_point.tolist(),
        }
        sizes = f"{problem.objectives} objectives, {problem.dimension:,} parameters"
        console.print(headed(f"{spec}:", sizes, "bold"))
    console.print(", ".join(f"{key}={value}" for key, value in settings.items()), markup=False, highlight=False)
    console.print(problem_description(spec.name), markup=False, highlight=False)
    return answer


@main.group()
def data() -> None:
    """The image data behind the MultiMNIST kinds of problems."""


@data.command("status")
@click.option("--data-root", default="", help="Folder to look in [default: ML2O_DATA, else the cache].")
@command
def data_status(console: Console, data_root: str) -> list[dict[str, Any]]:
    """Say which files of MNIST and Fashion-MNIST are there and whether their content is the published one."""
    from ml2o_dist.problems.download import data_status as status
    from ml2o_dist.problems.image_files import data_folder

    records = status(data_root)
    table = Table("data", "file", "bytes", "content", title=f"image data in {data_folder(data_root)}")
    for record in records:
        table.add_row(record.source, record.path, f"{record.bytes:,}" if record.present else "", record.content)
    console.print(table)
    if not all(record.present for record in records):
        console.print("Missing files: `ml2o data fetch` downloads them (40 MB).", highlight=False)
    return [asdict(record) for record in records]


@data.command("fetch")
@click.option("--data-root", default="", help="Folder to download into [default: ML2O_DATA, else the cache].")
@command
def data_fetch(console: Console, data_root: str) -> list[dict[str, Any]]:
    """Download MNIST and Fashion-MNIST (40 MB) from their official mirrors, checked."""
    from ml2o_dist.problems.download import fetch
    from ml2o_dist.problems.image_files import data_folder

    shown: dict[str, int] = {}

    def progress(name: str, done: int, total: int | None) -> None:
        if done - shown.get(name, -(2**30)) >= 4 * 2**20 or done == total:
            shown[name] = done
            console.print(f"{name}  {done / 2**20:.1f} of {(total or 0) / 2**20:.1f} MB", highlight=False)

    records = fetch(data_root, progress)
    console.print(f"all {len(records)} files are in {data_folder(data_root)}", highlight=False, soft_wrap=True)
    return [asdict(record) for record in records]
