"""`ml2o pareto-set query`: a preference in, a plain network out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ml2o_dist.paretoset.image_tasks import load_tasks
from ml2o_dist.paretoset.preferences import checked_preference
from ml2o_dist.paretoset.saved_set import load_set, save_plain
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import home_folder
from ml2o_dist.tracking.store import tracking_uri_to_keep


def query_set(
    place: str,
    preference: Sequence[float],
    *,
    out: Path | None,
    data_root: str,
    measure: bool,
    tracking_uri: str,
    console: Console,
) -> dict[str, Any]:
    """Take the plain network of one preference out of a set; return what `ml2o pareto-set query --json` prints.

    Raises:
        UserError: there is no set, the preference is none, data are missing, or `out` cannot be written.
    """
    if out is None and not measure:
        raise UserError("--no-measure without --out leaves nothing to do: name the file to write")
    if place.startswith("models:/"):
        from ml2o_dist.workflows.register_pareto_set import resolve_set  # late: MLflow takes 2 s

        found = resolve_set(tracking_uri_to_keep(tracking_uri), place)
    else:
        found = load_set(home_folder() / place)
    card, fusion = found.card, found.fusion
    if len(preference) != len(card.names):
        raise UserError(
            f"--preference has {len(preference)} numbers, the set {len(card.names)} tasks: {', '.join(card.names)}"
        )
    ray = checked_preference(preference, len(card.names))
    network = fusion.export(ray)
    answer: dict[str, Any] = {"preference": ray.tolist(), "tasks": list(card.names), "out": None}
    if measure:
        tasks = load_tasks(card.tasks, data_root)
        if (tasks.names, tasks.classes, tasks.side) != (tuple(card.names), tuple(card.classes), card.side):
            raise UserError(
                f"Pareto set {place!r} has other classes, names or image sizes than the tasks that it names, "
                f"{card.tasks!r}; --no-measure does without them"
            )
        losses, accuracies = tasks.measure(network, "test", torch.device("cpu"))
        answer |= {"test_losses": losses.tolist(), "test_accuracies": accuracies.tolist()}
        for name, r, loss, right in zip(card.names, ray.tolist(), losses.tolist(), accuracies.tolist(), strict=True):
            console.print(f"{name:16} preference {r:.3f}  loss {loss:.4f}  accuracy {right:.4f}", highlight=False)
    if out is not None:
        target = home_folder() / out
        if target.suffix != ".safetensors":
            raise UserError(f"--out {str(out)!r} must end in .safetensors")
        try:
            save_plain(target, network, card, ray.tolist())
        except OSError as error:
            raise UserError(f"--out {str(out)!r} cannot be written: {error.strerror or error}") from error
        answer["out"] = str(target)
        console.print(f"written        {target}", highlight=False, soft_wrap=True)
    return answer


def written_preference(text: str) -> list[float]:
    """Read `R1,R2,...`; raises UserError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--preference {text!r} is not numbers joined by ',', as in 0.3,0.7") from error
