"""Baselines of the fan-out on contents whose answers are known."""

import numpy as np
import pytest

from genret.r4t import baselines
from genret.retrieval.index import ExactIndex
from genret.retrieval.sets import greedy_dpp, mmr, vendi_groups
from genret.types import InputError

D = 8


def units(x):
    return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def pool():
    """Around each of two queries three tight clusters of ten contents, and twenty contents elsewhere."""
    rng = np.random.default_rng(0)
    queries = units(rng.normal(size=(2, D)))
    centres = units(queries[:, None] + 0.7 * rng.normal(size=(2, 3, D)) / D**0.5)
    near = units(centres[:, :, None] + 0.02 * rng.normal(size=(2, 3, 10, D)))
    away = rng.normal(size=(20, D))
    away = units(away - (away @ queries.T) @ np.linalg.pinv(queries.T))
    return queries, centres, np.concatenate([near.reshape(-1, D), away])


def test_random_pool_is_distinct_uniform_and_the_seeds(pool):
    queries = np.repeat(pool[0], 1000, axis=0)
    run = baselines.random_pool(80)
    ids = run(queries, 5, 0)
    assert ids.shape == (2000, 5) and ids.dtype == np.int32
    assert all(len(set(row)) == 5 for row in ids)
    np.testing.assert_allclose(np.bincount(ids.ravel(), minlength=80) / 2000, 5 / 80, rtol=0.5)
    np.testing.assert_array_equal(run(queries, 5, 0), ids)
    assert (run(queries, 5, 1) != ids).any()


def test_no_fanout_is_the_top_of_the_query(pool):
    queries, _, contents = pool
    ids = baselines.no_fanout(ExactIndex(contents))(queries, 12, 0)
    np.testing.assert_array_equal(ids, np.argsort(-(queries @ contents.T), axis=1)[:, :12])


def test_reranking_is_that_of_the_pool_and_spreads(pool):
    queries, _, contents = pool
    index = ExactIndex(contents)
    top = np.argsort(-(queries @ contents.T), axis=1)[:, :30]
    for run, pick in (
        (
            baselines.mmr_reranking(index, contents, pool=30, trade=0.3),
            lambda c, x: mmr(c, x, 3, 0.3),
        ),
        (
            baselines.dpp_reranking(index, contents, pool=30, sharpness=2.0),
            lambda c, x: greedy_dpp(np.exp(2 * c), x, 3),
        ),
    ):
        ids = run(queries, 3, 0)
        for q in range(2):
            cosine = queries[q] @ contents[top[q]].T
            np.testing.assert_array_equal(ids[q], top[q][pick(cosine, contents[top[q]])])
            # One of each of the query's three clusters.
            assert sorted(ids[q] // 10 % 3) == [0, 1, 2] and (ids[q] // 30 == q).all()
        plain = baselines.no_fanout(index)(queries, 3, 0)
        assert (vendi_groups(contents[ids]) > vendi_groups(contents[plain]) + 0.1).all()


def test_relevance_alone_is_no_fanout(pool):
    queries, _, contents = pool
    index = ExactIndex(contents)
    plain = baselines.no_fanout(index)(queries, 5, 0)
    np.testing.assert_array_equal(baselines.mmr_reranking(index, contents, trade=1.0)(queries, 5, 0), plain)


def test_clusters_of_neighbours_are_the_clusters(pool):
    queries, centres, contents = pool
    run = baselines.neighbour_clusters(ExactIndex(contents), contents, pool=30)
    best = np.stack([run(queries, 3, seed) for seed in range(4)])  # k-means may start badly
    assert best.shape == (4, 2, 3, D)
    np.testing.assert_allclose(np.linalg.norm(best, axis=-1), 1, atol=1e-5)
    found = np.einsum("sqkd,qcd->sqkc", best, centres).max(2).min(2).max(0)
    assert (found > 0.99).all()


def test_more_than_there_is_is_refused(pool):
    queries, _, contents = pool
    index = ExactIndex(contents)
    for run in (
        baselines.random_pool(80), baselines.no_fanout(index),
        baselines.mmr_reranking(index, contents), baselines.neighbour_clusters(index, contents),
    ):  # fmt: skip
        with pytest.raises(InputError, match="81 of 80"):
            run(queries, 81, 0)
    with pytest.raises(InputError, match="11 of 10"):
        baselines.dpp_reranking(index, contents, pool=10)(queries, 11, 0)
