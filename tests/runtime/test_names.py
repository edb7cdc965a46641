"""Names of models and experiments: what MLflow or a lock would refuse later is refused where settings are read."""

from __future__ import annotations

import json

import pytest
from mlflow.utils import validation  # what MLflow checks a key by, offline

from ml2o_dist.config_file import load_settings
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.names import checked_experiment_name, mlflow_key
from ml2o_dist.sweeping.settings import SweepTracking

REFUSED = [
    "",
    " ",
    "a/b",
    "a:b",
    "x.lock",
    "x.LOCK",
    "a.b",
    "a%2Fb",
    "a'b",
    'a"b',
    "a@b",
    "a\nb",
    "\x1b",
    "..",
    " a",
    "x" * 300,
]


@pytest.mark.parametrize("name", REFUSED)
def test_such_a_model_is_refused_before_training(name: str) -> None:
    with pytest.raises(UserError, match=r"^tracking\.model: model ") as refusal:
        load_settings(None, [f"tracking.model={json.dumps(name)}"])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["", "..", "/", ".", "a\nb", " a", "x" * 501])
def test_such_an_experiment_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^experiment "):
        checked_experiment_name(name)


def test_sweeps_check_their_model_too() -> None:
    with pytest.raises(ValueError, match="may not contain '/'"):
        SweepTracking(model="a/b")


@pytest.mark.parametrize(
    "name", ["resources.custom.a#b", "a\nb", "", "/x", "../x", "a/../b", "a//b", "x" * 300, "ü[1]", "."]
)
def test_a_key_is_made_one_that_mlflow_takes(name: str) -> None:
    key = mlflow_key(name)
    validation._validate_param_name(key)
    validation._validate_tag_name(key)
    validation._validate_length_limit("key", validation.MAX_ENTITY_KEY_LENGTH, key)
    assert mlflow_key(key) == key
    assert mlflow_key("learner.lr") == "learner.lr"
