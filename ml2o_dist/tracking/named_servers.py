"""MLflow servers that a run directory may name: those that the user, the environment or a run on this machine named.

A run directory may come from somebody else. Its data are not sent to a server that only the directory itself names.
The file `tracking_uris` in the private folder `files.state_folder()` lists, one a line and without passwords, the URIs
that runs on this machine were tracked at.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import private_folder, state_folder
from ml2o_dist.runtime.reading import read_bytes
from ml2o_dist.tracking.store import redacted, resolve_tracking_uri

FILE = "tracking_uris"

_LIMIT = 1 << 20
"""Maximum bytes of the file: some ten thousand URIs."""

_log = logging.getLogger("ml2o_dist.tracking")


def remember(uri: str) -> None:
    """Note that a run on this machine is tracked at `uri`; if the note cannot be written, `ml2o sync` asks later."""
    shown = redacted(uri)
    if not shown.isprintable() or _is_noted(shown):
        return
    try:
        file = private_folder(state_folder()) / FILE
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(handle, "ab") as stream:
            stream.write(f"{shown}\n".encode())  # in one write, so that lines of concurrent runs do not mix
    except OSError as error:
        _log.info("%s cannot be noted in %s: %s", shown, state_folder(), error.strerror or error)


def is_known(uri: str) -> bool:
    """Tell whether the environment, or a run on this machine, has named the server at `uri`."""
    shown = redacted(uri)
    return shown == _named_by_environment() or _is_noted(shown)


def check_known(uri: str, place: Path) -> None:
    """Raise UserError unless the environment, or a run on this machine, has named the server at `uri`.

    Args:
        uri: the server that the files in `place` name.
    """
    if not is_known(uri):
        raise UserError(
            f"{place} names MLflow at {redacted(uri)}, which neither you nor a run on this machine has named: "
            f"to send it what lies there, say so with --tracking-uri {redacted(uri)}"
        )


def check_resumed(setting: str, overrides: Sequence[str], place: Path) -> None:
    """Raise UserError if a resumed run would be sent to a server that only its own directory names.

    Args:
        setting: `tracking.uri` of the run.
        overrides: the user's settings, `key=value` each; `tracking.uri` among them counts as named by the user.
        place: the run directory.
    """
    if setting and not any(override.partition("=")[0].strip() == "tracking.uri" for override in overrides):
        check_known(resolve_tracking_uri(setting), place)


def _is_noted(shown: str) -> bool:
    try:
        kept = read_bytes(state_folder() / FILE, "list of tracking URIs", _LIMIT)
    except (FileNotFoundError, UserError):
        return False
    return shown.encode() in kept.split(b"\n")


def _named_by_environment() -> str:
    try:
        return redacted(resolve_tracking_uri())
    except UserError:  # a kind of URI that MLflow does not serve
        return ""
