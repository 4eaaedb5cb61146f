"""The discriminative rival: a query encoder trained straight on retrieval.

One hidden layer on the seed mean, added to it, under a multi-positive softmax over the training corpus.
Positives are the items of the seeds' latent cell that carry the attribute, by the labels that were looked
up or by the predictor's pseudo-labels: the same budget as everything else.
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
from genret.modit.stages import TrainingSet
from genret.modit.trajectories import seeds_and_tail
from genret.training.loop import FitOptions, fit
from genret.training.stage import Stage
from genret.types import Array, Terms


class QueryEncoder(nn.Module):
    """(seed mean f32[B, D], domain i32[B]) -> unit-norm query f32[B, D]; the seed mean at initialisation."""

    domains: int
    width: int = 512

    @nn.compact
    def __call__(self, x: Array, domain: Array) -> Array:
        onehot = jax.nn.one_hot(domain, self.domains)
        h = nn.gelu(
            nn.Dense(self.width, name="hidden")(jnp.concatenate([x * x.shape[-1] ** 0.5, onehot], -1))
        )
        return unit(x + nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros, name="out")(h))


def fit_contrastive(
    data: TrainingSet,
    positive: np.ndarray,
    workdir: Path,
    options: FitOptions,
    *,
    seeds: int,
    batch: int = 256,
    corpus: int = 32768,
    temperature: float = 0.05,
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Train on positives bool[M, N]; returns (seed means f32[Q, D], domain i32[Q]) -> queries f32[Q, D].

    corpus: softmax candidates per step, drawn from the training items (all of them if there are fewer).
    """
    model = QueryEncoder(len(positive))
    train = data.train
    size = min(corpus, len(train)) // batch * batch  # travels as rows of the batch

    def batches(step, _):
        rng = np.random.default_rng([options.seed, 31, step])
        cell, domain = rng.integers(0, len(data.cells.members), batch), rng.integers(0, len(positive), batch)
        items, _ = seeds_and_tail(rng, data.tails, cell, domain, seeds)
        x = (data.embeddings[items] * (items >= 0)[..., None]).sum(1)
        drawn = rng.choice(train, size, replace=False)
        inside = data.cells.membership[data.cells.run[cell][:, None], drawn] == cell[:, None]
        hit = inside & positive[domain[:, None], drawn] & ~(drawn == items[..., None]).any(1)
        return {"x": x, "domain": domain, "hit": hit, "drawn": drawn.reshape(batch, -1)}

    def loss(params, table, rows, _):
        q = model.apply({"params": params}, unit(rows["x"]), rows["domain"])
        logits = q @ table[rows["drawn"].reshape(-1)].T / temperature  # [B, corpus]
        log_p = jax.nn.log_softmax(logits, axis=-1)
        count = rows["hit"].sum(-1)
        value = -jnp.sum(jnp.where(rows["hit"], log_p, 0.0), -1) / jnp.maximum(count, 1)
        return Terms(value, (count > 0).astype(jnp.float32))

    width = data.embeddings.shape[1]
    stage = Stage(
        name=workdir.name,
        init=lambda key: model.init(key, jnp.zeros((1, width)), jnp.zeros(1, jnp.int32))["params"],
        loss=loss,
        batch=batches,
        rules=((r"", P()),),
        frozen=np.asarray(data.embeddings),
        card={"width": width, "domains": len(positive)},
    )
    params = fit(stage, workdir, options).ema
    encode = jax.jit(lambda x, m: model.apply({"params": params}, x, m))
    return lambda x, m: np.asarray(encode(x, m))
