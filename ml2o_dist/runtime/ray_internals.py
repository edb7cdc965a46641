"""Guards our use of Ray's private names: if a release has changed one, the user gets a one-line error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from ml2o_dist.runtime.errors import UserError

TESTED = "2.60.0"
"""The release of Ray that the tests have run with."""


@contextmanager
def ray_internal(what: str) -> Iterator[None]:
    """Raise UserError, in place of the original error, if the `with` block finds `what` missing or changed.

    The block must contain only the import or the call of the private name, since every such error in it counts.
    """
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"Ray {ray.__version__} has changed {what}, which ml2o-dist needs ({reason}); it is tested with Ray "
            f"{TESTED}: pip install 'ray=={TESTED}'"
        ) from error


def check_has(owner: type, *names: str) -> None:
    """Raise UserError if one of Ray's classes lacks a private method or attribute that our subclass uses."""
    for name in names:
        with ray_internal(f"{owner.__name__}.{name}"):
            getattr(owner, name)
