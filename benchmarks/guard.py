"""Evidence that the guard holds: what it lets pass, what it costs, and what the same rules do without it.

    .venv/bin/python benchmarks/guard.py --data-root ../shared/data --out runs/guard

Parts (`--parts drift,time` selects):
  drift        a rule that drifts slowly against mini-batch guards, over guard batch and margin, on noisy quadratics
  sensitivity  fallback x eps x every x guard batch, a learned rule and a hostile one, on a small network
  curves       every adversary and the untrained network: unguarded, guarded, DSSMG alone; tables and pictures
  networks     MultiMNIST LeNet and CNN: guarded adversaries against DSSMG alone (needs the image data)
  time         CPU time of a guarded step against the unguarded one, LeNet (needs the image data)

Each run's result is written to --out as it ends, and a second call with the same words computes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from guard_parts import PARTS, Scale
from guard_runs import Results, Unit, compute

from ml2o_dist.runtime.files import replacing
from ml2o_dist.tracking.identity import RunIdentity, load_identity, save_identity
from ml2o_dist.tracking.records import End, Params, Point, Upload
from ml2o_dist.tracking.store import redacted, resolve_tracking_uri
from ml2o_dist.tracking.store_run import MlflowRun

EXPERIMENT = "ml2o/evaluate"


def finished(out: Path, unit: Unit, data_root: str) -> dict[str, Any]:
    """Return the result of `unit`: read from `out` where it is there, else computed and written."""
    key = asdict(unit)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = out / unit.part / f"{name}.json"
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_text())
        return kept["result"]
    began = time.time()
    result = compute(unit, data_root)
    with replacing(file) as stream:
        stream.write(json.dumps({"unit": key, "seconds": time.time() - began, "result": result}).encode())
    return result


def finite(value: Any) -> Any:
    """Return `value` with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def log_to_mlflow(uri: str, out: Path, settings: Mapping[str, str], summary: Mapping[str, float]) -> str:
    """Log a call's figures and the files of `out` as one run, the same one for every call with this folder."""
    address = resolve_tracking_uri(uri)
    identity = load_identity(out) or RunIdentity(redacted(address), EXPERIMENT, "guard")
    save_identity(out, identity)
    run = MlflowRun(address, identity)
    run.start()
    now = time.time_ns() // 1_000_000
    run.send(Params(settings))
    run.send_points([Point(key, value, 0, now) for key, value in summary.items() if math.isfinite(value)])
    for path in sorted([*out.glob("*.md"), *out.glob("*.png"), out / "answer.json"]):
        run.send(Upload(path, ""))
    run.send(End("FINISHED", now))
    return f"{EXPERIMENT} run {run.run_id}"


def _parts(_context: click.Context, _option: click.Parameter, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PARTS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(PARTS)}")
    return names


@click.command()
@click.option("--parts", default=",".join(PARTS), show_default=True, callback=_parts)
@click.option("--steps", type=click.IntRange(1), help="of every run; default: each part's own")
@click.option("--seeds", type=click.IntRange(1), help="paired seeds of every run; default: each part's own")
@click.option("--data-root", default="", help="folder of MNIST and Fashion-MNIST")
@click.option("--out", default="runs/guard", show_default=True, type=click.Path(path_type=Path))
@click.option("--tracking-uri", default=None, help=f'log to MLflow, experiment {EXPERIMENT}; "" is the usual store')
@click.option("--json", "as_json", is_flag=True, help="print one JSON object in place of the tables")
def main(
    parts: list[str],
    steps: int | None,
    seeds: int | None,
    data_root: str,
    out: Path,
    tracking_uri: str | None,
    as_json: bool,
) -> None:
    """Measure the guard."""
    torch.set_num_threads(1)
    scale, answer, summary = Scale(steps, seeds), {}, {}
    for name in parts:
        part = PARTS[name]
        units, results = part.units(scale), Results()
        for number, unit in enumerate(units):
            click.echo(f"{name} {number + 1}/{len(units)}: {unit.label}", err=True)
            results[unit] = finished(out, unit, data_root)
        text = part.table(results)
        with replacing(out / f"{name}.md") as stream:
            stream.write(text.encode())
        if not as_json:
            click.echo(f"\n{part.title}\n\n{text}")
        for picture in part.draw(results, out):
            click.echo(f"picture: {picture}", err=True)
        figures = part.summary(results)
        summary |= {f"{name}/{key}": value for key, value in figures.items()}
        answer[name] = {
            "runs": [{"unit": asdict(unit), **results[unit]} for unit in units],
            "summary": figures,
        }
    plain = json.dumps(finite(answer))
    with replacing(out / "answer.json") as stream:
        stream.write(plain.encode())
    if tracking_uri is not None:
        settings = {"parts": ",".join(parts), "steps": str(steps or "default"), "seeds": str(seeds or "default")}
        click.echo(f"logged: {log_to_mlflow(tracking_uri, out, settings, summary)}", err=True)
    if as_json:
        click.echo(plain)


if __name__ == "__main__":
    main()
