"""The split: shares, disjointness, duplicates, marks and errors, also on drawn catalogues."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.catalogue.format import SPLIT_NAMES, Catalogue
from genret.catalogue.splits import make_splits
from genret.types import InputError

ALL = [(split, stage) for split in SPLIT_NAMES[1:] for stage in ("validation", "test")]


def catalogue(patterns, groups=None, assigned=None):
    patterns = np.asarray(patterns, np.int32)
    n = len(patterns)
    return Catalogue(
        name="test",
        path=Path("test.parquet"),
        ids=pa.array([str(i) for i in range(n)]) if n < 10_000 else pa.nulls(n, pa.string()),
        embeddings=np.ones((n, 1), np.float32),
        patterns=patterns,
        pattern_names=tuple(str(p) for p in range(patterns.max() + 1)),
        attribute_names=("a",),
        labels=np.zeros((1, n), np.int8),
        groups=np.arange(n, dtype=np.int32) if groups is None else np.asarray(groups, np.int32),
        assigned=np.full(n, -1, np.int8) if assigned is None else np.asarray(assigned, np.int8),
        texts=None,
        pattern_source="column",
        small_patterns=0,
    )


def check(data, splits):
    """What must hold of every split of every catalogue."""
    parts = {key: splits.holdout(*key) for key in ALL}
    rows = [splits.train, *(part.items for part in parts.values())]
    assert all(part.dtype == bool and len(part) == data.num_items for part in rows)
    assert np.sum(rows, axis=0).max() <= 1  # train and the four holdouts share no row,
    sides = np.concatenate([np.unique(data.groups[part]) for part in rows])
    assert len(np.unique(sides)) == len(sides)  # and no group
    held_out_groups = np.isin(data.groups, data.groups[~splits.train])
    np.testing.assert_array_equal(splits.train, ~held_out_groups)
    seen = []
    for part in parts.values():
        assert part.patterns.dtype == np.int32 and len(part.patterns)
        np.testing.assert_array_equal(part.patterns, np.unique(data.patterns[part.items]))
        assert part.patterns.min() >= 0
        seen.append(part.patterns)
    assert len(np.unique(np.concatenate(seen))) == sum(map(len, seen))  # nor a pattern
    for stage in ("validation", "test"):
        held = splits.holdout("pattern_holdout", stage).patterns
        assert not np.isin(data.patterns[splits.train], held).any()
    return parts


def test_shares_without_groups():
    """20 patterns of 30 rows, by hand: 4 patterns held out, 2 to a stage, 60 rows each; of the
    other 16 patterns 8 to a stage, 6 items held out in each, 48 rows; train keeps 16 x 24 = 384."""
    data = catalogue(np.arange(600) % 20)
    splits = make_splits(data, seed=3)
    parts = check(data, splits)
    for stage in ("validation", "test"):
        held, items = parts["pattern_holdout", stage], parts["item_holdout", stage]
        assert (len(held.patterns), held.items.sum()) == (2, 60)
        assert (len(items.patterns), items.items.sum()) == (8, 48)
        assert (np.bincount(data.patterns[items.items])[items.patterns] == 6).all()
    assert splits.train.sum() == 384 and splits.seed == 3


def test_fractions_round_half_up():
    """By hand: .5 of 5 patterns is 2.5, so 3 held out; .25 of 10 items is 2.5, so 3 of them."""
    data = catalogue(np.arange(50) % 5)
    splits = make_splits(data, pattern_fraction=0.5, item_fraction=0.25)
    check(data, splits)
    assert splits.train.sum() == 2 * 7


def test_deterministic_by_seed():
    data = catalogue(np.arange(2000) % 40)
    one, two, other = (make_splits(data, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.train, two.train)
    for key in ALL:
        np.testing.assert_array_equal(one.holdout(*key).items, two.holdout(*key).items)
        assert not np.array_equal(one.holdout(*key).items, other.holdout(*key).items)


def test_the_draws_are_independent():
    """A larger share only adds, and one share does not move what the other draws."""
    data = catalogue(np.arange(2000) % 40)
    base = make_splits(data)
    more_items = make_splits(data, item_fraction=0.4)
    more_patterns = make_splits(data, pattern_fraction=0.4)
    for stage in ("validation", "test"):
        key = ("pattern_holdout", stage)
        np.testing.assert_array_equal(base.holdout(*key).patterns, more_items.holdout(*key).patterns)
    assert not (more_items.train & ~base.train).any()
    assert not (more_patterns.train & ~base.train).any()
    assert not (base.train & ~more_patterns.train)[
        np.isin(data.patterns, data.patterns[more_patterns.train])
    ].any()


def test_labels_and_vectors_do_not_enter():
    data = catalogue(np.arange(600) % 20)
    before = make_splits(data).train
    data.labels[:] = 1
    data.embeddings[:] = -1
    np.testing.assert_array_equal(make_splits(data).train, before)


def test_groups_in_one_pattern_are_drawn_whole():
    """10 patterns of 10 groups of 4 rows, by hand: 2 groups, 8 rows, of each of 8 patterns."""
    groups = np.arange(400) // 4
    data = catalogue(groups % 10, groups)
    parts = check(data, make_splits(data))
    for stage in ("validation", "test"):
        part = parts["item_holdout", stage]
        assert (np.bincount(data.patterns[part.items])[part.patterns] == 8).all()
        assert (np.bincount(groups[part.items])[np.unique(groups[part.items])] == 4).all()


def test_duplicates_of_a_held_pattern_leave_training():
    """Each row of pattern 0 has a duplicate in pattern 1; where one is held out, both have left."""
    patterns = np.repeat(np.arange(10), 20)
    groups = np.arange(200)
    groups[20:40] = groups[:20]
    assigned = np.where(np.isin(patterns, (0, 2)), 2, -1)
    data = catalogue(patterns, groups, assigned)
    splits = make_splits(data)
    check_rows = splits.train | splits.holdout("item_holdout", "test").items
    check_rows |= splits.holdout("item_holdout", "validation").items
    assert not check_rows[20:40].any()  # nor are duplicates of a held-out pattern seeds elsewhere
    check(data, splits)


def test_groups_across_patterns_cost_no_more_than_their_share():
    """Every name occurs in five patterns: one priority per group holds .2 of the names out, and not
    the 1 - .8^5 = .67 that independent draws would."""
    names = np.tile(np.arange(100), 5)
    patterns = np.repeat(np.arange(5), 100)
    assigned = np.full(1000, -1)
    assigned[500:] = 2  # patterns 5 and 6 are held out, so that nothing else is
    data = catalogue(
        np.append(patterns, np.arange(500) % 2 + 5),
        np.append(names, 100 + np.arange(500)),
        assigned,
    )
    splits = make_splits(data)
    check(data, splits)
    assert splits.train[:500].mean() == pytest.approx(0.8)
    stages = [splits.holdout("item_holdout", s).items.sum() for s in ("validation", "test")]
    assert min(stages) > 5  # all 20 names lie in patterns of both stages; neither takes all


def test_rows_in_no_pattern_are_training_background():
    patterns = np.append(np.arange(200) % 10, [-1] * 20)
    groups = np.arange(220)
    assigned = np.full(220, -1)
    assigned[210:213] = [0, 1, 2]
    splits = make_splits(catalogue(patterns, groups, assigned))
    assert splits.train[200:].tolist() == [True] * 11 + [False] * 2 + [True] * 7
    held = int(np.flatnonzero(splits.holdout("pattern_holdout", "test").items)[0])
    groups[215] = groups[held]  # a duplicate of a held-out row
    data = catalogue(patterns, groups, assigned)
    again = make_splits(data)
    check(data, again)
    assert not again.train[215] and again.train[214]
    assert not any(again.holdout(*key).items[200:].any() for key in ALL)


def test_given_column_is_taken():
    patterns = np.arange(400) % 20
    assigned = np.full(400, -1)
    assigned[patterns < 3] = 2  # exactly these patterns
    given_items = (patterns == 5) & (np.arange(400) < 100)  # 5 of its 20 rows
    assigned[given_items] = 1
    assigned[patterns == 7] = 0  # pinned to training
    data = catalogue(patterns, None, assigned)
    splits = make_splits(data, pattern_fraction=0.5)
    parts = check(data, splits)
    held = [parts["pattern_holdout", stage].patterns for stage in ("validation", "test")]
    assert sorted(np.concatenate(held)) == [0, 1, 2]
    seeds = parts["item_holdout", "validation"].items | parts["item_holdout", "test"].items
    np.testing.assert_array_equal(seeds[patterns == 5], given_items[patterns == 5])
    np.testing.assert_array_equal(splits.train[patterns == 5], ~given_items[patterns == 5])
    assert splits.train[patterns == 7].all()
    assert (~splits.train[patterns == 9]).sum() == 4  # drawn: .2 of 20


def test_patterns_with_marks_are_not_drawn_whole():
    patterns = np.arange(400) % 10
    assigned = np.where(patterns < 6, np.where(np.arange(400) < 200, 0, 1), -1)
    for seed in range(5):
        splits = make_splits(catalogue(patterns, None, assigned), seed=seed)
        held = [splits.holdout("pattern_holdout", s).patterns for s in ("validation", "test")]
        assert np.concatenate(held).min() >= 6
        assert splits.train[assigned == 0].all() and not splits.train[assigned == 1].any()


@st.composite
def drawn(draw):
    """Any catalogue: uneven patterns, background rows, groups over patterns, marks of each kind."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(12, 30))
    patterns = np.repeat(np.arange(count), rng.integers(20, 40, count))
    patterns[rng.random(len(patterns)) < draw(st.sampled_from([0, 0.05]))] = -1
    n = len(patterns)
    groups = np.arange(n)
    copies = rng.random(n) < draw(st.sampled_from([0, 0.02, 0.2]))
    within = np.roll(groups, 1) if draw(st.booleans()) else rng.integers(0, n, n)
    groups[copies] = groups[within[copies]]
    assigned = np.full(n, -1)
    if draw(st.booleans()):
        assigned[rng.random(n) < 0.05] = 1
    if draw(st.booleans()):
        assigned[rng.random(n) < 0.05] = 0
    marked = draw(st.sampled_from([0, 2, 3]))
    open_patterns = np.arange(count)
    if marked:
        assigned[np.isin(patterns, rng.choice(count, marked, replace=False))] = 2
    elif (assigned >= 0).any():
        assigned[np.isin(patterns, open_patterns[: count // 2])] = -1
    return catalogue(patterns, groups, assigned)


@settings(max_examples=60, deadline=None)
@given(drawn(), st.integers(0, 1000), st.sampled_from([0.1, 0.2, 0.3]))
def test_any_catalogue(data, seed, fraction):
    splits = make_splits(data, seed=seed, pattern_fraction=0.15, item_fraction=fraction)
    parts = check(data, splits)
    held = np.unique(np.concatenate([parts["pattern_holdout", s].patterns for s in ("validation", "test")]))
    marked = np.unique(data.patterns[(data.assigned == 2) & (data.patterns >= 0)])
    if len(marked):
        assert np.isin(held, marked).all()
    else:
        assert len(held) == max(2, int(0.15 * data.num_patterns + 0.5))
        assert not (data.assigned[np.isin(data.patterns, held)] >= 0).any()
    assert not splits.train[data.assigned > 0].any()
    alone = np.bincount(data.groups, minlength=data.num_items)[data.groups] == 1
    outside = ~np.isin(data.patterns, held) & ~np.isin(data.patterns, marked)
    assert splits.train[alone & (data.assigned == 0)].all()
    assert splits.train[alone & (data.patterns < 0) & (data.assigned < 0)].all()
    # In a pattern without marks whose rows are all alone, the share is exact.
    for pattern in np.setdiff1d(np.arange(data.num_patterns), np.append(held, marked)):
        rows = outside & (data.patterns == pattern)
        if alone[rows].all() and (data.assigned[rows] < 0).all():
            assert (~splits.train[rows]).sum() == int(np.floor(fraction * rows.sum() + 0.5))
    again = make_splits(data, seed=seed, pattern_fraction=0.15, item_fraction=fraction)
    np.testing.assert_array_equal(splits.train, again.train)


@pytest.mark.parametrize(
    "field, message, call",
    [
        ("pattern_fraction", "0 is not", lambda: make_splits(sound(), pattern_fraction=0)),
        ("pattern_fraction", "1.5 is", lambda: make_splits(sound(), pattern_fraction=1.5)),
        ("item_fraction", "nan is", lambda: make_splits(sound(), item_fraction=float("nan"))),
        ("pattern", "3 patterns", lambda: make_splits(catalogue(np.arange(60) % 3))),
        ("pattern", "hold out 9", lambda: make_splits(sound(), pattern_fraction=0.9)),
        ("pattern", "0 of them without", lambda: make_splits(catalogue(*all_marked(0)))),
        ("split", "1 of 10 patterns", lambda: make_splits(catalogue(*all_marked(-1, 1)))),
        ("split", "9 of 10 patterns", lambda: make_splits(catalogue(*all_marked(-1, 9)))),
        ("split", "has no item", lambda: make_splits(catalogue(*all_marked(0, 4)))),
        ("split", "no holdout train/test", lambda: make_splits(sound()).holdout("train", "test")),
    ],
)
def test_refused(field, message, call):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert error.value.field == field


def sound():
    return catalogue(np.arange(200) % 10)


def all_marked(mark, held=0):
    patterns = np.arange(200) % 10
    return patterns, None, np.where(patterns < held, 2, mark)


def test_two_million_rows():
    rng = np.random.default_rng(0)
    n = 1_900_000
    data = catalogue(rng.integers(-1, 20_000, n), rng.integers(0, 2 * n, n))
    start = time.perf_counter()
    splits = make_splits(data)
    assert time.perf_counter() - start < 10
    assert 0.4 < splits.train.mean() < 0.7
