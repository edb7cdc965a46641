"""A network of hosts for a test, ended with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.hosts import Network, skip_without_namespaces


@contextmanager
def made_network() -> Iterator[Network]:
    """Make a network, or skip the test; end it with the `with` block."""
    skip_without_namespaces()
    made = Network()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def network() -> Iterator[Network]:
    with made_network() as made:
        yield made
