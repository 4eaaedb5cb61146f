"""From searches to rankings: seeds excluded, unknown labels skipped, several lists merged into one.

A ranking always comes from the full corpus. Items whose label is unknown in the query's domain are
skipped and the list is filled from below, so that all k places are judged (condensed lists, Sakai
2007): an unknown label never counts as a negative.
"""

from __future__ import annotations

import numpy as np

from genret.retrieval.index import Index
from genret.types import InputError


def rank(
    index: Index,
    queries: np.ndarray,
    k: int,
    *,
    exclude: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    domain: np.ndarray | None = None,
) -> np.ndarray:
    """The k best items of each query f32[Q, D] -> ids i32[Q, k], best first.

    exclude: i32[Q, S] items a query may not return (its seeds), padded with -1.
    labels: i8[M, N] of 1, 0 and -1 (unknown), with domain i32[Q]: only items whose label is known
        in the query's domain are returned.

    Raises InputError if shapes disagree, or if a query has fewer than k items left to return.
    """
    exclude, labels, domain = _checked(index, len(queries), k, exclude, labels, domain)
    return _search(index, queries, k, exclude, labels, domain)[0]


def rank_set(
    index: Index,
    queries: np.ndarray,
    k: int,
    *,
    how: str = "best_score",
    exclude: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    domain: np.ndarray | None = None,
) -> np.ndarray:
    """`rank` for R rows a query, f32[Q, R, D] -> ids i32[Q, k]: rank each row, then `merge`.

    It costs Q * R probes of the index: compare methods at equal k and equal probes.
    """
    if queries.ndim != 3:
        raise InputError("queries", f"{queries.shape} is not [Q, R, D]", "Give every query R rows.")
    q, r, width = queries.shape
    exclude, labels, domain = _checked(index, q, k, exclude, labels, domain)
    rows = queries.reshape(q * r, width)
    ids, scores = _search(index, rows, k, exclude.repeat(r, 0), labels, domain.repeat(r))
    return merge(ids.reshape(q, r, k), scores.reshape(q, r, k), k, how)


def merge(ids: np.ndarray, scores: np.ndarray, k: int, how: str = "best_score") -> np.ndarray:
    """Merge R ranked lists a query, ids i32[Q, R, L], scores f32[Q, R, L] -> i32[Q, k] distinct.

    how: 'best_score' ranks an item by its best score in any list (ties: the lower id);
        'round_robin' takes every list's first item, then every list's second, and so on.

    Raises InputError for another `how`, or if a query's lists hold fewer than k distinct ids.
    """
    q = len(ids)
    if how == "best_score":
        ids, scores = ids.reshape(q, -1), scores.reshape(q, -1)
        candidates = np.take_along_axis(ids, np.lexsort((ids, -scores), axis=1), axis=1)
    elif how == "round_robin":
        candidates = ids.transpose(0, 2, 1).reshape(q, -1)
    else:
        raise InputError("how", f"no merge is called {how!r}", "Use best_score or round_robin.")
    by_id = np.argsort(candidates, axis=1, kind="stable")
    sorted_ids = np.take_along_axis(candidates, by_id, axis=1)
    is_first = np.ones(candidates.shape, bool)
    np.put_along_axis(is_first, by_id[:, 1:], sorted_ids[:, 1:] != sorted_ids[:, :-1], axis=1)
    distinct = is_first.sum(axis=1)
    if (distinct < k).any():
        row = int(distinct.argmin())
        fix = "Search deeper lists or ask for a smaller k."
        raise InputError("k", f"query {row} has {distinct[row]} distinct items for {k} places", fix)
    return _first(candidates, is_first, k).astype(np.int32)


def _first(values: np.ndarray, keep: np.ndarray, k: int) -> np.ndarray:
    """The first k kept values of every row, in order."""
    return np.take_along_axis(values, np.argsort(~keep, axis=1, kind="stable")[:, :k], axis=1)


def _search(
    index: Index,
    queries: np.ndarray,
    k: int,
    exclude: np.ndarray,
    labels: np.ndarray | None,
    domain: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """ids i32[Q, k] and scores f32[Q, k] of checked input: search, drop, and search on if short."""
    queries = np.asarray(queries, np.float32)
    ids = np.empty((len(queries), k), np.int32)
    scores = np.empty((len(queries), k), np.float32)
    pending = np.arange(len(queries))
    depth = k + exclude.shape[1]  # enough unless labels are unknown
    while len(pending):
        depth = min(depth, index.num_items)
        found, values = index.search(queries[pending], depth)
        keep = np.ones(found.shape, bool)
        for seed in exclude[pending].T:
            keep &= found != seed[:, None]
        if labels is not None:
            keep &= labels[domain[pending, None], found] >= 0
        full = keep.sum(axis=1) >= k
        ids[pending[full]] = _first(found, keep, k)[full]
        scores[pending[full]] = _first(values, keep, k)[full]
        pending = pending[~full]
        if len(pending) and depth == index.num_items:
            raise RuntimeError(f"index {index.name!r} did not return each of its items once")
        depth *= 4
    return ids, scores


def _checked(
    index: Index,
    num_queries: int,
    k: int,
    exclude: np.ndarray | None,
    labels: np.ndarray | None,
    domain: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """exclude i32[Q, S] and domain i32[Q] filled in; every query can be given k items."""
    n = index.num_items
    exclude = np.full((num_queries, 0), -1) if exclude is None else np.sort(exclude, axis=-1)
    if exclude.ndim != 2 or len(exclude) != num_queries or (exclude >= n).any():
        fix = f"Pass i32[{num_queries}, S] of ids below {n}, padded with -1."
        raise InputError("exclude", "not one row of item ids per query", fix)
    if (labels is None) != (domain is None):
        raise InputError("domain", "labels and domain go together", "Pass both or neither.")
    domain = np.zeros(num_queries, np.int32) if domain is None else np.asarray(domain)
    if labels is None:
        known = np.ones((1, n), bool)
    elif labels.ndim != 2 or labels.shape[1] != n:
        raise InputError("labels", f"{labels.shape} is not [M, N]", f"The index holds {n} items.")
    else:
        known = labels >= 0
    if domain.shape != (num_queries,) or ((domain < 0) | (domain >= len(known))).any():
        fix = f"Pass i32[{num_queries}] below {len(known)}, the number of rows of labels."
        raise InputError("domain", "not one domain per query", fix)
    is_item = exclude >= 0
    is_item[:, 1:] &= exclude[:, 1:] != exclude[:, :-1]  # rows are sorted: count an item once
    left = known.sum(axis=1)[domain] - (known[domain[:, None], exclude] & is_item).sum(axis=1)
    if (left < k).any():
        row = int(left.argmin())
        problem = f"query {row} has {left[row]} items with a known label in domain {domain[row]}"
        raise InputError("k", f"{problem}, seeds aside, for {k} places", "Ask for a smaller k.")
    return exclude, labels, domain
