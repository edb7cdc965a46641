"""What the package uses of Ray that Ray does not promise: where a release has changed it, one line says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from ml2o_dist.runtime.errors import UserError

TESTED = "2.60.0"
"""The release of Ray that the tests have run with."""


@contextmanager
def ray_internal(what: str) -> Iterator[None]:
    """Raise UserError, in place of the error, where the `with` block finds `what` missing or changed.

    The block is to hold nothing but the import or the call of what is private: any of these errors in it counts.
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
    """Raise UserError where a class of Ray's lacks a private method or attribute that ours builds on."""
    for name in names:
        with ray_internal(f"{owner.__name__}.{name}"):
            getattr(owner, name)
