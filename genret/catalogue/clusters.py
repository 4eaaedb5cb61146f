"""Spherical k-means: cells of unit-norm rows by cosine (Lloyd's steps; Dhillon and Modha 2001).

The N x P products run in JAX a block of rows at a time; the means are summed on the host in
float64, in row order, so that a seed always gives the same cells (a GPU's scatter-add may not).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from genret.types import Array, InputError

# Cosines held at once, whatever the number of cells: 16 MiB, since C libraries give
# much larger blocks back to the system, to be mapped again.
_SCORES = 1 << 22


@jax.jit
def _cosines(rows: Array, centroids: Array) -> Array:
    # Full float32: TF32 or bfloat16 would move rows between close cells and break monotony.
    return jnp.dot(rows, centroids.T, precision=jax.lax.Precision.HIGHEST)  # [block, P]


@jax.jit
def _nearest_on_device(rows: Array, centroids: Array) -> tuple[Array, Array]:
    cosines = _cosines(rows, centroids)
    return jnp.argmax(cosines, axis=1).astype(jnp.int32), jnp.max(cosines, axis=1)


def _nearest(rows: np.ndarray, centroids: Array) -> tuple[Array, Array] | tuple[np.ndarray, np.ndarray]:
    if jax.default_backend() != "cpu":
        return _nearest_on_device(rows, centroids)
    return _best(np.asarray(_cosines(rows, centroids)))  # XLA's argmax takes longer than the product


def _nearest_here(rows: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same in NumPy, for many small problems of as many shapes: nothing is compiled."""
    return _best(rows @ centroids.T)


def _best(cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    best = cosines.argmax(1)
    return best.astype(np.int32), np.take_along_axis(cosines, best[:, None], 1)[:, 0]


def _sweep(
    embeddings, centroids: np.ndarray, block: int, nearest: Callable = _nearest
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid i32[N] of every row and its cosine f32[N]."""
    n = len(embeddings)
    block = max(1, min(block, n, _SCORES // len(centroids)))
    cell, cosine = np.empty(n, np.int32), np.empty(n, np.float32)
    on_device = jnp.asarray(centroids) if nearest is _nearest else centroids
    padded = np.zeros((block, centroids.shape[1]), np.float32)
    for start in range(0, n, block):
        rows = np.asarray(embeddings[start : start + block], np.float32)
        if len(rows) < block:  # a padded last block keeps one compiled shape
            padded[: len(rows)] = rows
        best, value = nearest(rows if len(rows) == block else padded, on_device)
        cell[start : start + block] = np.asarray(best)[: len(rows)]
        cosine[start : start + block] = np.asarray(value)[: len(rows)]
    return cell, cosine


def _fill_empty(cell: np.ndarray, cosine: np.ndarray, num_clusters: int) -> np.ndarray:
    """Gives each empty cell one of the worst-fitting rows; a cell keeps its best-fitting row."""
    empty = np.flatnonzero(np.bincount(cell, minlength=num_clusters) == 0)
    if not len(empty):
        return cell
    by_cell = np.lexsort((cosine, cell))  # within a cell, its best-fitting row comes last
    movable = by_cell[:-1][cell[by_cell[1:]] == cell[by_cell[:-1]]]
    worst = movable[np.lexsort((movable, cosine[movable]))[: len(empty)]]
    cell = cell.copy()
    cell[worst] = empty
    return cell


def _means(embeddings, cell: np.ndarray, centroids: np.ndarray, block: int) -> np.ndarray:
    """Unit-norm mean f32[P, D] of each cell; a cell whose rows cancel out keeps its centroid."""
    sums = np.zeros(centroids.shape, np.float64)
    for start in range(0, len(cell), block):
        part = cell[start : start + block]
        order = np.argsort(part, kind="stable")
        filled, first = np.unique(part[order], return_index=True)
        rows = np.asarray(embeddings[start : start + block], np.float32)[order]
        sums[filled] += np.add.reduceat(rows, first, axis=0, dtype=np.float64)
    norm = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(norm > 1e-6, sums / np.maximum(norm, 1e-6), centroids).astype(np.float32)


def spherical_kmeans(
    embeddings: np.ndarray,
    num_clusters: int,
    *,
    seed: int,
    iterations: int = 20,
    block: int = 65536,
    nearest: Callable = _nearest,
) -> tuple[np.ndarray, np.ndarray]:
    """Clusters unit-norm rows so that Sum_n cos(x_n, c_a(n)) rises at every iteration.

    embeddings: f32[N, D] unit-norm rows; a `np.memmap` is read a block at a time.
    block: most rows held at once (fewer where `num_clusters` is large), so [N, P] never exists.
    nearest: (rows, centroids) -> nearest centroid of each row and its cosine.

    Starts at `num_clusters` random distinct rows, gives an empty cell the worst-fitting row, and
    stops when no row changes its cell, at most after `iterations`. Deterministic by `seed`.

    Returns the centroids f32[P, D], each the unit-norm mean of its rows, and the cell i32[N] of
    every row; no cell is empty. Raises InputError where there are fewer rows than clusters.
    """
    if np.ndim(embeddings) != 2:
        problem = f"shape {np.shape(embeddings)} is not [N, D]"
        raise InputError("embeddings", problem, "Pass a matrix.")
    if num_clusters < 1 or num_clusters > len(embeddings):
        raise InputError(
            "num_clusters",
            f"{num_clusters} clusters asked of {len(embeddings)} rows",
            "Ask for at least 1 and at most one per row.",
        )
    if iterations < 1 or block < 1:
        raise InputError("iterations" if iterations < 1 else "block", "is below 1", "Pass a positive number.")
    chosen = np.random.default_rng(seed).choice(len(embeddings), num_clusters, replace=False)
    centroids = np.asarray(embeddings[np.sort(chosen)], np.float32)
    cell = None
    for _ in range(iterations):
        new = _fill_empty(*_sweep(embeddings, centroids, block, nearest), num_clusters)
        if cell is not None and np.array_equal(new, cell):
            break
        cell = new
        centroids = _means(embeddings, cell, centroids, block)
    return centroids, cell


def two_level_kmeans(
    embeddings: np.ndarray, num_clusters: int, *, seed: int, iterations: int = 20
) -> tuple[np.ndarray, np.ndarray]:
    """`spherical_kmeans` for many clusters: √P coarse cells, then each by itself, in 2 N √P cosines an
    iteration instead of N P. A row near the border of its coarse cell may miss a centroid beyond it.

    A coarse cell gets clusters in proportion to its rows, one at least. Returns and raises as
    `spherical_kmeans`.
    """
    if num_clusters > len(embeddings):  # for the message; the coarse level would not notice
        spherical_kmeans(embeddings, num_clusters, seed=seed)
    coarse = max(1, round(num_clusters**0.5))
    _, of = spherical_kmeans(embeddings, coarse, seed=seed, iterations=iterations)
    rows_of = np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of, minlength=coarse))[:-1])
    counts = _shares(np.array([len(rows) for rows in rows_of]), num_clusters)
    centroids, cell, first = [], np.empty(len(of), np.int32), 0
    for c, (rows, count) in enumerate(zip(rows_of, counts, strict=True)):
        own = spherical_kmeans(
            np.asarray(embeddings[rows]), int(count), seed=seed + c, iterations=iterations,
            nearest=_nearest_here,
        )  # fmt: skip
        centroids.append(own[0])
        cell[rows] = first + own[1]
        first += count
    return np.concatenate(centroids), cell


def _shares(sizes: np.ndarray, total: int) -> np.ndarray:
    """`total` i64[n] in proportion to `sizes`, each from 1 to its size: those owed most are rounded up."""
    exact = sizes * (total / sizes.sum())
    counts = np.clip(np.floor(exact).astype(np.int64), 1, sizes)
    while (left := total - counts.sum()) != 0:
        owed = np.where(counts < sizes if left > 0 else counts > 1, np.sign(left) * (exact - counts), -np.inf)
        counts[np.argsort(-owed, kind="stable")[: min(abs(left), np.isfinite(owed).sum())]] += np.sign(left)
    return counts


def assign(embeddings: np.ndarray, centroids: np.ndarray, block: int = 65536) -> np.ndarray:
    """Cell i32[N] of the nearest centroid by cosine; the lowest number wins a tie.

    embeddings: f32[N, D], centroids: f32[P, D], unit norm. Raises InputError on unequal widths.
    """
    if np.ndim(embeddings) != 2 or np.shape(embeddings)[1] != np.shape(centroids)[1]:
        raise InputError(
            "embeddings",
            f"shape {np.shape(embeddings)} does not fit centroids {np.shape(centroids)}",
            "Use the embeddings that the centroids were fitted on.",
        )
    return _sweep(embeddings, np.asarray(centroids, np.float32), block)[0]
