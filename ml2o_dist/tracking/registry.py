"""Versions of learned optimizers in MLflow's model registry: register, list, resolve to a file.

Every call names its store: the process-wide tracking URI is neither read nor set.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import unquote, urlsplit

from ml2o_dist.artifact import WEIGHTS_FILE, Artifact, load_artifact, package_version
from ml2o_dist.errors import UserError, unknown
from ml2o_dist.files import cache_folder
from ml2o_dist.tracking.store import (
    connect,
    ensure_experiment,
    refused,
    store_exists,
)

CANDIDATE = "candidate"
"""The alias of the newest version, which no gate has looked at yet."""

_PAGE = 200
_CREATION_S = 30
_PROVENANCE_TAGS = ("config_hash", "git", "seed", "meta_steps", "best_meta_step", "validation_score")


class ModelVersion(TypedDict):
    """One registered version, as `ml2o models list --json` prints it: `created` in UTC, `run_id` "" without a run."""

    name: str
    version: int
    aliases: list[str]
    tags: dict[str, str]
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

    The same weights from the same run are registered once: a second call (a resumed run) returns the version of
    the first. An alias never moves back to an older version.

    Args:
        uri: where, as `resolve_tracking_uri` returns it.
        artifact: the .safetensors file or its folder; verified first.
        run_id: the MLflow run that made it; None where there is none.
        experiment: where the model is kept when there is no run.
        description: what a reader of the registry sees: the figures.
        tags: further tags; weights_sha256, config_hash, git, seed and meta_steps come from the card.

    Raises:
        UserError: a broken artifact, an unknown run, or a store that refuses or does not answer.
    """
    loaded = load_artifact(artifact)
    with _answers(uri):
        client = connect(uri)
        known = _same_version(client, model, loaded, run_id)
        number = (
            known if known is not None else _create(client, uri, model, loaded, run_id, experiment, description, tags)
        )
        _set_alias(client, model, alias, number)
    return number


def list_versions(uri: str, model: str = "") -> list[ModelVersion]:
    """Return every version of `model` ("": of all models) by name and number; [] where there is none.

    An sqlite store that does not exist yet is not created. Raises UserError for a store that does not answer.
    """
    if not store_exists(uri):
        return []
    with _answers(uri):
        client = connect(uri)
        by_version: dict[tuple[str, int], list[str]] = {}
        for registered in _pages(client.search_registered_models):
            for alias, number in registered.aliases.items():
                by_version.setdefault((registered.name, int(number)), []).append(alias)
        found = [
            ModelVersion(
                name=entry.name,
                version=int(entry.version),
                aliases=sorted(by_version.get((entry.name, int(entry.version)), [])),
                tags=dict(entry.tags),
                created=datetime.fromtimestamp(entry.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
                run_id=entry.run_id or "",
            )
            for entry in _pages(client.search_model_versions)
            if model in ("", entry.name)
        ]
    return sorted(found, key=lambda entry: (entry["name"], entry["version"]))


def resolve_model(uri: str, reference: str) -> Path:
    """Return the local .safetensors file of a registered version.

    Args:
        uri: where, as `resolve_tracking_uri` returns it.
        reference: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    A remote artifact is downloaded once, into a cache named by its weights_sha256, and verified.

    Raises:
        UserError: bad syntax, an unknown model, alias or version (it names those that exist), a missing or altered
            file, or a store that does not answer.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", reference)
    if match is None:
        raise UserError(f"{reference!r} is not of the form models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    versions = list_versions(uri)
    if name not in (names := {entry["name"] for entry in versions}):
        raise unknown("registered model", name, names)
    versions = [entry for entry in versions if entry["name"] == name]
    wanted = [entry for entry in versions if alias in entry["aliases"] or (number and entry["version"] == int(number))]
    if not wanted:
        if alias:
            raise unknown(f"alias of model {name!r}", alias, {text for entry in versions for text in entry["aliases"]})
        raise unknown(f"version of model {name!r}", number, [str(entry["version"]) for entry in versions])
    with _answers(uri):
        source = str(connect(uri).get_model_version_download_uri(name, str(wanted[0]["version"])))
    path = _local_path(source)
    if path is None:
        return _download(uri, source, wanted[0]["tags"].get("weights_sha256", ""))
    file = path / "artifacts" / WEIGHTS_FILE
    if not file.exists():
        raise UserError(f"{reference} is kept in {str(file)!r}, which is not there (another machine's disk?)")
    return file


@contextmanager
def _answers(uri: str) -> Iterator[None]:
    """Turn what MLflow raises into one line that names the store."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MLflow lets SQLAlchemy's, requests' and its own errors through: all mean the same here
        raise refused(uri, error) from error


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
    from mlflow.exceptions import MlflowException

    experiment_id = client.get_run(run_id).info.experiment_id if run_id else ensure_experiment(client, uri, experiment)
    logged = client.create_logged_model(experiment_id, name=model, source_run_id=run_id)
    with tempfile.TemporaryDirectory(prefix="ml2o-model-") as folder:
        _save_pyfunc(Path(folder) / "model", artifact)
        client.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
    client.finalize_logged_model(logged.model_id, "READY")
    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # A server takes only the logged model's id; without a server MLflow would look that id up at the process-wide URI.
    served = _served(uri)
    created = client.create_model_version(
        model,
        source=f"models:/{logged.model_id}" if served else logged.artifact_location,
        run_id=run_id,
        model_id=logged.model_id if served else None,
        description=description,
        tags=_tags(artifact) | dict(tags or {}),
        await_creation_for=_CREATION_S,
    )
    return int(created.version)


def _save_pyfunc(folder: Path, artifact: Artifact) -> None:
    """Write the MLflow model; whatever the artifact's files are called, they are `artifacts/weights.*` in it."""
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    single = np.dtype("float32")
    signature = ModelSignature(
        Schema([TensorSpec(single, (-1, -1, -1))]),
        Schema([TensorSpec(single, (-1, -1))]),
    )
    staged = folder.with_name("staged")
    staged.mkdir()
    weights = shutil.copyfile(artifact.path, staged / WEIGHTS_FILE)
    card = shutil.copyfile(artifact.path.with_suffix(".json"), (staged / WEIGHTS_FILE).with_suffix(".json"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*An input example", UserWarning)  # the signature is complete without one
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"weights": str(weights), "card": str(card)},
            signature=signature,
            pip_requirements=[f"ml2o-dist=={package_version()}" if package_version() else "ml2o-dist"],
        )


def _tags(artifact: Artifact) -> dict[str, str]:
    provenance = artifact.card["provenance"]
    tags = {key: str(provenance[key]) for key in _PROVENANCE_TAGS if provenance.get(key) is not None}
    return {"weights_sha256": artifact.weights_sha256, **tags}


def _same_version(client: Any, model: str, artifact: Artifact, run_id: str | None) -> int | None:
    for entry in _pages(client.search_model_versions):
        same_weights = entry.tags.get("weights_sha256") == artifact.weights_sha256
        if entry.name == model and same_weights and (entry.run_id or None) == run_id:
            return int(entry.version)
    return None


def _set_alias(client: Any, model: str, alias: str, number: int) -> None:
    current = client.get_registered_model(model).aliases.get(alias)
    if current is None or int(current) < number:
        client.set_registered_model_alias(model, alias, str(number))


def _pages(search: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(max_results=_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _served(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https", "databricks") or uri == "databricks"


def _local_path(source: str) -> Path | None:
    parts = urlsplit(source)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return None if parts.scheme else Path(source)


def _download(uri: str, source: str, digest: str) -> Path:
    import mlflow.artifacts

    cache = cache_folder() / "models"
    if digest and _is_whole(cache / digest, digest):
        return cache / digest / WEIGHTS_FILE
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        with _answers(uri):
            path = mlflow.artifacts.download_artifacts(f"{source}/artifacts", dst_path=folder, tracking_uri=uri)
        found = load_artifact(Path(path)).weights_sha256
        if digest and found != digest:
            raise UserError(f"{source} holds weights {found[:12]}..., its version's tag says {digest[:12]}...")
        target = cache / found
        if not _is_whole(target, found):
            shutil.rmtree(target, ignore_errors=True)
            os.replace(path, target)
    return target / WEIGHTS_FILE


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        return load_artifact(folder).weights_sha256 == digest
    except UserError:
        return False
