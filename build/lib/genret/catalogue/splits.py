"""One assignment of items to roles that serves both protocols, so that one model serves both.

pattern_holdout: a share of the patterns leaves training whole; half of them validate, half test.
item_holdout: in every other pattern a share of the groups leaves training. Contexts for validation
come from one half of these patterns and contexts for test from the other half, because a tenth of a
small pattern is too few items to draw seeds from; so the two differ in items and in patterns.

A group has one role: pattern_holdout before item_holdout before training where its rows differ, and
a coin decides between validation and test. So duplicates of a held-out item are never trained on,
and no two holdouts share a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from genret.catalogue.format import SPLIT_NAMES, Catalogue
from genret.types import InputError

_TRAIN, _UNUSED = 0, 1  # unused: held out, but in no pattern that contexts are drawn from
_ROLES = {
    ("item_holdout", "validation"): 2,
    ("item_holdout", "test"): 3,
    ("pattern_holdout", "validation"): 4,
    ("pattern_holdout", "test"): 5,
}


@dataclass(frozen=True, eq=False)
class Holdout:
    """What one evaluation draws contexts from.

    patterns: i32[P], ascending, each with at least one item.
    items: bool[N], the rows seeds may be drawn from; each lies in one of `patterns`.
    """

    patterns: np.ndarray
    items: np.ndarray


@dataclass(frozen=True, eq=False)
class Splits:
    """train: bool[N], the only rows anything fitted may see. seed: what the rest was drawn by."""

    train: np.ndarray
    seed: int
    holdouts: Mapping[tuple[str, str], Holdout]

    def holdout(self, split: str, stage: str) -> Holdout:
        """`split` is item_holdout or pattern_holdout, `stage` is validation or test."""
        if (split, stage) not in self.holdouts:
            known = ", ".join("/".join(key) for key in self.holdouts)
            raise InputError("split", f"no holdout {split}/{stage}", f"Ask for one of {known}.")
        return self.holdouts[split, stage]


def make_splits(
    catalogue: Catalogue,
    *,
    seed: int = 0,
    pattern_fraction: float = 0.2,
    item_fraction: float = 0.2,
) -> Splits:
    """Draws what the `split` column leaves open; deterministic by `seed`.

    pattern_fraction: share of all patterns held out (at least 2), drawn among those without a mark;
    none are drawn where the column marks a pattern as pattern_holdout.
    item_fraction: share of the groups of every other pattern, rounded half up. None are drawn in a
    pattern with a row marked item_holdout, and no group with a row marked train is drawn.
    Rows in no pattern are trained on, unless their mark or their group says otherwise.

    The draws are independent: changing one fraction does not move what the other draws, save where
    they meet, and a larger one only adds. Raises InputError for a fraction outside 0..1 and for too
    few patterns or groups.
    """
    for name, value in (("pattern_fraction", pattern_fraction), ("item_fraction", item_fraction)):
        if not 0 < value < 1:
            raise InputError(name, f"{value} is not between 0 and 1", "Pass a share such as 0.2.")
    patterns, groups = catalogue.patterns, catalogue.groups
    train, item_holdout, pattern_holdout = (
        catalogue.assigned == SPLIT_NAMES.index(name) for name in ("train", "item_holdout", "pattern_holdout")
    )
    order, halves, priority, coins = (np.random.default_rng([seed, i]) for i in range(4))
    held = _hold_patterns(catalogue, pattern_fraction, order)

    # The role of a pattern's rows once they are held out; the last entry is that of pattern -1.
    role = np.full(catalogue.num_patterns + 1, _UNUSED, np.int8)
    rank = halves.random(catalogue.num_patterns)
    for split, members in (("pattern_holdout", held), ("item_holdout", ~held)):
        members = np.flatnonzero(members)
        members = members[np.argsort(rank[members])]
        role[members[: len(members) // 2]] = _ROLES[split, "validation"]
        role[members[len(members) // 2 :]] = _ROLES[split, "test"]

    in_held = np.append(held, False)[patterns]
    out = in_held | item_holdout | pattern_holdout
    group_role = np.zeros(int(groups.max()) + 1, np.int8)
    coin = coins.integers(0, 2, len(group_role), np.int8)

    def raise_role(group: np.ndarray, pattern: np.ndarray) -> None:
        np.maximum.at(group_role, group, _flip(role[pattern], coin[group]))

    raise_role(groups[out], patterns[out])

    # One priority per group, not per pattern: groups in several patterns are held out by all alike,
    # else training would lose 1 - (1 - f)^m of those in m patterns.
    fixed = np.append(_marked(catalogue, item_holdout), True)[patterns]
    pinned = np.zeros(len(group_role), bool)
    pinned[groups[train]] = True
    free = ~fixed & ~in_held & ~pinned[groups] & (group_role[groups] == _TRAIN)
    drawn_pattern, drawn_group = _draw_groups(
        patterns[free], groups[free], priority.random(len(group_role)), item_fraction
    )
    raise_role(drawn_group, drawn_pattern)

    row_role = _flip(group_role, coin)[groups]
    holdouts = {}
    for key, number in _ROLES.items():
        items = (row_role == number) & (role[patterns] == number)
        if not items.any():
            raise InputError(
                "split",
                f"{'/'.join(key)} has no item to draw seeds from",
                "Use larger patterns or a larger fraction, or mark fewer rows as train.",
            )
        holdouts[key] = Holdout(np.unique(patterns[items]), items)
    return Splits(row_role == _TRAIN, seed, holdouts)


def _flip(role: np.ndarray, coin: np.ndarray) -> np.ndarray:
    """Swaps validation and test where the coin is 1, so that under a maximum either may prevail."""
    return np.where(role > _UNUSED, role ^ coin, role)


def _marked(catalogue: Catalogue, rows: np.ndarray) -> np.ndarray:
    """bool[P]: has the pattern a row under `rows` bool[N]?"""
    found = catalogue.patterns[rows & (catalogue.patterns >= 0)]
    return np.bincount(found, minlength=catalogue.num_patterns) > 0


def _hold_patterns(catalogue: Catalogue, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """bool[P]: the patterns that leave training whole."""
    total = catalogue.num_patterns
    held = _marked(catalogue, catalogue.assigned == SPLIT_NAMES.index("pattern_holdout"))
    rank = rng.random(total)
    if not held.any():
        open_ = np.flatnonzero(~_marked(catalogue, catalogue.assigned >= 0))
        count = max(2, int(np.floor(fraction * total + 0.5)))
        if len(open_) < count or total - count < 2:
            raise InputError(
                "pattern",
                f"{total} patterns, {len(open_)} of them without a mark in the split column, "
                f"are too few to hold out {count}",
                f"{count} patterns without a mark and 2 others are needed.",
            )
        held[open_[np.argsort(rank[open_])[:count]]] = True
    elif held.sum() < 2 or total - held.sum() < 2:
        raise InputError(
            "split",
            f"{held.sum()} of {total} patterns are marked pattern_holdout",
            "At least 2 (one to validate, one to test) and 2 others are needed.",
        )
    return held


def _draw_groups(
    patterns: np.ndarray, groups: np.ndarray, priority: np.ndarray, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """(pattern, group) pairs i64[n]: in each pattern the share of its groups lowest in priority."""
    pattern, group = np.divmod(np.unique(patterns.astype(np.int64) * len(priority) + groups), len(priority))
    pattern, group = (values[np.lexsort((priority[group], pattern))] for values in (pattern, group))
    count = np.bincount(pattern)
    place = np.arange(len(pattern)) - (np.cumsum(count) - count)[pattern]
    chosen = place < np.floor(fraction * count + 0.5)[pattern]
    return pattern[chosen], group[chosen]
