"""Fan-outs of a trained set retriever: all K rows of a set in one joint draw.

`items.nearest_items` maps them to contents.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from genret.diffusion.edm import SIGMA_MAX, SIGMA_MIN, Space
from genret.diffusion.retriever import Method, Retriever
from genret.r4t.prompts import K
from genret.r4t.stages import condition
from genret.retrieval.sets import traced_mmr
from genret.training import mesh as meshes
from genret.types import Array, InputError, PyTree

SDE_STEPS = 256  # the paper's sampler
GUIDANCE = 0.1


def network_calls(method: Method, steps: int, guidance: float = 0.0) -> int:
    """Calls of the network that one draw costs, both branches of the guidance counted."""
    calls = {"posterior_mean": 1, "heun": 2 * steps - 1}.get(method, steps)
    return calls * (2 if guidance else 1)


@functools.partial(jax.jit, static_argnames="k")
def kept(queries: Array, rows: Array, k: int) -> Array:
    """k of the L rows drawn for each query, f32[B, D] and f32[B, L, D] -> f32[B, k, D]; ours.

    The paper draws 12 rows and emits 10, without a word on which. Rows of one draw can repeat each other:
    those of maximal marginal relevance to the query stay, in that order. With k = L they stay as drawn.
    """
    if k == rows.shape[1]:
        return rows

    def choose(query: Array, own: Array) -> Array:
        relevance = jnp.matmul(own, query, precision=jax.lax.Precision.HIGHEST)
        return own[traced_mmr(relevance, own, k)]

    return jax.vmap(choose)(queries, rows)


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
