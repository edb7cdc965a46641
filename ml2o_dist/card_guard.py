"""How much of a guard the card of learned weights may ask for: only what is stricter than the default guard.

Weights come from anywhere. If their card could loosen the guard, they could switch off what is there to check them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml2o_dist.config import GuardSettings

_THEOREM = ("dssmg", "smg")
"""The fallbacks that are known to converge."""

_AS_STRICT: dict[str, Callable[[Any, Any], bool]] = {
    "fallback": lambda asked, default: asked in _THEOREM,
    "eps": lambda asked, default: asked <= default,
    "p": lambda asked, default: True,  # the theorem holds for each that GuardSettings takes
    "budget": lambda asked, default: asked <= default,
    "margin": lambda asked, default: asked >= default,
    "batches": lambda asked, default: asked >= default,
    "growth": lambda asked, default: asked >= default,
    "every": lambda asked, default: asked <= default,
    "criterion": lambda asked, default: asked == "each",
}
"""For each setting, whether the value `asked` checks at least as strictly as the `default`."""


def admitted(asked: GuardSettings | None, origin: str) -> tuple[GuardSettings | None, str]:
    """Return the guard that the weights from `origin` get, and one line about what was refused, "" if nothing was.

    Each setting of `asked` that is looser than the default one is replaced by the default. None stays None.
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
        f"the card of {origin!r} asks for a guard that is looser than the default one: {shown}; the default is used: "
        f"{used}. Give guard settings of your own to choose others"
    )
    return asked.model_copy(update={name: getattr(default, name) for name in looser}), line


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
