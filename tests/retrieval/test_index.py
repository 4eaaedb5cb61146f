"""Exact search against brute force, ties included and on every mesh; ScaNN against exact search."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.retrieval import index as index_module
from genret.retrieval.index import (
    ExactIndex,
    build_index,
    recall,
    recall_by_score,
    scann_index,
    top_k,
)
from genret.types import InputError

MESHES = {"one": (1,), "line": (8,), "cube": (2, 2, 2)}


def make_mesh(shape):
    names = ("data", "fsdp", "tensor")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def brute_force(embeddings, queries, k):
    """float64 scores, ties by the lower id: numpy's stable sort is the oracle."""
    scores = queries.astype(np.float64) @ embeddings.astype(np.float64).T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(scores, ids, axis=1)


def grid(rng, rows, width):
    """Multiples of 1/4 in [-1/2, 1/2]: every inner product is exact in f32, and most are tied."""
    return (rng.integers(-2, 3, (rows, width)) / 4).astype(np.float32)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def clustered(rng, rows, width=64, cells=200):
    centres = unit(rng.standard_normal((cells, width)))
    noise = rng.standard_normal((rows, width)) / np.sqrt(width)
    return unit(centres[rng.integers(cells, size=rows)] + 0.6 * noise)


def query_mix(rng, embeddings, count):
    """Items; means of 8 neighbours, as a seed centroid; means of 8 unrelated items."""
    items = embeddings[rng.integers(len(embeddings), size=count)]
    near = np.argsort(-items @ embeddings.T, axis=1)[:, :100]
    near = np.take_along_axis(near, rng.integers(100, size=(count, 8)), axis=1)
    apart = rng.integers(len(embeddings), size=(count, 8))
    return np.concatenate([items, unit(embeddings[near].mean(1)), unit(embeddings[apart].mean(1))])


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize(("n", "k"), [(1024, 1), (1024, 7), (1024, 15), (1024, 16), (1000, 7)])
def test_top_k_is_lax_top_k_ties_included(levels, n, k):
    # `levels` distinct values: 1 is all tied, 2 has ties within and across every chunk of 64.
    scores = np.random.default_rng(levels).integers(levels, size=(64, n)).astype(np.float32)
    values, at = jax.jit(top_k, static_argnums=1)(scores, k)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(at, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, expected, axis=1))


@given(
    n=st.integers(1, 12).map(lambda blocks: 128 * blocks), k=st.integers(1, 6) | st.integers(7, 40),
    real=st.integers(-200, 1700), levels=st.sampled_from([1, 3, 10**6]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_columns_that_do_not_count_never_win(n, k, real, levels, seed):
    # They score above all others, as padding does where every product is negative.
    scores = -np.random.default_rng(seed).integers(1, levels + 1, size=(8, n)).astype(np.float32)
    scores[:, max(real, 0) :] = 0
    values, at = jax.jit(top_k, static_argnums=1)(scores, k, real)
    real = min(max(real, 0), n)
    expected = np.argsort(-scores[:, :real], axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(at[:, : min(k, real)], expected)
    np.testing.assert_array_equal(values[:, : min(k, real)], np.take_along_axis(scores, expected, axis=1))
    assert np.isneginf(values[:, min(k, real) :]).all()


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("n", "k"), [(1037, 3), (1037, 20), (1037, 1037), (3, 2), (20_000, 10)])
def test_exact_is_brute_force_on_every_mesh(mesh, n, k):
    rng = np.random.default_rng(0)
    embeddings, queries = grid(rng, n, 16), grid(rng, 70, 16)
    index = ExactIndex(embeddings, mesh=make_mesh(MESHES[mesh]), query_block=64, corpus_block=256)
    ids, scores = index.search(queries, k)
    expected_ids, expected_scores = brute_force(embeddings, queries, k)
    assert ids.dtype == np.int32 and scores.dtype == np.float32
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)
    assert index.num_items == n


def test_ids_depend_on_neither_mesh_nor_batch():
    # Duplicates make rounding visible: a kernel that rounds by position would reorder them.
    rng = np.random.default_rng(1)
    embeddings = clustered(rng, 3000)
    embeddings[1500:] = embeddings[:1500]
    queries = query_mix(rng, embeddings, 20)
    one, line, cube = (
        ExactIndex(embeddings, mesh=make_mesh(shape)).search(queries, 30) for shape in MESHES.values()
    )
    alone = [ExactIndex(embeddings).search(query[None], 30) for query in queries[:3]]
    for ids, scores in (line, cube):
        np.testing.assert_array_equal(ids, one[0])
        np.testing.assert_array_equal(scores, one[1])
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in alone]), one[0][:3])
    expected_ids, expected_scores = brute_force(embeddings, queries, 30)
    np.testing.assert_allclose(one[1], expected_scores, atol=1e-6)
    assert recall(one[0], expected_ids) > 0.999


@pytest.mark.parametrize("mesh", MESHES)
def test_padding_is_never_returned(mesh):
    # Every true score is negative, so a zero padding row would win.
    embeddings = unit(np.random.default_rng(2).uniform(0.1, 1, (130, 8)))
    index = ExactIndex(embeddings, mesh=make_mesh(MESHES[mesh]))
    ids, scores = index.search(-embeddings[:5], 130)
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.tile(np.arange(130), (5, 1)))
    assert (scores < 0).all()


def test_many_query_blocks_on_many_devices():
    # With every block in flight at once, XLA's CPU devices deadlock in the gather and abort.
    embeddings = grid(np.random.default_rng(8), 500, 8)
    queries = np.tile(embeddings, (8, 1))
    ids, _ = ExactIndex(embeddings, mesh=make_mesh((8,)), query_block=32).search(queries, 3)
    np.testing.assert_array_equal(ids, np.tile(brute_force(embeddings, embeddings, 3)[0], (8, 1)))


@pytest.mark.parametrize("most", [{}, {"corpus_block": 4096}], ids=["usual", "small"])
def test_scores_of_all_pairs_never_exist(most):
    embeddings, queries = np.ones((100_000, 4), np.float32), np.ones((1024, 4), np.float32)
    index = ExactIndex(embeddings, **most)
    compiled = index_module.search_rows.lower(
        queries, index.rows, k=10, num_items=100_000, block=index.block, mesh=index.mesh
    ).compile()
    # Those of 128 queries with a block, its rows, and what is chosen.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 4 * index.block * (128 + 4)


def test_memory_map_of_half_precision(tmp_path):
    embeddings = grid(np.random.default_rng(3), 300, 16)  # exact in float16 as well
    np.save(tmp_path / "e.npy", embeddings.astype(np.float16))
    mapped = np.load(tmp_path / "e.npy", mmap_mode="r")
    ids, _ = ExactIndex(mapped, mesh=make_mesh((8,))).search(embeddings[:9], 5)
    np.testing.assert_array_equal(ids, brute_force(embeddings, embeddings[:9], 5)[0])


def test_no_queries_is_no_answer():
    ids, scores = ExactIndex(np.eye(4, dtype=np.float32)).search(np.zeros((0, 4), np.float32), 2)
    assert ids.shape == scores.shape == (0, 2)
    assert ids.dtype == np.int32 and scores.dtype == np.float32


@pytest.mark.parametrize("bad", [np.ones(4), np.ones((4, 2), int), np.ones((0, 4)), np.ones((4, 0))])
def test_embeddings_that_are_no_float_matrix(bad):
    with pytest.raises(InputError, match="embeddings: .* is not float"):
        ExactIndex(bad)


def test_inputs_are_checked_before_the_search():
    bad = np.ones((70_000, 2), np.float32)
    bad[66_000, 1] = np.nan
    with pytest.raises(InputError, match="embeddings: row 66000 is not finite"):
        ExactIndex(bad)
    index = ExactIndex(np.eye(4, dtype=np.float32))
    for k in (0, 5):
        with pytest.raises(InputError, match=f"k: {k} items of 4"):
            index.search(np.ones((1, 4)), k)
    with pytest.raises(InputError, match=r"queries: \[1, 3\] is not \[Q, 4\]"):
        index.search(np.ones((1, 3)), 1)
    with pytest.raises(InputError, match="queries: row 1 is not finite"):
        index.search(np.array([[1, 0, 0, 0], [0, np.nan, 0, 0]]), 1)
    with pytest.raises(InputError, match="no index is called 'hnsw'"):
        build_index("hnsw", np.eye(4, dtype=np.float32), 1)


# ScaNN


@pytest.mark.parametrize(
    ("n", "options"),
    [
        (2000, {}),
        (20_000, {"reorder": 7500}),
        (20_000, {"num_leaves": 141}),
        (20_000, {"num_leaves": 141, "soar": True}),
    ],
    ids=["brute force", "hashing", "tree", "tree, SOAR"],
)
@pytest.mark.parametrize("k", [28, 50])
def test_scann_defaults_find_all_but_a_thousandth(n, options, k):
    pytest.importorskip("scann", reason="no ScaNN wheel for this platform")
    rng = np.random.default_rng(4)
    embeddings = clustered(rng, n)
    queries = query_mix(rng, embeddings, 100)
    exact_ids, exact_scores = ExactIndex(embeddings).search(queries, k)
    index = scann_index(embeddings, k=k, **options)
    ids, scores = index.search(queries, k)
    assert ids.dtype == np.int32 and index.num_items == n
    assert bool(index.reorder) == bool(options)  # below TREE nothing is hashed untold
    # Its scores are the exact inner products of the ids it returns, best first.
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, embeddings[ids]), atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    for kind in np.split(np.arange(300), 3):  # items, near means, means of unrelated items
        assert recall(ids[kind], exact_ids[kind]) >= 0.999
        assert recall_by_score(scores[kind], exact_scores[kind]) >= 0.999


def test_soar_finds_more_in_as_many_leaves():
    pytest.importorskip("scann", reason="no ScaNN wheel for this platform")
    rng = np.random.default_rng(6)
    embeddings = rng.normal(size=(20_000, 24)).astype(np.float32)  # no clusters: neighbours across borders
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    queries = embeddings[:200]
    exact_ids, _ = ExactIndex(embeddings).search(queries, 20)
    few = dict(k=20, num_leaves=141, leaves_to_search=6)
    found = {s: scann_index(embeddings, soar=s, **few).search(queries, 20)[0] for s in (False, True)}
    assert all(len(set(row)) == 20 for row in found[True].tolist())  # none twice, though in two leaves
    missed = {s: 1 - recall(ids, exact_ids) for s, ids in found.items()}
    assert missed[True] < 0.7 * missed[False]


def test_scann_searched_deeper_than_its_leaves_still_answers():
    pytest.importorskip("scann", reason="no ScaNN wheel for this platform")
    rng = np.random.default_rng(5)
    embeddings = clustered(rng, 2000, width=16)
    index = scann_index(embeddings, k=5, num_leaves=40, leaves_to_search=1, reorder=20)
    for k in (100, 2000):  # about two leaves' worth, and everything
        ids, scores = index.search(embeddings[:20], k)
        assert np.isfinite(scores).all()
        assert all(len(set(row)) == k for row in ids.tolist())
    assert index.search(embeddings[:0], 3)[0].shape == (0, 3)


def test_without_scann_the_exact_index_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "scann", None)  # what an absent wheel looks like to `import`
    embeddings = np.eye(4, dtype=np.float32)
    with pytest.raises(InputError, match="wheels for Linux.*Use the exact index.*pip install"):
        build_index("scann", embeddings, 2)
    assert build_index("auto", embeddings, 2).name == "exact"


def test_items_that_look_for_items_need_few_leaves(monkeypatch):
    pytest.importorskip("scann", reason="no ScaNN wheel for this platform")
    embeddings = clustered(np.random.default_rng(7), 20_000)
    assert build_index("scann", embeddings, 21, of_items=True).leaves == 0  # too few items for a tree
    monkeypatch.setattr(index_module, "TREE", 20_000)
    wide, narrow = (build_index("scann", embeddings, 21, of_items=own) for own in (False, True))
    assert narrow.leaves < wide.leaves / 10 and narrow.reorder < wide.reorder
    exact_ids, _ = ExactIndex(embeddings).search(embeddings[:300], 21)
    assert recall(narrow.search(embeddings[:300], 21)[0], exact_ids) >= 0.99


def test_auto_is_scann_where_it_is_installed():
    pytest.importorskip("scann", reason="no ScaNN wheel for this platform")
    assert build_index("auto", np.eye(4, dtype=np.float32), 2).name == "scann"
    assert build_index("exact", np.eye(4, dtype=np.float32), 2).name == "exact"


def test_recall_by_hand():
    # Row 0 shares {1, 2} of 3, row 1 shares all three in another order: (2 + 3) / 6.
    assert recall(np.array([[2, 1, 9], [6, 5, 4]]), np.array([[1, 2, 3], [4, 5, 6]])) == 5 / 6
    # The k-th exact score is .7: .9 and .7 reach it, .6 does not.
    assert recall_by_score(np.array([[0.9, 0.7, 0.6]]), np.array([[0.9, 0.8, 0.7]])) == 2 / 3


def test_recall_by_score_forgives_duplicates():
    embeddings = np.repeat(np.eye(2, dtype=np.float32), 3, axis=0)  # items 0-2 are one, 3-5 another
    query = np.array([[1.0, 0.0]], np.float32)
    exact_ids, exact_scores = ExactIndex(embeddings).search(query, 2)
    np.testing.assert_array_equal(exact_ids, [[0, 1]])
    other = np.array([[1, 2]])  # just as right
    assert recall(other, exact_ids) == 0.5
    assert recall_by_score(query @ embeddings[other[0]].T, exact_scores) == 1


@pytest.mark.shared
@pytest.mark.parametrize("name", ["fashion", "streaming"])
def test_scann_recall_on_real_catalogues(name):
    pytest.importorskip("scann", reason="no ScaNN wheel for this platform")
    shared = Path(__file__).parents[3] / "shared/data/embeddings"
    embeddings = unit(np.load(shared / f"{name}_minilm_f16.npy").astype(np.float32))
    queries = query_mix(np.random.default_rng(6), embeddings, 100)
    _, exact_scores = ExactIndex(embeddings).search(queries, 28)
    _, scores = scann_index(embeddings, k=28).search(queries, 28)
    assert recall_by_score(scores, exact_scores) >= 0.999


def test_precision_survives_long_vectors():
    # At D = 1024 a TF32 or bf16 matmul errs by 1e-3 or more; full f32 stays below 1e-6.
    rng = np.random.default_rng(7)
    embeddings = unit(rng.standard_normal((200, 1024)))
    _, scores = ExactIndex(embeddings).search(embeddings[:10], 200)
    np.testing.assert_allclose(scores, brute_force(embeddings, embeddings[:10], 200)[1], atol=1e-6)
