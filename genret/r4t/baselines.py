"""What a fan-out must beat: chance, the query alone, and re-ranking or clustering what the query finds.

Each is (queries f32[Q, D], k, seed) -> contents i32[Q, k], or sets f32[Q, k, D] to search with.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from genret.catalogue.clusters import spherical_kmeans
from genret.r4t.fanout import SetRetriever
from genret.retrieval.index import Index
from genret.retrieval.sets import greedy_dpp, mmr
from genret.types import InputError

Baseline = Callable[[np.ndarray, int, int], np.ndarray]


def random_pool(num_items: int) -> Baseline:
    """k distinct contents at random: chance level, to be printed in every table."""

    def run(queries: np.ndarray, k: int, seed: int) -> np.ndarray:
        _check(k, num_items)
        rng = np.random.default_rng(seed)
        return np.stack([rng.choice(num_items, k, replace=False) for _ in queries]).astype(np.int32)

    return run


def no_fanout(index: Index) -> Baseline:
    """The query's own k nearest contents; k is all that a fan-out returns, sub-queries times depth."""

    def run(queries: np.ndarray, k: int, seed: int) -> np.ndarray:
        _check(k, index.num_items)
        return index.search(queries, k)[0]

    return run


def mmr_reranking(index: Index, contents: np.ndarray, *, pool: int = 100, trade: float = 0.5) -> Baseline:
    """k of the query's `pool` nearest contents by maximal marginal relevance; trade: λ of `sets.mmr`."""
    return _reranking(index, contents, pool, lambda cosine, rows, k: mmr(cosine, rows, k, trade))


def dpp_reranking(index: Index, contents: np.ndarray, *, pool: int = 100, sharpness: float = 4.0) -> Baseline:
    """k of the query's `pool` nearest by a greedy determinantal process with quality e^{sharpness cos}."""
    return _reranking(
        index, contents, pool, lambda cosine, rows, k: greedy_dpp(np.exp(sharpness * cosine), rows, k)
    )


def neighbour_clusters(index: Index, contents: np.ndarray, *, pool: int = 100) -> Baseline:
    """Centroids of a spherical k-means of the query's `pool` nearest contents: a set to search with."""

    def run(queries: np.ndarray, k: int, seed: int) -> np.ndarray:
        ids, _ = _neighbours(index, queries, k, pool)
        return np.stack([spherical_kmeans(contents[i], k, seed=seed)[0] for i in ids])

    return run


def regressor(model: SetRetriever) -> Baseline:
    """A set model trained under `matched_regression_loss`: one call, no randomness."""

    def run(queries: np.ndarray, k: int, seed: int) -> np.ndarray:
        return model.sets(queries, k, method="posterior_mean", guidance=0.0)

    return run


def _reranking(index: Index, contents: np.ndarray, pool: int, choose: Callable) -> Baseline:
    def run(queries: np.ndarray, k: int, seed: int) -> np.ndarray:
        ids, cosines = _neighbours(index, queries, k, pool)
        picks = [choose(c, contents[i], k) for i, c in zip(ids, cosines, strict=True)]
        return np.take_along_axis(ids, np.stack(picks), axis=1)

    return run


def _neighbours(index: Index, queries: np.ndarray, k: int, pool: int) -> tuple[np.ndarray, np.ndarray]:
    """ids i32[Q, pool] and cosines f32[Q, pool]; a small corpus is all of the pool."""
    pool = min(pool, index.num_items)
    _check(k, pool)
    return index.search(queries, pool)


def _check(k: int, most: int) -> None:
    if not 1 <= k <= most:
        raise InputError("k", f"{k} of {most} contents asked for", f"use 1 to {most}, or a larger pool")
