"""Metrics of sets: diversity, groundedness, what the union of several searches finds; and MMR and DPP.

Rows are unit-norm embeddings; a row of zeros is padding wherever a docstring says so. The Vendi score is
that of Friedman and Dieng 2023 (arXiv 2210.02410), of order 1; R4T (arXiv 2603.06397) uses it as a reward
(its eq. 2) and as a metric (its appendix B).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genret.types import Array, InputError


class Vendi(NamedTuple):
    """The score VS in 1..n, and its two normalisations: (VS - 1) / (n - 1) in 0..1, and VS / n."""

    score: float
    normalised: float
    share: float


def vendi(rows: np.ndarray) -> Vendi:
    """Vendi score of unit-norm rows f32[n, D]: exp of the entropy of the eigenvalues of X Xᵀ / n.

        VS = exp(-Σ_j λ_j ln λ_j)

    Taken from the D x D dual Xᵀ X / n where D < n: the non-zero eigenvalues are the same. VS is 1 for n
    copies, n for orthonormal rows, and never above min(n, D). `normalised` is 0 for a single row.
    Raises InputError if there is no row, or one is not of unit norm.
    """
    rows = _checked("rows", rows).astype(np.float64)
    n, width = rows.shape
    gram = rows.T @ rows if width < n else rows @ rows.T
    eigenvalues = np.linalg.eigvalsh(gram / n)
    positive = eigenvalues[eigenvalues > 0]
    score = float(np.exp(-(positive * np.log(positive)).sum()))
    return Vendi(score, (score - 1) / (n - 1) if n > 1 else 0.0, score / n)


@jax.jit
def vendi_groups(rows: Array) -> Array:
    """Vendi scores f32[G] of sets f32[G, k, D] at once; rows of zeros are padding, a set of them scores 0."""
    count = jnp.any(rows != 0, axis=-1).sum(-1)  # [G]
    gram = jnp.einsum("gid,gjd->gij", rows, rows, precision=jax.lax.Precision.HIGHEST)
    # Padding adds eigenvalues of 0, and 0 ln 0 = 0; rounding can put one a little below.
    share = jnp.maximum(jnp.linalg.eigvalsh(gram / jnp.maximum(count, 1)[:, None, None]), 0.0)
    entropy = -jax.scipy.special.xlogy(share, jnp.maximum(share, 1e-30)).sum(-1)
    return jnp.where(count > 0, jnp.exp(entropy), 0.0)


def vendi_of_runs(runs: Sequence[np.ndarray]) -> Vendi:
    """R4T's appendix B: Vendi over N repeated runs for one query, each run the mean of its sub-queries.

    runs: N arrays f32[k_i, D] of unit-norm rows. A mean is scaled back to unit norm, as the score wants
    a kernel with a diagonal of ones. Raises InputError for no run, an empty one, or a mean of zero.
    """
    means = np.stack([_checked("runs", run).mean(0) for run in _several("runs", runs)])
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    if (norms < 1e-6).any():
        problem = f"run {int(norms.argmin())} averages to zero"
        raise InputError("runs", problem, "Its mean has no direction: leave it out.")
    return vendi(means / norms)


def vendi_of_subqueries(runs: Sequence[np.ndarray]) -> Vendi:
    """The other protocol, of R4T's table 2: Vendi over all sub-queries of the N runs together.

    runs: as for `vendi_of_runs`. The caption's "normalised" is `normalised` or `share`: it does not say.
    """
    return vendi(np.concatenate([_checked("runs", run) for run in _several("runs", runs)]))


def coherence(rows: np.ndarray) -> np.ndarray:
    """Mean cosine over pairs, 2 / (m (m - 1)) Σ_{i<j} x_i · x_j, of sets f32[..., k, D] -> f64[...].

    Rows of zeros are padding; a set of one row is perfectly coherent (1), one of none not at all (0).
    Intra-list distance, ILD, is 1 - coherence. It and diversity oppose each other: report both.
    """
    rows = np.asarray(rows, np.float64)
    count = (rows != 0).any(-1).sum(-1)
    # |Σ x|² holds each pair twice and every row with itself once.
    total = (rows.sum(-2) ** 2).sum(-1) - (rows**2).sum((-1, -2))
    return np.where(count > 1, total / np.maximum(count * (count - 1), 1), np.float64(count == 1))


def duplicate_rate(ids: np.ndarray) -> np.ndarray:
    """Share of entries that repeat an earlier one of their set: ids i32[Q, k], -1 is padding -> f32[Q]."""
    ids = np.sort(np.asarray(ids), axis=1)
    count = (ids >= 0).sum(1)
    repeats = ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)).sum(1)
    return np.float32(repeats / np.maximum(count, 1))


class Found(NamedTuple):
    """Of each query's reference set Y and pool R, the union of what its searches returned: f32[Q] all.

    recall: |Y ∩ R| / |Y|, R4T's eq. 5 and Recall@R, also called coverage. hit: 1 where it is not 0.
    precision: |Y ∩ R| / |R|. pool: |R|, at most the sum of the searches' depths.
    """

    recall: np.ndarray
    hit: np.ndarray
    precision: np.ndarray
    pool: np.ndarray


def found(ids: np.ndarray, references: Sequence[np.ndarray]) -> Found:
    """What k searches of depth n find together: ids i32[Q, k, n] (-1 is padding), references Q x i32[|Y|].

    An item returned by several searches counts once, and nothing is searched again in its place: methods
    are compared at an equal k n (R4T: 10 x 500). Raises InputError if a reference set is empty.
    """
    if len(ids) != len(references):
        problem = f"{len(references)} sets for {len(ids)} queries"
        raise InputError("references", problem, "Give one reference set per query.")
    rows = np.empty((4, len(ids)), np.float32)
    for q, (returned, wanted) in enumerate(zip(ids, references, strict=True)):
        pool, wanted = np.unique(returned[returned >= 0]), np.unique(wanted)
        if not len(wanted):
            raise InputError("references", f"set {q} is empty", "Leave that query out.")
        both = len(np.intersect1d(pool, wanted, assume_unique=True))
        rows[:, q] = both / len(wanted), both > 0, both / max(len(pool), 1), len(pool)
    return Found(*rows)


def soft_coverage(rows: np.ndarray, reference: np.ndarray) -> float:
    """mean_{y ∈ Y} max_{r ∈ R} cos(y, r) of rows f32[R, D] against a reference set f32[Y, D], unit-norm."""
    rows, reference = _checked("rows", rows), _checked("reference", reference)
    return float((reference @ rows.T).max(1).mean())


def mmr(relevance: np.ndarray, rows: np.ndarray, k: int, trade: float = 0.5) -> np.ndarray:
    """Maximal marginal relevance (Carbonell and Goldstein 1998): k of n candidates -> i32[k], in order.

        next = argmax_i  λ rel(i) - (1 - λ) max_{j chosen} cos(i, j)

    relevance: f32[n]; rows: unit-norm f32[n, D]; trade: λ, 1 ranks by relevance alone. The first pick is
    the most relevant candidate; ties go to the lower index. Raises InputError unless 1 <= k <= n.
    """
    rows = _candidates(relevance, rows, k)
    if not 0 <= trade <= 1:
        raise InputError("trade", f"{trade} is outside 0..1", "It weighs relevance against novelty.")
    return np.asarray(traced_mmr(np.float32(relevance), np.float32(rows), k, trade))


@functools.partial(jax.jit, static_argnames="k")
def traced_mmr(relevance: Array, rows: Array, k: int, trade: float = 0.5) -> Array:
    """`mmr` without its checks, to be traced or mapped: f32[n], f32[n, D] -> i32[k]."""

    def pick(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], Array]:
        score, nearest, free = carry
        best = jnp.argmax(jnp.where(free, score, -jnp.inf)).astype(jnp.int32)
        cosine = jnp.matmul(rows, rows[best], precision=jax.lax.Precision.HIGHEST)
        nearest = jnp.maximum(nearest, cosine)
        return (trade * relevance - (1 - trade) * nearest, nearest, free.at[best].set(False)), best

    start = relevance, jnp.full(len(rows), -1.0), jnp.full(len(rows), True)
    return jax.lax.scan(pick, start, length=k)[1]


def greedy_dpp(quality: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """k of n candidates -> i32[k], each the one that raises log det(I + L) most, L_ij = q_i q_j cos(i, j).

    quality: q f32[n], not negative, a larger one is wanted more; all ones is the plain log-determinant of
    the rows. The gain of i is ln(1 + q_i² x_iᵀ (I + Σ_{j chosen} q_j² x_j x_jᵀ)⁻¹ x_i), kept up to date by
    one Cholesky row per pick (Chen et al. 2018, arXiv 1709.05135). log det(I + L) is monotone and
    submodular, so the choice is within 1 - 1/e of the best set's. Ties go to the lower index.
    Raises InputError for a negative quality, or unless 1 <= k <= n.
    """
    rows = _candidates(quality, rows, k)
    if np.min(quality) < 0:
        raise InputError("quality", f"has a negative value {np.min(quality)}", "Exponentiate a score, say.")
    scaled = rows * np.asarray(quality, np.float64)[:, None]
    chosen = np.empty(k, np.int32)
    factors = np.zeros((k, len(rows)))  # row i: Cholesky factors of pick i with every candidate
    gain = 1 + (scaled**2).sum(1)
    for i in range(k):
        best = chosen[i] = gain.argmax()
        column = scaled @ scaled[best] - factors[:i].T @ factors[:i, best]
        factors[i] = column / np.sqrt(gain[best])
        gain = gain - factors[i] ** 2
        gain[chosen[: i + 1]] = -np.inf
    return chosen


def _checked(field: str, rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 2 or not len(rows):
        raise InputError(field, f"{rows.shape} is not [n, D] with n >= 1", "Give at least one row.")
    norms = np.linalg.norm(rows, axis=1)
    bad = ~(np.abs(norms - 1) < 1e-3)
    if bad.any():
        problem = f"row {int(bad.argmax())} has norm {norms[bad.argmax()]:.4g}"
        raise InputError(field, problem, "Scale every row to unit norm.")
    return rows


def _several(field: str, runs: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    if not len(runs):
        raise InputError(field, "there is none", "Give one array of sub-queries per run.")
    return runs


def _candidates(scores: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    rows = _checked("rows", rows).astype(np.float64)
    if np.shape(scores) != (len(rows),) or not np.isfinite(scores).all():
        problem = f"{np.shape(scores)} for {len(rows)} candidates, or not finite"
        raise InputError("scores", problem, "Give one finite number per candidate.")
    if not 1 <= k <= len(rows):
        raise InputError("k", f"{k} of {len(rows)} candidates asked for", f"Use 1 to {len(rows)}.")
    return rows
