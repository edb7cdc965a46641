"""A registered Pareto set as MLflow loads it: images and a preference in, the logits of all tasks out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy as np
import torch

from ml2o_dist.paretoset.saved_set import load_set


class ParetoSetModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow is untyped
    """Standardised images [B, 1, H, W] -> the logits of all tasks, side by side [B, sum of classes].

    The parameter `preference` [T] sets the trade-off; by default it is even.
    """

    def load_context(self, context: Any) -> None:
        """Read the set."""
        self.found = load_set(Path(context.artifacts["set"]))

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Return the logits of the network for the preference."""
        count = len(self.found.card.names)
        preference = (params or {}).get("preference", [1 / count] * count)
        network = self.found.fusion.export(preference)
        with torch.no_grad():
            logits = network(torch.from_numpy(np.asarray(model_input, dtype=np.float32)))
        answer: np.ndarray = torch.cat(logits, dim=1).numpy()
        return answer


mlflow.models.set_model(ParetoSetModel())
