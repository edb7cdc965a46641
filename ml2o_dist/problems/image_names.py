"""The image data sets by name; nothing of their data, nor torch."""

from __future__ import annotations

from typing import Any

from ml2o_dist.runtime.registry import Registry

PAIRS = ("multimnist", "multifashion", "multifashionmnist", "multidigits")
"""The package's own: two overlapping images each (problems/images.py)."""

IMAGE_SETS: Registry[Any] = Registry("image data set")
"""What plug-ins bring (`image_sets.register_images`)."""
