"""Preference pairs from scored pools: a margin in items, and the Pareto pair filter (papers' A.8).

The paper keeps "winner pairs that do not lower same-pattern purity"; against what, it does not say, so the
point of comparison is a switch:

    off        no filter
    pair       Purity(w) >= Purity(l)
    reference  Purity(w) >= Purity(the model's one-call query)
    both       the two above
    dominance  both, and Attribute(w) >= Attribute(l)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genret.modit.candidates import Pool
from genret.retrieval.scoring import Counts
from genret.types import InputError

FILTERS = ("off", "pair", "reference", "both", "dominance")


@dataclass(frozen=True)
class PairRule:
    """margin: least difference of Joint, in items. filter: see the module. cap: most pairs of a context.
    on_policy_share: least share of winners that are the model's own or within `near` radians of one of its
    own. improve: a winner must beat the model's one-call query in Joint. apart: most radians from either side
    to that query; what a far loser teaches is where it lies, not which way to go."""

    margin: int = 2
    filter: str = "pair"
    cap: int = 4
    on_policy_share: float = 0.5
    near: float = 0.2
    improve: bool = True
    apart: float = 0.45

    def __post_init__(self) -> None:
        if self.filter not in FILTERS:
            raise InputError("filter", f"unknown mode {self.filter!r}", f"use one of {', '.join(FILTERS)}")
        if self.margin < 1 or self.cap < 1 or not 0 <= self.on_policy_share <= 1:
            problem = f"margin {self.margin}, cap {self.cap}, on_policy_share {self.on_policy_share}"
            raise InputError("pairs", problem, "use a margin and a cap of 1 or more and a share in 0..1")
        if not (0 <= self.near <= np.pi and 0 < self.apart <= np.pi):
            raise InputError("pairs", f"near {self.near}, apart {self.apart}", "use radians in 0..3.14")


# The paper's: half of the winners its own or near it, and no bound on where either side lies.
PAPER = PairRule(margin=2, filter="pair", on_policy_share=0.5, near=0.2, improve=False, apart=np.pi)


@dataclass(frozen=True)
class Pairs:
    """context, winner, loser: i32[n], a context and two of its candidates. own: bool[n], the winner is on
    policy or near it. empty: contexts that yielded no pair. lost: pairs given up for the on-policy share."""

    context: np.ndarray
    winner: np.ndarray
    loser: np.ndarray
    own: np.ndarray
    empty: int
    lost: int

    def __len__(self) -> int:
        return len(self.context)


def allowed(pool: Pool, counts: Counts, rule: PairRule) -> np.ndarray:
    """bool[Q, C, C]: whether (winner, loser) is a pair under `rule`; the last candidate is the reference."""

    def difference(values: np.ndarray) -> np.ndarray:
        return values[:, :, None] - values[:, None, :]

    ok = difference(counts.joint) >= rule.margin
    if rule.filter in ("pair", "both", "dominance"):
        ok &= difference(counts.purity) >= 0
    if rule.filter in ("reference", "both", "dominance"):
        ok &= (counts.purity >= counts.purity[:, -1:])[:, :, None]
    if rule.filter == "dominance":
        ok &= difference(counts.attribute) >= 0
    if rule.improve:
        ok &= (counts.joint > counts.joint[:, -1:])[:, :, None]
    near = (pool.queries @ pool.queries[:, -1:].transpose(0, 2, 1))[..., 0] >= np.cos(rule.apart)
    return ok & near[:, :, None] & near[:, None]


def near_policy(pool: Pool, near: float) -> np.ndarray:
    """bool[Q, C]: on policy, or within `near` radians of an on-policy candidate."""
    own = pool.queries[:, pool.on_policy]
    cosine = np.einsum("qcd,qod->qco", pool.queries, own).max(-1)
    return pool.on_policy | (cosine >= np.cos(near))


def select_pairs(rng: np.random.Generator, pool: Pool, counts: Counts, rule: PairRule) -> Pairs:
    """At most `cap` allowed pairs a context, those of the largest margin in Joint (ties at random), on-policy
    winners before others where the share asks for them; then off-policy winners are dropped at random until
    the share holds over all pairs.
    """
    ok, own = allowed(pool, counts, rule), near_policy(pool, rule.near)
    q, c, _ = ok.shape
    first = np.ceil(rule.cap * rule.on_policy_share)
    margin = counts.joint[:, :, None] - counts.joint[:, None]
    order = np.where(ok, rng.random(ok.shape) - margin, np.inf).reshape(q, -1)
    # Of the on-policy winners' pairs the first few are moved to the front of the line.
    mine = (ok & own[:, :, None]).reshape(q, -1)
    place = np.argsort(np.argsort(np.where(mine, order, np.inf), 1), 1)
    order = np.where(mine & (place < first), order - 1e6, order)
    chosen = np.argsort(order, 1)[:, : rule.cap]
    context, at = np.nonzero(np.isfinite(np.take_along_axis(order, chosen, 1)))
    winner, loser = np.divmod(chosen[context, at], c)
    theirs = ~own[context, winner]
    most = len(theirs)
    if rule.on_policy_share > 0:
        most = int(np.floor((~theirs).sum() * (1 / rule.on_policy_share - 1) + 1e-9))
    drop = rng.permutation(np.flatnonzero(theirs))[most:]
    keep = np.setdiff1d(np.arange(len(context)), drop)
    context, winner, loser = (a[keep].astype(np.int32) for a in (context, winner, loser))
    empty = q - len(np.unique(context))
    return Pairs(context, winner, loser, own[context, winner], empty, len(drop))
