"""From the rows of a set to contents of the database, with or without repeats."""

from __future__ import annotations

import numpy as np

from genret.retrieval.index import Index
from genret.types import InputError


def nearest_items(index: Index, sets: np.ndarray, *, distinct: bool = False) -> np.ndarray:
    """The content nearest to each row of sets f32[Q, K, D]: i32[Q, K]; Q K probes.

    distinct: a row whose content an earlier row has takes the nearest one that no row has.
    Raises InputError for distinct rows of fewer than K contents.
    """
    queries, rows, width = sets.shape
    if distinct and rows > index.num_items:
        raise InputError("sets", f"{rows} distinct rows of {index.num_items} contents", "keep repeats")
    found = index.search(sets.reshape(-1, width), rows if distinct else 1)[0].reshape(queries, rows, -1)
    return distinct_items(found) if distinct else found[..., 0]


def distinct_items(candidates: np.ndarray, present: np.ndarray | None = None) -> np.ndarray:
    """One content per row, none twice in a set: i32[n, K], -1 where not `present` bool[n, K].

    candidates: i32[n, K, C], contents of each row, best first, C >= K. First each content goes to the first
    row that has it on top; then, in order, the other rows take their best that is still free.
    """
    n, rows, _ = candidates.shape
    present = np.ones((n, rows), bool) if present is None else present
    items = np.where(present, candidates[..., 0], -1).astype(np.int32)
    earlier = np.tril(np.ones((rows, rows), bool), -1)
    waiting = ((items[:, :, None] == items[:, None]) & earlier).any(-1) & present
    for j in range(1, rows):
        at = np.flatnonzero(waiting[:, j])
        taken = np.where(waiting[at], -1, items[at])  # [m, K]
        free = (candidates[at, j, :, None] != taken[:, None]).all(-1)  # [m, C]
        items[at, j] = candidates[at, j][np.arange(len(at)), free.argmax(1)]
        waiting[at, j] = False
    return items
