"""What the approaches of a run came to, read back: whole, or one line that names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ml2o_dist.paretoset.fronts import Front
from ml2o_dist.paretoset.results import ApproachResult, read_fronts
from ml2o_dist.runtime.errors import UserError

RAYS = torch.eye(2, dtype=torch.float64)
FRONT = Front(RAYS, RAYS + 0.5, RAYS / 2)
RESULTS = [
    ApproachResult("pwe", {"validation": FRONT, "test": FRONT}, 5, 1.5, 22, 100.0, 0, 0, 0.1),
    ApproachResult("mgda", {}, 7, 0.0, 3, 90.0, 1, 1),
]


def whole() -> dict[str, Any]:
    approaches = [result.to_json() for result in RESULTS]
    tree = {"tasks": ["a", "b"], "data_sha256": {"x": "0"}, "git": None, "approaches": approaches}
    return dict(json.loads(json.dumps(tree)))


def test_fronts_come_back_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "fronts.json").write_text(json.dumps(whole()))
    found = read_fronts(tmp_path / "fronts.json")
    assert (found.tasks, found.data_sha256, found.git) == (("a", "b"), {"x": "0"}, None)
    assert [each.to_json() for each in found.approaches] == [each.to_json() for each in RESULTS]


def front(tree: dict[str, Any]) -> Any:
    return tree["approaches"][0]["test"]


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no approaches": (lambda t: t.pop("approaches"), "approaches: Field required"),
    "approaches that are none": (lambda t: t.update(approaches=[1]), "approaches.0: Input should be"),
    "tasks that are a number": (lambda t: t.update(tasks=1), "tasks: Input should be"),
    "another number of tasks": (lambda t: t.update(tasks=["a"]), "has other tasks"),
    "an approach twice": (lambda t: t["approaches"].append(t["approaches"][0]), "stands there twice"),
    "no name": (lambda t: t["approaches"][1].pop("approach"), "approach: Field required"),
    "seconds below zero": (lambda t: t["approaches"][1].update(seconds=-1), "seconds: Input should be"),
    "a huge count": (lambda t: t["approaches"][1].update(steps=10**30), "steps: "),
    "a front that is a text": (lambda t: t["approaches"][0].update(test="x"), "the front cannot be used"),
    "losses of nothing": (lambda t: front(t).update(losses=None), "losses: Input should be"),
    "losses in one row": (lambda t: front(t).update(losses=[1.0, 2.0]), "losses.0: Input should be"),
    "uneven rows": (lambda t: front(t).update(losses=[[1.0], [1.0, 2.0]]), "shape"),
    "one row more": (lambda t: front(t)["rays"].append([0.5, 0.5]), "shape"),
    "no rows": (lambda t: front(t).update(rays=[], losses=[], accuracies=[]), "shape"),
    "many points": (
        lambda t: front(t).update({key: front(t)[key] * 1001 for key in ("rays", "losses", "accuracies")}),
        "2002 points of 2 tasks",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_fronts_of_something_else_are_one_line(kind: str, tmp_path: Path) -> None:
    change, why = WRONG[kind]
    tree = whole()
    change(tree)
    (tmp_path / "fronts.json").write_text(json.dumps(tree))
    with pytest.raises(UserError) as caught:
        read_fronts(tmp_path / "fronts.json")
    assert why in str(caught.value)
    assert str(caught.value).startswith(f"fronts '{tmp_path}/fronts.json'")
    assert len(str(caught.value).splitlines()) == 1


NO_FRONTS = ("", "[]", "[" * 100_000, '{"tasks": NaN}', '{"tasks": [], "tasks": []}', "9" * 5000)


@pytest.mark.parametrize("text", NO_FRONTS, ids=range(len(NO_FRONTS)))
def test_a_file_that_holds_no_fronts_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "fronts.json").write_text(text)
    with pytest.raises(UserError, match=r"fronts\.json'"):
        read_fronts(tmp_path / "fronts.json")
