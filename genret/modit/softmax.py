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

from genret.types import Array, InputError

LEAST_POSITIVES = 3  # a target of one or two items is mostly noise
_COLUMNS = 1024  # of the logits exist at once: a CPU's cache holds these


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
    and may be split. place: i32[N+1], the position of a catalogue row in `rows`, or -1. most: positives of a
    row, at most (None: as many as it is given places for)."""

    rows: np.ndarray
    place: np.ndarray
    most: int | None = None

    def candidates(self, positives: np.ndarray, seeds: np.ndarray) -> Candidates:
        """positives: i32[B, L], seeds: i32[B, S] catalogue rows, padded with -1. A seed is no positive.
        Raises InputError where a row has more than `most`."""
        if self.most is not None:
            there = positives >= 0
            if (there.sum(1) > self.most).any():
                problem = f"{there.sum(1).max()} in a row, most is {self.most}"
                raise InputError("positives", problem, "count them with `most_positives`")
            first = np.argsort(~there, axis=1, kind="stable")[:, : self.most]
            positives = np.take_along_axis(positives, first, 1)
        is_seed = (positives[:, :, None] == seeds[:, None]).any(-1)
        hits = np.where(is_seed, -1, positives).astype(np.int32)
        return Candidates(hits, self.place[hits] >= 0, self.place[seeds])


def most_positives(members: np.ndarray, positive: np.ndarray) -> int:
    """The most items of one row of `positive` bool[M, N] in a cell of members i32[C, L] (-1 is padding), 1 at
    least: far fewer than L, and the loss reads an embedding for each place."""
    return max(1, *(int((has[members] & (members >= 0)).sum(1).max()) for has in positive))


def make_corpus(train: np.ndarray, items: int, limit: int, seed: int = 0, most: int | None = None) -> Corpus:
    """All training rows i32[n] of a catalogue of `items`, or a random `limit` of them."""
    rows = np.asarray(train, np.int32)
    if limit < len(rows):
        rows = np.sort(np.random.default_rng([seed, 51]).choice(rows, limit, replace=False))
    place = np.full(items + 1, -1, np.int32)  # the last entry answers for padding
    place[rows] = np.arange(len(rows))
    return Corpus(rows, place, most)


def multi_positive_softmax(
    query: Array, table: Array, corpus: Array, candidates: Candidates, temperature: float
) -> tuple[Array, Array]:
    """(-mean over positives of log softmax(q·e / T), 1 where there are enough positives): f32[B] each.

    query: f32[B, D] unit-norm; table: f32[N, D]; corpus: i32[n]. The softmax is over the corpus and the
    row's own positives; seeds are left out of it, as evaluation leaves them out of the ranking.
    """
    rest = log_partition(query / temperature, table, corpus, candidates.seeds)[:, None]
    hit = candidates.hits >= 0
    own = jnp.einsum("bd,bld->bl", query, table[jnp.maximum(candidates.hits, 0)]) / temperature
    extra = jnp.where(hit & ~candidates.known, own, -jnp.inf)
    total = jax.nn.logsumexp(jnp.concatenate([rest, extra], axis=1), axis=1)
    count = hit.sum(-1)
    value = -jnp.where(hit, own - total[:, None], 0.0).sum(-1) / jnp.maximum(count, 1)
    return value, (count >= LEAST_POSITIVES).astype(jnp.float32)


def _log_sum_exp(query: Array, table: Array, corpus: Array, seeds: Array) -> Array:
    logits = query @ table[corpus].T
    # Padding points past the end, where a scatter writes nothing.
    seeds = jnp.where(seeds >= 0, seeds, logits.shape[1])
    logits = logits.at[jnp.arange(len(query))[:, None], seeds].set(-jnp.inf, mode="drop")
    return jax.nn.logsumexp(logits, axis=1)


@jax.custom_vjp
def log_partition(query: Array, table: Array, corpus: Array, seeds: Array) -> Array:
    """log Σ exp(q · e) over the rows e of a corpus but the seeds, f32[B], and its gradient, in one pass.

    query: f32[B, D]; table: f32[N, D]; corpus: i32[n], rows of it; seeds: i32[B, S], places in the corpus, or
    -1. The gradient of a query is the corpus' mean under its softmax, so it is summed beside the value, as
    attention does (Rabe & Staats 2021, arXiv 2112.05682), and the logits [B, n] are never there. The table's
    gradient, where somebody wants it, forms them.
    """
    return _one_pass(query, table, corpus, seeds)[0]


def _one_pass(query: Array, table: Array, corpus: Array, seeds: Array) -> tuple[Array, Array]:
    count, (batch, width) = len(corpus), query.shape
    size = min(_COLUMNS, count)
    parts = -(-count // size)
    blocks = table[jnp.pad(corpus, (0, parts * size - count))].reshape(parts, size, width)
    column, row = jnp.arange(size), jnp.arange(batch)[:, None]

    def part(carry: tuple[Array, Array, Array], given: tuple[Array, Array]):
        top, total, mean = carry  # of what came before: maximum, Σ exp(· - top), Σ exp(· - top) e
        rows, first = given
        logits = jnp.where(first + column < count, query @ rows.T, -jnp.inf)
        inside = (seeds >= first) & (seeds < first + size)
        logits = logits.at[row, jnp.where(inside, seeds - first, size)].set(-jnp.inf, mode="drop")
        new = jnp.maximum(top, logits.max(1))
        share, kept = jnp.exp(logits - new[:, None]), jnp.exp(top - new)
        return (new, total * kept + share.sum(1), mean * kept[:, None] + share @ rows), None

    # Finite, so that a block of nothing but seeds leaves zeros and no nan.
    nothing = jnp.full(batch, jnp.finfo(jnp.float32).min), jnp.zeros(batch), jnp.zeros_like(query)
    (top, total, mean), _ = jax.lax.scan(part, nothing, (blocks, jnp.arange(parts) * size))
    return top + jnp.log(total), mean / total[:, None]


def _forward(query: Array, table: Array, corpus: Array, seeds: Array):
    value, slope = _one_pass(query, table, corpus, seeds)
    return value, (slope, query, table, corpus, seeds)


def _backward(kept: tuple[Array, ...], g: Array):
    slope, query, table, corpus, seeds = kept
    _, pull = jax.vjp(lambda table: _log_sum_exp(query, table, corpus, seeds), table)
    return g[:, None] * slope, *pull(g), None, None


log_partition.defvjp(_forward, _backward)
