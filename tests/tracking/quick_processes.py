"""Processes that use the registry and start in a moment: forked by one that has imported what they need.

That one, Python's fork server, has opened nothing: neither sqlite nor a connection to a server may be forked.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import sqlalchemy.orm

import ml2o_dist.tracking.champion  # noqa: F401

sqlalchemy.orm.configure_mappers()


def quick_processes() -> ForkServerContext:
    """Return the context to start processes, pools and barriers with."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
