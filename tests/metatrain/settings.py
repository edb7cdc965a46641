"""Small meta-training settings for tests: seconds, not minutes."""

from __future__ import annotations

from typing import Any

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.config_file import parse_settings

TREE: dict[str, Any] = {
    "meta_steps": 12,
    "device": "cpu",
    "workers": 1,
    "slots": 4,
    "horizon": [5, 8],
    "family": {
        "train": [
            {"problem": "quadratic[noise=0.1,batch=4]", "choices": {"n": [4, 6], "m": [2, 3]}},
            {"problem": "fonseca"},
        ],
        "validation": ["quadratic[m=2,n=5]"],
        "test": ["quadratic[m=2,n=7]"],
    },
    "rule": {"hidden": 4, "lr": 0.05},
    "learner": {"lr": 0.01},
    "validation": {"every": 4, "horizon": 10, "instances": 2},
    "comparison": {"steps": 20, "seeds": 2, "learning_rates": [0.01, 0.1]},
}


def small(**changes: Any) -> MetaTrainSettings:
    """The settings above with top-level keys replaced (mappings are merged)."""
    tree = {**TREE, **{k: {**TREE[k], **v} if isinstance(v, dict) and k in TREE else v for k, v in changes.items()}}
    return parse_settings(tree)
