"""Spherical k-means against planted clusters, hand-made cases and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from genret.catalogue import clusters
from genret.catalogue.clusters import assign, spherical_kmeans, two_level_kmeans
from genret.types import InputError


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def mixture(n=1200, width=12, centres=10, noise=0.6, seed=0):
    rng = np.random.default_rng(seed)
    planted = rng.integers(0, centres, n)
    centre = unit(rng.standard_normal((centres, width)))
    return unit(centre[planted] + noise / width**0.5 * rng.standard_normal((n, width))), planted


def objective(rows, centroids, cell):
    return float(np.einsum("nd,nd->n", rows, centroids[cell], dtype=np.float64).mean())


def test_hand_computed_plane():
    """Four unit vectors at 0, 20, 90 and 130 degrees. Worked by hand: two cells, whose centroids
    bisect them at 10 and 110 degrees; mean cosine (2 cos 10 + 2 cos 20) / 4 = .962250."""
    angles = np.deg2rad([0, 20, 90, 130])
    rows = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    for seed in range(4):
        centroids, cell = spherical_kmeans(rows, 2, seed=seed)
        assert cell[0] == cell[1] != cell[2] == cell[3]
        degrees = np.rad2deg(np.arctan2(*centroids.T[::-1]))
        np.testing.assert_allclose(np.sort(degrees), [10, 110], atol=1e-4)
        assert objective(rows, centroids, cell) == pytest.approx(0.962250, abs=1e-6)


def test_recovers_planted_clusters():
    rng = np.random.default_rng(1)
    planted = rng.integers(0, 8, 800)
    rows = unit(np.eye(16)[planted] + 0.08 * rng.standard_normal((800, 16)))
    best = max(
        (spherical_kmeans(rows, 8, seed=seed) for seed in range(8)),
        key=lambda found: objective(rows, *found),
    )
    assert adjusted_rand_score(planted, best[1]) == 1.0
    true = unit(np.stack([rows[planted == c].mean(0) for c in range(8)]))
    np.testing.assert_allclose((true @ best[0].T).max(1), 1, atol=1e-5)


def test_objective_rises_until_nothing_moves():
    rows, _ = mixture(noise=2.0)
    found = [spherical_kmeans(rows, 24, seed=3, iterations=i) for i in range(1, 60)]
    values = np.array([objective(rows, *each) for each in found])
    assert (np.diff(values) >= -1e-7).all() and values[-1] > values[0] + 0.01
    centroids, cell = found[-1]
    np.testing.assert_array_equal(assign(rows, centroids), cell)  # a fixed point
    np.testing.assert_array_equal(found[-1][0], found[-2][0])
    means = unit(np.stack([rows[cell == c].mean(0, dtype=np.float64) for c in range(24)]))
    np.testing.assert_allclose(centroids, means, atol=1e-6)


def test_objective_close_to_scikit_learn():
    """On unit rows Euclidean k-means has nearly the same optimum: |x - y|² = 2 - 2 cos(x, y)."""
    rows, _ = mixture(n=2000, width=16, centres=20, noise=1.2)
    ours = max(objective(rows, *spherical_kmeans(rows, 20, seed=s, iterations=50)) for s in range(6))
    theirs = KMeans(20, n_init=6, random_state=0).fit(rows)
    peer = objective(rows, unit(theirs.cluster_centers_), theirs.labels_)
    assert ours > 0.985 * peer


def test_two_levels_are_nearly_as_good_as_one_and_no_cell_is_empty():
    rows, _ = mixture(n=6000, width=16, centres=40, noise=1.2)
    whole = objective(rows, *spherical_kmeans(rows, 300, seed=0))
    centroids, cell = found = two_level_kmeans(rows, 300, seed=0)
    assert centroids.shape == (300, 16) and np.bincount(cell, minlength=300).min() >= 1
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    means = unit(np.stack([rows[cell == c].mean(0, dtype=np.float64) for c in range(300)]))
    np.testing.assert_allclose(centroids, means, atol=1e-6)
    chance = objective(rows, rows[:300], assign(rows, rows[:300]))
    assert objective(rows, *found) - chance > 0.75 * (whole - chance)
    np.testing.assert_array_equal(two_level_kmeans(rows, 300, seed=0)[1], cell)
    assert sorted(two_level_kmeans(rows[:50], 50, seed=0)[1]) == list(range(50))  # a row each
    with pytest.raises(InputError, match="num_clusters: 51 clusters asked of 50 rows"):
        two_level_kmeans(rows[:50], 51, seed=0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.data())
def test_shares_add_up_and_are_in_proportion(sizes, data):
    sizes = np.array(sizes)
    total = data.draw(st.integers(len(sizes), sizes.sum()))
    counts = clusters._shares(sizes, total)
    assert counts.sum() == total and (counts >= 1).all() and (counts <= sizes).all()
    # Past what one at least forces up elsewhere, none is a whole cluster off its share.
    forced = np.maximum(1 - sizes * total / sizes.sum(), 0).sum()
    assert (np.abs(counts - sizes * total / sizes.sum()) < 1 + forced).all()


def test_deterministic_by_seed_and_whatever_the_block(monkeypatch):
    rows, _ = mixture()
    one, two = (spherical_kmeans(rows, 16, seed=5) for _ in range(2))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])
    assert not np.array_equal(one[1], spherical_kmeans(rows, 16, seed=6)[1])
    small = spherical_kmeans(rows, 16, seed=5, block=97)
    np.testing.assert_array_equal(one[1], small[1])
    np.testing.assert_allclose(one[0], small[0], atol=1e-6)
    monkeypatch.setattr(clusters, "_SCORES", 16 * 50)  # fewer rows at once where cells are many
    np.testing.assert_array_equal(one[1], spherical_kmeans(rows, 16, seed=5)[1])


def test_row_order_only_renames(monkeypatch):
    """From the same starting rows, permuted data gives the same partition."""
    rows, _ = mixture(n=400)
    order = np.random.default_rng(2).permutation(400)

    class Start:
        def __init__(self, rows):
            self.rows = rows

        def choice(self, n, k, replace):
            return self.rows

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Start(np.arange(12)))
    straight = spherical_kmeans(rows, 12, seed=0)[1]
    places = np.argsort(order)[:12]  # where rows 0..11 have gone
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Start(places))
    permuted = spherical_kmeans(rows[order], 12, seed=0)[1]
    assert adjusted_rand_score(straight[order], permuted) == 1.0


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_no_cell_is_empty(iterations):
    rng = np.random.default_rng(0)
    rows = unit(np.repeat(rng.standard_normal((7, 5)), 30, axis=0))  # 7 distinct vectors only
    centroids, cell = spherical_kmeans(rows, 40, seed=0, iterations=iterations)
    assert (np.bincount(cell, minlength=40) > 0).all()
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    each = spherical_kmeans(rows[:25], 25, seed=0)[1]
    np.testing.assert_array_equal(np.sort(each), np.arange(25))


def test_rows_that_cancel_keep_a_unit_centroid():
    rows = np.array([[1, 0], [-1, 0]], np.float32)
    centroids, cell = spherical_kmeans(rows, 1, seed=0)
    assert np.linalg.norm(centroids[0]) == 1 and cell.tolist() == [0, 0]


def test_memory_map(tmp_path):
    rows, _ = mixture(n=300)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    np.testing.assert_array_equal(
        spherical_kmeans(mapped, 9, seed=1, block=128)[1], spherical_kmeans(rows, 9, seed=1)[1]
    )


def test_assign_is_the_nearest_by_cosine():
    rows, _ = mixture(n=333)
    centroids = rows[:20]
    cell = assign(rows, centroids, block=64)
    assert cell.dtype == np.int32
    np.testing.assert_array_equal(cell, (rows.astype(np.float64) @ centroids.T).argmax(1))
    np.testing.assert_array_equal(cell[:20], np.arange(20))


@pytest.mark.parametrize(
    "field, call",
    [
        ("num_clusters", lambda rows: spherical_kmeans(rows, 11, seed=0)),
        ("num_clusters", lambda rows: spherical_kmeans(rows, 0, seed=0)),
        ("iterations", lambda rows: spherical_kmeans(rows, 2, seed=0, iterations=0)),
        ("embeddings", lambda rows: spherical_kmeans(rows[0], 1, seed=0)),
        ("embeddings", lambda rows: assign(rows, rows[:2, :3])),
    ],
)
def test_bad_input(field, call):
    with pytest.raises(InputError) as error:
        call(mixture(n=10)[0])
    assert error.value.field == field
