"""`ml2o models`: what is in the registry of learned optimizers, out of it and into it, and which is the champion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ml2o_dist.cli.command import command, say
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.shown_text import visible

if TYPE_CHECKING:
    from ml2o_dist.artifact import Artifact
    from ml2o_dist.tracking.registry import ModelVersion

MODEL = "ml2o"
"""The name that `tracking.model` has by default, too."""

_SCHEME = "models:/"


def tracking_uri_option(body: Callable[..., Any]) -> Callable[..., Any]:
    """Add --tracking-uri, the registry."""
    text = "MLflow [default: MLFLOW_TRACKING_URI, else sqlite in ML2O_HOME]."
    return click.option("--tracking-uri", default="", help=text)(body)


@click.group()
def models() -> None:
    """The registry of learned optimizers.

    REFERENCE names a version: NAME@ALIAS or NAME/VERSION, with or without `models:/` before it. Aliases: `candidate`
    is the newest version, `champion` the one that was promoted, `previous` the champion before it.
    """


@models.command("list")
@tracking_uri_option
@click.option("--name", default="", help="Only the versions of this model.")
@command
def models_list(console: Console, tracking_uri: str, name: str) -> list[dict[str, Any]]:
    """List every registered version.

    With its aliases and its validation score (lower is better).
    """
    from ml2o_dist.tracking.registry import list_versions
    from ml2o_dist.tracking.store import redacted, resolve_tracking_uri

    uri = resolve_tracking_uri(tracking_uri)
    versions = list_versions(uri, name)
    title = f"models in {redacted(uri)}"
    console.print(versions_table(versions, title) if versions else f"no registered {title}", soft_wrap=not versions)
    return [dict(version) for version in versions]


@models.command("show")
@click.argument("reference")
@tracking_uri_option
@command
def models_show(console: Console, reference: str, tracking_uri: str) -> dict[str, Any]:
    """Show one version, or the aliases of a bare NAME.

    A version whose file cannot be used is shown with what is wrong with it.
    """
    from ml2o_dist.tracking.registry import CANDIDATE, CHAMPION, PREVIOUS, find_version, model_versions
    from ml2o_dist.tracking.store import redacted, resolve_tracking_uri

    uri = resolve_tracking_uri(tracking_uri)
    bare = reference.removeprefix(_SCHEME)
    if "@" in bare or "/" in bare:
        return _show_version(console, uri, find_version(uri, _SCHEME + bare))
    versions = model_versions(uri, bare)
    answer: dict[str, Any] = {"name": bare}
    for alias in (CHAMPION, CANDIDATE, PREVIOUS):
        answer[alias] = next((entry["version"] for entry in versions if alias in entry["aliases"]), None)
        _fact(console, alias, "none" if answer[alias] is None else f"{bare}/{answer[alias]}")
    console.print(versions_table(versions, f"{bare} in {redacted(uri)}"))
    return {**answer, "versions": [dict(version) for version in versions]}


@models.command("promote")
@click.argument("reference", default="")
@click.option("--name", default=MODEL, show_default=True, help="The model, where REFERENCE is not given.")
@click.option("--suite", default="quick", show_default=True, help="What decides: a suite's name, or a YAML file.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the suite; repeatable.")
@click.option("--force", is_flag=True, help="Promote it whatever the gate says, which is recorded.")
@click.option("--address", default="auto", show_default=True, help="Ray: auto, local, or HOST:PORT.")
@tracking_uri_option
@command
def models_promote(
    console: Console,
    reference: str,
    name: str,
    suite: str,
    overrides: tuple[str, ...],
    force: bool,
    address: str,
    tracking_uri: str,
) -> dict[str, Any]:
    """Make REFERENCE, or the candidate, champion if it is better.

    Both are evaluated on the suite, from the same starting points and batches. Better: the whole 95 % interval of the
    ratio of their losses lies below 1. The first champion must be better than tuned Adam on the sum. What was evaluated
    before is found, not run again.

    Exit codes: 0 promoted, 5 refused, 2 wrong words or settings, 3 a cell failed, 4 aborted, 130 / 143
    stopped.
    """
    from ml2o_dist.evaluation.suites import load_suite
    from ml2o_dist.workflows.promote import promote

    words = [*overrides, *([f"tracking.uri={tracking_uri}"] if tracking_uri else [])]
    full = _SCHEME + reference.removeprefix(_SCHEME) if reference else ""
    answer = promote(load_suite(suite, tuple(words)), name, full, force=force, address=address, console=console)
    _fact(console, "champion", f"{answer['name']}/{answer['champion']}{' (forced)' if answer['forced'] else ''}")
    _fact(console, "because", answer["reason"])
    return answer


@models.command("rollback")
@click.option("--name", default=MODEL, show_default=True, help="The model.")
@tracking_uri_option
@command
def models_rollback(console: Console, name: str, tracking_uri: str) -> dict[str, Any]:
    """Make the previous champion champion again.

    A second rollback undoes the first.
    """
    from ml2o_dist.tracking.champion import rollback
    from ml2o_dist.tracking.store import resolve_tracking_uri

    champion, previous = rollback(resolve_tracking_uri(tracking_uri), name)
    _fact(console, "champion", f"{name}/{champion}")
    _fact(console, "previous", f"{name}/{previous}")
    return {"name": name, "champion": champion, "previous": previous}


@models.command("export")
@click.argument("reference")
@click.option("--output", required=True, help="Folder, or FILE.safetensors; nothing else is written over.")
@tracking_uri_option
@command
def models_export(console: Console, reference: str, output: str, tracking_uri: str) -> dict[str, Any]:
    """Write a version's weights and card, verified.

    As they were registered: weights.safetensors and weights.json.
    """
    from ml2o_dist.runtime.files import home_folder
    from ml2o_dist.tracking.store import resolve_tracking_uri
    from ml2o_dist.tracking.transfer import export_version

    full = _SCHEME + reference.removeprefix(_SCHEME)
    written = export_version(resolve_tracking_uri(tracking_uri), full, home_folder() / output)
    _fact(console, "weights", str(written.path))
    return {"reference": full, "path": str(written.path), "weights_sha256": written.weights_sha256}


@models.command("import")
@click.argument("path")
@click.option("--name", default=MODEL, show_default=True, help="The model that it becomes a version of.")
@tracking_uri_option
@command
def models_import(console: Console, path: str, name: str, tracking_uri: str) -> dict[str, Any]:
    """Verify a weights file and register it as a candidate.

    It may be a file, or lie in a folder, a run directory or at a URI.

    The same weights and rule settings are registered once.
    """
    from ml2o_dist.artifact_sources import load_artifact
    from ml2o_dist.runtime.files import home_folder
    from ml2o_dist.runtime.remote_files import is_uri
    from ml2o_dist.tracking.registry import find_version
    from ml2o_dist.tracking.store import resolve_tracking_uri
    from ml2o_dist.tracking.transfer import import_version

    if path.startswith(_SCHEME):
        raise UserError(f"{path} is registered already: PATH is a weights file, a folder or a URI")
    uri = resolve_tracking_uri(tracking_uri)
    place = path if is_uri(path) else str(home_folder() / path)
    version, new = import_version(uri, name, load_artifact(place), place)
    found = find_version(uri, f"{_SCHEME}{name}/{version}")
    how = "registered" if new else "there already"
    _fact(console, how, f"{name}/{version} {_aliases(found)}".rstrip())
    return {**found, "new": new}


def versions_table(versions: Sequence[ModelVersion], title: str) -> Table:
    """Return a table of versions that is legible in 80 columns; the rest is in `ml2o models show`."""
    columns = ("model", "aliases", "made", "validation", "best/steps", "weights")
    table = Table(*columns, title=title, box=box.SIMPLE)
    for version in versions:
        tags = version["tags"]
        table.add_row(
            Text(visible(f"{version['name']}/{version['version']}"), overflow="fold"),
            Text("\n".join(map(visible, version["aliases"]))),
            version["created"][:10],
            *(
                Text(visible(text))
                for text in (
                    tags.get("validation_score", "")[:7],
                    f"{tags.get('best_meta_step', '?')[:9]}/{tags.get('meta_steps', '?')[:9]}",
                    tags.get("weights_sha256", "")[:8],
                )
            ),
        )
    return table


def _show_version(console: Console, uri: str, version: ModelVersion) -> dict[str, Any]:
    from ml2o_dist.artifact_sources import load_artifact
    from ml2o_dist.tracking.registered_files import version_file
    from ml2o_dist.tracking.registry import version_source

    reference = f"{version['name']}/{version['version']}"
    source = version_source(uri, version)
    answer: dict[str, Any] = {**version, "source": source, "path": None, "rule": None, "parameters": None}
    _fact(console, "version", f"{reference} {_aliases(version)}".rstrip())
    _fact(console, "created", version["created"])
    _fact(console, "MLflow run", version["run_id"] or "none")
    _fact(console, "kept in", source)
    try:
        artifact = load_artifact(version_file(uri, source, version["tags"], f"{_SCHEME}{reference}"))
    except UserError as error:
        answer["unreadable"] = str(error)
        say(str(error))
    else:
        answer |= {"path": str(artifact.path), "rule": artifact.card["rule"], "parameters": artifact.card["parameters"]}
        _fact(console, "file", str(artifact.path))
        _fact(console, "architecture", _architecture(artifact))
    for title, lines in (
        ("tags", [visible(f"{key}: {value}") for key, value in sorted(version["tags"].items())]),
        ("description", version["description"].splitlines()),
    ):
        _fact(console, title, "" if lines else "none")
        for line in lines:
            console.print(f"  {visible(line)}", markup=False, highlight=False, soft_wrap=True)
    return answer


def _fact(console: Console, name: str, text: str) -> None:
    console.print(f"{name:<15}{visible(text)}".rstrip(), markup=False, highlight=False, soft_wrap=True)


def _aliases(version: ModelVersion) -> str:
    return f"({', '.join(version['aliases'])})" if version["aliases"] else ""


def _architecture(artifact: Artifact) -> str:
    def flat(settings: Mapping[str, Any], before: str = "") -> list[str]:
        words: list[str] = []
        for key, value in settings.items():
            nested = isinstance(value, Mapping)
            words += flat(value, f"{before}{key}.") if nested else [f"{before}{key}={value}"] * (value is not None)
        return words

    return f"{artifact.card['parameters']:,} weights, {', '.join(flat(artifact.card['rule']))}"
