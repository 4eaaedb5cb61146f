"""Walks, cells and tails: properties of drawn worlds, formulas by frequency, cases by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from genret.modit import trajectories as tr
from genret.types import InputError

WALKS = ("locality_walk", "sorted_bins")


def walk(kind, rng, data, cell, domain, length):
    if kind == "sorted_bins":
        return tr.sorted_bins(rng, data.cells, data.density, cell, domain, length)
    return tr.locality_walk(rng, data.cells, data.neighbours, data.density, cell, domain, length)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(WALKS),
    sizes=st.lists(st.integers(2, 12), min_size=1, max_size=4),
    length=st.integers(2, 14),
    levels=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 10_000),
)
def test_walks_ascend_in_one_cell_without_repeats(world, kind, sizes, length, levels, seed):
    data = world(sizes, seed, levels=levels)
    rng = np.random.default_rng(seed)
    cell = rng.integers(0, len(data.cells.members), 20)
    domain = rng.integers(0, 2, 20)
    walks = walk(kind, rng, data, cell, domain, length)
    assert walks.shape == (20, length)
    for items, c, m in zip(walks, cell, domain, strict=True):
        inside = data.cells.members[c][data.cells.members[c] >= 0]
        count = min(length, len(inside))
        given, padding = items[:count], items[count:]
        assert (padding == -1).all()  # a small cell is walked whole, then padded
        assert len(set(given)) == count and set(given) <= set(inside)
        assert (np.diff(data.density[m, given]) >= 0).all()


def test_walks_keep_to_training_items_of_molecules(fitted, splits):
    rng, data = np.random.default_rng(0), fitted.data
    cell, domain = rng.integers(0, len(data.cells.members), 300), rng.integers(0, 4, 300)
    for kind in WALKS:
        walks = walk(kind, rng, data, cell, domain, 16)
        assert splits.train[walks].all()
        run = data.cells.run[cell][:, None]
        np.testing.assert_array_equal(data.cells.membership[run, walks], np.repeat(cell[:, None], 16, 1))


def step_cosine(x, walks):
    return np.einsum("btd,btd->bt", x[walks[:, :-1]], x[walks[:, 1:]]).mean()


def test_locality_walks_take_nearer_steps_than_sorted_bins(fitted):
    rng, data = np.random.default_rng(0), fitted.data
    cell, domain = rng.integers(0, len(data.cells.members), 1000), rng.integers(0, 4, 1000)
    near, bins = (step_cosine(data.embeddings, walk(k, rng, data, cell, domain, 8)) for k in WALKS)
    assert near > bins + 0.01, (near, bins)


def test_locality_walk_follows_a_chain_where_there_is_one(world):
    # One cell on a line, density rising along it; an item's neighbours are the two next in line, so
    # that from the lower half no jump is needed for six items.
    data = world([30])
    rows = np.sort(data.train)
    order = np.full(len(data.embeddings), -1)
    order[rows] = np.arange(30)
    density = np.where(order >= 0, order / 29, 0)[None].astype(np.float32)
    neighbours = np.full((len(order), 2), -1, np.int32)
    neighbours[rows] = rows[np.minimum(np.arange(30)[:, None] + [1, 2], 29)]
    cell, domain = np.zeros(200, int), np.zeros(200, int)
    rng = np.random.default_rng(0)
    walks = tr.locality_walk(rng, data.cells, neighbours, density, cell, domain, 6)
    steps = np.diff(order[walks], axis=1)
    assert steps.min() == 1 and steps.max() == 2
    assert abs(steps.mean() - 1.5) < 0.1  # both neighbours alike


def bonet(scaled, draws, bins=8):
    """A.6's formula, item by item: P of a single draw, from density scaled to 0..1."""
    tau = max(np.percentile(scaled, 10), 0.05)
    which = [min(int(r * bins), bins - 1) for r in scaled]
    share = {b: which.count(b) for b in set(which)}
    n_b = {b: c / (c + 0.03 * draws) * np.exp(((b + 0.5) / bins - 1) / tau) for b, c in share.items()}
    p = np.array([n_b[b] / share[b] for b in which])
    return p / p.sum()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_percentile_is_numpys_to_the_last_bit(dtype):
    rng = np.random.default_rng(0)
    for longest in (1, 2, 11, 92):
        x = rng.random((77, longest)).astype(dtype)
        x[np.arange(longest) >= rng.integers(1, longest + 1, 77)[:, None]] = np.nan
        theirs = np.nanpercentile(x, 10, axis=1, keepdims=True)
        ours = tr._percentile(x, 10)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "scaled",
    [
        [0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.5, 0.7, 0.9, 1],  # τ at its floor of .05
        [0, 0.3, 0.35, 0.4, 0.45, 0.6, 0.6, 0.6, 0.9, 1],  # τ = the 10th percentile, .27
    ],
)
def test_sorted_bins_draw_by_the_bonet_formula(scaled):
    # Row 10 is what an index of -1 would read: in no cell, and of a density that would be noticed.
    scaled = np.array(scaled)
    density = np.append(2 + 2 * scaled, 9.0)[None].astype(np.float32)  # the scale must not matter
    members = np.append(np.arange(10), [-1, -1]).astype(np.int32)[None]
    cells = tr.Cells(members, np.append(np.zeros(10, int), -1)[None], np.zeros(1, int))
    zeros, rng = np.zeros(40_000, int), np.random.default_rng(0)
    one = tr.sorted_bins(rng, cells, density, zeros, zeros, 1)
    p = bonet(scaled, 1)
    likely = p * 40_000 > 5
    observed = np.bincount(one[:, 0], minlength=10)
    assert (observed[~likely] < 20).all()
    expected = p[likely] / p[likely].sum() * observed[likely].sum()
    assert chisquare(observed[likely], expected).pvalue > 1e-3
    # Eight draws without replacement: f(S), the chance that S is drawn first, item by item.
    p, first = bonet(scaled, 8), {frozenset(): 1.0}
    for _ in range(8):
        longer = {}
        for s, f in first.items():
            for i in set(range(10)) - s:
                longer[s | {i}] = longer.get(s | {i}, 0) + f * p[i] / (1 - p[list(s)].sum())
        first = longer
    expected = [sum(f for s, f in first.items() if i in s) for i in range(10)]
    eight = tr.sorted_bins(rng, cells, density, zeros, zeros, 8)
    share = np.bincount(eight.ravel(), minlength=10) / 40_000
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / 40_000))


def test_a_draw_is_in_random_order_and_padding_comes_last():
    # The first n of a draw must be a draw of n: a selection algorithm's own order need not be.
    low = np.array([[3, 5, 7, 9, -1, -1]], np.int32)
    tails = tr.Tails(low[None], np.array([[[1, 2]]], np.int32))
    zeros = np.zeros(20_000, int)
    seeds, _ = tr.seeds_and_tail(np.random.default_rng(0), tails, zeros, zeros, 6)
    assert (seeds[:, 4:] == -1).all() and (np.sort(seeds[:, :4]) == [3, 5, 7, 9]).all()
    for place in range(4):
        assert chisquare(np.unique(seeds[:, place], return_counts=True)[1]).pvalue > 1e-3


def test_raw_sequences_restart_one_time_in_ten():
    # On a ring where i's only neighbour is i + 1, in no cell: a step is +1 or back to the start.
    cells = tr.Cells(np.full((1, 1), -1, np.int32), np.full((1, 500), -1), np.zeros(1, int))
    ring = ((np.arange(500) + 1) % 500)[:, None]
    starts = np.arange(500).repeat(8)
    walks = tr.raw_sequences(np.random.default_rng(0), cells, ring, starts, 12)
    np.testing.assert_array_equal(walks[:, 0], starts)
    on, back = walks[:, 1:] == (walks[:, :-1] + 1) % 500, walks[:, 1:] == starts[:, None]
    assert (on ^ back).all()
    assert abs(back.mean() - 0.1) < 4 * np.sqrt(0.09 / back.size)


def test_raw_sequences_are_half_walks_and_half_cells(fitted, splits):
    rng, data = np.random.default_rng(0), fitted.data
    starts = rng.choice(data.train, 4000)
    walks = tr.raw_sequences(rng, data.cells, data.neighbours, starts, 16)
    assert splits.train[walks].all()
    near = (data.neighbours[walks[:, :-1]] == walks[:, 1:, None]).any(-1)
    is_walk = (near | (walks[:, 1:] == starts[:, None])).all(1) & (walks[:, 0] == starts)
    distinct = (np.diff(np.sort(walks, 1), axis=1) > 0).all(1)
    cell = data.cells.membership[:, walks]  # [R, B, 16]
    is_cell = ((cell == cell[..., :1]) & (cell >= 0)).all(-1).any(0) & distinct
    assert (is_walk | is_cell).all()
    # An item outside every kept cell of a clustering always walks.
    expected = 0.5 * (data.cells.membership[:, starts] >= 0).mean()
    assert abs((~is_walk).mean() - expected) < 4 * np.sqrt(0.25 / 4000)
    # A random order in the cell of the start, so some other item of the cell comes first.
    ours = (cell[..., 0] == data.cells.membership[:, starts]).any(0)
    assert ours[~is_walk].all() and (walks[~is_walk, 0] == starts[~is_walk]).mean() < 0.1


def test_raw_sequences_longer_than_every_cell_walk(world):
    data, rng = world([4, 3]), np.random.default_rng(0)
    walks = tr.raw_sequences(rng, data.cells, data.neighbours, data.train.repeat(9), 20)
    assert np.isin(walks, data.train).all()


def test_tails_by_hand():
    # Cell 0: rows 0..9, density .0 to .9 shuffled; cell 1: rows 10, 11, 12. Row 13 is in none.
    tenths = [3, 9, 0, 5, 7, 1, 8, 2, 6, 4, 5, 2, 9, 10]
    density = np.array([tenths], np.float32) / 10
    members = np.full((2, 10), -1, np.int32)
    members[0], members[1, :3] = range(10), (10, 11, 12)
    cells = tr.Cells(members, np.array([[0] * 10 + [1] * 3 + [-1]]), np.zeros(2, int))
    seen = np.full((1, 14), -1, np.int8)
    tails = tr.fit_tails(cells, density, seen, share=0.3, least=2)
    np.testing.assert_array_equal(tails.low[0, 0], [2, 5])  # nothing known: the two of lowest density
    np.testing.assert_array_equal(tails.tail[0, 0], [1, 6, 4])  # .9 .8 .7: the top 30 %
    np.testing.assert_array_equal(tails.low[0, 1], [11, 10])
    np.testing.assert_array_equal(tails.tail[0, 1], [12, 10, -1])  # at least two
    seen[0, [4, 1, 8, 12]], seen[0, [2, 11, 10]] = 0, 1
    tails = tr.fit_tails(cells, density, seen, share=0.3, least=2)
    np.testing.assert_array_equal(tails.low[0, 0], [8, 4, 1])  # all that are known to lack it: .6 .7 .9
    np.testing.assert_array_equal(tails.tail[0, 0], [1, 6, 4])  # labels do not move the tail
    np.testing.assert_array_equal(tails.low[0, 1], [12, -1, -1])  # the others have it
    tails = tr.fit_tails(cells, density, seen, share=0.3, least=5)
    np.testing.assert_array_equal(tails.low[0, 0], [8, 4, 1, 5, 7])  # made up from the unknown: .1 .2
    whole = tr.fit_tails(cells, density, seen, share=1.0, least=2)
    assert set(whole.tail[0, 0]) == set(range(10)) and set(whole.tail[0, 1]) == {10, 11, 12, -1}


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=4),
    share=st.floats(0.02, 0.5),
    least=st.integers(1, 8),
    seed=st.integers(0, 10_000),
)
def test_tails_are_on_top_and_low_items_lack_the_attribute(world, sizes, share, least, seed):
    data, rng = world(sizes, seed), np.random.default_rng(seed)
    seen = rng.choice([-1, 0, 1], data.density.shape, p=rng.dirichlet([1, 1, 1])).astype(np.int8)
    tails = tr.fit_tails(data.cells, data.density, seen, share=share, least=least)
    for m in range(2):
        for c, size in enumerate(sizes):
            rho, items = data.density[m], data.cells.members[c, :size]
            low, tail = (t[m, c][t[m, c] >= 0] for t in (tails.low, tails.tail))
            ordered = items[np.argsort(rho[items])]  # densities are distinct
            assert len(tail) == min(size, max(least, int(np.ceil(share * size))))
            np.testing.assert_array_equal(tail[::-1], ordered[-len(tail) :])
            lacking = [i for i in ordered if seen[m, i] == 0]
            unknown = [i for i in ordered if seen[m, i] == -1]
            filled = unknown[: max(0, least - len(lacking))]
            np.testing.assert_array_equal(low, lacking + filled)


def test_seeds_and_half_of_the_tail_are_fair_draws(world):
    data = world([40, 20], share=0.1, least=5)  # tails of 5 and 5, and 6 of the whole
    rng = np.random.default_rng(0)
    cell, domain = np.full(6000, 1), np.ones(6000, int)
    seeds, half = tr.seeds_and_tail(rng, data.tails, cell, domain, 4)
    low, tail = data.tails.low[1, 1], data.tails.tail[1, 1]
    low = low[low >= 0]
    assert 4 < len(low) <= 10
    count = [np.sum(seeds == i) for i in low]
    assert sum(count) == seeds.size and chisquare(count).pvalue > 1e-3
    assert (np.diff(np.sort(seeds, 1), axis=1) > 0).all()  # without replacement
    assert (half.sum(1) == 3).all() and not half[:, tail < 0].any()  # half of five, rounded up
    assert chisquare(half.sum(0)[tail >= 0]).pvalue > 1e-3


def test_cells_see_training_items_only(molecules, splits):
    options = dict(sizes=(32, 64), seeds=2, smallest=20, seed=3)
    cells = tr.fit_cells(molecules.embeddings, splits.train, **options)
    rng = np.random.default_rng(0)
    moved = np.array(molecules.embeddings)
    noise = rng.normal(size=(int((~splits.train).sum()), moved.shape[1]))
    moved[~splits.train] = noise / np.linalg.norm(noise, axis=1, keepdims=True)
    again = tr.fit_cells(moved, splits.train, **options)
    for one, two in zip(cells.__dict__.values(), again.__dict__.values(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert (cells.membership[:, ~splits.train] == -1).all()
    assert len(cells.membership) == 4 and set(cells.run) == {0, 1, 2, 3}
    for c, row in enumerate(cells.members):  # the three tables agree
        inside = np.flatnonzero(cells.membership[cells.run[c]] == c)
        np.testing.assert_array_equal(np.sort(row[row >= 0]), inside)
        assert len(inside) >= 20
    items = (cells.members >= 0).sum(1)
    assert items[cells.run == 0].mean() < items[cells.run == 1].mean()  # granularities differ
    one, two = cells.membership[0], cells.membership[2]  # the same size by two seeds
    assert not np.array_equal(one, two)


def test_cells_that_cannot_be_are_named(molecules, splits):
    fit = dict(sizes=(32,), seeds=1, seed=0)
    with pytest.raises(InputError, match="latent cells"):
        tr.fit_cells(molecules.embeddings, splits.train, smallest=1000, **fit)
    with pytest.raises(InputError, match="smallest"):
        tr.fit_cells(molecules.embeddings, splits.train, smallest=1, **fit)


def test_neighbours_by_brute_force(molecules, splits):
    table = tr.neighbour_table(molecules.embeddings, splits.train, k=10, index="exact")
    assert (table[~splits.train] == -1).all()
    train = np.flatnonzero(splits.train)
    x = np.asarray(molecules.embeddings[train], np.float64)
    cosine = x @ x.T
    np.fill_diagonal(cosine, -2)
    at = np.full(len(table), -1)
    at[train] = np.arange(len(train))
    chosen = at[table[train]]
    assert (chosen >= 0).all() and (chosen != np.arange(len(train))[:, None]).all()
    best = -np.sort(-cosine, axis=1)[:, :10]
    found = np.take_along_axis(cosine, chosen, 1)  # of two that tie, either will do
    np.testing.assert_allclose(found, best, atol=1e-6)


def test_sorting_puts_padding_last():
    density = np.array([[0.5, 0.1, 0.9], [0.1, 0.2, 0.3]])
    items = np.array([[2, -1, 0, 1], [2, 0, -1, -1]])
    ordered = tr.sort_by_density(items, density, np.array([0, 1]))
    np.testing.assert_array_equal(ordered, [[1, 0, 2, -1], [0, 2, -1, -1]])
