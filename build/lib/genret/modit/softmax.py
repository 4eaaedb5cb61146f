"""Multi-positive softmax over the training corpus: retrieval itself as a differentiable loss.

Used twice: as the whole loss of the discriminative rival, and as the optional retrieval-aware term of
SFT. Positives are items of the seeds' latent cell that carry the attribute, as far as it was bought.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from genret.types import Array, InputError

LEAST_POSITIVES = 3  # a target of one or two items is mostly noise


@struct.dataclass
class Candidates:
    """drawn: i32[B, n/B], the n catalogue rows of this step's softmax, folded so that the leading axis is
    the batch. hits: i32[B, L] and seeds: i32[B, S], positions in `drawn`, padded with -1."""

    drawn: Array
    hits: Array
    seeds: Array


def draw_candidates(
    rng: np.random.Generator,
    train: np.ndarray,
    items: int,
    positives: np.ndarray,
    seeds: np.ndarray,
    limit: int,
) -> Candidates:
    """Every positive of the batch, filled up with random training rows to at most `limit` candidates.

    train: i32[n] training rows of a catalogue of `items`. positives: i32[B, L], seeds: i32[B, S]
    catalogue rows, padded with -1. A positive that does not fit, or is a seed, is a miss, not an error.
    Raises InputError where there are fewer candidates than rows in the batch.
    """
    batch = len(positives)
    size = min(limit, len(train)) // batch * batch
    if not size:
        raise InputError(
            "batch", f"{batch} exceeds the {min(limit, len(train))} softmax candidates", "lower it"
        )
    positives = np.where((positives[..., None] == seeds[:, None]).any(-1), -1, positives)
    wanted = np.unique(positives[positives >= 0])
    rest = rng.permutation(train)
    rest = rest[~np.isin(rest, wanted, assume_unique=True)] if size < len(train) else rest
    drawn = (np.concatenate([wanted, rest]) if size < len(train) else rest)[:size]
    place = np.full(items + 1, -1, np.int32)  # the last entry answers for padding
    place[drawn] = np.arange(size)
    return Candidates(drawn.astype(np.int32).reshape(batch, -1), place[positives], place[seeds])


def multi_positive_softmax(
    query: Array, table: Array, candidates: Candidates, temperature: float
) -> tuple[Array, Array]:
    """(-mean over positives of log softmax(q·e / T), 1 where there are enough positives): f32[B] each.

    query: f32[B, D] unit-norm; table: f32[N, D]. Seeds are left out of the softmax, as evaluation leaves
    them out of the ranking.
    """
    logits = query @ table[candidates.drawn.reshape(-1)].T / temperature  # [B, n]
    rows = jnp.arange(len(query))[:, None]
    # Padding points past the end, where a scatter writes nothing.
    seeds = jnp.where(candidates.seeds >= 0, candidates.seeds, logits.shape[1])
    log_p = jax.nn.log_softmax(logits.at[rows, seeds].set(-1e9, mode="drop"), axis=-1)
    hit = candidates.hits >= 0
    found = jnp.where(hit, jnp.take_along_axis(log_p, jnp.maximum(candidates.hits, 0), axis=1), 0.0)
    count = hit.sum(-1)
    return -found.sum(-1) / jnp.maximum(count, 1), (count >= LEAST_POSITIVES).astype(jnp.float32)
