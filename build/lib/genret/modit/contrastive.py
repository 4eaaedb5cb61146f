"""The discriminative rival: a query encoder trained straight on retrieval (`softmax`).

Its positives come from the labels that were looked up or from the predictor's pseudo-labels: the same
budget as everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from genret.diffusion.edm import unit
from genret.modit.softmax import draw_candidates, multi_positive_softmax
from genret.modit.stages import TrainingSet
from genret.modit.trajectories import seeds_and_tail
from genret.training.loop import FitOptions, fit
from genret.training.stage import Stage
from genret.types import Array, Terms


class QueryEncoder(nn.Module):
    """(seed mean f32[B, D], domain i32[B]) -> unit-norm query f32[B, D]; the seed mean at initialisation.

    One linear map per domain, or one hidden layer of `width` that all domains share. The linear map has
    been the stronger one at every label budget tried: it overfits the training cells less.
    """

    domains: int
    width: int = 0

    @nn.compact
    def __call__(self, x: Array, domain: Array) -> Array:
        size, zeros = x.shape[-1], nn.initializers.zeros
        if self.width:
            onehot = jax.nn.one_hot(domain, self.domains)
            h = nn.Dense(self.width, name="hidden")(jnp.concatenate([x * size**0.5, onehot], -1))
            return unit(x + nn.Dense(size, kernel_init=zeros, name="out")(nn.gelu(h)))
        maps = self.param("kernel", zeros, (self.domains, size, size))
        shifts = self.param("bias", zeros, (self.domains, size))
        return unit(x + jnp.einsum("bd,bde->be", x, maps[domain]) + shifts[domain])


def fit_contrastive(
    data: TrainingSet,
    positive: np.ndarray,
    workdir: Path,
    options: FitOptions,
    *,
    seeds: int,
    batch: int = 256,
    corpus: int = 32768,
    width: int = 0,
    temperature: float = 0.03,
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Train on positives bool[M, N]; returns (seed means f32[Q, D], domain i32[Q]) -> queries f32[Q, D].

    corpus: softmax candidates per step (all training items if there are fewer). width: see QueryEncoder.
    """
    model = QueryEncoder(len(positive), width)

    def batches(step, _):
        rng = np.random.default_rng([options.seed, 31, step])
        cell = rng.integers(0, len(data.cells.members), batch)
        domain = rng.integers(0, len(positive), batch)
        items, _ = seeds_and_tail(rng, data.tails, cell, domain, seeds)
        x = (data.embeddings[items] * (items >= 0)[..., None]).sum(1)
        members = data.cells.members[cell]
        hits = np.where((members >= 0) & positive[domain[:, None], members], members, -1)
        found = draw_candidates(rng, data.train, len(data.embeddings), hits, items, corpus)
        return {"x": x, "domain": domain, "candidates": found}

    def loss(params, table, rows, _):
        q = model.apply({"params": params}, unit(rows["x"]), rows["domain"])
        return Terms(*multi_positive_softmax(q, table, rows["candidates"], temperature))

    size = data.embeddings.shape[1]
    stage = Stage(
        name=workdir.name,
        init=lambda key: model.init(key, jnp.zeros((1, size)), jnp.zeros(1, jnp.int32))["params"],
        loss=loss,
        batch=batches,
        rules=((r"", P()),),
        frozen=np.asarray(data.embeddings),
        card={"embedding": size, "domains": len(positive), "width": width},
    )
    params = fit(stage, workdir, options).ema
    encode = jax.jit(lambda x, m: model.apply({"params": params}, x, m))
    return lambda x, m: np.asarray(encode(x, m))
