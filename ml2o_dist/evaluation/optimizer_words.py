"""Names of optimizers. Checking a name here imports nothing that can run an optimizer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from ml2o_dist.pretrained import PRETRAINED, shipped_names
from ml2o_dist.rules.names import adversaries, aggregators, optimizers, split_optimizer_name
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import home_folder

GUARD = "gml2o:"
REGISTRY = "models:/"
OWN = {
    "initial": "the learned rule before any meta-training",
    "dssmg": "double-sampling stochastic multi-gradient, the guard's fallback",
    "smg": "stochastic multi-gradient (Liu & Vicente 2021)",
}
_OTHERS = f"any of them as {GUARD}NAME, {REGISTRY}NAME@ALIAS, a weights file or a run directory"


def check_optimizers(texts: Iterable[str]) -> None:
    """Raise UserError, with the nearest name, if a text names no optimizer. Weights files are not opened."""
    for text in texts:
        name = text.removeprefix(GUARD)
        if name in OWN or name in adversaries() or name in shipped_names() or name.startswith(REGISTRY):
            continue
        if is_hand_designed(name):
            split_optimizer_name(name)
        elif not ("/" in name or name.endswith(".safetensors") or (name and (home_folder() / name).exists())):
            raise unknown_optimizer(text)


def is_hand_designed(name: str) -> bool:
    """Tell whether a name means a hand-designed optimizer: it has + or @, or is an aggregator or an optimizer alone."""
    single = name in aggregators() or name in optimizers().keys() - {"sgd", "momentum", "adam"}
    return "/" not in name and (single or "+" in name or "@" in name)


def unknown_optimizer(text: str) -> UserError:
    """Return the error for a text that names no optimizer."""
    names = sorted({name for name, _, _ in optimizer_descriptions()} - {"sgd", "momentum", "adam"})
    near = difflib.get_close_matches(text.lower(), [*names, *(GUARD + name for name in names)], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(
        f"unknown optimizer {text!r}{hint} (allowed: {', '.join(names)} with [+sgd|+momentum|+adam][@LR] after those "
        f"of torchjd, {_OTHERS}); a plug-in's needs --plugin FILE.py"
    )


def optimizer_descriptions() -> Iterator[tuple[str, str, str]]:
    """Yield (name, kind, description) of every optimizer that has a name."""
    for name in shipped_names():
        what = "the weights that serve where none are named" if name == PRETRAINED else "weights in the package"
        yield name, "learned", what
    yield "initial", "learned", OWN["initial"]
    for name in ("dssmg", "smg"):
        yield name, "stochastic multi-gradient", OWN[name]
    for name, what in sorted(aggregators().items()):
        yield name, "aggregator", what
    for name, what in optimizers().items():
        yield name, "optimizer", what
    for name, what in adversaries().items():
        yield name, "adversary", what
