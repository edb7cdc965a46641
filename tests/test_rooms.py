"""The rooms of the package: imports go one way, and few modules lie loose."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ml2o_dist"


def imported(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ml2o_dist."):
            found.add(str(node.module))
    return found


def room_of(module: str) -> str:
    return module.split(".")[1]


def arrows() -> dict[str, set[str]]:
    """By room, the rooms that it imports from; the package's own names are no room."""
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).parts
        if parts[0].startswith("__"):
            continue
        room = parts[0].removesuffix(".py")
        found.setdefault(room, set()).update(room_of(module) for module in imported(file))
    return {room: targets - {room} for room, targets in found.items()}


def test_no_room_leads_back_to_itself() -> None:
    order = list(TopologicalSorter(arrows()).static_order())  # CycleError names a circle
    assert order.index("runtime") < order.index("problems") < order.index("rules") < order.index("workflows")


def test_what_every_room_stands_on_stands_on_nothing() -> None:
    assert arrows()["runtime"] == set()
    assert arrows()["torch_optim"].isdisjoint({"metatrain", "evaluation", "tracking", "workflows"})
    assert all("cli" not in targets for room, targets in arrows().items() if room != "cli")


def test_few_modules_lie_loose() -> None:
    loose = [file.name for file in PACKAGE.glob("*.py") if not file.name.startswith("__")]
    assert len(loose) <= 8, loose
