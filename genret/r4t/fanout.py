"""Fan-outs of a trained set retriever: L rows of a set in one joint draw, of which k are emitted.

The paper draws 12 rows and emits 10, without a word on which. Rows of one draw repeat each other, and some
land between contents. Ours, by maximal marginal relevance to the query:

    `SetRetriever.sets`      of the rows: where the index is not to be asked
    `SetRetriever.grounded`  of the contents that they land on, where a row gains by landing near its own
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genret.diffusion.edm import SIGMA_MAX, SIGMA_MIN, Space
from genret.diffusion.retriever import Method, Retriever
from genret.r4t.prompts import K
from genret.r4t.stages import condition
from genret.retrieval.index import Index
from genret.retrieval.sets import traced_mmr
from genret.training import mesh as meshes
from genret.training import processes
from genret.types import Array, InputError, PyTree

SDE_STEPS = 256  # the paper's sampler
GUIDANCE = 0.1


def network_calls(method: Method, steps: int, guidance: float = 0.0) -> int:
    """Calls of the network that one draw costs, both branches of the guidance counted."""
    calls = {"posterior_mean": 1, "heun": 2 * steps - 1}.get(method, steps)
    return calls * (2 if guidance else 1)


@functools.partial(jax.jit, static_argnames="k")
def chosen(queries: Array, found: Array, bonus: Array, k: int) -> Array:
    """k of L candidates for each query by maximal marginal relevance, in that order: i32[B, k].

    found: f32[B, L, D], unit-norm. The relevance of one is its cosine with the query f32[B, D], plus its
    bonus f32[B, L].
    """

    def choose(query: Array, own: Array, bonus: Array) -> Array:
        relevance = jnp.matmul(own, query, precision=jax.lax.Precision.HIGHEST) + bonus
        return traced_mmr(relevance, own, k)

    return jax.vmap(choose)(queries, found, bonus)


@functools.partial(jax.jit, static_argnames="k")
def kept(queries: Array, rows: Array, k: int) -> Array:
    """Of the rows drawn, f32[B, L, D] -> f32[B, k, D], by `chosen`; with k = L they stay as drawn."""
    if k == rows.shape[1]:
        return rows
    picks = chosen(queries, rows, jnp.zeros(rows.shape[:2]), k)
    return jnp.take_along_axis(rows, picks[..., None], axis=1)


def grounded(
    rows: np.ndarray, queries: np.ndarray, k: int, index: Index, contents: np.ndarray, *, weight: float,
    block: int = 1024,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Rows f32[Q, L, D] -> sets f32[Q, k, D] and the contents i32[Q, k] that they land on: k of the L rows,
    those whose contents are `chosen`; the bonus of one is `weight` times its cosine with its content.

    queries: unit-norm f32[Q, D]. index: of contents, unit-norm f32[N, D]. block: most queries at once. A row
    of zeros is none: it is chosen last, and lands on -1. Raises InputError for k > L.
    """
    if not 1 <= k <= rows.shape[1]:
        raise InputError("k", f"{k} of the {rows.shape[1]} rows drawn", f"use 1 to {rows.shape[1]}")
    ids, near = (x.reshape(rows.shape[:2]) for x in index.search(rows.reshape(-1, rows.shape[-1]), 1))
    real = rows.any(-1)
    bonus = np.where(real, np.float32(weight) * near, np.float32(-1e6))
    blocks = np.array_split(np.arange(len(rows)), max(1, -(-len(rows) // block)))
    picks = [chosen(queries[at], np.float32(contents[ids[at]]), bonus[at], k) for at in blocks]
    # Each process has its own index, and searches on with what is chosen.
    picks = np.array(processes.agreed("sets", np.concatenate(picks).tolist()))
    ids = np.where(real, ids, -1)
    return np.take_along_axis(rows, picks[..., None], 1), np.take_along_axis(ids, picks, 1)


@dataclass(frozen=True)
class SetRetriever:
    """A trained set model. rows: L, drawn at a time; without row positions it may differ from the L trained
    with. block: most queries at once, on each device of the mesh that holds the parameters, if they are on
    one (then all processes must ask together)."""

    retriever: Retriever
    params: PyTree
    space: Space
    rows: int = K
    block: int = 1024

    def sets(
        self, queries: np.ndarray, k: int | None = None, *, method: Method = "euler_maruyama",
        steps: int = SDE_STEPS, guidance: float = GUIDANCE, seed: int = 0,
        levels: tuple[float, float] = (SIGMA_MIN, SIGMA_MAX),
    ) -> np.ndarray:  # fmt: skip
        """Unit-norm queries f32[Q, D] -> sets f32[Q, k, D], unit-norm: the k of L rows drawn that are `kept`.

        levels: least and largest σ of the schedule.
        Query q's draw depends on `seed` and q alone. Runs in blocks of one compiled shape; `network_calls`
        says what a draw costs. Raises InputError for k > L, and for the posterior mean of a model whose rows
        have no positions: they would all be the same.
        """
        k = self.rows if k is None else k
        if not 1 <= k <= self.rows:
            raise InputError("k", f"{k} of the {self.rows} rows drawn", f"use 1 to {self.rows}")
        if method == "posterior_mean" and not self.retriever.model.row_positions and k > 1:
            problem = "gives all rows of an equivariant model the same value"
            raise InputError("method", f"posterior_mean {problem}", "use a sampler")
        out = np.empty((len(queries), k, queries.shape[1]), np.float32)
        keys = jax.random.split(jax.random.key(seed), len(queries))
        parts = meshes.parts_beside(self.params)
        size = parts * min(self.block, -(-len(queries) // parts))
        w = np.float32(guidance) if guidance else None
        for start in range(0, len(queries), size):
            at = np.arange(start, min(start + size, len(queries)))
            padded = np.resize(at, size)
            # One block is the common case, and taking all of an array costs a millisecond.
            own = keys if size == len(queries) else keys[padded]
            asked = meshes.place_beside(self.params, (condition(queries[padded]), own))
            drawn = self.retriever.generate(
                self.params, self.space, *asked, w, method=method, steps=steps, rows=self.rows, levels=levels
            )
            out[at] = np.asarray(kept(queries[padded], meshes.local(drawn), k))[: len(at)]
        return out

    def grounded(
        self, queries: np.ndarray, k: int, index: Index, contents: np.ndarray, *, weight: float, **how: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Unit-norm queries f32[Q, D] -> sets f32[Q, k, D] and the contents i32[Q, k] that they land on: k of
        the L rows drawn, by the function of this name. how: as `sets` takes it. Raises InputError for k > L.
        """
        rows = self.sets(queries, **how)
        return grounded(rows, queries, k, index, contents, weight=weight, block=self.block)
