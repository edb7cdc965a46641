"""The weights that come with the package, NAME.safetensors and NAME.json each, by name."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent
"""Their folder."""

PRETRAINED = "pretrained"
"""What stands for the weights that serve where none are named."""

DEFAULT = "ml2o-small"
"""Those."""


def shipped_names() -> list[str]:
    """Return the names of the weights that come with the package, `PRETRAINED` first."""
    return [PRETRAINED, *sorted(file.stem for file in SHIPPED.glob("*.safetensors"))]
