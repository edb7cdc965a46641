"""The weights in the wheel against tuned baselines: the suite `paper`, its problems for 1,000 steps, the suite `shift`.

    .venv/bin/python benchmarks/shipped.py --data-root ../shared/data --out runs/shipped

Hours on 2 cores; finished cells are kept (ML2O_CACHE), so that the same command goes on where it was stopped. The long
part has half the seeds, the four baselines that stood best after the suite's steps, and of their learning rates four:
the one most often best there, one above it and two below; the untrained network is left out. Each part's folder in
`--out` holds what `ml2o evaluate --run-dir` writes. Extra `solvers` needed.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml

from ml2o_dist.artifact_sources import load_artifact
from ml2o_dist.evaluation.suites import load_suite

Answer = dict[str, Any]
PARTS = ("paper", "long", "shift")
LONG = 1000
STRONGEST = 4
UNTUNED = "mean+adam@0.001"
"""Adam with torch's own learning rate, what the suite `shift` is about."""


@click.command()
@click.option("--weights", default="pretrained", show_default=True, help="As `ml2o evaluate --optimizer` takes them.")
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Joined by commas.")
@click.option("--data-root", default="")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/shipped"), show_default=True)
def main(weights: str, parts: str, data_root: str, out: Path) -> None:
    """Run what is left of each part, and print its tables."""
    optimizers = [weights, f"gml2o:{weights}", "initial"]
    rule = load_artifact(weights).rule.model_dump(exclude={"guard"})
    settings = [f"data.root={data_root}", *(f"rule.{key}={value}" for key, value in rule.items())]  # of `initial`
    for part in parts.split(","):
        if part not in PARTS:
            raise click.BadParameter(f"{part!r} is not one of {', '.join(PARTS)}", param_hint="--parts")
        source = ["--suite", part]
        if part == "long":
            short = evaluate(["--suite", "paper"], optimizers, settings, out / "paper")
            source = ["--config", str(long_evaluation(short, out))]
        answer = evaluate(source, optimizers[:2] if part == "long" else optimizers, settings, out / part)
        click.echo(f"\n## {part}\n")
        for name in optimizers[:2]:
            show(answer["summary"], name, UNTUNED if part == "shift" else "")
        stand(answer["summary"])


def evaluate(source: list[str], optimizers: list[str], settings: list[str], folder: Path) -> Answer:
    """Return the answer of `ml2o evaluate`."""
    words = ["evaluate", *source, "--run-dir", str(folder.absolute()), "--json", "--quiet"]
    words += [word for name in optimizers for word in ("--optimizer", name)]
    words += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run([sys.executable, "-m", "ml2o_dist", *words], stdout=subprocess.PIPE)
    if done.returncode:  # it has said why
        sys.exit(done.returncode)
    answer: Answer = json.loads(done.stdout)
    return answer


def long_evaluation(short: Answer, out: Path) -> Path:
    """Write the settings of the long part, chosen by the short one's baselines alone; return the file."""
    suite = load_suite("paper")
    found = [each for each in short["summary"]["standings"] if each["role"] == "baseline"]
    found = sorted(found, key=lambda each: each["ratio"]["estimate"])[:STRONGEST]
    chosen = sorted((each["optimizer"] for each in found), key=suite.baselines.index)  # so that a swap changes nothing
    rates = Counter(row["learning_rate"] for row in short["summary"]["rows"] if row["optimizer"] in chosen)
    ((best, _),) = rates.most_common(1)
    place = suite.learning_rates.index(best)
    grid = list(suite.learning_rates[max(0, place - 2) : place + 2])
    tree = {
        "problems": list(suite.problems),
        "baselines": chosen,
        "reference": suite.reference if suite.reference in chosen else chosen[0],
        "seeds": suite.seeds // 2,
        "steps": LONG,
        "tuning_seeds": suite.tuning_seeds,
        "learning_rates": grid,
    }
    file = (out / "long.yaml").absolute()
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def show(summary: Answer, name: str, other: str = "") -> None:
    """Print a row for each problem: `name` against `other`, else the baseline with the lowest mean loss there."""
    against = other or "best tuned baseline"
    click.echo(f"| problem | {against} | its loss | {name} | ratio | difference | lower | accuracy | ms |")
    click.echo("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    lower = apart = problems = 0
    gains = []
    for problem in dict.fromkeys(row["problem"] for row in summary["rows"]):
        rows = {row["optimizer"]: row for row in summary["rows"] if row["problem"] == problem}
        ours = rows[name]
        baselines = [rows[other]] if other else [row for row in rows.values() if row["role"] == "baseline"]
        best = min(baselines, key=lambda row: number(row["loss"]))
        pairs = [(number(a), number(b)) for a, b in zip(ours["seed_losses"], best["seed_losses"], strict=True)]
        differences = np.array([a - b for a, b in pairs])
        with np.errstate(invalid="ignore"):  # of a run that diverged
            mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(len(pairs))
        problems, lower, apart = problems + 1, lower + (mean < 0), apart + (mean + 2 * error < 0)
        gain = accuracy_gain(ours, best)
        gains += [] if gain is None else [gain]
        click.echo(
            f"| `{problem}` | {best['label']} | {number(best['loss']):.3f} | {number(ours['loss']):.3f} | "
            f"{number(ours['loss']) / number(best['loss']):.3f} | {mean:+.3f} ± {error:.3f} | "
            f"{sum(a < b for a, b in pairs)} of {len(pairs)} | {'-' if gain is None else f'{gain:+.1f}'} | "
            f"{number(ours['ms_per_step']) / number(best['ms_per_step']):.1f} x |"
        )
    click.echo(
        f"\n{name}: lower on {lower} of {problems}, by more than 2 standard errors on {apart}; accuracy "
        f"{np.mean(gains) if gains else math.nan:+.2f} points\n"
    )


def accuracy_gain(ours: Answer, best: Answer) -> float | None:
    """Return by how many points the mean test accuracy is higher; None where there is none."""
    if not ours["test_accuracy"] or not best["test_accuracy"]:
        return None
    return 100 * float(np.mean(ours["test_accuracy"]) - np.mean(best["test_accuracy"]))


def stand(summary: Answer) -> None:
    """Print the standing of every optimizer, best first."""
    click.echo(
        "| optimizer | to the reference | to the best | speedup | at equal time | at equal evaluations | diverged |"
    )
    click.echo("|---|---:|---:|---:|---:|---:|---:|")
    for each in sorted(summary["standings"], key=lambda each: number(each["ratio"]["estimate"])):
        ratio, best = each["ratio"], each["to_best"]
        click.echo(
            f"| {each['optimizer']} | {number(ratio['estimate']):.3f} [{number(ratio['low']):.3f}, "
            f"{number(ratio['high']):.3f}] | {number(best['estimate']):.3f} | {number(each['speedup']):.2f} | "
            f"{number(each['ratio_at_time']):.3f} | {number(each['ratio_at_evaluations']):.3f} | "
            f"{number(each['diverged']['estimate']):.0%} |"
        )


def number(value: float | None) -> float:
    """Return a figure of an answer, whose null stands for what is not finite."""
    return math.inf if value is None else float(value)


if __name__ == "__main__":
    main()
