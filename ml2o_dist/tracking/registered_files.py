"""The files of a registered version: write them as an MLflow model, find them, compare them with the version's tags."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ml2o_dist.artifact import WEIGHTS_FILE, Artifact, package_version, read_artifact
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import cache_folder
from ml2o_dist.tracking.store import StoreAway, answering

DIGEST_TAGS = ("weights_sha256", "card_sha256")
"""Tags of a version that must match its card. The card's digest covers the whole card, with the files' digests."""


def save_model(folder: Path, artifact: Artifact) -> None:
    """Write the MLflow model; the artifact's files are always named `artifacts/weights.*` in it."""
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


def version_file(uri: str, source: str, tags: Mapping[str, str], reference: str) -> Path:
    """Return the verified local .safetensors file of a version.

    Args:
        uri: the store.
        source: the place of the version's MLflow model according to the store. A remote model is downloaded, and only
            once if the version's tags have the digest of its card.
        tags: the tags of the version.
        reference: the user's name for the version, for errors.

    Raises:
        UserError: a file is missing, altered, newer or of another architecture, or does not match `tags`.
    """
    folder = _local_path(source)
    try:
        if folder is None:
            return _download(uri, source, tags)
        file = folder / "artifacts" / WEIGHTS_FILE
        if not file.exists():
            raise UserError(f"{str(file)!r}, where it is kept, is not there (another machine's disk?)")
        _check_tags(read_artifact(file), tags)
    except StoreAway:
        raise
    except UserError as error:
        raise UserError(f"{reference}: {error}") from error
    return file


def _check_tags(artifact: Artifact, tags: Mapping[str, str]) -> None:
    for key in DIGEST_TAGS:
        said, found = tags.get(key, ""), artifact.card[key]
        if not said:
            raise UserError(f"the registered version has no tag {key}, so that nothing says which file was registered")
        if said != found:
            raise UserError(
                f"{str(artifact.path)!r} has {key} {found[:12]}..., the registered version's tag says {said[:12]}..."
            )


def _local_path(source: str) -> Path | None:
    parts = urlsplit(source)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return None if parts.scheme else Path(source)


def _download(uri: str, source: str, tags: Mapping[str, str]) -> Path:
    """Download weights and card into a cache folder named by the card's digest: equal weights may have other cards."""
    import mlflow.artifacts

    cache = cache_folder() / "models"
    digest = tags.get("card_sha256", "")
    if re.fullmatch("[0-9a-f]{64}", digest) and _is_whole(cache / digest, digest):
        found = read_artifact(cache / digest)
        _check_tags(found, tags)
        return found.path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        path = Path(folder) / "downloaded"
        for name in (WEIGHTS_FILE, Path(WEIGHTS_FILE).with_suffix(".json").name):  # no other files of the folder
            with answering(uri):
                mlflow.artifacts.download_artifacts(f"{source}/artifacts/{name}", dst_path=str(path), tracking_uri=uri)
        found = read_artifact(path)
        _check_tags(found, tags)
        target = cache / str(found.card["card_sha256"])
        if not _is_whole(target, target.name):
            shutil.rmtree(target, ignore_errors=True)
            try:
                os.replace(path, target)
            except OSError as error:
                if not _is_whole(target, target.name):  # else another process was quicker
                    raise UserError(f"{str(target)!r} cannot be written: {error.strerror or error}") from error
    return target / WEIGHTS_FILE


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        return bool(read_artifact(folder).card["card_sha256"] == digest)
    except UserError:
        return False
