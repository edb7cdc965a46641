"""Load learned optimizers from the package, a folder, a URI or a registry.

Nothing here needs torch until weights are read.
"""

from __future__ import annotations

import hashlib
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ml2o_dist.pretrained import DEFAULT, PRETRAINED, SHIPPED, shipped_names
from ml2o_dist.runtime.errors import unknown
from ml2o_dist.runtime.files import cache_folder, expanded, home_folder, replacing
from ml2o_dist.runtime.remote_files import answering, connect, is_uri, read_remote

if TYPE_CHECKING:
    from ml2o_dist.artifact import Artifact


def load_artifact(path: Path | str) -> Artifact:
    """Read and verify a learned optimizer.

    Args:
        path: a name of `shipped_names`; the .safetensors file, or the folder that holds `weights.safetensors`, a run
            directory for one; as a path, looked for as `located` says, or a URI (`s3://bucket/runs/x`); or a registered
            version, `models:/NAME@ALIAS` or `models:/NAME/VERSION`, of the registry that `resolve_tracking_uri` names.

    Raises:
        UserError: as `artifact.read_artifact`, or an unknown name.
    """
    from ml2o_dist.artifact import read_artifact  # imported late: it needs torch; names and places do not

    if str(path).startswith("models:/"):
        # Imported by name: only registry users need MLflow, and tracking imports this module.
        registry, store = (import_module(f"ml2o_dist.tracking.{name}") for name in ("registry", "store"))
        path = registry.resolve_model(store.resolve_tracking_uri(), str(path))
    elif str(path) in shipped_names():
        path = SHIPPED / f"{DEFAULT if str(path) == PRETRAINED else path}.safetensors"
    elif is_uri(path):
        path = _fetched(str(path))
    else:
        given, path = str(path), located(str(path))
        if _is_word(given) and not os.path.exists(path):
            allowed = [*shipped_names(), "a run directory", "a weights file", "models:/NAME@ALIAS"]
            raise unknown("weights", given, allowed)
    return read_artifact(path)


def located(reference: str) -> str:
    """Return where weights are: a relative path in the current folder if it exists there, else in ML2O_HOME.

    A name, a URI and "" are returned unchanged.
    """
    if not reference or reference in shipped_names() or reference.startswith("models:/") or is_uri(reference):
        return reference
    path = expanded(reference)
    return str(path.absolute() if os.path.exists(path) else home_folder() / path)


def _fetched(place: str) -> Path:
    """Copy an artifact from a URI into the cache folder; return the copy's .safetensors file. Raises UserError."""
    from ml2o_dist.artifact import CARD_LIMIT, WEIGHTS_FILE, WEIGHTS_LIMIT, card_file  # late, as above

    uri, filesystem, path = connect(place, "weights")
    folder = cache_folder() / "weights" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    if not path.endswith(".safetensors"):
        path += f"/{WEIGHTS_FILE}"
    file = folder / path.rpartition("/")[2]
    files = (
        (path, file, WEIGHTS_LIMIT),
        (path.removesuffix(".safetensors") + ".json", card_file(file), CARD_LIMIT),
    )
    for source, target, limit in files:
        content = read_remote(filesystem, source, f"{target.name} of {uri!r}", limit)
        with answering(f"the copy {str(target)!r} of {uri!r} cannot be written"), replacing(target) as copy:
            copy.write(content)
    return file


def _is_word(text: str) -> bool:
    """Tell whether this is a name rather than a path."""
    return Path(text).name == text and not text.endswith(".safetensors")
