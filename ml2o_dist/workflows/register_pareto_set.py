"""Pareto sets in MLflow's model registry: register a set's file, find it again."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

from ml2o_dist.artifact import package_version
from ml2o_dist.paretoset.saved_set import FILE, SavedSet, load_set
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.names import checked_model_name
from ml2o_dist.tracking.registry import (
    CANDIDATE,
    create_version,
    find_version,
    list_versions,
    set_alias,
    version_source,
)
from ml2o_dist.tracking.store import answering, connect, store_exists


def register_set(uri: str, model: str, file: Path, run_id: str | None, experiment: str, description: str) -> int:
    """Register a set as a version of `model` with the alias candidate, once; return the version.

    Raises:
        UserError: a file that is altered, or a store that refuses or does not answer.
    """
    checked_model_name(model)
    found = load_set(file)
    tags = {"weights_sha256": found.weights_sha256, "tasks": found.card.tasks}
    with answering(uri):
        client = connect(uri)
        versions = list_versions(uri, model) if store_exists(uri) else []
        same = [each["version"] for each in versions if tags.items() <= each["tags"].items()]
        known = max(same, default=None)
        if known is None:
            with tempfile.TemporaryDirectory(prefix="ml2o-set-") as folder:
                _save_model(Path(folder) / "model", file, len(found.card.names))
                saved = Path(folder) / "model"
                known = create_version(client, uri, model, saved, run_id, experiment, description, tags)
        set_alias(client, model, CANDIDATE, known)
    return known


def resolve_set(uri: str, reference: str) -> SavedSet:
    """Return the set of `models:/NAME@ALIAS` or `models:/NAME/VERSION`; raises UserError."""
    import mlflow.artifacts

    version = find_version(uri, reference)
    if "tasks" not in version["tags"]:  # by which `register_set` marks its versions
        raise UserError(f"{reference} is no Pareto set")
    place = f"{version_source(uri, version)}/artifacts/{FILE}"  # no other files of the folder
    with tempfile.TemporaryDirectory(prefix="ml2o-set-") as folder:
        with answering(uri):
            file = mlflow.artifacts.download_artifacts(place, dst_path=folder, tracking_uri=uri)
        found = load_set(file)
    if found.weights_sha256 != version["tags"].get("weights_sha256"):
        raise UserError(f"{reference}: its tensors are not those that the registry says were registered")
    return found


def _save_model(folder: Path, file: Path, tasks: int) -> None:
    """Write the MLflow model that contains a set's file."""
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    single = np.dtype("float32")
    even: Any = [1.0 / tasks] * tasks
    signature = ModelSignature(
        Schema([TensorSpec(single, (-1, -1, -1, -1))]),
        Schema([TensorSpec(single, (-1, -1))]),
        ParamSchema([ParamSpec("preference", "double", even, shape=(-1,))]),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*An input example", UserWarning)  # the signature is complete without one
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).with_name("pyfunc_set.py")),
            artifacts={"set": str(file)},
            signature=signature,
            pip_requirements=[f"ml2o-dist=={package_version()}" if package_version() else "ml2o-dist"],
        )
