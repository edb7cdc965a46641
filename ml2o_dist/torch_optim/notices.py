"""Warnings, given once each, about a training that fails without raising an error."""

from __future__ import annotations

import sys
import warnings
from collections import Counter, deque
from collections.abc import Sequence

from torch import Tensor

STILL = 10
"""Number of steps in a row without a movement that rounding cannot explain."""

WINDOW, FEWEST = 50, 3
"""If fewer than `FEWEST` of `WINDOW` guarded steps are learned ones, the fallback trains, not the learned rule."""

SMALLEST_LR = 0.05
"""An `lr` factor below this is probably a learning rate that was meant for another optimizer."""

NAMED = 8
"""Most parameters that a warning names; further ones are only counted."""


class Notices:
    """Counts problems from step to step, for the warnings of one optimizer."""

    def __init__(self, optimizer: str) -> None:
        """`optimizer`: the name of its class."""
        self._optimizer = optimizer
        self._still = 0
        self._accepted: deque[bool] = deque(maxlen=WINDOW)
        self._refusers: deque[tuple[int, ...]] = deque(maxlen=WINDOW)
        self._said_still = self._said_refused = False

    def learning_rates(self, rates: Sequence[float]) -> None:
        """Warn about `lr` factors that look like another optimizer's learning rates."""
        small = [rate for rate in rates if 0 < rate < SMALLEST_LR]
        if small:
            warn(
                f"lr={small[0]:g} makes the steps of {self._optimizer} {1 / small[0]:,.0f} times as short: lr "
                "multiplies a step whose length is learned. Leave it at 1"
            )

    def unreached(self, names: Sequence[str]) -> None:
        """Warn about trainable parameters without a gradient in their first step."""
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            warn(
                f"no loss reached {len(names)} trainable parameters in their first step, which do not move until one "
                f"does: {', '.join(names[:NAMED])}{more}. If a loss does use them, something hides them from "
                "torch.autograd.grad, as a function does that calls backward inside; if none will, freeze them by "
                "requires_grad_(False)"
            )

    def moved(self, moved: bool, gradient: Tensor) -> None:
        """Record whether a step moved a parameter; `gradient` is its Jacobian. Warn if none moves any more."""
        self._still = 0 if moved or not bool(gradient.any()) else self._still + 1
        if self._still >= STILL and not self._said_still:
            self._said_still = True
            warn(
                f"the last {STILL} steps of {self._optimizer} moved no parameter, though the gradients are not 0 "
                f"(their norm is {float(gradient.norm()):.2g}): the steps are shorter than the parameters' rounding. "
                "Unless the losses are at their minimum, make a new optimizer: its steps start at their first size"
            )

    def decided(self, accepted: bool, worse: Sequence[bool]) -> None:
        """Record a decision of the guard; `worse` tells which losses of the learned step were above the fallback's.

        Warn if nearly all learned steps are refused.
        """
        self._accepted.append(accepted)
        self._refusers.append(() if accepted else tuple(i for i, each in enumerate(worse) if each))
        if len(self._accepted) == WINDOW and sum(self._accepted) < FEWEST and not self._said_refused:
            self._said_refused = True
            counts = Counter(i for refusers in self._refusers for i in refusers)
            refused = WINDOW - sum(self._accepted)
            reason = "their difference was within the noise of the guard's samples"
            if counts:
                objective, times = counts.most_common(1)[0]
                reason = f"most often loss {objective + 1} was above that of the fallback's step, {times} times"
            warn(
                f"the guard of {self._optimizer} refused {refused} of the last {WINDOW} learned steps: {reason}. The "
                "fallback trains instead. The budget is a multiple of what the losses have fallen by so far; a larger "
                "one lets more pass, GML2O(..., guard={'budget': 50}), as does {'criterion': 'sum'}; ML2O has no guard"
            )


def warn(message: str) -> None:
    """Warn at the line of the caller outside this package and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in ("ml2o_dist", "torch")
