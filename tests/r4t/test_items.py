"""Rows to contents: nearest, and nearest without repeats, against the definition row by row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.r4t.items import distinct_items, nearest_items
from genret.retrieval.index import ExactIndex
from genret.types import InputError


def by_definition(candidates, present):
    """One set: first rows keep their best; then each other row, in order, its best that no row has."""
    items = [int(c[0]) if p else -1 for c, p in zip(candidates, present, strict=True)]
    first = [p and items.index(item) == j for j, (item, p) in enumerate(zip(items, present, strict=True))]
    taken = {item for item, keep in zip(items, first, strict=True) if keep}
    for j, p in enumerate(present):
        if p and not first[j]:
            items[j] = next(int(c) for c in candidates[j] if c not in taken)
            taken.add(items[j])
    return items


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_distinct_items_are_those_of_the_definition(data):
    rows = data.draw(st.integers(1, 5))
    numbers = data.draw(st.integers(rows, rows + 2))
    sets = data.draw(st.integers(0, 4))
    order = [data.draw(st.permutations(range(numbers)).map(lambda p: p[:rows])) for _ in range(sets * rows)]
    candidates = np.array(order, np.int32).reshape(sets, rows, rows)
    present = np.array([data.draw(st.booleans()) for _ in range(sets * rows)], bool).reshape(sets, rows)
    items = distinct_items(candidates, present)
    assert items.dtype == np.int32
    assert items.tolist() == [by_definition(c, p) for c, p in zip(candidates, present, strict=True)]


def test_a_refill_never_costs_a_later_row_its_own_best():
    candidates = np.array([[[7, 3, 1], [7, 3, 1], [3, 7, 1]]], np.int32)
    assert distinct_items(candidates).tolist() == [[7, 1, 3]]


def test_nearest_items_with_and_without_repeats():
    contents = np.eye(4, 6, dtype=np.float32)
    rows = np.float32([[[9, 1, 0, 0, 0, 0], [8, 2, 1, 0, 0, 0], [0, 1, 0, 3, 0, 0]]])
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    index = ExactIndex(contents)
    assert nearest_items(index, rows).tolist() == [[0, 0, 3]]
    assert nearest_items(index, rows, distinct=True).tolist() == [[0, 1, 3]]
    with pytest.raises(InputError, match="distinct"):
        nearest_items(ExactIndex(contents[:2]), rows, distinct=True)
