"""Multi-positive softmax over the training corpus: retrieval itself as a differentiable loss.

Used twice: as the whole loss of the discriminative rival, and as the optional retrieval-aware term of
SFT. Positives are items of the seeds' latent cell that carry the attribute, as far as it was bought.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from genret.types import Array

LEAST_POSITIVES = 3  # a target of one or two items is mostly noise


@struct.dataclass
class Candidates:
    """What one batch adds to the corpus: hits i32[B, L], catalogue rows of the positives, padded with -1;
    known bool[B, L], those that are in the corpus already; seeds i32[B, S], places in the corpus, or -1."""

    hits: Array
    known: Array
    seeds: Array


@dataclass(frozen=True)
class Corpus:
    """The negatives: rows i32[n] of the catalogue, the same for every step, so that a batch stays small
    and may be split. place: i32[N+1], the position of a catalogue row in `rows`, or -1."""

    rows: np.ndarray
    place: np.ndarray

    def candidates(self, positives: np.ndarray, seeds: np.ndarray) -> Candidates:
        """positives: i32[B, L], seeds: i32[B, S] catalogue rows, padded with -1. A seed is no positive."""
        is_seed = (positives[:, :, None] == seeds[:, None]).any(-1)
        hits = np.where(is_seed, -1, positives).astype(np.int32)
        return Candidates(hits, self.place[hits] >= 0, self.place[seeds])


def make_corpus(train: np.ndarray, items: int, limit: int, seed: int = 0) -> Corpus:
    """All training rows i32[n] of a catalogue of `items`, or a random `limit` of them."""
    rows = np.asarray(train, np.int32)
    if limit < len(rows):
        rows = np.sort(np.random.default_rng([seed, 51]).choice(rows, limit, replace=False))
    place = np.full(items + 1, -1, np.int32)  # the last entry answers for padding
    place[rows] = np.arange(len(rows))
    return Corpus(rows, place)


def multi_positive_softmax(
    query: Array, table: Array, corpus: Array, candidates: Candidates, temperature: float
) -> tuple[Array, Array]:
    """(-mean over positives of log softmax(q·e / T), 1 where there are enough positives): f32[B] each.

    query: f32[B, D] unit-norm; table: f32[N, D]; corpus: i32[n]. The softmax is over the corpus and the
    row's own positives; seeds are left out of it, as evaluation leaves them out of the ranking.
    """
    logits = query @ table[corpus].T / temperature  # [B, n]
    # Padding points past the end, where a scatter writes nothing.
    seeds = jnp.where(candidates.seeds >= 0, candidates.seeds, logits.shape[1])
    logits = logits.at[jnp.arange(len(query))[:, None], seeds].set(-jnp.inf, mode="drop")
    hit = candidates.hits >= 0
    own = jnp.einsum("bd,bld->bl", query, table[jnp.maximum(candidates.hits, 0)]) / temperature
    extra = jnp.where(hit & ~candidates.known, own, -jnp.inf)
    total = jax.nn.logsumexp(jnp.concatenate([logits, extra], axis=1), axis=1)
    count = hit.sum(-1)
    value = -jnp.where(hit, own - total[:, None], 0.0).sum(-1) / jnp.maximum(count, 1)
    return value, (count >= LEAST_POSITIVES).astype(jnp.float32)
