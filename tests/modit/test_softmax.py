"""The retrieval-aware loss against a softmax worked out in NumPy, and its candidate draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.diffusion import edm
from genret.diffusion.dit import make_dit
from genret.diffusion.retriever import Retriever
from genret.modit import stages
from genret.modit.softmax import log_partition, make_corpus, most_positives, multi_positive_softmax
from genret.training.loop import accumulate, draw_for
from genret.training.rows import read_all
from genret.types import InputError


def corpus_of(rows, items=None):
    return make_corpus(np.asarray(rows), items or max(rows) + 1, limit=1000)


def test_loss_by_hand():
    # Query e₁ against e₁, e₂, -e₁ and a seed; T = .5, so logits are 2, 0, -2 (the seed is left out).
    table = np.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], np.float32)
    query, everything = jnp.array([[1.0, 0.0]]), corpus_of(range(4))
    found = everything.candidates(np.array([[0, 1, 2, -1]]), np.array([[3, -1]]))
    loss, weight = multi_positive_softmax(query, table, everything.rows, found, 0.5)
    total = np.log(np.exp(2) + 1 + np.exp(-2))
    np.testing.assert_allclose(loss, [-((2 - total) + (0 - total) + (-2 - total)) / 3], rtol=1e-6)
    assert weight == 1
    # A positive outside the corpus joins its own row's softmax, so leaving it out changes nothing here.
    some = corpus_of([0, 1, 3], items=4)
    found = some.candidates(np.array([[0, 1, 2, -1]]), np.array([[3, -1]]))
    again, _ = multi_positive_softmax(query, table, some.rows, found, 0.5)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for few in ([-1, -1, -1], [0, 1, -1], [0, 1, 3]):  # too few, or one of them a seed
        found = everything.candidates(np.array([few]), np.array([[3, -1]]))
        loss, weight = multi_positive_softmax(query, table, everything.rows, found, 0.5)
        assert weight == 0 and np.isfinite(loss).all()


def test_gradient_moves_the_query_to_its_positives():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(32, 4)).astype(np.float32)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    corpus = corpus_of(range(32))
    found = corpus.candidates(np.array([[5, 9, -1]]), np.array([[-1]]))
    q = jnp.asarray(rng.normal(size=(1, 4)), jnp.float32)

    def loss(q):
        return multi_positive_softmax(q / jnp.linalg.norm(q), table, corpus.rows, found, 0.1)[0].sum()

    def toward(q):
        return float((q / jnp.linalg.norm(q) @ table[[5, 9]].mean(0))[0])

    gradient = jax.grad(loss)(q)
    assert np.isfinite(gradient).all()
    step = q - 0.05 * gradient
    assert loss(step) < loss(q) and toward(step) > toward(q)


@given(st.integers(0, 2**31), st.sampled_from([10, 50, 1000]))
@settings(max_examples=40, deadline=None)
def test_a_corpus_is_distinct_training_rows_and_places_point_back(seed, limit):
    rng = np.random.default_rng(seed)
    train = np.sort(rng.choice(200, 100, replace=False))
    corpus = make_corpus(train, 200, limit, seed)
    assert len(set(corpus.rows)) == len(corpus.rows) == min(limit, 100) and set(corpus.rows) <= set(train)
    positives, seeds = rng.integers(-1, 200, (8, 6)), rng.integers(-1, 200, (8, 3))
    found = corpus.candidates(positives, seeds)
    for row in range(8):
        assert not set(found.hits[row]) & set(seeds[row][seeds[row] >= 0])
    np.testing.assert_array_equal(found.known, np.isin(found.hits, corpus.rows) & (found.hits >= 0))
    inside = found.seeds >= 0
    np.testing.assert_array_equal(corpus.rows[found.seeds[inside]], seeds[inside])
    np.testing.assert_array_equal(inside, np.isin(seeds, corpus.rows))


def test_microbatches_change_nothing_in_sft(world):
    data = world([30, 40, 30])
    retriever = Retriever(make_dit("test", embedding=data.embeddings.shape[1], domains=2, max_context=8))
    space = edm.plain_space(data.embeddings.shape[1], 2)
    term = stages.RetrievalTerm(1.0, 0.1, 64)
    stage = stages.make_stage("sft", retriever, space, data, batch=16, length=8, retrieval=term)
    frozen = jax.tree.map(jnp.asarray, stage.frozen)
    params, batch = retriever.init(jax.random.key(0)), read_all(stage.batch(0, None))
    draw = draw_for(0, jnp.int32(0), 16)
    one, four = (
        jax.jit(lambda p, b, parts=parts: accumulate(stage, p, frozen, b, draw, parts))(params, batch)
        for parts in (1, 4)
    )
    assert float(one[1]["with_positives"]) > 0.5
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


@given(st.integers(0, 2**31), st.integers(1, 3000), st.sampled_from([0.035, 1.0]))
@settings(max_examples=15, deadline=None)
def test_the_partition_and_its_gradients_are_those_of_all_logits_at_once(seed, items, temperature):
    """In blocks of the corpus against one matrix of logits, in float64 by hand."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(items + 5, 6))
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    corpus = rng.permutation(items + 5)[:items]
    query = table[rng.integers(0, len(table), 3)] / temperature
    seeds = rng.integers(-1, items, (3, 4)) if items > 12 else np.full((3, 4), -1)
    logits = query @ table[corpus].T
    for row, own in enumerate(seeds):
        logits[row, own[own >= 0]] = -np.inf
    top = logits.max(1, keepdims=True)
    share = np.exp(logits - top)
    total = share.sum(1, keepdims=True)
    given = [jnp.asarray(x, jnp.float32) for x in (query, table)]
    value, pull = jax.vjp(lambda q, t: log_partition(q, t, corpus, seeds), *given)
    np.testing.assert_allclose(value, (top + np.log(total))[:, 0], rtol=1e-5, atol=1e-5)
    g = jnp.array([1.0, -2.0, 0.5])
    weight = share / total * np.asarray(g)[:, None]  # of each row of the corpus
    np.testing.assert_allclose(pull(g)[0], weight @ table[corpus], atol=2e-5)
    expected = np.zeros_like(table)
    expected[corpus] = weight.T @ query
    np.testing.assert_allclose(pull(g)[1], expected, atol=2e-4)


def test_positives_are_packed_into_as_few_places_as_any_row_needs():
    members = np.array([[4, 2, 7, -1], [1, 3, -1, -1]])
    has = np.zeros((2, 9), bool)
    has[0, [2, 7, 1]] = has[1, 3] = True
    assert most_positives(members, has) == 2 and most_positives(members, has & False) == 1
    wide = make_corpus(np.arange(8), 9, 100)
    tight = make_corpus(np.arange(8), 9, 100, most=2)
    hits, seeds = np.where(has[0][members] & (members >= 0), members, -1), np.array([[2, -1], [-1, 0]])
    found = tight.candidates(hits, seeds)
    np.testing.assert_array_equal(found.hits, [[-1, 7], [1, -1]])  # 2 is a seed
    query = np.float32([[0.6, 0.8], [1, 0]])
    table = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    a, b = (
        multi_positive_softmax(jnp.asarray(query), table, c.rows, c.candidates(hits, seeds), 0.3)
        for c in (wide, tight)
    )
    np.testing.assert_allclose(a, b, rtol=1e-6)
    with pytest.raises(InputError, match="most is 1"):
        make_corpus(np.arange(8), 9, 100, most=1).candidates(hits, seeds)
