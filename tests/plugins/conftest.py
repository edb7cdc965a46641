"""The examples of plug-ins, loaded once for the session, as `--plugin` loads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ml2o_dist.plugins import load_plugin

EXAMPLES = Path(__file__).parents[2] / "examples" / "plugins"


@pytest.fixture(scope="session", autouse=True)
def examples() -> None:
    for file in sorted(EXAMPLES.glob("*.py")):
        load_plugin(str(file))
