"""A real Chromium (Debian's package), driven by playwright; tests that need one skip where there is none."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""Chromium asks for nothing by itself, and runs as root."""


@contextmanager
def chromium(within: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Iterator[Any]:
    """Open a headless Chromium; `within`: words before its command, for a host of its own (tests/cluster/hosts.py)."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no Chromium on this machine (Debian's package: chromium)")
    with playwright.sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        command = Path(folder) / "chromium"  # playwright takes a file, and speaks to it through pipes
        command.write_text(f'#!/bin/sh\nexec {shlex.join([*within, found])} "$@"\n')
        command.chmod(0o755)
        opened = driver.chromium.launch(executable_path=command, args=list(FLAGS), env=environment)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    with chromium() as opened:
        yield opened
