"""Names that MLflow and our locks take: checked where settings are read, so before anything is trained."""

from __future__ import annotations

import posixpath
import re
from typing import Annotated

from pydantic import AfterValidator

from ml2o_dist.runtime.errors import UserError

LOCK_SUFFIX = ".lock"
"""What the name of a promotion's lock ends in; no model may be called so."""

_NOT_IN_MODELS = "/:.%\"'@\\"
"""MLflow takes none of them in the name of a logged model, or in `models:/NAME@ALIAS`."""

_LONGEST_KEY = 250
"""Characters that MLflow keeps of a key."""

_LONGEST_MODEL, _LONGEST_EXPERIMENT = 200, 200
"""Characters. MLflow keeps 256 of a registered model's name and 500 of an experiment's; locks and folders add some."""


def checked_model_name(name: str) -> str:
    """Return the name of a registered model; raises UserError where MLflow or a promotion's lock cannot take it."""
    if name.casefold().endswith(LOCK_SUFFIX):
        raise UserError(f"model {name!r}: names that end in {LOCK_SUFFIX} are kept for the locks of promotions")
    if wrong := sorted({each for each in name if each in _NOT_IN_MODELS or not each.isprintable()}):
        raise UserError(f"model {name!r}: a registered model's name may not contain {' '.join(map(repr, wrong))}")
    if not name or name != name.strip() or len(name) > _LONGEST_MODEL:
        raise UserError(
            f"model {name!r}: a registered model's name has 1 to {_LONGEST_MODEL} characters and no space at its ends"
        )
    return name


def checked_experiment_name(name: str) -> str:
    """Return the name of an experiment, whose artifacts may lie in a folder of this name; raises UserError."""
    if not name.strip(" ./") or not name.isprintable() or name != name.strip() or len(name) > _LONGEST_EXPERIMENT:
        raise UserError(
            f"experiment {name!r}: a name has 1 to {_LONGEST_EXPERIMENT} printable characters, and more than dots and "
            "slashes, without a space at its ends"
        )
    return name


def mlflow_key(name: str) -> str:
    """Return `name` as MLflow takes it for the key of a parameter or a tag: what it does not take becomes `-`."""
    key = re.sub(r"[^\w.\- :/]", "-", name).strip("/.")[:_LONGEST_KEY] or "-"
    return key if posixpath.normpath(key) == key else key.replace("/", "-")


ModelName = Annotated[str, AfterValidator(checked_model_name)]
ExperimentName = Annotated[str, AfterValidator(checked_experiment_name)]
