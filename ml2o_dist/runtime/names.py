"""Checks names that MLflow and our locks must accept, when settings are read and so before any training."""

from __future__ import annotations

import posixpath
import re
from typing import Annotated

from pydantic import AfterValidator

from ml2o_dist.runtime.errors import UserError

LOCK_SUFFIX = ".lock"
"""The suffix of a promotion lock's name; no model name may end in it."""

_NOT_IN_MODELS = "/:.%\"'@\\"
"""Characters that MLflow refuses in the name of a logged model, or in `models:/NAME@ALIAS`."""

_LONGEST_KEY = 250
"""Most characters of a key in MLflow."""

_LONGEST_MODEL, _LONGEST_EXPERIMENT = 200, 200
"""Most characters. MLflow keeps 256 of a model's name and 500 of an experiment's; locks and folders add some."""


def checked_model_name(name: str) -> str:
    """Return the name of a registered model; raise UserError if MLflow or a promotion's lock cannot use it."""
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
    """Return the name of an experiment, which may also name an artifact folder; raise UserError if it is invalid."""
    if not name.strip(" ./") or not name.isprintable() or name != name.strip() or len(name) > _LONGEST_EXPERIMENT:
        raise UserError(
            f"experiment {name!r}: a name has 1 to {_LONGEST_EXPERIMENT} printable characters, and more than dots and "
            "slashes, without a space at its ends"
        )
    return name


def mlflow_key(name: str) -> str:
    """Return `name` as a key for an MLflow parameter or tag; characters that MLflow refuses become `-`."""
    key = re.sub(r"[^\w.\- :/]", "-", name).strip("/.")[:_LONGEST_KEY] or "-"
    return key if posixpath.normpath(key) == key else key.replace("/", "-")


ModelName = Annotated[str, AfterValidator(checked_model_name)]
ExperimentName = Annotated[str, AfterValidator(checked_experiment_name)]
