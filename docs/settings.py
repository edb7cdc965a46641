"""Write the page of all settings, docs/settings.md, from the package: `make docs` calls it."""

from __future__ import annotations

from ml2o_dist.config import EvaluateSettings, MetaTrainSettings
from ml2o_dist.config_reference import meta_train_settings, settings_of
from ml2o_dist.paretoset.settings import ParetoSetSettings
from ml2o_dist.sweeping.settings import SweepSettings

HEAD = """# Settings

This page lists every setting with its default, its range and its meaning. Each is a key of a YAML file
(`--config FILE`) and a word for `--set KEY=VALUE`. `ml2o settings KEY` prints the same for one key or group, and names
the nearest key where there is none of that name.

Without `--config`, `ml2o meta-train` runs the embedded configuration
(`ml2o_dist/configs/digits.yaml`). The column *embedded* has its value where it differs from the default.
"""

KINDS = {
    "ml2o meta-train": MetaTrainSettings,
    "ml2o evaluate": EvaluateSettings,
    "ml2o sweep": SweepSettings,
    "ml2o pareto-set train": ParetoSetSettings,
}


def main() -> None:
    """Print the page."""
    print(HEAD)
    for command, kind in KINDS.items():
        trains = command == "ml2o meta-train"
        columns = ["key", "default", *["embedded"] * trains, "allowed", "meaning"]
        print(f"## {command}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for each in meta_train_settings() if trains else settings_of(kind):
            if command == "ml2o sweep" and each.key.startswith("meta_train."):
                continue
            cells = [f"`{each.key}`", "required" if each.default is None else f"`{each.default}`"]
            if trains:
                cells.append("" if each.embedded in (None, each.default) else f"`{each.embedded}`")
            cells.append(each.allowed)
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in [*cells, each.meaning]) + " |")
        if command == "ml2o sweep":
            print("| `meta_train.*` | | | the settings of `ml2o meta-train`, or the name of a file of them |")
        print()


if __name__ == "__main__":
    main()
