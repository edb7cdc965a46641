"""GML2O: a learned rule guarded by a convergent one, which takes over wherever the learned step would be worse.

The seed paper (Yang, Tang, Yang 2023) guards ML2O by a step that is known to converge. The test below, its margin and
the claims about them are ours.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ml2o_dist.config import GuardSettings
from ml2o_dist.problems.base import Batch
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.base import Oracle, State, StepInfo, UpdateRule, look
from ml2o_dist.rules.descent import Descent
from ml2o_dist.runtime.errors import UserError


@dataclass(frozen=True)
class Debt:
    """How far the steps since the debt was last 0 left each objective above the fallback's candidates.

    There are k entries: one for each objective, or with `criterion: sum` one for their sum.

    Attributes:
        owed: [P, k] float64, at least 0.
        variance: [P, k], variance of the estimate `owed`; 0 where losses are exact.
        limit: [P, k], the budget: `GuardSettings.budget` times the `Descent.depth` of the run so far.
    """

    owed: Tensor
    variance: Tensor
    limit: Tensor

    def after(self, worse: Tensor, variance: Tensor) -> Debt:
        """Return the debt after a step that was worse by `worse` [P, k]; better steps repay, but leave no credit."""
        owed = self.owed + worse
        free = owed <= 0
        return replace(self, owed=owed.where(~free, 0), variance=(self.variance + variance).where(~free, 0))

    def where(self, taken: Tensor, other: Debt) -> Debt:
        """Return this debt for the instances in the mask `taken` [P], and `other` for the rest."""
        pairs = (self.owed, other.owed), (self.variance, other.variance), (self.limit, other.limit)
        return Debt(*(ours.where(taken[:, None], theirs) for ours, theirs in pairs))

    def within(self, margin: float) -> Tensor:
        """Return [P]: whether every entry of the debt plus `margin` standard errors is within the budget."""
        return (self.owed + margin * self.variance.sqrt() <= self.limit).all(dim=1)


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison of the two candidates, for each instance.

    Attributes:
        passed: [P], whether the learned candidate passed.
        learned_losses, fallback_losses: [P, m], the losses of both candidates that were compared.
        debt: the debt if the learned candidate is taken.
    """

    passed: Tensor
    learned_losses: Tensor
    fallback_losses: Tensor
    debt: Debt


@dataclass(frozen=True)
class GML2OState:
    """The state after `step` steps: both rules' states, the debt, and how far the objectives have fallen.

    `debt` and `descent` are None before the first step. `descent` is also None in states of older versions.
    """

    step: int
    learned: State
    fallback: State
    debt: Debt | None = None
    descent: Descent | None = None


@dataclass(frozen=True)
class GuardedInfo(StepInfo):
    """What a guarded step saw and decided.

    Attributes:
        accepted: [P], which instances took the learned candidate.
        checked: whether the candidates were compared (`GuardSettings.every`). If not, the losses below are nan.
        learned_losses, fallback_losses: [P, m], the losses of both candidates that were compared.
        forwards, backwards: evaluations that the step used for each instance, including the Jacobian.
        guard_seconds: wall time of the fallback's candidate and of the comparison.
    """

    accepted: Tensor
    checked: bool
    learned_losses: Tensor
    fallback_losses: Tensor
    forwards: int
    backwards: int
    guard_seconds: float


class GuardedRule(UpdateRule):
    """z_{t+1} = x_L, the learned candidate, where it passes the guard; else x_D, the fallback's candidate.

    Both candidates start at z_t and share the Jacobian of the first batch. Every checked step advances the fallback's
    state, whichever candidate is taken. Each instance is decided separately.

    **Exact losses** (noise-free problems): x_L is accepted iff f_i(x_L) <= f_i(x_D) + eps_t for EVERY objective, with
    eps_t = eps_0 (t + 1)^(-2p). Thus no objective is worse by more than eps_t than after the fallback's step from the
    same point. With DSSMG as fallback, its bound (`ml2o_dist.rules.stochastic`) holds for the guarded run with
    sum_t eps_t < inf added, and nothing is assumed about the learned rule: the proof bounds lambda^T F at x_D for a
    fixed lambda of the simplex, and lambda^T F(z_{t+1}) <= lambda^T F(x_D) + eps_t. The bound does not say that the
    guarded run ends at a better point than a run of the fallback alone: once the two runs are at different points they
    may reach different parts of the front.

    **Mini-batches**: a rule that drifts slowly can pass a single noisy comparison. Therefore x_L is accepted iff
    mean_s d_is + margin * sd_s(d_is) / sqrt(B) <= eps_t for every objective. d_is = f_is(x_L) - f_is(x_D) are the
    paired differences over the B samples of guard batches that neither candidate depends on. The bound then gets an
    extra term per step: with the probability of a normal tail beyond `margin` a step may still be worse, by the order
    of |x_L - x_D| sigma / sqrt(B), where sigma is the deviation of the gradients of single samples. The sum of these
    terms does not vanish unless B grows or the candidates meet.

    **A budget** (`budget` > 0, ours, and the default): the learned step is better in the long run precisely where it
    is worse than the fallback's greedy step from the same point, and there the tests above reject it. The bound needs
    less: for a fixed lambda, lambda^T F(z_{t+1}) = lambda^T F(x_D) + lambda^T d_t with d_t = F(z_{t+1}) - F(x_D), and
    the telescoped sum needs only sum_t lambda^T d_t <= max_i sum_t d_ti. Therefore x_L is also accepted if, for every
    objective, the sum of the differences since that sum was last 0 or less is at most C_t = budget D_t. A better step
    repays debt but leaves no credit that a hostile rule could use later. D_t is the decrease so far of the objective
    that fell furthest (`Descent`, from averages over several batches). A constant added to a loss does not change D_t,
    a loss that begins at 0 gets the same budget as the others, and a rule that only climbs gets none. As D_t <= max_i
    f_i(z_0) - inf f_i, DSSMG's bound holds with `budget` times that added to its initial value, so the limit is still
    Pareto critical. On mini-batches the sum is an estimate, and the sum plus `margin` standard errors, which grow only
    with the root of the sum, must stay within C_t. Half of the guard's samples decide, and the other half are added to
    the sum. The decision does not depend on that other half, so the estimate's error is a martingale. With a budget no
    single step is guaranteed to be no worse; `budget: 0` guarantees it.

    **Without any theorem**: `every` > 1 (steps between are taken unchecked), `criterion: sum` (one objective may pay
    for another), any other fallback (`mgda+sgd@0.01`).

    A learned candidate with a non-finite parameter or loss is never accepted. A non-finite loss of the fallback counts
    as infinitely bad. After a rejected step the learned rule keeps its memory of the gradients, and `overruled` passes
    it the update that was taken instead (`UpdateRule.overruled`).

    Cost with DSSMG, besides the shared Jacobian: one gradient, and two forwards for each guard batch.
    """

    def __init__(self, learned: UpdateRule, fallback: UpdateRule, settings: GuardSettings | None = None) -> None:
        self.learned = learned
        self.fallback = fallback
        self.settings = settings or GuardSettings()

    def initial_state(self, instances: int, objectives: int, layout: ParameterLayout) -> GML2OState:
        """Return the states of both rules before their first step."""
        shape = (instances, objectives, layout)
        return GML2OState(0, self.learned.initial_state(*shape), self.fallback.initial_state(*shape))

    def step(self, oracle: Oracle, parameters: Tensor, state: GML2OState) -> tuple[Tensor, GML2OState, GuardedInfo]:
        """Take one guarded step from `parameters` [P, n]."""
        return self.choose(oracle, parameters, state, look(oracle, parameters))

    def propose(
        self, oracle: Oracle, parameters: Tensor, state: GML2OState, seen: StepInfo
    ) -> tuple[Tensor, GML2OState]:
        """Return the candidate that passes and the state after it."""
        point, state, _ = self.choose(oracle, parameters, state, seen)
        return point, state

    def overruled(self, state: GML2OState, seen: StepInfo, update: Tensor, where: Tensor) -> GML2OState:
        """Call `overruled` of both rules."""
        learned = self.learned.overruled(state.learned, seen, update, where)
        return replace(state, learned=learned, fallback=self.fallback.overruled(state.fallback, seen, update, where))

    def grown(self, state: GML2OState, more: ParameterLayout) -> GML2OState:
        """Call `grown` of both rules."""
        learned, fallback = self.learned.grown(state.learned, more), self.fallback.grown(state.fallback, more)
        return replace(state, learned=learned, fallback=fallback)

    def choose(
        self, oracle: Oracle, parameters: Tensor, state: GML2OState, seen: StepInfo
    ) -> tuple[Tensor, GML2OState, GuardedInfo]:
        """Return what `step` returns, given what was `seen` at `parameters` [P, n]."""
        forwards, backwards = oracle.forwards - 1, oracle.backwards - oracle.problem.objectives  # before the Jacobian
        candidate, learned = self.learned.propose(oracle, parameters, state.learned, seen)
        accepted = candidate.isfinite().all(dim=1)
        began = _now(candidate)
        point, fallback, checked = candidate, state.fallback, state.step % self.settings.every == 0
        descent = self._descent(state, seen)
        debt = state.debt
        losses = theirs = torch.full_like(seen.losses, math.nan)
        if checked or not bool(accepted.all()):
            safe, fallback = self.fallback.propose(oracle, parameters, state.fallback, seen)
            if checked:
                before = self._debt(state, descent)
                verdict = self._compare(oracle, candidate, safe, state.step, before)
                accepted = accepted & verdict.passed
                debt = verdict.debt.where(accepted, before)
                losses, theirs = verdict.learned_losses, verdict.fallback_losses
            point = torch.where(accepted[:, None], candidate, safe)
            learned = self.learned.overruled(learned, seen, point - parameters, ~accepted)
        info = GuardedInfo(
            seen.losses,
            seen.jacobian,
            seen.batch,
            accepted,
            checked,
            losses,
            theirs,
            oracle.forwards - forwards,
            oracle.backwards - backwards,
            _now(candidate) - began,
        )
        return point, GML2OState(state.step + 1, learned, fallback, debt, descent), info

    def _descent(self, state: GML2OState, seen: StepInfo) -> Descent:
        """Return how far the objectives have fallen, including the losses of this step."""
        losses = seen.losses.sum(dim=1, keepdim=True) if self.settings.criterion == "sum" else seen.losses
        descent = state.descent
        if descent is None:
            known = state.debt.limit.amax(dim=1) / self.settings.budget if state.debt and self.settings.budget else None
            descent = Descent.begin(losses, known)
        return descent.after(losses)

    def _debt(self, state: GML2OState, descent: Descent) -> Debt:
        """Return the debt before a step (0 before the first one) with the current budget as its limit."""
        zero = torch.zeros_like(descent.first)
        debt = state.debt or Debt(zero, zero, zero)
        return replace(debt, limit=(self.settings.budget * descent.depth)[:, None].expand_as(zero))

    def _compare(self, oracle: Oracle, candidate: Tensor, safe: Tensor, step: int, debt: Debt) -> Verdict:
        """Compare the candidates on guard batches, or exactly where the problem has no noise."""
        settings = self.settings
        ours, theirs, exact = _paired_losses(
            oracle, candidate, safe, math.ceil(settings.batches * (step + 1) ** settings.growth)
        )
        means = ours.mean(dim=1), theirs.mean(dim=1)
        if settings.criterion == "sum":
            ours, theirs = ours.sum(dim=2, keepdim=True), theirs.sum(dim=2, keepdim=True)
        worse = ours - theirs.where(theirs.isfinite(), math.inf)
        allowed = settings.eps * (step + 1) ** (-2 * settings.p)
        # One half of the samples decides, the other is added to the debt: given acceptance the deciding half is biased.
        halves = settings.budget > 0 and not exact
        decides, pays = (worse[:, 0::2], worse[:, 1::2]) if halves else (worse, worse)
        if not exact and worse.shape[1] < settings.fewest_samples:
            raise UserError(
                f"the guard needs {settings.fewest_samples} samples or more: raise the problem's batch or "
                "rule.guard.batches"
            )
        mean, variance = _mean_and_variance(decides)
        passed = (mean + settings.margin * variance.sqrt() <= allowed).all(dim=1)
        if settings.budget:
            passed = passed | debt.after(mean, variance).within(settings.margin)
        finite = ours.isfinite().all(dim=2).all(dim=1)
        return Verdict(finite & passed, *means, debt.after(*_mean_and_variance(pays)))


def guarded(learned: UpdateRule, settings: GuardSettings | None) -> UpdateRule:
    """Return `learned` under the guard that the settings describe, or unchanged if `settings` is None.

    Raises:
        UserError: an unknown fallback, or a hand-designed one without its learning rate.
    """
    if settings is None:
        return learned
    return GuardedRule(learned, fallback_rule(settings), settings)


def fallback_rule(settings: GuardSettings) -> UpdateRule:
    """Build the fallback that the settings name; raises UserError as `guarded`."""
    # Imported late: workers without a guard need neither scipy nor torchjd, whose imports take a second.
    from ml2o_dist.rules.aggregated import AggregatedRule, parse_optimizer_name, takes_learning_rate
    from ml2o_dist.rules.stochastic import DSSMG, SMG

    if settings.fallback == "dssmg":
        return DSSMG(settings.p)
    if settings.fallback == "smg":
        return SMG(settings.p)
    aggregator, optimizer, lr = parse_optimizer_name(settings.fallback)
    if lr is None and takes_learning_rate(optimizer):
        raise UserError(f"rule.guard.fallback={settings.fallback!r} needs its learning rate: {settings.fallback}@0.01")
    return AggregatedRule(aggregator, optimizer, lr)


def _paired_losses(oracle: Oracle, candidate: Tensor, safe: Tensor, batches: int) -> tuple[Tensor, Tensor, bool]:
    """Return both candidates' losses on the same samples, [P, B, m] each in float64, and whether they are exact."""
    ours, theirs = [], []
    for _ in range(batches):
        batch: Batch = oracle.draw()
        ours.append(oracle.sample_losses(candidate, batch).double())
        theirs.append(oracle.sample_losses(safe, batch).double())
        if oracle.problem.exact(batch):
            return ours[0], theirs[0], True
    return torch.cat(ours, dim=1), torch.cat(theirs, dim=1), False


def _mean_and_variance(samples: Tensor) -> tuple[Tensor, Tensor]:
    """[P, B, k] -> the mean over the samples [P, k] and its variance, 0 for one exact value or where none is finite."""
    if samples.shape[1] == 1:
        return samples[:, 0], torch.zeros_like(samples[:, 0])
    variance = samples.var(dim=1) / samples.shape[1]
    return samples.mean(dim=1), variance.where(variance.isfinite(), 0)


def _now(like: Tensor) -> float:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
