"""Limit the guard that a card of learned weights may request: no looser than the default guard, and cheap.

Weights may come from anywhere. If their card could loosen the guard, they could switch off their own check; if it
could request any number of batches, they could keep a machine busy for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml2o_dist.config import GuardSettings

_THEOREM = ("dssmg", "smg")
"""The fallbacks that are known to converge."""

MOST_BATCHES, MOST_GROWTH = 16, 0.1
"""After a thousand steps that is 64 batches for one comparison."""

_AS_STRICT: dict[str, Callable[[Any, Any], bool]] = {
    "fallback": lambda asked, default: asked in _THEOREM,
    "eps": lambda asked, default: asked <= default,
    "p": lambda asked, default: True,  # the theorem holds for each that GuardSettings takes
    "budget": lambda asked, default: asked <= default,
    "margin": lambda asked, default: asked >= default,
    "batches": lambda asked, default: default <= asked <= MOST_BATCHES,
    "growth": lambda asked, default: default <= asked <= MOST_GROWTH,
    "every": lambda asked, default: asked <= default,
    "criterion": lambda asked, default: asked == "each",
}
"""For each setting, whether the value `asked` is at least as strict as the `default`, at an acceptable cost."""


def admitted(asked: GuardSettings | None, origin: str) -> tuple[GuardSettings | None, str]:
    """Return the guard for the weights from `origin`, and one line about refused settings, "" if there are none.

    Each setting of `asked` that is looser than the default one, or too costly, is replaced by the default. None stays
    None.
    """
    if asked is None:
        return None, ""
    default = GuardSettings()
    looser = [name for name, strict in _AS_STRICT.items() if not strict(getattr(asked, name), getattr(default, name))]
    if not looser:
        return asked, ""
    shown = ", ".join(f"{name}={_short(getattr(asked, name))}" for name in looser)
    used = ", ".join(f"{name}={_short(getattr(default, name))}" for name in looser)
    line = (
        f"the card of {origin!r} asks for a guard that is looser than the default one, or too dear: {shown}; the "
        f"default is used: {used}. Give guard settings of your own to choose others"
    )
    return asked.model_copy(update={name: getattr(default, name) for name in looser}), line


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
