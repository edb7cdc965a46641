"""A range in even parts."""

from __future__ import annotations


def even_blocks(rows: int, largest: int) -> list[slice]:
    """Cut `rows` into the fewest blocks of at most max(1, `largest`), as even as can be, widest first."""
    count = -(-rows // max(1, largest))
    size, wider = divmod(rows, count)
    return [slice(i * size + min(i, wider), (i + 1) * size + min(i + 1, wider)) for i in range(count)]
