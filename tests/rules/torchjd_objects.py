"""torchjd's objects as its documentation builds them, for comparison: written apart from the table under test."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torchjd.aggregation as ta
import torchjd.scalarization as ts


def torchjd_object(name: str, objectives: int) -> Any:
    """Return a fresh torchjd object with the settings that are documented for `name`."""
    return {
        "alignedmtl": lambda: ta.AlignedMTL(pref_vector=None, scale_mode="min"),
        "cagrad": lambda: ta.CAGrad(0.5),
        "config": lambda: ta.ConFIG(),
        "crmogm": lambda: ta.GramianWeightedAggregator(ta.CRMOGMWeighting(ta.MGDAWeighting(), 0.9)),
        "dualproj": lambda: ta.DualProj(),
        "dwa": lambda: ts.DWA(2.0),
        "excessmtl": lambda: ta.ExcessMTL(robust_step_size=1.0, n_warmup_steps=0),
        "fairgrad": lambda: ta.FairGrad(2.0),
        "famo": lambda: ts.FAMO(objectives, lr=0.025, weight_decay=1e-3),
        "geometricmean": lambda: ts.GeometricMean(),
        "graddrop": lambda: ta.GradDrop(leak=None),
        "gradvac": lambda: ta.GradVac(beta=0.5),
        "imtlg": lambda: ta.IMTLG(),
        "imtll": lambda: ts.IMTLL(objectives),
        "krum": lambda: ta.Krum(0, n_selected=1),
        "mean": lambda: ta.Mean(),
        "mgda": lambda: ta.MGDA(epsilon=0.001, max_iters=100),
        "nashmtl": lambda: ta.NashMTL(objectives, max_norm=1.0, update_weights_every=1, optim_niter=20),
        "pcd": lambda: ta.PCD(tau=0.02),
        "pcgrad": lambda: ta.PCGrad(),
        "randomweights": lambda: ta.Random(),
        "stch": lambda: ts.STCH(0.1),
        "sum": lambda: ta.Sum(),
        "trimmedmean": lambda: ta.TrimmedMean(1),
        "upgrad": lambda: ta.UPGrad(),
        "uw": lambda: ts.UW(objectives),
    }[name]()


NAMES = (
    *("alignedmtl", "cagrad", "config", "crmogm", "dualproj", "dwa", "excessmtl", "fairgrad", "famo", "geometricmean"),
    *("graddrop", "gradvac", "imtlg", "imtll", "krum", "mean", "mgda", "nashmtl", "pcd", "pcgrad", "randomweights"),
    *("stch", "sum", "trimmedmean", "upgrad", "uw"),
)
SOLVERS = {
    "cagrad": ("cvxpy", "clarabel"),
    "dualproj": ("qpsolvers", "quadprog"),
    "nashmtl": ("cvxpy", "ecos"),
    "upgrad": ("qpsolvers", "quadprog"),
}
SCALARIZERS = ["dwa", "famo", "geometricmean", "imtll", "stch", "uw"]
POSITIVE = ["dwa", "famo", "geometricmean", "imtll", "uw"]
FEWEST = {"krum": 3, "trimmedmean": 3, "nashmtl": 2}
RESCALED = ["cagrad", "dualproj", "gradvac", "upgrad"]
REMEMBERING = ["crmogm", "dwa", "excessmtl", "famo", "gradvac", "imtll", "nashmtl", "pcd", "uw"]
"""What the methods are like, by their papers."""


def marked(name: str) -> Any:
    """Return `name` as a test's parameter, skipped where its solver is not installed."""
    missing = [package for package in SOLVERS.get(name, ()) if find_spec(package) is None]
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=f"{name} needs {missing}: [solvers]"))
