"""Find the user's modules: an optimizer is given only their parameters.

Hooks are not used, because torch.compile would trace a hook and recompile everything once it is gone. The modules are
found among the objects that Python's garbage collector knows, when parameters are added.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable

from torch import Tensor, nn


def every_module() -> list[nn.Module]:
    """Return the modules of this process that are fully constructed."""
    frozen = gc.get_freeze_count() > 0  # objects that gc.freeze() has hidden are not listed
    if frozen:
        gc.unfreeze()
    try:
        return [each for each in gc.get_objects() if issubclass(type(each), nn.Module) and "_modules" in vars(each)]
    finally:
        if frozen:
            gc.collect()  # else present garbage would be kept for good
            gc.freeze()


def embedding_tables(parameters: Iterable[Tensor], among: Iterable[nn.Module] | None = None) -> set[int]:
    """Return the ids of those `parameters` that are the table of an embedding, one of `among` or of all modules."""
    matrices = {id(parameter) for parameter in parameters if parameter.dim() == 2}
    if not matrices:
        return set()
    modules = every_module() if among is None else among
    tables = (m._parameters.get("weight") for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag))
    return {id(table) for table in tables if id(table) in matrices}
