"""A network of hosts for a test, ended with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Network, skip_without_namespaces


@pytest.fixture
def network() -> Iterator[Network]:
    skip_without_namespaces()
    made = Network()
    try:
        yield made
    finally:
        made.close()
