"""The learned optimizer as MLflow sees it: this file is copied into every registered version (models-from-code).

    updates = mlflow.pyfunc.load_model("models:/ml2o@candidate").predict(gradients)

`gradients` [T, m, n] are the m objectives' gradients at T successive points; `updates` [T, n] is what the rule adds
to the parameters at each of them. The rule remembers: row t depends on the gradients up to t, so that a caller who
steps through a problem sends what it has seen so far and uses the last row. Nothing is kept between two calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy as np
import torch

from ml2o_dist.artifact import read_artifact
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.learned import learned_rule


class LearnedOptimizer(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow is untyped
    """Reads the artifact with every check of `load_artifact` and steps through given gradients."""

    def load_context(self, context: Any) -> None:
        """Load the weights that `context.artifacts["weights"]` names; raises UserError if they were altered."""
        artifact = read_artifact(Path(context.artifacts["weights"]))
        self.rule = learned_rule(artifact.rule, artifact.weights)

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Map gradients [T, m, n] to updates [T, n], both float32; raises ValueError for another shape."""
        gradients = torch.from_numpy(np.array(model_input, dtype=np.float32))
        if gradients.ndim != 3:
            raise ValueError(f"gradients must be [steps, objectives, parameters], not {list(gradients.shape)}")
        steps, objectives, dimension = gradients.shape
        state = self.rule.initial_state(1, objectives, ParameterLayout.vector(dimension))
        updates = torch.empty(steps, dimension)
        for step in range(steps):
            update, state = self.rule.update(gradients[None, step], state)
            updates[step] = update[0]
        return updates.numpy()


mlflow.models.set_model(LearnedOptimizer())
