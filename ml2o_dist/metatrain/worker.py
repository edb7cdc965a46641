"""The Ray actor around `run_episode`: it knows nothing that another worker could not recompute."""

from __future__ import annotations

import os

import torch

from ml2o_dist.metatrain.episode import EpisodeResult, EpisodeSpec, Weights, run_episode


class RolloutWorker:
    """Runs episodes on one torch thread: results depend neither on the core count nor on the neighbours."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        if torch.cuda.is_available():
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def pid(self) -> int:
        """Return the process id: answers once the worker is up."""
        return os.getpid()

    def run(self, weights: Weights, spec: EpisodeSpec) -> EpisodeResult:
        """Run one episode."""
        return run_episode(weights, spec)
