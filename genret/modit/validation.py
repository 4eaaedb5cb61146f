"""Is the metric predictor any good where it is used: at ordering items inside a pattern (papers' A.3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from genret.catalogue.format import Catalogue
from genret.catalogue.splits import Splits
from genret.modit.density import Labels, knn_density
from genret.modit.protocol import SPLITS
from genret.retrieval.index import Index

MOST = 20_000  # held-out items of a split whose true density is measured


def true_density(catalogue: Catalogue, items: np.ndarray, index: Index, k: int) -> np.ndarray:
    """ρ_m(i) = Attribute@K(e_i) f32[M, n] of catalogue rows i32[n] over the full corpus, itself left out.

    Unknown labels leave the denominator; an item whose neighbours are all unknown is NaN.
    """
    ids, _ = index.search(np.asarray(catalogue.embeddings[items]), k + 1)
    itself = ids == items[:, None]
    itself[:, -1] |= ~itself.any(1)
    found = catalogue.labels[:, ids[~itself].reshape(len(items), k)]
    known = (found >= 0).sum(-1)
    return np.where(known > 0, (found == 1).sum(-1) / np.maximum(known, 1), np.nan)


def sampled(items: np.ndarray, pattern: np.ndarray, most: int = MOST) -> np.ndarray:
    """Of items i64[n] with their patterns, whole patterns drawn by chance while they hold `most` items: the
    true density of an item costs an exact search, and of hundreds of thousands an hour."""
    if len(items) <= most:
        return items
    names, number, sizes = np.unique(pattern, return_inverse=True, return_counts=True)
    order = np.random.default_rng(0).permutation(len(names))
    kept = order[np.cumsum(sizes[order]) <= most]
    return items[np.isin(number, kept)]


def within_pattern(
    predicted: np.ndarray, truth: np.ndarray, pattern: np.ndarray, least: int = 5
) -> dict[str, float]:
    """Spearman, Kendall (τ-b) and NDCG of predicted against true density f32[n], inside each pattern and
    averaged over the patterns with `least` items and two or more distinct densities."""
    from scipy.stats import kendalltau, rankdata
    from sklearn.metrics import ndcg_score

    alike: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}  # by size: one call judges all of a size
    for p in np.unique(pattern):
        here = (pattern == p) & np.isfinite(truth)
        y, f = truth[here], predicted[here]
        if len(y) >= least and np.ptp(y) > 0 and np.ptp(f) > 0:
            alike.setdefault(len(y), []).append((y, f))
    sums, patterns = np.zeros(3), 0
    for pairs in alike.values():
        y, f = (np.stack(side) for side in zip(*pairs, strict=True))
        a, b = (r - r.mean(1, keepdims=True) for r in (rankdata(y, axis=1), rankdata(f, axis=1)))
        spearman = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
        kendall = [kendalltau(*row)[0] for row in zip(f, y, strict=True)]
        sums += (spearman.sum(), sum(kendall), ndcg_score(y, f) * len(y))
        patterns += len(y)
    names = ("spearman", "kendall", "ndcg")
    values = sums / patterns if patterns else np.full(3, np.nan)
    return {n: round(float(v), 4) for n, v in zip(names, values, strict=True)} | {"patterns": patterns}


def calibration_error(predicted: np.ndarray, truth: np.ndarray, bins: int = 10) -> float:
    """Mean over equally filled bins of |mean predicted - mean true density|."""
    known = np.isfinite(truth)
    order = np.argsort(predicted[known])
    parts = zip(
        np.array_split(predicted[known][order], bins), np.array_split(truth[known][order], bins),
        strict=True,
    )  # fmt: skip
    return round(float(np.mean([abs(f.mean() - y.mean()) for f, y in parts if len(f)])), 4)


@dataclass(frozen=True)
class Spread:
    """Labels bought with one budget, and what was fitted on them: predicted ρ̂ f32[M, N], normals f32[M, D]
    and intercepts f32[M] of the linear probes."""

    budget: float
    labels: Labels
    predicted: np.ndarray
    normals: np.ndarray
    intercepts: np.ndarray


def predictor_report(
    catalogue: Catalogue, splits: Splits, spreads: Iterable[Spread], index: Index, k: int
) -> list[dict[str, Any]]:
    """One row per (budget, predictor, domain, split) on test holdouts, whose labels nothing was fitted on.

    Predictors: the MLP, the mean of the 10 nearest probes, and the linear probe on item labels (a
    direction, not a density, so it has no calibration).
    """
    rows, held = [], {}
    for split in SPLITS:
        holdout = splits.holdout(split, "test")
        items = np.flatnonzero(holdout.items & np.isin(catalogue.patterns, holdout.patterns))
        items = sampled(items, np.asarray(catalogue.patterns)[items])
        held[split] = items, true_density(catalogue, items, index, k)
    for spread in spreads:
        for split, (items, truth) in held.items():
            x, pattern = np.asarray(catalogue.embeddings[items]), catalogue.patterns[items]
            predictors = {
                "metric predictor (MLP)": spread.predicted[:, items],
                "kNN of the probes": knn_density(catalogue, spread.labels, x),
                "linear probe": spread.normals @ x.T + spread.intercepts[:, None],
            }
            for name, predicted in predictors.items():
                for m, domain in enumerate(catalogue.attribute_names):
                    row = {"predictor": name, "budget": spread.budget, "lookups": spread.labels.lookups}
                    row |= {"domain": domain, "split": split, "items": len(items)}
                    row |= within_pattern(predicted[m], truth[m], pattern)
                    is_density = name != "linear probe"
                    row["calibration"] = calibration_error(predicted[m], truth[m]) if is_density else None
                    rows.append(row)
    return rows
