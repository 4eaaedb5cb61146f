"""Metrics of pattern-preserving attribute retrieval, of one ranked list per context.

A context is (domain m, pattern p, seeds S); T is the list of K items returned for it. With a_i the
attribute of item i in domain m and p_i its pattern (the definitions of Joint@K and its headroom are
ours; arXiv 2606.26899 names the quantities and gives no formula):

    Attribute@K = 1/K Σ_{i ∈ T} a_i
    Purity@K    = 1/K Σ_{i ∈ T} 1[p_i = p]
    Joint@K     = 1/K Σ_{i ∈ T} a_i 1[p_i = p]                   the primary metric
    Headroom    = 1/K min(K, #{i ∉ S : p_i = p, a_i = 1})        the best Joint@K there is

Hence Attribute + Purity - 1 <= Joint <= min(Attribute, Purity), and Joint <= Headroom.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from genret.types import InputError


class Judgement(NamedTuple):
    """One value per context, all f32[Q] in [0, 1]."""

    joint: np.ndarray
    attribute: np.ndarray
    purity: np.ndarray
    headroom: np.ndarray
    normalised_joint: np.ndarray


def judge(
    ids: np.ndarray,
    *,
    labels: np.ndarray,
    domain: np.ndarray,
    patterns: np.ndarray,
    pattern: np.ndarray,
    seeds: np.ndarray,
) -> Judgement:
    """Judge ids i32[Q, K], the items returned for each context, by the module's formulas.

    labels: i8[M, N] of 1, 0 and -1 (unknown); domain: i32[Q], the row each context asks for.
    patterns: i32[N], -1 for an item in no pattern; pattern: i32[Q], the one each context asks for.
    seeds: i32[Q, S], padded with -1.

    Raises InputError naming the context if it asks for no pattern, if its list repeats an item,
    holds a seed or an item without a known label (`rank` makes lists that do not), or if its
    headroom is zero.
    """
    k = ids.shape[1]
    _refuse(pattern < 0, "pattern", "asks for no pattern")
    _refuse((ids < 0).any(axis=1), "ids", "returns fewer than K items")
    attribute = labels[domain[:, None], ids]  # [Q, K]
    in_pattern = patterns[ids] == pattern[:, None]  # [Q, K]
    in_order = np.sort(ids, axis=1)
    _refuse((in_order[:, 1:] == in_order[:, :-1]).any(axis=1), "ids", "returns an item twice")
    is_seed = np.zeros(ids.shape, bool)
    for seed in seeds.T:
        is_seed |= ids == seed[:, None]
    _refuse(is_seed.any(axis=1), "ids", "returns one of its seeds")
    _refuse((attribute < 0).any(axis=1), "ids", "returns an item whose label is unknown")

    joint = (attribute * in_pattern).sum(axis=1)
    reachable = np.minimum(k, _positives(labels, domain, patterns, pattern, seeds))
    _refuse(reachable == 0, "contexts", "has no positive item in its pattern besides the seeds")
    return Judgement(
        joint=np.float32(joint / k),
        attribute=np.float32(attribute.sum(axis=1) / k),
        purity=np.float32(in_pattern.sum(axis=1) / k),
        headroom=np.float32(reachable / k),
        normalised_joint=np.float32(joint / reachable),
    )


def macro(values: np.ndarray, pattern: np.ndarray) -> float:
    """Mean over patterns of the mean over a pattern's contexts: values f32[Q], pattern i32[Q]."""
    _, which, count = np.unique(pattern, return_inverse=True, return_counts=True)
    return float((np.bincount(which, weights=values) / count).mean())


def _positives(
    labels: np.ndarray,
    domain: np.ndarray,
    patterns: np.ndarray,
    pattern: np.ndarray,
    seeds: np.ndarray,
) -> np.ndarray:
    """i64[Q]: #{i not a seed : p_i = p, a_i = 1}."""
    size = int(max(patterns.max(), pattern.max())) + 1
    positive = (labels == 1) & (patterns >= 0)  # [M, N]
    table = np.stack([np.bincount(patterns[row], minlength=size) for row in positive])  # [M, P]
    seeds = np.sort(seeds, axis=1)
    counts = (seeds >= 0) & (labels[domain[:, None], seeds] == 1)
    counts &= patterns[seeds] == pattern[:, None]
    counts[:, 1:] &= seeds[:, 1:] != seeds[:, :-1]  # a seed given twice is one item
    return table[domain, pattern] - counts.sum(axis=1)


def _refuse(bad: np.ndarray, field: str, what: str) -> None:
    if bad.any():
        fix = "Rank with exclude=, labels= and domain=, and draw contexts that can be satisfied."
        raise InputError(field, f"context {int(bad.argmax())} {what}", fix)
