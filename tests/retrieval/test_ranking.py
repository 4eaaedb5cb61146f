"""Rankings against a filter of the fully sorted corpus, one query at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.retrieval.index import ExactIndex, scann_index
from genret.retrieval.ranking import merge, rank, rank_set
from genret.types import InputError


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


class BruteForce:
    """An index in four lines, so that hypothesis compiles nothing."""

    name = "brute force"

    def __init__(self, embeddings):
        self.embeddings, self.num_items = embeddings, len(embeddings)

    def search(self, queries, k):
        scores = queries @ self.embeddings.T
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
        return ids, np.take_along_axis(scores, ids, axis=1)


def one_by_one(embeddings, queries, k, exclude, labels, domain):
    rows = []
    for query, seeds, m in zip(queries, exclude, domain, strict=True):
        order = np.argsort(-(embeddings @ query), kind="stable")
        rows.append([i for i in order if i not in seeds and labels[m, i] >= 0][:k])
    return np.array(rows)


# Three axes of the plane and what lies between, worked by hand: the query (1, 0) ranks
# 0 (1.0), 3 (.8), 1 (.6), 4 (0), 2 (-1).
HAND = np.array([[1, 0], [0.6, 0.8], [-1, 0], [0.8, 0.6], [0, 1]], np.float32)
QUERY = np.array([[1, 0]], np.float32)


def test_by_hand():
    index = ExactIndex(HAND)
    np.testing.assert_array_equal(rank(index, QUERY, 3), [[0, 3, 1]])
    seeds = np.array([[3, -1]])
    np.testing.assert_array_equal(rank(index, QUERY, 3, exclude=seeds), [[0, 1, 4]])
    # In domain 0 items 0 and 4 are unknown: skipped, and the list is filled from below by item 2.
    labels = np.array([[-1, 1, 0, 0, -1], [0, 0, 1, 1, 0]], np.int8)
    for m, expected in ((0, [1, 2]), (1, [0, 1])):
        ids = rank(index, QUERY, 2, exclude=seeds, labels=labels, domain=np.array([m]))
        np.testing.assert_array_equal(ids, [expected])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(1, 6), st.integers(0, 5))
def test_is_the_filtered_full_order(seed, unknown, k, num_seeds):
    rng = np.random.default_rng(seed)
    n, q = 60, 7
    embeddings, queries = unit(rng.standard_normal((n, 4))), unit(rng.standard_normal((q, 4)))
    labels = rng.integers(0, 2, (2, n)).astype(np.int8)
    labels[0, rng.random(n) < unknown] = -1  # domain 1 is fully known
    domain = rng.integers(2, size=q)
    exclude = rng.integers(-1, n, (q, num_seeds))  # padded anywhere, possibly twice the same
    index = BruteForce(embeddings)
    expected = [
        one_by_one(embeddings, queries[i : i + 1], k, exclude[i : i + 1], labels, domain[i : i + 1])
        for i in range(q)
    ]
    given_ = {"exclude": exclude, "labels": labels, "domain": domain}
    if min(row.shape[1] for row in expected) < k:
        with pytest.raises(InputError, match="known label in domain 0"):
            rank(index, queries, k, **given_)
        return
    ids = rank(index, queries, k, **given_)
    np.testing.assert_array_equal(ids, np.concatenate(expected))
    assert ids.dtype == np.int32
    assert not (ids[:, :, None] == exclude[:, None, :]).any()  # seeds never appear
    assert (labels[domain[:, None], ids] >= 0).all()  # unknown never counted
    # A set of one row is a query, by either merge.
    for how in ("best_score", "round_robin"):
        np.testing.assert_array_equal(rank_set(index, queries[:, None], k, how=how, **given_), ids)


def test_known_labels_change_nothing():
    rng = np.random.default_rng(0)
    index = BruteForce(unit(rng.standard_normal((50, 4))))
    queries = unit(rng.standard_normal((5, 4)))
    labels, domain = rng.integers(0, 2, (3, 50)).astype(np.int8), np.array([0, 1, 2, 0, 1])
    ids = rank(index, queries, 10, labels=labels, domain=domain)
    np.testing.assert_array_equal(ids, rank(index, queries, 10))


def test_sparse_labels_are_reached_through_scann_too():
    pytest.importorskip("scann", reason="no ScaNN wheel for this platform")
    rng = np.random.default_rng(1)
    embeddings = unit(rng.standard_normal((3000, 16)))
    labels = np.full((1, 3000), -1, np.int8)
    labels[0, rng.choice(3000, 30, replace=False)] = 1  # 1 %: the search must reach far down
    index = scann_index(embeddings, k=8, num_leaves=50, reorder=100)
    domain = np.zeros(4, np.int32)
    ids = rank(index, embeddings[:4], 30, labels=labels, domain=domain)
    expected = one_by_one(embeddings, embeddings[:4], 30, np.full((4, 0), -1), labels, domain)
    np.testing.assert_array_equal(ids, expected)


def test_an_index_that_loses_items_is_an_error_and_no_loop():
    class Stuck(BruteForce):
        def search(self, queries, k):
            ids, scores = super().search(queries, k)
            return np.zeros_like(ids), scores

    with pytest.raises(RuntimeError, match="'brute force' did not return each of its items once"):
        rank(Stuck(HAND), QUERY, 2, exclude=np.array([[0]]))


def test_inputs():
    index = BruteForce(HAND)
    labels, domain = np.array([[-1, 1, 0, 0, -1]], np.int8), np.array([0])
    with pytest.raises(InputError, match="query 0 has 2 items with a known label in domain 0"):
        rank(index, QUERY, 3, exclude=np.array([[1, 1]]), labels=labels, domain=domain)
    with pytest.raises(InputError, match="labels and domain go together"):
        rank(index, QUERY, 1, labels=labels)
    with pytest.raises(InputError, match="labels: .* is not .M, N."):
        rank(index, QUERY, 1, labels=labels[:, :4], domain=domain)
    with pytest.raises(InputError, match="domain: not one domain per query"):
        rank(index, QUERY, 1, labels=labels, domain=np.array([1]))
    with pytest.raises(InputError, match="exclude: not one row"):
        rank(index, QUERY, 1, exclude=np.array([[5]]))
    with pytest.raises(InputError, match="queries: .* is not .Q, R, D."):
        rank_set(index, QUERY, 1)


def test_merge_by_hand():
    # List 0: 7 (.9), 5 (.5), 2 (.4). List 1: 5 (.8), 7 (.7), 9 (.4).
    ids = np.array([[[7, 5, 2], [5, 7, 9]]])
    scores = np.array([[[0.9, 0.5, 0.4], [0.8, 0.7, 0.4]]])
    # Best scores: 7 .9, 5 .8, then 2 and 9 tie at .4 and the lower id goes first.
    np.testing.assert_array_equal(merge(ids, scores, 4), [[7, 5, 2, 9]])
    # In turns: 7 5 | 5 7 | 2 9, repeats dropped.
    np.testing.assert_array_equal(merge(ids, scores, 4, "round_robin"), [[7, 5, 2, 9]])
    np.testing.assert_array_equal(merge(ids[:, ::-1], scores, 3, "round_robin"), [[5, 7, 9]])
    with pytest.raises(InputError, match="query 0 has 4 distinct items for 5 places"):
        merge(ids, scores, 5)
    with pytest.raises(InputError, match="no merge is called 'mean'"):
        merge(ids, scores, 1, "mean")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 8))
def test_merge_against_dictionaries(seed, r, k):
    rng = np.random.default_rng(seed)
    ids = np.stack([[rng.permutation(12)[:k] for _ in range(r)] for _ in range(5)])
    scores = -np.sort(-rng.integers(0, 6, (5, r, k)) / 4, axis=2)  # descending, many ties
    for row, (lists, values) in enumerate(zip(ids, scores, strict=True)):
        best = {}
        for i, s in zip(lists.ravel().tolist(), values.ravel().tolist(), strict=True):
            best[i] = max(s, best.get(i, -1))
        by_score = sorted(best, key=lambda i: (-best[i], i))[:k]
        in_turns = list(dict.fromkeys(lists.T.ravel().tolist()))[:k]
        assert merge(ids, scores, k)[row].tolist() == by_score
        assert merge(ids, scores, k, "round_robin")[row].tolist() == in_turns


def test_a_set_reaches_what_one_query_cannot():
    # Two opposite groups; the mean of the two rows would rank neither group first.
    embeddings = unit(np.array([[1, 0.1], [1, 0.2], [-1, 0.1], [-1, 0.2], [0, 1]]))
    rows = np.array([[[1, 0], [-1, 0]]], np.float32)
    index, seeds = BruteForce(embeddings), np.array([[0]])
    np.testing.assert_array_equal(rank_set(index, rows, 3, exclude=seeds), [[2, 1, 3]])
    in_turns = rank_set(index, rows, 3, how="round_robin", exclude=seeds)
    np.testing.assert_array_equal(in_turns, [[1, 2, 4]])
