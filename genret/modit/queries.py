"""Queries of a trained MO-DiT: posterior mean, samples, their mean, and roll-outs.

A sample imitates one item and is a noisier query than a centroid, so the kind of query is always named.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from genret.diffusion.edm import Space
from genret.diffusion.retriever import Retriever
from genret.modit.protocol import Contexts
from genret.modit.stages import condition
from genret.modit.trajectories import sort_by_density
from genret.training import mesh as meshes
from genret.types import Condition, InputError, PyTree

HEUN_STEPS = 18
HEUN_CALLS = 2 * HEUN_STEPS - 1


@dataclass(frozen=True)
class MoDiT:
    """A trained model and what it needs to read a context: density f32[M, N] orders the seeds.

    Where the parameters are on a mesh, each of its devices makes its share of the queries, up to `block` at a
    time; then all processes must ask together.
    """

    retriever: Retriever
    params: PyTree
    space: Space
    embeddings: np.ndarray
    density: np.ndarray
    block: int = 256

    def queries(
        self, contexts: Contexts, guidance: float = 0.0, *, method: str = "posterior_mean", samples: int = 1,
        steps: int = HEUN_STEPS, rollout: int = 0, seed: int = 0, null: bool = False,
        order: str = "ascending",
    ) -> np.ndarray:  # fmt: skip
        """Unit-norm queries f32[Q, samples, D], independent draws; each of `rollout` rounds appends the query
        to the context and asks again, in blocks of one compiled shape. guidance 0 costs one network call,
        else two. null: ask under the null domain and in the order given, as a model that has seen no
        attribute must be. order: of the seeds by density; shuffled and descending as a model trained on such
        walks must be."""
        domain = np.full_like(contexts.domain, len(self.density)) if null else contexts.domain
        if order not in ("ascending", "shuffled", "descending"):
            raise InputError("order", f"unknown order {order!r}", "use ascending, shuffled or descending")
        items = contexts.seeds
        if not null and order != "shuffled":  # seeds are drawn in random order
            density = -self.density if order == "descending" else self.density
            items = sort_by_density(contexts.seeds, density, contexts.domain)
        domain, items = domain.repeat(samples), items.repeat(samples, 0)
        keys = jax.random.split(jax.random.key(seed), len(items))
        out = np.empty((len(items), self.embeddings.shape[1]), np.float32)
        parts = meshes.parts_beside(self.params)
        share = max(-(-self.block // parts), min(self.block, -(-len(items) // parts)))  # of each device
        for start in range(0, len(items), share * parts):
            at = np.arange(start, min(start + share * parts, len(items)))
            padded = np.resize(at, share * parts)
            given = condition(self.embeddings, items[padded], domain[padded])
            for turn in range(rollout + 1):
                w = np.float32(guidance) if guidance else None
                asked = meshes.place_beside(self.params, (given, keys[padded]))
                made = self.retriever.generate(self.params, self.space, *asked, w, method=method, steps=steps)
                made = np.asarray(meshes.local(made))[:, 0]
                given = _append(given, made) if turn < rollout else given
            out[at] = made[: len(at)]
        return out.reshape(len(contexts), samples, out.shape[1])


def _append(given: Condition, query: np.ndarray) -> Condition:
    """The context with one more item in the first free place (or a new one at the end)."""
    context = np.pad(np.asarray(given.context), ((0, 0), (0, 1), (0, 0)))
    mask = np.pad(np.asarray(given.mask), ((0, 0), (0, 1)))
    free = mask.sum(1)
    context[np.arange(len(query)), free], mask[np.arange(len(query)), free] = query, True
    return given.replace(context=context, mask=mask)
