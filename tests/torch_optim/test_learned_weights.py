"""Whose weights an optimizer has, and when they are read."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from ml2o_dist import GML2O, ML2O, UserError
from ml2o_dist.tracking.registry import register_version
from tests.torch_optim.small import TwoTasks, flat, take
from tests.tracking.filled_registry import Registry


def test_it_says_whose_weights_it_has(place: Path) -> None:
    optimizer = ML2O(TwoTasks().parameters(), place)
    assert optimizer.weights == str(place)
    assert f"weights: {place}" in repr(optimizer)
    assert copy.deepcopy(optimizer).weights == str(place)


def test_no_network_is_asked_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    model = TwoTasks()
    optimizer = GML2O(model.parameters(), "models:/ml2o@champion")
    before = flat(model)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        take(optimizer, model, 0)
    assert torch.equal(flat(model), before)


def test_a_registered_version_is_read_at_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path)
    artifact = registry.artifact(1)
    register_version(registry.uri, "drop", artifact, run_id=registry.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    model, twin = TwoTasks(), TwoTasks()
    one, other = GML2O(model.parameters(), "models:/drop@candidate"), GML2O(twin.parameters(), artifact)
    for step in range(3):
        take(one, model, step)
        take(other, twin, step)
    assert torch.equal(flat(model), flat(twin))
    with pytest.raises(UserError, match=r"belongs to weights.*\(initial\)"):
        GML2O(model.parameters(), "initial").load_state_dict(one.state_dict())
