"""`ml2o settings` and `ml2o optimizers`: what can be set and what can be compared."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ml2o_dist.cli.command import command

COMMANDS = ("meta-train", "evaluate", "sweep", "pareto-set")


@click.command("settings")
@click.argument("key", required=False)
@click.option(
    "--of", "of", type=click.Choice(COMMANDS), default="meta-train", show_default=True, help="Whose settings."
)
@command
def settings(console: Console, key: str | None, of: str) -> list[dict[str, Any]]:
    """List the settings, or those of KEY, with default, range and meaning.

    Each is a key of the YAML file and a word for --set: `ml2o settings rule`, `ml2o settings learner.lr`.
    """
    from ml2o_dist.config_reference import chosen, meta_train_settings, settings_of

    every = meta_train_settings() if of == "meta-train" else list(settings_of(_model(of)))
    found = every if key is None else chosen(every, key)
    several = ["embedded"] if of == "meta-train" else []
    table = Table("key", "default", *several, "allowed", "meaning", title=f"settings of ml2o {of}", show_lines=False)
    for each in found:
        values = ["required" if each.default is None else each.default]
        if of == "meta-train":
            values.append("" if each.embedded in (None, each.default) else str(each.embedded))
        table.add_row(*map(Text, (each.key, *values, each.allowed, each.meaning)))
    console.print(table)
    if of == "meta-train":
        console.print(
            "Without --config, ml2o meta-train runs the embedded configuration; its values are shown where they differ."
        )
    return [each.to_json() for each in found]


@click.group()
def optimizers() -> None:
    """What can be compared by `ml2o evaluate`."""


@optimizers.command("list")
@command
def optimizers_list(console: Console) -> list[dict[str, Any]]:
    """List every optimizer by name."""
    from ml2o_dist.evaluation.optimizer_words import optimizer_descriptions

    table = Table("optimizer", "kind", "what", title="optimizers")
    answer = []
    for name, kind, what in optimizer_descriptions():
        table.add_row(name, kind, what)
        answer.append({"name": name, "kind": kind, "description": what})
    console.print(table)
    console.print(
        "Any of them under the guard: gml2o:NAME. AGGREGATOR[+OPTIMIZER][@LR] combines two; without @LR the learning "
        "rate is tuned. A run directory, a weights file or models:/NAME@ALIAS is a learned optimizer of your own.",
        markup=False,
        highlight=False,
    )
    return answer


def _model(of: str) -> Any:
    if of == "sweep":
        from ml2o_dist.sweeping.settings import SweepSettings

        return SweepSettings
    if of == "pareto-set":
        from ml2o_dist.paretoset.settings import ParetoSetSettings

        return ParetoSetSettings
    from ml2o_dist.config import EvaluateSettings, MetaTrainSettings

    return EvaluateSettings if of == "evaluate" else MetaTrainSettings
