"""The Ray actors that run an episode and its replay; they hold no state that another actor could not recompute."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray

from ml2o_dist.metatrain.episode import (
    EpisodeResult,
    EpisodeSpec,
    replay_episode,
    roll_out_episode,
    run_episode,
)
from ml2o_dist.metatrain.rollout_record import read_rollout, rollout_batch
from ml2o_dist.rules.learned import Weights


class _OneThread:
    """Computes on one torch thread, so that results do not depend on the core count or on other processes."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        if torch.cuda.is_available():
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def where(self) -> tuple[int, str]:
        """Return the process id and Ray's name of the node; Ray answers once the process is up."""
        return os.getpid(), ray.get_runtime_context().get_node_id()


class RolloutWorker(_OneThread):
    """Runs episodes."""

    def run(self, weights: Weights, spec: EpisodeSpec) -> EpisodeResult:
        """Run one episode."""
        return run_episode(weights, spec)

    def roll_out(self, weights: Weights, spec: EpisodeSpec) -> tuple[EpisodeResult, pa.RecordBatch | None]:
        """Run the rollout of an episode; return its result so far and what another process needs to replay it."""
        result, replayable = roll_out_episode(weights, spec)
        return result, None if replayable is None else rollout_batch(replayable)


class Replayer(_OneThread):
    """Replays the workers' rollouts on its own device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def replay(
        self, weights: Weights, spec: EpisodeSpec, batch: pa.RecordBatch
    ) -> tuple[float, NDArray[np.float32] | None]:
        """Return the meta-loss and the meta-gradient of an episode."""
        return replay_episode(weights, spec, read_rollout(batch, self._device))
