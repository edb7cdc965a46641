"""What kind of run a folder holds: a folder holds one."""

from __future__ import annotations

from pathlib import Path

from ml2o_dist.runtime.errors import UserError

KINDS = {
    "a sweep": "sweep.yaml",
    "a Pareto set": "pareto_set.yaml",
    "an evaluation": "evaluation.json",
    "a meta-training": "config.yaml",
}
"""The file that tells; a sweep's folder has the best trial's config.yaml besides."""


def kind_of(folder: Path) -> str | None:
    """Return what the folder holds, in words; None where it holds no run."""
    return next((kind for kind, name in KINDS.items() if (folder / name).exists()), None)


def check_kind(folder: Path, wanted: str, shown: str = "") -> None:
    """Raise UserError where the folder holds a run of another kind than the `wanted` one; `shown` is its name."""
    found = kind_of(folder)
    if found not in (None, wanted):
        what = f"the {wanted.split(' ', 1)[1]}"
        raise UserError(f"{shown or folder} holds {found}; choose another --run-dir for {what}")
