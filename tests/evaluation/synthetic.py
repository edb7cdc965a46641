"""Evaluations made up by hand: learned, untrained, guarded, diverged, failed; one to five objectives; a whole suite."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ml2o_dist.config import EvaluateSettings
from ml2o_dist.evaluation.evaluated import (
    Curve,
    EvaluatedCell,
    Evaluation,
    FailedCell,
    Front,
    Role,
    Row,
    Standing,
)
from ml2o_dist.evaluation.statistics import Interval

STEPS = 60
HOSTILE = "<script>alert('1')</script>&\"$x_{"


def curve(loss: float, *, seed: int = 0, steps: int = STEPS, start: float = 4.0, guarded: bool = False) -> Curve:
    """A noisy way from `start` to `loss`."""
    noise = random.Random(seed)
    points = min(steps, 200)
    decay = [math.exp(-(5 + 2 * seed % 7) * k / points) for k in range(points)]
    values = [loss + (start - loss) * d + 0.05 * abs(loss) * noise.uniform(-1, 1) for d in decay]
    return Curve(
        steps=tuple(round(steps * (k + 1) / points) for k in range(points)),
        loss=tuple(values),
        error=tuple(0.04 * abs(value) for value in values),
        acceptance=tuple(min(1.0, max(0.0, 0.9 * d + 0.1 * noise.random())) for d in decay) if guarded else None,
    )


def spread(name: str, loss: float, seeds: int) -> tuple[float, ...]:
    """Losses of the seeds whose mean is `loss`, other ones for every name."""
    noise = random.Random(name)
    steps = [noise.uniform(-0.03, 0.03) for _ in range(seeds)]
    return tuple(loss + step - sum(steps) / seeds for step in steps)


def row(
    name: str,
    problem: str,
    loss: float,
    *,
    role: Role = "baseline",
    lr: float | None = None,
    objectives: int = 2,
    seeds: int = 3,
    **changes: object,
) -> Row:
    """A row of a made-up run."""
    guarded = name.startswith("gml2o:")
    made = Row(
        optimizer=name,
        label=name if lr is None else f"{name}@{lr:g}",
        role=role,
        problem=problem,
        steps=STEPS,
        seeds=seeds,
        failed=0,
        diverged=0,
        loss=loss,
        loss_standard_error=0.0123 if seeds > 1 else math.nan,
        seed_losses=spread(name, loss, seeds),
        loss_at_evaluations=1.1 * loss,
        loss_at_time=1.2 * loss,
        losses=(loss / objectives,) * objectives,
        test_accuracy=None,
        criticality=0.25,
        criticality_standard_error=0.0625,
        criticality_relative=0.5,
        acceptance=0.625 if guarded else None,
        evaluations=STEPS * (1.0 + objectives),
        ms_per_step=1.5,
        guard_share=0.375 if guarded else None,
        conflicting=0.5,
        mean_cosine=-0.1,
        front=None,
        learning_rate=lr,
        tuning={} if lr is None else {lr: loss},
        note="",
        curve=curve(loss, seed=len(name), guarded=guarded),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def diverged(row: Row, seeds: int = 2) -> Row:
    """The same, but the first `seeds` diverged."""
    lost = (*(math.inf,) * seeds, *row.seed_losses[seeds:])
    steps = len(row.curve.steps)
    gone = Curve(row.curve.steps, (4.0, 1e30) + (math.nan,) * (steps - 2), (math.nan,) * steps)
    return replace(
        row, diverged=seeds, seed_losses=lost, loss=math.inf, loss_standard_error=math.nan, curve=gone,
        losses=(math.nan,) * len(row.losses), criticality=math.nan, criticality_standard_error=math.nan,
    )  # fmt: skip


def failed(row: Row) -> Row:
    """The same, but no cell of it could be run."""
    nan = math.nan
    return replace(
        row, seeds=0, failed=len(row.seed_losses), loss=nan, loss_standard_error=nan, losses=(), curve=Curve(),
        seed_losses=(nan,) * len(row.seed_losses), loss_at_evaluations=nan, loss_at_time=nan, criticality=nan,
        evaluations=nan, ms_per_step=nan, test_accuracy=None,
    )  # fmt: skip


def cells(row: Row) -> list[EvaluatedCell]:
    """The cells behind a row: end points scattered round its losses, along a front where there are two objectives."""
    found = []
    objectives = max(len(row.losses), 1)
    for seed, loss in enumerate(row.seed_losses):
        if math.isnan(loss):
            continue
        noise = random.Random(f"{row.optimizer} {seed}")
        tilt = noise.uniform(0.1, 0.9)
        shares = (tilt, 1 - tilt) if objectives == 2 else (1 / objectives,) * objectives
        ends = tuple(loss * share * noise.uniform(0.9, 1.1) for share in shares)
        found.append(
            EvaluatedCell(
                optimizer=row.optimizer,
                problem=row.problem,
                seed=seed,
                steps=row.steps,
                losses=tuple(loss * share for share in shares),
                test_accuracy=row.test_accuracy,
                criticality=row.criticality,
                acceptance=row.acceptance,
                evaluations=int(row.evaluations),
                ms_per_step=row.ms_per_step,
                diverged=math.isinf(loss),
                learning_rate=row.learning_rate,
                test_loss=None,
                end_losses=ends,
                criticality_relative=0.5,
                criticality_gap=1e-9,
                guard_share=row.guard_share,
                forwards=row.steps,
                backwards=row.steps * objectives,
                conflicting=0.5,
                mean_cosine=-0.1,
            )
        )
    return found


def standing(name: str, role: Role, ratio: float, problems: int, **changes: object) -> Standing:
    made = Standing(
        optimizer=name,
        role=role,
        problems=problems,
        ratio=Interval(ratio, 0.9 * ratio, 1.1 * ratio),
        to_best=Interval(1.2 * ratio, 1.1 * ratio, 1.3 * ratio),
        ratio_at_evaluations=1.05 * ratio,
        ratio_at_time=1.15 * ratio,
        improvement=Interval(0.83, 0.7, 0.92),
        mean_rank=1 + ratio,
        delta_m=100 * (ratio - 1),
        delta_m_accuracy=-1.25,
        speedup=1 / ratio,
        log_area=math.log(ratio),
        diverged=Interval(0.05, 0.01, 0.2),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def mean_ratio(rows: Sequence[Row], name: str, reference: str) -> float:
    """Geometric mean of the losses over the reference's, on the problems of both; a diverged one counts as 100."""
    losses = {(each.optimizer, each.problem): each.loss for each in rows}
    pairs = [(loss, losses[reference, problem]) for (optimizer, problem), loss in losses.items() if optimizer == name]
    logs = [math.log(a / b) if math.isfinite(a) else math.log(100) for a, b in pairs if not math.isnan(a)]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def evaluation(
    rows: Sequence[Row],
    *,
    reference: str = "mean+adam",
    fronts: Mapping[str, tuple[tuple[float, ...], ...]] | None = None,
    failures: Sequence[FailedCell] = (),
    **settings: object,
) -> Evaluation:
    """Rows with the cells behind them, and standings where the reference is among them."""
    roles = {each.optimizer: each.role for each in rows}
    problems = list(dict.fromkeys(each.problem for each in rows))
    seeds = max((len(each.seed_losses) for each in rows), default=3)
    known = {"steps": STEPS, "seeds": seeds, "reference": reference, "learning_rates": (0.001, 0.01, 0.1)}
    standings = ()
    if reference in roles:
        standings = tuple(
            standing(name, role, mean_ratio(rows, name, reference), len(problems)) for name, role in roles.items()
        )
    return Evaluation(
        settings=EvaluateSettings(**(known | settings)),
        suite=str(settings.get("suite", "")),
        suite_sha256="5c" * 32,
        data_sha256={"digits": "cd" * 32},
        cells=tuple(cell for each in rows for cell in cells(each)),
        rows=tuple(rows),
        standings=standings,
        failed=tuple(failures),
        fronts=fronts or {},
        seconds=158.0,
        git="0c0ffee0c0ff",
    )


FRONT = tuple((t / 40, (1 - (t / 40) ** 0.5) ** 2 / 2) for t in range(41))
DIGITS, MANY, CURVED = "multidigits[hidden=40,net=mlp]", "quadratic[m=5]@120", "fonseca"
EDGE = row("mgda+adam", DIGITS, 0.75, lr=0.1, note="best learning rate 0.1 is at the edge of the grid",
           test_accuracy=(0.912, 0.9))  # fmt: skip
LOST = diverged(row("mean+sgd", DIGITS, 9.0, lr=1e6))
DIGITS_ROWS = (
    row("mean+adam", DIGITS, 0.8, test_accuracy=(0.905, 0.89), lr=0.01),
    EDGE,
    row("initial", DIGITS, 1.0, role="other", test_accuracy=(0.8, 0.8)),
    LOST,
    row("learned", DIGITS, 0.5, role="learned", test_accuracy=(0.95, 0.94)),
    row("gml2o:learned", DIGITS, 0.55, role="learned", test_accuracy=(0.94, 0.94), ms_per_step=2.5),
)
MANY_ROWS = tuple(
    row(name, MANY, loss, role=role, objectives=5, steps=120, curve=curve(loss, steps=120, guarded="gml2o" in name))
    for name, loss, role in (
        ("mean+adam", 0.2, "baseline"), ("mgda+adam", 0.4, "baseline"), ("learned", 0.7, "learned"),
        ("gml2o:learned", 0.3, "learned"),
    )
)  # fmt: skip
CURVED_ROWS = tuple(
    row(name, CURVED, loss, role=role, front=Front(0.5, 0.6, 1, 0.04, -0.08))
    for name, loss, role in (
        ("mean+adam", 0.9, "baseline"),
        ("mgda+adam", 0.7, "baseline"),
        ("learned", 0.6, "learned"),
    )
)
EVALUATION = evaluation(DIGITS_ROWS + MANY_ROWS + CURVED_ROWS, fronts={CURVED: FRONT})
"""Better, worse, the edge of a grid, a diverged baseline, two and five objectives, a known front."""


def suite(problems: int = 12, optimizers: int = 8, seeds: int = 5) -> Evaluation:
    """A suite as large as those that ship: learned, guarded, baselines, an adversary that diverges on some."""
    names: list[tuple[str, Role]] = [
        ("mean+adam", "baseline"), ("mgda+adam", "baseline"), ("pcgrad+adam", "baseline"),
        ("models:/ml2o@candidate", "learned"), ("gml2o:models:/ml2o@candidate", "learned"),
        ("initial", "other"), ("gml2o:random", "other"), ("nan", "other"), ("dssmg", "other"),
        ("cagrad+momentum@0.03", "baseline"),
    ][:optimizers]  # fmt: skip
    tasks = [
        "multidigits[net=mlp,hidden=40]", "multidigits[net=mlp,hidden=24-24,activation=gelu]",
        "multidigits[net=cnn,channels=6-12]", "fonseca", "zdt1[n=10]@1000", "zdt3[n=10]@1000", "quadratic[m=3,n=20]",
        "quadratic[m=5,n=50]@2000", "dtlz2[m=3]", "multimnist[net=lenet5]@2000", "logistic[m=1]", "valleys[m=2]",
    ][:problems]  # fmt: skip
    rows = []
    for p, problem in enumerate(tasks):
        objectives = next((m for m in (1, 3, 5) if f"m={m}" in problem), 2)
        tiny = "quadratic" in problem
        steps = int(problem.partition("@")[2] or 200)
        for i, (name, role) in enumerate(names):
            loss = (0.3 + 0.1 * ((i * 7 + p * 3) % 9)) * (0.01 if tiny else 1) * (0.6 if role == "learned" else 1)
            guarded = name.startswith("gml2o:")
            shape = curve(loss, seed=i + p, steps=steps, start=2.0 if tiny else 4.0, guarded=guarded)
            made = row(
                name, problem, loss, role=role, objectives=objectives, seeds=seeds, steps=steps, curve=shape,
                lr=0.01 if role == "baseline" and "@" not in name else None,
                ms_per_step=0.4 * (1 + i % 4) * (1 + p % 3),
                evaluations=steps * (1.0 + objectives + guarded),
                test_accuracy=(0.9 - 0.01 * i,) * objectives if "multi" in problem else None,
                seed_losses=tuple(loss * (1 + 0.05 * ((i + s) % seeds)) for s in range(seeds)),
            )  # fmt: skip
            rows.append(diverged(made, 3) if name == "nan" and p % 2 else made)
    return evaluation(
        rows, suite="networks", seeds=seeds, steps=200, fronts={task: FRONT for task in tasks if task == "fonseca"}
    )
