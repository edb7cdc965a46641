"""The examples of plug-ins, loaded for each file of tests as `--plugin` loads them, and taken out again after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ml2o_dist import plugins
from ml2o_dist.config import RULE_SETTINGS
from ml2o_dist.runtime import registry

EXAMPLES = Path(__file__).parents[2] / "examples" / "plugins"


@pytest.fixture(scope="module", autouse=True)
def examples() -> Iterator[None]:
    rules = dict(RULE_SETTINGS)
    for file in sorted(EXAMPLES.glob("*.py")):
        plugins.load_plugin(str(file))
    yield
    for each, name in registry._added:
        each.remove(name)
    registry._added.clear()
    plugins._loaded.clear()
    RULE_SETTINGS.clear()
    RULE_SETTINGS.update(rules)
