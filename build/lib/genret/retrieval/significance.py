"""Is one method better than another on the same contexts? The paired, clustered bootstrap.

Contexts of one pattern share their items and are no independent observations, so whole patterns are
drawn again, not contexts (the cluster bootstrap; Davison & Hinkley 1997, section 3.8). A context's
difference pairs the two methods, which removes how hard the context is.
"""

from __future__ import annotations

import numpy as np

from genret.types import InputError


def paired_bootstrap(
    difference: np.ndarray, cluster: np.ndarray, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high): the macro average of difference f32[Q] and its 95 % percentile interval.

    The average is `metrics.macro`: the mean over clusters of the mean over a cluster's contexts.
    cluster: i32[Q]. Contexts and clusters only: the spread over training seeds is another matter.

    Raises InputError if the two disagree in shape, are empty, or a difference is not finite.
    """
    difference, cluster = np.asarray(difference, np.float64), np.asarray(cluster)
    if difference.ndim != 1 or difference.shape != cluster.shape or not len(difference):
        raise InputError(
            "difference",
            f"has shape {difference.shape}, cluster {cluster.shape}",
            "Give one of each per context.",
        )
    if not np.isfinite(difference).all():
        raise InputError("difference", "is not finite", "Leave out contexts that were not judged.")
    _, which, count = np.unique(cluster, return_inverse=True, return_counts=True)
    means = np.bincount(which, weights=difference) / count  # [P]
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    block = max(1, 2**22 // len(means))  # resamples at once, so that memory does not grow with P
    for start in range(0, resamples, block):
        part = drawn[start : start + block]
        part[:] = means[rng.integers(len(means), size=(len(part), len(means)))].mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(means.mean()), float(low), float(high)
