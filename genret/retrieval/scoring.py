"""Labels for candidate queries by real retrieval: Joint, Attribute and Purity at K, as one compiled function.

The corpus is spread over the mesh as in `ExactIndex`; queries go through it in large blocks, and of each
ranking only three counts come back to the host.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from genret.retrieval.index import ExactIndex, Index, search_rows
from genret.types import Array, InputError


class Counts(NamedTuple):
    """Items among the top K of every candidate, i32[Q, C] each: with the attribute and of the pattern
    (joint), with the attribute, of the pattern."""

    joint: np.ndarray
    attribute: np.ndarray
    purity: np.ndarray


class Scorer:
    """Scores candidates against a fixed corpus.

    embeddings: f32[n, D]. labels: i8[M, n] of 1, 0 and -1; an unknown label is passed over, and the ranking
    filled from below, as in evaluation. patterns: i32[R, n], the pattern of every item in each of R
    partitions (-1: none). index: search it instead of the mesh, on the host (ScaNN).

    Raises InputError where shapes disagree or k exceeds the corpus.
    """

    def __init__(
        self, embeddings: np.ndarray, labels: np.ndarray, patterns: np.ndarray, k: int, *,
        mesh: Mesh | None = None, index: Index | None = None, block: int = 2048,
    ):  # fmt: skip
        items = len(embeddings)
        if index is not None and index.num_items != items:
            raise InputError(
                "index", f"holds {index.num_items} of {items} items", "build it on these embeddings"
            )
        if labels.shape[1:] != (items,) or patterns.shape[1:] != (items,):
            problem = f"{labels.shape} labels and {patterns.shape} patterns for {items} items"
            raise InputError("labels", problem, "pass [M, n] and [R, n]")
        if not 1 <= k < items:
            raise InputError("k", f"{k} of {items} items", f"use 1 to {items - 1}")
        self.index = index or ExactIndex(embeddings, mesh=mesh, query_block=block)
        self.labels, self.patterns, self.k, self.block = jnp.asarray(labels), jnp.asarray(patterns), k, block
        self.num_items, self.spare = items, 0

    @property
    def flops(self) -> int:
        """Floating-point operations that scoring one candidate takes: 2 n D."""
        return 2 * self.num_items * self.index.width

    def __call__(
        self, candidates: np.ndarray, *, domain: np.ndarray, partition: np.ndarray, pattern: np.ndarray,
        exclude: np.ndarray,
    ) -> Counts:  # fmt: skip
        """candidates: f32[Q, C, D]; domain, partition, pattern: i32[Q], what each context asks for;
        exclude: i32[Q, S] items of this corpus that do not count (its seeds), padded with -1."""
        q, c, width = candidates.shape
        flat = np.asarray(candidates, np.float32).reshape(q * c, width)
        asked = [np.repeat(np.asarray(a, np.int32), c, 0) for a in (domain, partition, pattern, exclude)]
        bad = ~np.isfinite(flat).all(axis=1)
        if bad.any():
            at = divmod(int(bad.argmax()), c)
            raise InputError(
                "candidates", f"context {at[0]}, candidate {at[1]} is not finite", "see its maker"
            )
        out = np.empty((3, q * c), np.int32)
        pending = np.arange(q * c)
        while len(pending):
            depth = min(self.k + exclude.shape[1] + self.spare, self.num_items)
            found = self._counts(flat[pending], [a[pending] for a in asked], depth)
            full = (found[3] == self.k) | (depth == self.num_items)
            out[:, pending[full]] = found[:3, full]
            if not full.all():  # too many unknown labels on the way: look deeper, from now on
                self.spare = 2 * self.spare + self.k
            pending = pending[~full]
        return Counts(*out.reshape(3, q, c))

    def _counts(self, queries: np.ndarray, asked: list[np.ndarray], depth: int) -> np.ndarray:
        out = np.empty((4, len(queries)), np.int32)
        for start in range(0, len(queries), self.block):
            here = np.arange(start, min(start + self.block, len(queries)))
            # One compiled shape but for the last block, which is a power of two.
            size = min(self.block, max(32, 1 << (len(here) - 1).bit_length()))
            rows = np.resize(here, size)
            block, of = queries[rows], [a[rows] for a in asked]
            if isinstance(self.index, ExactIndex):
                index = self.index
                counts = _search_and_count(
                    block, index.rows, self.labels, self.patterns, *of, k=self.k, depth=depth,
                    num_items=self.num_items, block=index.block, mesh=index.mesh,
                )  # fmt: skip
            else:
                ids, _ = self.index.search(block, depth)
                counts = _count(ids, self.labels, self.patterns, *of, k=self.k)
            out[:, here] = np.asarray(counts)[:, : len(here)]
        return out


@partial(jax.jit, static_argnames=("k", "depth", "num_items", "block", "mesh"))
def _search_and_count(
    queries, rows, labels, patterns, domain, partition, pattern, exclude, *, k, depth, num_items, block, mesh
):
    ids, _ = search_rows(queries, rows, k=depth, num_items=num_items, block=block, mesh=mesh)
    return count(ids, labels, patterns, domain, partition, pattern, exclude, k=k)


def count(
    ids: Array, labels: Array, patterns: Array, domain: Array, partition: Array, pattern: Array,
    exclude: Array, *, k: int,
) -> Array:  # fmt: skip
    """Joint, Attribute, Purity and judged items among the first k usable ones of rankings i32[q, L]:
    i32[4, q]. Usable: not excluded, and with a known label in the domain asked for."""
    label = labels[domain[:, None], ids]
    usable = (label >= 0) & ~(ids[:, :, None] == exclude[:, None]).any(-1)
    top = usable & (jnp.cumsum(usable, axis=1) <= k)
    attribute = top & (label == 1)
    same = top & (patterns[partition[:, None], ids] == pattern[:, None])
    return jnp.stack([x.sum(1) for x in (attribute & same, attribute, same, top)])


_count = partial(jax.jit, static_argnames=("k",))(count)
