"""States of torch's random number generators, so that a closure draws the same numbers when it is called again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

RandomStates = dict[torch.device, Tensor]
"""The state of torch's generator of each device."""


def random_states(devices: Sequence[torch.device]) -> RandomStates:
    """Return the states of torch's generators: the CPU's, and those of the CUDA `devices`."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    return states | {device: torch.cuda.get_rng_state(device) for device in devices}


@contextmanager
def replayed(states: RandomStates) -> Iterator[None]:
    """Run the block with these generator states, and restore the generators' own states afterwards."""
    now = random_states([device for device in states if device.type == "cuda"])
    _set(states)
    try:
        yield
    finally:
        _set(now)


def _set(states: RandomStates) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
