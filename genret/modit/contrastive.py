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
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from genret.diffusion.edm import unit
from genret.modit.softmax import make_corpus, most_positives, multi_positive_softmax
from genret.modit.stages import TrainingSet, embedded
from genret.modit.trajectories import seeds_and_tail
from genret.training.loop import FitOptions, fit
from genret.training.mesh import local
from genret.training.rows import ByRow
from genret.training.stage import Stage
from genret.types import Array, Terms


class QueryEncoder(nn.Module):
    """(seed mean f32[B, D], domain i32[B]) -> unit-norm query f32[B, D]; the seed mean at initialisation.

    One linear map and shift per domain. A hidden layer shared by all domains was tried on MOSES and lost:
    it overfits the training cells.
    """

    domains: int

    @nn.compact
    def __call__(self, x: Array, domain: Array) -> Array:
        size, zeros = x.shape[-1], nn.initializers.zeros
        maps = self.param("kernel", zeros, (self.domains, size, size))
        shifts = self.param("bias", zeros, (self.domains, size))
        # Every domain's product, then its own, as in `DiT`: far cheaper than a gather of maps.
        moved = jnp.einsum("bd,mde->bme", x, maps) + shifts
        return unit(x + jnp.take_along_axis(moved, domain[:, None, None], axis=1)[:, 0])


def fit_contrastive(
    data: TrainingSet,
    positive: np.ndarray,
    workdir: Path,
    options: FitOptions,
    *,
    seeds: int,
    batch: int,
    corpus: int,
    temperature: float,
    mesh: Mesh | None = None,
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Train on positives bool[M, N]; returns (seed means f32[Q, D], domain i32[Q]) -> queries f32[Q, D].

    corpus: most negatives of the softmax. A finished run in `workdir` is read back.
    """
    stage = contrastive_stage(
        workdir.name, data, positive, seeds=seeds, batch=batch, corpus=corpus, temperature=temperature,
        seed=options.seed,
    )  # fmt: skip
    params, model = local(fit(stage, workdir, options, mesh=mesh).ema), QueryEncoder(len(positive))
    encode = jax.jit(lambda x, m: model.apply({"params": params}, x, m))
    return lambda x, m: np.asarray(encode(x, m))


def contrastive_stage(
    name: str, data: TrainingSet, positive: np.ndarray, *, seeds: int, batch: int, corpus: int,
    temperature: float, seed: int = 0,
) -> Stage:  # fmt: skip
    """The stage that `fit_contrastive` trains."""
    model, size = QueryEncoder(len(positive)), data.embeddings.shape[1]
    most = most_positives(data.cells.members, positive)
    negatives = make_corpus(data.train, len(data.embeddings), corpus, seed, most)

    def batches(step, _):
        rng = np.random.default_rng([seed, 31, step])
        cell = rng.integers(0, len(data.cells.members), batch)
        domain = rng.integers(0, len(positive), batch)
        items, _ = seeds_and_tail(rng, data.tails, cell, domain, seeds)
        seen = embedded(data.embeddings, items)
        x = ByRow((batch, size), lambda rows: seen.read(rows).sum(1))
        members = data.cells.members[cell]
        hits = np.where((members >= 0) & positive[domain[:, None], members], members, -1)
        return {"x": x, "domain": domain, "candidates": negatives.candidates(hits, items)}

    def loss(params, frozen, rows, _):
        q = model.apply({"params": params}, unit(rows["x"]), rows["domain"])
        return Terms(
            *multi_positive_softmax(q, frozen["table"], frozen["corpus"], rows["candidates"], temperature)
        )

    return Stage(
        name=name,
        init=lambda key: model.init(key, jnp.zeros((1, size)), jnp.zeros(1, jnp.int32))["params"],
        loss=loss,
        batch=batches,
        rules=((r"", P()),),
        frozen={"table": np.asarray(data.embeddings), "corpus": negatives.rows},
        card={"embedding": size, "domains": len(positive)},
    )
