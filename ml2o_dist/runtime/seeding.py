"""Named random streams: a seed is a pure function of the stream's name."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: str | int) -> int:
    """Map the `parts` that name a random stream to a seed in [0, 2^63).

    Equal parts give equal seeds on every machine; `1` and `"1"` differ.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh torch generator on `device` for the stream that `parts` name."""
    import torch  # imported late: seeds alone do not need it

    return torch.Generator(device=device).manual_seed(derive_seed(*parts))
