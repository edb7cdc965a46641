"""Every kind of file that is read, changed at random: reading it ends in a value or in one line, never otherwise.

While a file is read, no file outside of its folder is opened, no code is run that a file brought, and memory is short.
What a file holds is changed as a text (bytes flipped, cut, repeated) and as a value (other types, huge numbers, deep
nesting, markup, paths); digests that a file has of itself are made to agree, as a careful forger would.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml2o_dist.runtime.errors import UserError
from tests.hostile_changes import WATCH, changed_bytes, little_memory
from tests.hostile_kinds import FOLDERS, KINDS, PAGES, Kind

SECRET = "the secret of another folder"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole folder of each kind, written by the package, each read once; a secret lies beside them."""
    place = tmp_path_factory.mktemp("good")
    for name, make in FOLDERS.items():
        (place / name).mkdir()
        make(place / name)
    for folder, kind in KINDS.values():
        kind.read(place / folder)
    (place / "secret").write_text(SECRET)
    return place


@pytest.fixture(scope="module")
def good_pages(good: Path) -> Path:
    """The same, each page written once."""
    for folder, kind in PAGES.values():
        kind.read(good / folder)
    return good


@dataclass
class Outcomes:
    """How often reading ended in a value and in a line: both must come, or the test says nothing."""

    values: int = 0
    lines: list[str] = field(default_factory=list)


def read_changed(good: Path, place: Path, folder: str, kind: Kind, seed: int, outcomes: Outcomes) -> None:
    """Change a file of a copy of the folder, and read it."""
    draw = random.Random(seed)
    here = place / "here"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(good / folder, here)
    if kind.change is None or draw.random() < 0.4:
        (here / kind.file).write_bytes(changed_bytes((here / kind.file).read_bytes(), draw))
    else:
        kind.change(here, draw)
    with little_memory(), WATCH.over(here):
        try:
            kind.read(here)
        except UserError as error:
            line = str(error)
        else:
            outcomes.values += 1
            return
    outcomes.lines.append(line)
    assert len(line.splitlines()) == 1
    assert len(line) < 3000
    assert SECRET not in line


def try_kind(good: Path, place: Path, folder: str, kind: Kind, examples: int) -> None:
    outcomes = Outcomes()

    @settings(max_examples=examples, deadline=None, database=None, derandomize=examples < 100,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.integers(0, 2**32))
    def run(seed: int) -> None:
        read_changed(good, place, folder, kind, seed, outcomes)

    run()
    assert outcomes.values + len(outcomes.lines) >= examples / 2


@pytest.mark.parametrize("name", KINDS)
def test_a_changed_file_ends_in_a_value_or_one_line(name: str, good: Path, tmp_path: Path) -> None:
    try_kind(good, tmp_path, *KINDS[name], examples=12)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_a_file_changed_in_many_ways_ends_in_a_value_or_one_line(name: str, good: Path, tmp_path: Path) -> None:
    try_kind(good, tmp_path, *KINDS[name], examples=250)


@pytest.mark.long
@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_a_changed_file_is_written_or_one_line(name: str, good_pages: Path, tmp_path: Path) -> None:
    try_kind(good_pages, tmp_path, *PAGES[name], examples=30)
