"""Finds the kind of run in a folder; a folder holds one run."""

from __future__ import annotations

from pathlib import Path

from ml2o_dist.runtime.errors import UserError

KINDS = {
    "a sweep": "sweep.yaml",
    "a Pareto set": "pareto_set.yaml",
    "an evaluation": "evaluation.json",
    "a meta-training": "config.yaml",
}
"""The file that identifies each kind; a sweep's folder also has the best trial's config.yaml."""


def kind_of(folder: Path) -> str | None:
    """Return the kind of run in the folder, in words; None if it holds no run."""
    return next((kind for kind, name in KINDS.items() if (folder / name).exists()), None)


def check_kind(folder: Path, wanted: str, shown: str = "") -> None:
    """Raise UserError if the folder holds a run of another kind than `wanted`; `shown` is the folder's name."""
    found = kind_of(folder)
    if found not in (None, wanted):
        what = f"the {wanted.split(' ', 1)[1]}"
        raise UserError(f"{shown or folder} holds {found}; choose another --run-dir for {what}")
