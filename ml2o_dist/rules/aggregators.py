"""The hand-designed ways from m gradients to one direction: every torchjd method by name, with its settings.

A name is torchjd's class name in lower case; settings are torchjd's defaults unless the table says otherwise. There
are two kinds. An Aggregator looks at the Jacobian J [m, n]; a Scalarizer s looks at the losses f [m] alone, and its
direction is the gradient of s(f(z)), J^T ds/df.

Left out, with the reason:
    Constant, COSMOS, PBI: they want a preference, which a name does not carry (`mean` has equal weights).
    MoDoWeighting, SDMGradWeighting: they want Jacobians on two or three independent batches, so they are other rules.
    Mean, Sum and Random as scalarizers: they repeat the aggregators.
    Tchebycheff: torchjd has the smooth form only, `stch`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchjd import Stateful, aggregation, scalarization

from ml2o_dist.rules.names import AGGREGATORS
from ml2o_dist.runtime.errors import UserError, unknown

DWA_EPOCH = 20
"""Steps over which `dwa` averages losses (ours). Batches are drawn with replacement, so there are no natural epochs; 20
steps damp the batches' noise and leave eight updates of the weights in the 200 steps of a comparison."""


@dataclass(frozen=True)
class Method:
    """How torchjd is called for one name.

    Attributes:
        about: one line that describes the method, with its source.
        build: number of objectives -> a fresh Aggregator or Scalarizer.
        objectives: the fewest objectives that it works with.
        positive: it is defined only for losses that are positive by construction.
        learned: its own parameters are trained by the optimizer that trains the network.
        rescaled: by definition a multiple of J gives that multiple of the direction, but torchjd compares |J|^2 with
            absolute thresholds (1e-4, 1e-8). It is therefore called with J / 2^k, largest entry in [1/2, 1), and its
            result is multiplied by 2^k. This is exact, and the thresholds become relative (ours).
        looks_back: it learns from the losses of the step's batch after the step, which costs one more forward.
    """

    about: str
    build: Callable[[int], nn.Module]
    objectives: int = 1
    positive: bool = False
    learned: bool = False
    rescaled: bool = False
    looks_back: bool = False


def _crmogm(objectives: int) -> nn.Module:
    averaged = aggregation.CRMOGMWeighting(aggregation.MGDAWeighting(), alpha=0.9)
    module: nn.Module = aggregation.GramianWeightedAggregator(averaged)
    return module


_BUILT_IN: dict[str, Method] = {
    "alignedmtl": Method(
        "Senushkin et al. 2023, Algorithm 1: smallest singular value as the common one",
        lambda m: aggregation.AlignedMTL(),
    ),
    "cagrad": Method(
        "Liu et al. 2021; c = 0.5 is LibMTL's. Solver: Clarabel",
        lambda m: aggregation.CAGrad(c=0.5),
        rescaled=True,
    ),
    "config": Method(
        "Liu et al. 2024, equation 2",
        lambda m: aggregation.ConFIG(),
    ),
    "crmogm": Method(
        "Zhou et al. 2022: weights of mgda, averaged with alpha = 0.9 (their schedule needs a decaying step)",
        _crmogm,
    ),
    "dualproj": Method(
        "Lopez-Paz & Ranzato 2017; solver: quadprog",
        lambda m: aggregation.DualProj(),
        rescaled=True,
    ),
    "dwa": Method(
        "Liu, Johns & Davison 2019, their T",
        lambda m: scalarization.DWA(temperature=2.0),
        positive=True,
    ),
    "excessmtl": Method(
        "He et al. 2024; baseline = the first step's excess, no warm-up epochs",
        lambda m: aggregation.ExcessMTL(),
    ),
    "fairgrad": Method(
        "Ban & Ji 2024; alpha = 2 as in the authors' QM9 run. Solver: scipy. It is weak where |J| is far from 1",
        lambda m: aggregation.FairGrad(alpha=2.0),
    ),
    "famo": Method(
        "Liu et al. 2023, Algorithm 2: the weights' Adam has lr 0.025, decay 1e-3. One more forward a step, charged",
        lambda m: scalarization.FAMO(m),
        positive=True,
        looks_back=True,
    ),
    "geometricmean": Method(
        "Chennupati et al. 2019",
        lambda m: scalarization.GeometricMean(),
        positive=True,
    ),
    "graddrop": Method(
        "Chen et al. 2020, no leak",
        lambda m: aggregation.GradDrop(),
    ),
    "gradvac": Method(
        "Wang et al. 2021, whole model; torchjd's and LibMTL's beta = 0.5",
        lambda m: aggregation.GradVac(),
        rescaled=True,
    ),
    "imtlg": Method(
        "Liu et al. 2021, 'Towards impartial ...'",
        lambda m: aggregation.IMTLG(),
    ),
    "imtll": Method(
        "Liu et al. 2021, 'Towards impartial ...': its balance of the losses",
        lambda m: scalarization.IMTLL(m),
        positive=True,
        learned=True,
    ),
    "krum": Method(
        "Blanchard et al. 2017, no Byzantine row: the gradient that is nearest to its neighbours",
        lambda m: aggregation.Krum(n_byzantine=0),
        objectives=3,
    ),
    "mgda": Method(
        "Sener & Koltun 2018, Algorithm 2: Frank-Wolfe, 100 iterations, tolerance 1e-3; not exactly min-norm",
        lambda m: aggregation.MGDA(),
    ),
    "mean": Method(
        "the mean of the gradients",
        lambda m: aggregation.Mean(),
    ),
    "nashmtl": Method(
        "Navon et al. 2022: norm at most 1, weights anew at every step, 20 iterations. Solver: ECOS, 40 ms a step",
        lambda m: aggregation.NashMTL(n_tasks=m),
        objectives=2,
    ),
    "pcd": Method(
        "Priority-Constrained Descent, arXiv 2606.29521, tau = 0.02: the first objective is the primary one",
        lambda m: aggregation.PCD(),
    ),
    "pcgrad": Method(
        "Yu et al. 2020",
        lambda m: aggregation.PCGrad(),
    ),
    "randomweights": Method(
        "Lin et al. 2022: softmax of a Gaussian. Not `random`, which names a random direction",
        lambda m: aggregation.Random(),
    ),
    "stch": Method(
        "Lin et al. 2024, equal weights, ideal point 0; mu = 0.1, the middle of the 0.01 .. 1 that the paper looks at",
        lambda m: scalarization.STCH(mu=0.1),
    ),
    "sum": Method(
        "the sum of the gradients",
        lambda m: aggregation.Sum(),
    ),
    "trimmedmean": Method(
        "Yin et al. 2018: without the largest and the smallest entry of each coordinate; the median for m = 3",
        lambda m: aggregation.TrimmedMean(trim_number=1),
        objectives=3,
    ),
    "upgrad": Method(
        "Quinton & Rey 2024; solver: quadprog",
        lambda m: aggregation.UPGrad(),
        rescaled=True,
    ),
    "uw": Method(
        "Kendall, Gal & Cipolla 2018",
        lambda m: scalarization.UW(m),
        positive=True,
        learned=True,
    ),
}

for _name, _method in _BUILT_IN.items():
    AGGREGATORS.register(_name, Method)(_method)

Direction = Callable[[Tensor], Tensor]
"""J [m, n] -> the direction to descend along, [n]."""


def register_aggregator(name: str, *, objectives: int = 1) -> Callable[[Direction], Direction]:
    """Register a function from the Jacobian [m, n] to a direction [n] (a decorator).

    Its torch random numbers are seeded by the step number. `objectives`: the fewest objectives that it works with.
    """

    def register(direction: Direction) -> Direction:
        about = " ".join((direction.__doc__ or name).split())
        method = Method(about, lambda m: _Function(direction), objectives=objectives)
        AGGREGATORS.register(name, direction)(method)
        return direction

    return register


class _Function(nn.Module):
    """Wraps a function as a torchjd object without memory."""

    def __init__(self, direction: Direction) -> None:
        super().__init__()
        self._direction = direction

    def forward(self, jacobian: Tensor) -> Tensor:
        return self._direction(jacobian)


def check_aggregator(name: str) -> Method:
    """Return the method `name`; raise UserError if it is unknown or torchjd lacks the solver that it needs."""
    if name not in AGGREGATORS:
        raise unknown("aggregator", name, AGGREGATORS, extensible=True)
    try:
        AGGREGATORS[name].build(2)
    except ImportError as error:
        raise UserError(f"aggregator {name!r}: {error} (all solvers: pip install 'ml2o-dist[solvers]')") from error
    method: Method = AGGREGATORS[name]
    return method


def build_aggregator(name: str, objectives: int) -> nn.Module:
    """Build torchjd's object for one instance; its buffers and parameters are the method's whole memory.

    Raises:
        UserError: as `check_aggregator`, or too few objectives.
    """
    method = check_aggregator(name)
    if objectives < method.objectives:
        raise UserError(f"aggregator {name!r} needs at least {method.objectives} objectives, not {objectives}")
    return method.build(objectives)


def learned_parameters(name: str, module: nn.Module) -> list[nn.Parameter]:
    """Return the method's own parameters that the network's optimizer trains; [] for most methods."""
    return list(module.parameters()) if AGGREGATORS[name].learned else []


def aggregate(name: str, module: nn.Module, jacobian: Tensor, losses: Tensor, seed: int) -> tuple[Tensor, nn.Module]:
    """Return one instance's direction for J [m, n] and f [m], and the module for the next step.

    The direction is [n], or [n + k] with the gradient of the method's k `learned` parameters at the end. Neither
    `module` nor the global random stream is changed; torchjd's random numbers are a function of `seed`.

    If J is not finite, or torchjd's solver fails on a finite J (ValueError, LinAlgError), the direction is NaN and
    `module` is returned unchanged. If the solver fails on J = 0 (`nashmtl`) the direction is 0.
    """
    own = learned_parameters(name, module)
    if not jacobian.isfinite().all():
        return jacobian.new_full((jacobian.shape[1] + sum(p.numel() for p in own),), math.nan), module
    following = copy.deepcopy(module) if _remembers(module) else module
    if isinstance(following, scalarization.Scalarizer):
        return _scalarized(name, following.to(jacobian), jacobian, losses), following
    unit = _power_of_two(jacobian) if AGGREGATORS[name].rescaled else 1.0
    try:
        return _seeded(following, jacobian / unit, seed) * unit, following
    except (ValueError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return torch.full_like(jacobian[0], math.nan if jacobian.any() else 0.0), module


def after_step(name: str, module: nn.Module, own_move: Tensor, losses: Tensor, epoch_ends: bool) -> None:
    """Update a `module` in place after a step with the finite direction that `aggregate` returned with it.

    `own_move` [k] is subtracted from its learned parameters. `losses` [m] are those of the same batch after the step,
    from which `famo` learns. `epoch_ends` closes an epoch of `dwa`.
    """
    own = learned_parameters(name, module)
    if own:
        with torch.no_grad():
            nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(own) - own_move, own)
    if isinstance(module, scalarization.FAMO):
        module.update(losses)
    if isinstance(module, scalarization.DWA) and epoch_ends:
        module.step()


def _scalarized(name: str, module: nn.Module, jacobian: Tensor, losses: Tensor) -> Tensor:
    """Return J^T ds/df [n], followed by the gradient of the learned parameters: [n + k]."""
    with torch.enable_grad():
        values = losses.detach().to(jacobian).requires_grad_(True)
        weights, *own = torch.autograd.grad(module(values), [values, *learned_parameters(name, module)])
    return torch.cat([weights @ jacobian, *own])


def _remembers(module: nn.Module) -> bool:
    return any(isinstance(part, Stateful) for part in module.modules())


def _power_of_two(matrix: Tensor) -> float:
    """Return the 2^k for which the largest entry of `matrix` / 2^k is in [1/2, 1); 1 for a matrix of zeros."""
    return math.ldexp(1.0, math.frexp(float(matrix.abs().max()))[1])


def _seeded(aggregator: nn.Module, matrix: Tensor, seed: int) -> Tensor:
    # torchjd draws from the global generator of the CPU or of the matrix's device. torch.manual_seed would reach the
    # streams of all other devices as well.
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        direction: Tensor = aggregator(matrix)
    return direction
