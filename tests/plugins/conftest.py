"""Plug-ins that a test loads are taken out again after it, as if they had been loaded in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ml2o_dist import plugins
from ml2o_dist.config import RULE_SETTINGS
from ml2o_dist.runtime import registry

EXAMPLES = Path(__file__).parents[2] / "examples" / "plugins"


@contextmanager
def taken_out() -> Iterator[None]:
    """Take out, after the block, every plug-in that is loaded."""
    rules = dict(RULE_SETTINGS)
    try:
        yield
    finally:
        for each, name in registry._added:
            each.remove(name)
        registry._added.clear()
        plugins._loaded.clear()
        RULE_SETTINGS.clear()
        RULE_SETTINGS.update(rules)


@pytest.fixture(scope="module")
def examples() -> Iterator[None]:
    """The examples of plug-ins, loaded as `--plugin` loads them."""
    with taken_out():
        for file in sorted(EXAMPLES.glob("*.py")):
            plugins.load_plugin(str(file))
        yield
