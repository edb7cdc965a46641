"""The product of several lists as test cases, of which `make test` runs a part that has every value."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def crossed(
    names: str, *lists: Iterable[Any], where: Callable[..., bool] = lambda *values: True
) -> pytest.MarkDecorator:
    """Parametrize by those of the product of `lists` for which `where` holds; all are long but a few.

    The quick ones are one for each value of the longest list, with the other lists' values in turn. A pytest.param of
    one value keeps its marks.
    """
    columns = [
        [each if isinstance(each, type(pytest.param())) else pytest.param(each) for each in one] for one in lists
    ]
    cases = [case for case in itertools.product(*columns) if where(*(each.values[0] for each in case))]
    longest = max(range(len(columns)), key=lambda column: len(columns[column]))
    quick = []
    for i, value in enumerate(columns[longest]):
        turns = [(i + at * (i // len(column))) % len(column) for at, column in enumerate(columns)]  # not in step
        turned = [column[turn:] + column[:turn] for turn, column in zip(turns, columns, strict=True)]
        turned[longest] = [value]
        quick += [next((case for case in itertools.product(*turned) if case in cases), None)]
    return pytest.mark.parametrize(
        names.replace(" ", "").split(","),
        [
            pytest.param(
                *(each.values[0] for each in case),
                marks=[*(mark for each in case for mark in each.marks), *([] if case in quick else [pytest.mark.long])],
            )
            for case in cases
        ],
    )
