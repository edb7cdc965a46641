"""Learned weights as a fixture."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torch_optim.small import weights_file


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return weights_file(tmp_path / "weights", lr=0.005, output="controlled", features="alignment")
