"""Is one method better than another on the same contexts? The paired, clustered bootstrap, and Holm.

Contexts of one pattern share their items and are no independent observations, so whole patterns are
drawn again, not contexts (the cluster bootstrap; Davison & Hinkley 1997, section 3.8). A context's
difference pairs the two methods, which removes how hard the context is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from genret.types import InputError


class Paired(NamedTuple):
    """The macro average of a difference, its 95 % percentile interval, and its two-sided p-value."""

    mean: float
    low: float
    high: float
    p: float


def paired_test(
    difference: np.ndarray, cluster: np.ndarray, cell: np.ndarray | None = None, *,
    resamples: int = 10_000, seed: int = 0,
) -> Paired:  # fmt: skip
    """The average of difference f32[Q], and whether it is zero.

    The average is `metrics.macro`: the mean over clusters of the mean over a cluster's contexts.
    cluster: i32[Q]. cell: i32[Q]; where it is given, the average is the mean over cells of that macro
    average, and a cluster is drawn with all its cells. Contexts and clusters only: the spread over
    training seeds is another matter.

    With d* the averages of R resamples, the interval is their 2.5 and 97.5 % quantiles, and

        p = min(1, 2 (1 + min(#{d* <= 0}, #{d* >= 0})) / (1 + R)),

    that interval turned round: about the level at which it begins to hold zero. The ones count the data
    as a draw of their own, so that p is never 0 (Davison & Hinkley 1997, section 4.2, equation 4.11).

    Raises InputError if the arrays disagree in shape, are empty, or a difference is not finite.
    """
    difference, cluster = np.asarray(difference, np.float64), np.asarray(cluster)
    cell = np.zeros(len(cluster), int) if cell is None else np.asarray(cell)
    if difference.ndim != 1 or not difference.shape == cluster.shape == cell.shape or not len(difference):
        raise InputError(
            "difference",
            f"has shape {difference.shape}, cluster {cluster.shape}, cell {cell.shape}",
            "Give one of each per context.",
        )
    if not np.isfinite(difference).all():
        raise InputError("difference", "is not finite", "Leave out contexts that were not judged.")
    _, which = np.unique(cluster, return_inverse=True)
    _, where = np.unique(cell, return_inverse=True)
    clusters, cells = which.max() + 1, where.max() + 1
    at = which * cells + where
    count = np.bincount(at, minlength=clusters * cells).reshape(clusters, cells)
    total = np.bincount(at, weights=difference, minlength=clusters * cells).reshape(clusters, cells)
    means, asked = total / np.maximum(count, 1), (count > 0).astype(float)  # [P, C]
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    block = max(1, 2**22 // clusters)  # resamples at once, so that memory does not grow with P
    for start in range(0, resamples, block):
        part = drawn[start : start + block]
        picked = rng.integers(clusters, size=(len(part), clusters))
        picked += np.arange(len(part))[:, None] * clusters
        times = np.bincount(picked.ravel(), minlength=picked.size).reshape(picked.shape).astype(float)
        # A cell of which a resample holds no cluster is left out of that resample's mean.
        held = np.maximum(times @ asked, 1e-9)  # [R, C]
        part[:] = (times @ means / held).sum(1) / (held > 0.5).sum(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    average = (means.sum(0) / asked.sum(0)).mean()
    return Paired(float(average), float(low), float(high), min(1.0, 2 * (1 + int(tail)) / (1 + resamples)))


def paired_bootstrap(
    difference: np.ndarray, cluster: np.ndarray, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high) of `paired_test`: the macro average of difference f32[Q] and its 95 % interval."""
    return paired_test(difference, cluster, resamples=resamples, seed=seed)[:3]


def holm(p: np.ndarray) -> np.ndarray:
    """p-values f64[N] adjusted so that calling those below α findings errs anywhere with chance <= α.

    With p_(1) <= ... <= p_(N): adjusted_(i) = max_{j <= i} min(1, (N - j + 1) p_(j)) (Holm 1979), for any
    dependence between the tests. Raises InputError if one is not in [0, 1].
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise InputError("p", "holds a value that is no probability", "Give a list of p-values.")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted
