"""Export learned optimizers from the registry into files, and import them from files."""

from __future__ import annotations

import filecmp
from pathlib import Path

from ml2o_dist.artifact import WEIGHTS_FILE, Artifact, read_artifact
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import replacing
from ml2o_dist.tracking.registry import list_versions, register_version, resolve_model
from ml2o_dist.tracking.store import redacted


def export_version(uri: str, reference: str, output: Path) -> Artifact:
    """Write the weights and the card of a registered version, byte for byte; return the artifact, read back.

    Args:
        uri: the registry, as `resolve_tracking_uri` returns it.
        reference: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        output: a folder (created if missing), or a file that ends in .safetensors. Equal files are not rewritten.

    Raises:
        UserError: as `resolve_model`; another file is there already, or the files cannot be written.
    """
    weights = resolve_model(uri, reference)
    target = output if output.suffix == ".safetensors" else output / WEIGHTS_FILE
    try:
        copies = [(target.with_suffix(suffix), weights.with_suffix(suffix)) for suffix in (".safetensors", ".json")]
        for file, source in copies:
            if file.exists() and not (file.is_file() and filecmp.cmp(file, source, shallow=False)):
                raise UserError(f"{str(file)!r} is there already and is not that of {reference}: name another --output")
        for file, source in copies:
            if not file.exists():
                with replacing(file) as stream:
                    stream.write(source.read_bytes())
    except OSError as error:
        raise UserError(f"{str(target)!r} cannot be written: {error.strerror or error}") from error
    return read_artifact(target)


def import_version(uri: str, model: str, artifact: Artifact, place: str) -> tuple[int, bool]:
    """Register an artifact from elsewhere as a version of `model`, the candidate if it is the newest one.

    Args:
        uri: the registry, as `resolve_tracking_uri` returns it.
        artifact: the artifact, as read.
        place: where it was read from; it becomes the version's tag `imported_from`.

    Returns:
        The version, and whether it is new: the same weights and rule settings are registered once.

    Raises:
        UserError: as `register_version`.
    """
    before = {entry["version"] for entry in list_versions(uri, model)}
    origin = redacted(place)
    version = register_version(
        uri, model, artifact.path, description=f"Imported from {origin}.", tags={"imported_from": origin}
    )
    return version, version not in before
