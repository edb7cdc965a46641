"""Versions of learned optimizers in MLflow's model registry: register, list, resolve to a file.

Every call names its store: the process-wide tracking URI is neither read nor set.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import urlsplit

from ml2o_dist.artifact import Artifact, read_artifact
from ml2o_dist.runtime.errors import UserError, unknown
from ml2o_dist.runtime.names import checked_model_name
from ml2o_dist.tracking.description import within_limit
from ml2o_dist.tracking.registered_files import DIGEST_TAGS, save_model, version_file
from ml2o_dist.tracking.store import answering, connect, ensure_experiment, store_exists

CANDIDATE = "candidate"
"""The alias of the newest version, which has not passed a gate yet."""

CHAMPION = "champion"
"""The alias of the promoted version, which others load."""

PREVIOUS = "previous"
"""The alias of the champion before it, which a rollback restores."""

_PAGE = 200
_CREATION_S = 30
_PROVENANCE_TAGS = ("config_hash", "git", "seed", "meta_steps", "best_meta_step", "validation_score")


class ModelVersion(TypedDict):
    """One registered version, as `ml2o models list --json` prints it: `created` in UTC, `run_id` "" without a run."""

    name: str
    version: int
    aliases: list[str]
    tags: dict[str, str]
    description: str
    created: str
    run_id: str


def register_version(
    uri: str,
    model: str,
    artifact: Path,
    *,
    run_id: str | None = None,
    experiment: str = "ml2o/meta-train",
    description: str = "",
    tags: Mapping[str, str] | None = None,
    alias: str = CANDIDATE,
) -> int:
    """Register a learned optimizer as a version of `model` and give it `alias`; return the version.

    The same weights and rule settings from the same run (without `run_id`: from any run) are registered once. A second
    call (a resumed run) returns the version of the first. An alias never moves back to an older version.

    Args:
        uri: where, as `resolve_tracking_uri` returns it.
        artifact: the .safetensors file or its folder; verified first.
        run_id: the MLflow run that made it; None where there is none.
        experiment: the experiment that keeps the model when there is no run.
        description: the figures, shown in the registry; its end is cut off if it is too long for MLflow.
        tags: further tags; the digests, config_hash, git, seed and meta_steps come from the card.

    Raises:
        UserError: a broken artifact, one with weights that are NaN or infinite, an unknown run, a name that MLflow or
            the locks of promotions cannot take, or a store that refuses or does not answer.
    """
    checked_model_name(model)
    loaded = read_artifact(artifact)
    with answering(uri):
        client = connect(uri)
        known = _same_version(client, model, loaded, run_id)
        number = (
            known if known is not None else _create(client, uri, model, loaded, run_id, experiment, description, tags)
        )
        set_alias(client, model, alias, number)
    return number


def list_versions(uri: str, model: str = "") -> list[ModelVersion]:
    """Return every version of `model` ("": of all models) by name and number; [] if there is none.

    An sqlite store that does not exist yet is not created. Raises UserError for a store that does not answer.
    """
    if not store_exists(uri):
        return []
    with answering(uri):
        client = connect(uri)
        by_version: dict[tuple[str, int], list[str]] = {}
        for registered in _pages(client.search_registered_models, model):
            for alias, number in registered.aliases.items():
                by_version.setdefault((registered.name, int(number)), []).append(alias)
        found = [
            ModelVersion(
                name=entry.name,
                version=int(entry.version),
                aliases=sorted(by_version.get((entry.name, int(entry.version)), [])),
                tags=dict(entry.tags),
                description=entry.description or "",
                created=datetime.fromtimestamp(entry.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
                run_id=entry.run_id or "",
            )
            for entry in _pages(client.search_model_versions, model)
            if model in ("", entry.name)
        ]
    return sorted(found, key=lambda entry: (entry["name"], entry["version"]))


def model_versions(uri: str, model: str) -> list[ModelVersion]:
    """Return every version of `model` by number, one at least.

    Raises:
        UserError: there is no such model (the line has the nearest name), or a store that does not answer.
    """
    versions = list_versions(uri, model) if model else []
    if not versions:
        raise unknown("registered model", model, {entry["name"] for entry in list_versions(uri)})
    return versions


def find_version(uri: str, reference: str) -> ModelVersion:
    """Return the version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names.

    Raises:
        UserError: bad syntax, an unknown model, alias or version (it names those that exist), or a store that does
            not answer.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d{1,18}))", reference)
    if match is None:
        raise UserError(f"{reference!r} is not of the form models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    versions = model_versions(uri, name)
    for entry in versions:
        if alias in entry["aliases"] or (number and entry["version"] == int(number)):
            return entry
    if alias:
        raise unknown(f"alias of model {name!r}", alias, {text for entry in versions for text in entry["aliases"]})
    raise unknown(f"version of model {name!r}", number, [str(entry["version"]) for entry in versions])


def version_source(uri: str, version: ModelVersion) -> str:
    """Return the store's location of the MLflow model of `version`: a folder, or a URI of the store's own kind."""
    with answering(uri):
        return str(connect(uri).get_model_version_download_uri(version["name"], str(version["version"])))


def resolve_model(uri: str, reference: str) -> Path:
    """Return the local .safetensors file of a registered version.

    A remote artifact is downloaded once, into a cache named by its card's digest. The file is verified, also against
    the digests in the version's tags.

    Args:
        uri: where, as `resolve_tracking_uri` returns it.
        reference: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        UserError: as `find_version`; or a file is missing, altered, of a later format, or of another architecture than
            its card or the registry says; the message names the difference.
    """
    version = find_version(uri, reference)
    if "tasks" in version["tags"] and "rule_sha256" not in version["tags"]:
        raise UserError(f"{reference} is a Pareto set, not an optimizer: `ml2o pareto-set query {reference}`")
    return version_file(uri, version_source(uri, version), version["tags"], reference)


def _create(
    client: Any,
    uri: str,
    model: str,
    artifact: Artifact,
    run_id: str | None,
    experiment: str,
    description: str,
    tags: Mapping[str, str] | None,
) -> int:
    with tempfile.TemporaryDirectory(prefix="ml2o-model-") as folder:
        save_model(Path(folder) / "model", artifact)
        every = _tags(artifact) | dict(tags or {})
        return create_version(client, uri, model, Path(folder) / "model", run_id, experiment, description, every)


def create_version(
    client: Any,
    uri: str,
    model: str,
    folder: Path,
    run_id: str | None,
    experiment: str,
    description: str,
    tags: Mapping[str, str],
) -> int:
    """Register the MLflow model in `folder` as a new version of `model`; return the version."""
    from mlflow.exceptions import MlflowException

    experiment_id = client.get_run(run_id).info.experiment_id if run_id else ensure_experiment(client, uri, experiment)
    logged = client.create_logged_model(experiment_id, name=model, source_run_id=run_id)
    client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # A server accepts only the logged model's id; without one MLflow would look that id up at the process-wide URI.
    served = _served(uri)
    created = client.create_model_version(
        model,
        source=f"models:/{logged.model_id}" if served else logged.artifact_location,
        run_id=run_id,
        model_id=logged.model_id if served else None,
        description=within_limit(description),
        tags=dict(tags),
        await_creation_for=_CREATION_S,
    )
    return int(created.version)


def _tags(artifact: Artifact) -> dict[str, str]:
    provenance = artifact.card["provenance"]
    tags = {key: str(provenance[key]) for key in _PROVENANCE_TAGS if provenance.get(key) is not None}
    return {**{key: str(artifact.card[key]) for key in DIGEST_TAGS}, "rule_sha256": _rule_sha256(artifact), **tags}


def _rule_sha256(artifact: Artifact) -> str:
    """Return the sha256 of the rule settings: equal weights under other settings are another optimizer."""
    return hashlib.sha256(json.dumps(artifact.card["rule"], sort_keys=True).encode()).hexdigest()


def _same_version(client: Any, model: str, artifact: Artifact, run_id: str | None) -> int | None:
    rule = _rule_sha256(artifact)
    for entry in _pages(client.search_model_versions, model):
        same_weights = entry.tags.get("weights_sha256") == artifact.weights_sha256
        same_rule = entry.tags.get("rule_sha256", rule) == rule  # older versions have no such tag
        if entry.name == model and same_weights and same_rule and run_id in (None, entry.run_id):
            return int(entry.version)
    return None


def set_alias(client: Any, model: str, alias: str, number: int) -> None:
    """Give a version an alias, unless a newer version has it."""
    current = client.get_registered_model(model).aliases.get(alias)
    if current is None or int(current) < number:
        client.set_registered_model_alias(model, alias, str(number))


def _pages(search: Any, model: str) -> Iterator[Any]:
    # The filter saves the store work. If its grammar cannot quote the name, the caller finds it among all versions.
    only = f"name = '{model}'" if model and "'" not in model else None
    token = None
    while True:
        page = search(filter_string=only, max_results=_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _served(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https", "databricks") or uri == "databricks"
