"""Sequences of training items: raw, metric-ordered, and seeds -> tail (papers' A.5 to A.7).

Everything here is drawn afresh for every step as a pure function of a NumPy generator, vectorised over
the batch: padded cell tables and a kNN table are all the state there is.

Latent cells are spherical k-means cells of the training items at several granularities. They are never
the evaluation patterns; several sizes and seeds make them look like whatever pattern is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genret.catalogue.clusters import spherical_kmeans, two_level_kmeans
from genret.modit.density import search_in_parts
from genret.retrieval.index import build_index
from genret.types import InputError

NEVER = -1e30


# Most latent cells fitted at one level: with more, the cosines of all rows to all centroids take hours.
DIRECT = 8192


@dataclass(frozen=True)
class Cells:
    """Latent cells. members: i32[C, L] catalogue rows, padded with -1. membership: i32[R, N], the cell of
    every training item in each of R clusterings (-1 elsewhere). run: i32[C], the clustering of a cell."""

    members: np.ndarray
    membership: np.ndarray
    run: np.ndarray


def fit_cells(
    embeddings: np.ndarray,
    train: np.ndarray,
    *,
    sizes: Sequence[int],
    seeds: int,
    smallest: int,
    seed: int,
) -> Cells:
    """Cluster the training items once per (mean cell size, seed); keep cells with >= `smallest` items.

    Raises InputError for `smallest` below 2 (a walk needs a next item) and where no cell reaches it.
    """
    if smallest < 2:
        raise InputError("smallest", f"latent cells of {smallest} item", "use 2 or more")
    rows = np.flatnonzero(train)
    x = np.asarray(embeddings[rows])
    membership, members, run = [], [], []
    for repeat in range(seeds):
        for size in sizes:
            count = max(2, len(rows) // size)
            cluster = spherical_kmeans if count <= DIRECT else two_level_kmeans
            _, cell = cluster(x, count, seed=1000 * seed + 10 * repeat + 1, iterations=15)
            order = np.argsort(cell, kind="stable")
            parts = np.split(rows[order], np.cumsum(np.bincount(cell, minlength=count))[:-1])
            of_item = np.full(len(train), -1, np.int32)
            for part in parts:
                if len(part) >= smallest:
                    of_item[part] = len(members)
                    members.append(part)
                    run.append(len(membership))
            membership.append(of_item)
    if not members:
        raise InputError(
            "latent cells", f"none of {len(rows)} items reaches {smallest}",
            "lower `smallest` or raise the mean cell size",
        )  # fmt: skip
    table = np.full((len(members), max(map(len, members))), -1, np.int32)
    for i, part in enumerate(members):
        table[i, : len(part)] = part
    return Cells(table, np.stack(membership), np.asarray(run))


def neighbour_table(embeddings: np.ndarray, train: np.ndarray, *, k: int, index: str) -> np.ndarray:
    """i32[N, k] nearest training items of every training item (itself left out), -1 for other rows."""
    rows = np.flatnonzero(train)
    x = np.asarray(embeddings[rows])
    ids = search_in_parts(build_index(index, x, k + 1, of_items=True), x, k + 1, "neighbours")
    itself = ids == np.arange(len(rows))[:, None]
    itself[:, -1] |= ~itself.any(1)
    table = np.full((len(train), k), -1, np.int32)
    table[rows] = rows[ids[~itself].reshape(len(rows), k)]
    return table


def _choose(rng: np.random.Generator, logits: np.ndarray, count: int) -> np.ndarray:
    """Positions i64[B, count] of a draw without replacement, p ∝ exp(logit), in the order drawn (the
    Gumbel top-k trick): the first n are a draw of n, and positions at NEVER come last."""
    noisy = logits + rng.gumbel(size=logits.shape)
    if count == 1:
        return noisy.argmax(1)[:, None]
    top = np.argpartition(-noisy, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(noisy, top, 1), axis=1)
    return np.take_along_axis(top, order, 1)


def _draw(rng: np.random.Generator, table: np.ndarray, logits: np.ndarray, count: int) -> np.ndarray:
    """Items i32[B, count] of `_choose` from table i32[B, L]; where a row has fewer, -1 at the end."""
    picked = _choose(rng, logits, min(count, table.shape[1]))
    items = np.take_along_axis(table, picked, 1)
    return np.pad(items, ((0, 0), (0, count - items.shape[1])), constant_values=-1)


def raw_sequences(
    rng: np.random.Generator, cells: Cells, neighbours: np.ndarray, starts: np.ndarray, length: int
) -> np.ndarray:
    """i32[B, length]: half random walks on the kNN graph with restart 0.1, half random orders in a cell.

    starts: i32[B] training items. A stand-in for the natural sequences the paper pretrains on.
    """
    walks = np.empty((len(starts), length), np.int32)
    walks[:, 0] = starts
    for t in range(1, length):
        step = neighbours[walks[:, t - 1], rng.integers(0, neighbours.shape[1], len(starts))]
        walks[:, t] = np.where(rng.random(len(starts)) < 0.1, starts, step)
    cell = cells.membership[rng.integers(0, len(cells.membership), len(starts)), starts]
    in_cell = (rng.random(len(starts)) < 0.5) & (cell >= 0)
    table = cells.members[cell]
    sizes = (table >= 0).sum(1)
    in_cell &= sizes >= length
    if in_cell.any():
        logits = np.where(table[in_cell] >= 0, 0.0, NEVER)
        walks[in_cell] = _draw(rng, table[in_cell], logits, length)
    return walks


def locality_walk(
    rng: np.random.Generator,
    cells: Cells,
    neighbours: np.ndarray,
    density: np.ndarray,
    cell: np.ndarray,
    domain: np.ndarray,
    length: int,
    *,
    slack: float = 0.05,
) -> np.ndarray:
    """GTG-style walk i32[B, length]: near neighbours of the same cell whose density is at least the
    running best less `slack` (density scaled to 0..1 inside the cell), no repeats.

    Where no neighbour qualifies, the walk jumps to a random cell item that does, or to any unvisited one;
    the walk is sorted at the end, so a jump costs smoothness, not order. A cell of fewer than `length`
    items is walked whole and padded with -1.
    """
    table, rows = cells.members[cell], np.arange(len(cell))
    valid = table >= 0
    score = np.where(valid, density[domain[:, None], table], np.nan)
    low, high = np.nanmin(score, 1, keepdims=True), np.nanmax(score, 1, keepdims=True)
    span = np.maximum(high - low, 1e-6)
    scaled = np.where(valid, (score - low) / span, -1.0)
    first = _choose(rng, np.where(valid & (scaled <= 0.5), 0.0, NEVER), 1)[:, 0]
    walk = np.empty((len(cell), length), np.int32)
    walk[:, 0] = table[rows, first]
    best = scaled[rows, first]
    free = valid.copy()  # positions of the cell not yet visited
    free[rows, first] = False
    for t in range(1, length):
        near = neighbours[walk[:, t - 1]]  # [B, k]
        near_score = (density[domain[:, None], near] - low) / span
        fresh = ~(walk[:, :t, None] == near[:, None]).any(1)
        inside = cells.membership[cells.run[cell][:, None], near] == cell[:, None]
        ok = inside & fresh & (near_score >= best[:, None] - slack)
        stuck = ~ok.any(1)
        step = near[rows, _choose(rng, np.where(ok, 0.0, NEVER), 1)[:, 0]]
        if stuck.any():
            better = free[stuck] & (scaled[stuck] >= best[stuck, None] - slack)
            logits = np.where(better, 0.0, np.where(free[stuck], -100.0, NEVER))
            jump = _choose(rng, logits, 1)[:, 0]
            step[stuck] = table[stuck, jump]
        step = np.where(free.any(1), step, -1)
        walk[:, t] = step
        free &= table != step[:, None]
        best = np.maximum(best, (density[domain, step] - low[:, 0]) / span[:, 0])
    return sort_by_density(walk, density, domain)


def sorted_bins(
    rng: np.random.Generator,
    cells: Cells,
    density: np.ndarray,
    cell: np.ndarray,
    domain: np.ndarray,
    length: int,
    *,
    bins: int = 8,
) -> np.ndarray:
    """BONET's SORT-SAMPLE inside a cell, i32[B, length]: equal-width density bins, an item of bin b drawn
    with weight exp((ρ_b - 1)/τ) / (|b| + K₀), then sorted. Padded with -1 where a cell is smaller.

    ρ is scaled to 0..1 inside the cell, ρ_b is the bin's midpoint, K₀ = 0.03 × the draws and
    τ = the 10th percentile of ρ, floored at 0.05 (papers' A.6).
    """
    table = cells.members[cell]
    valid = table >= 0
    score = np.where(valid, density[domain[:, None], table], np.nan)
    low, high = np.nanmin(score, 1, keepdims=True), np.nanmax(score, 1, keepdims=True)
    scaled = (score - low) / np.maximum(high - low, 1e-6)
    tau = np.maximum(_percentile(scaled, 10), 0.05)
    which = np.where(valid, np.minimum(np.nan_to_num(scaled) * bins, bins - 1).astype(int), bins)
    counts = (which[:, :, None] == np.arange(bins)).sum(1)  # [B, bins]
    midpoint = (np.arange(bins) + 0.5) / bins
    weight = (midpoint - 1) / tau - np.log(counts + 0.03 * length)
    logits = np.take_along_axis(np.pad(weight, ((0, 0), (0, 1)), constant_values=NEVER), which, 1)
    return sort_by_density(_draw(rng, table, logits, length), density, domain)


def _percentile(x: np.ndarray, percent: float) -> np.ndarray:
    """`np.nanpercentile` of each row of x [B, L], to the last bit and without its loop over rows: [B, 1]."""
    ordered = np.sort(x, axis=1)  # nan goes last
    last = (~np.isnan(x)).sum(1, keepdims=True) - 1
    at = last * (percent / 100)
    low = np.floor(at).astype(int)
    a, b = (np.take_along_axis(ordered, np.minimum(i, last), 1) for i in (low, low + 1))
    t, rest = (part.astype(x.dtype) for part in (at - low, 1 - (at - low)))
    return np.where(at - low < 0.5, a + (b - a) * t, b - (b - a) * rest)


def sort_by_density(items: np.ndarray, density: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Rows of items i32[B, T] in ascending density of their domain; padding (-1) goes last."""
    score = np.where(items >= 0, density[domain[:, None], items], np.inf)
    return np.take_along_axis(items, np.argsort(score, axis=1, kind="stable"), 1)


@dataclass(frozen=True)
class Tails:
    """Per domain and cell: the low items seeds are drawn from and the high-density tail.

    low, tail: i32[M, C, L] and i32[M, C, T] catalogue rows, padded with -1.
    """

    low: np.ndarray
    tail: np.ndarray


def fit_tails(
    cells: Cells, density: np.ndarray, seen: np.ndarray, *, share: float = 0.1, least: int = 8
) -> Tails:
    """Tail = the top `share` of a cell by density, at least `least` items. Low = its items that are known
    to lack the attribute, as the seeds of a question do; where fewer than `least` are known, the items of
    lowest density among the unknown make up the number.

    seen: i8[M, N], labels that were looked up (1, 0, and -1 for unknown).
    """
    domains, (count, longest) = len(density), cells.members.shape
    sizes = (cells.members >= 0).sum(1)
    tail_size = np.minimum(np.maximum(np.ceil(share * sizes).astype(int), least), sizes)
    low = np.full((domains, count, longest), -1, np.int32)
    tail = np.full((domains, count, int(tail_size.max())), -1, np.int32)
    for m in range(domains):
        ordered = sort_by_density(cells.members, density[m : m + 1], np.zeros(count, int))
        label = np.where(ordered >= 0, seen[m, ordered], 1)
        by_label = np.argsort(np.select([label == 0, label < 0], [0, 1], 2), axis=1, kind="stable")
        lacking, unknown = (label == 0).sum(1), (label < 0).sum(1)
        kept = np.maximum(lacking, np.minimum(lacking + unknown, least))
        low[m] = np.where(np.arange(longest) < kept[:, None], np.take_along_axis(ordered, by_label, 1), -1)
        from_top = sizes[:, None] - 1 - np.arange(tail.shape[2])
        top = np.take_along_axis(ordered, np.maximum(from_top, 0), 1)
        tail[m] = np.where(np.arange(tail.shape[2]) < tail_size[:, None], top, -1)
    return Tails(low[:, :, : max(1, int((low >= 0).sum(2).max()))], tail)


def seeds_and_tail(
    rng: np.random.Generator, tails: Tails, cell: np.ndarray, domain: np.ndarray, seeds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Seeds i32[B, seeds] from the low items (-1 at the end where it is smaller) and a random half of the
    tail, as a mask bool[B, T] over `tails.tail`: a cheap target distribution against collapse."""
    low, tail = tails.low[domain, cell], tails.tail[domain, cell]
    chosen = _draw(rng, low, np.where(low >= 0, 0.0, NEVER), seeds)
    order = np.argsort(np.where(tail >= 0, rng.random(tail.shape), 2.0), axis=1).argsort(1)
    half = np.ceil((tail >= 0).sum(1) / 2)
    return chosen, order < half[:, None]
