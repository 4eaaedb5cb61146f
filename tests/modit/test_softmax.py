"""The retrieval-aware loss against a softmax worked out in NumPy, and its candidate draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.modit.softmax import Candidates, draw_candidates, multi_positive_softmax


def test_loss_by_hand():
    # One query e₁ against e₁, e₂, -e₁ and a seed; T = .5, so logits are 2, 0, -2 (the seed is left out).
    table = np.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], np.float32)
    candidates = Candidates(np.array([[0, 1, 2, 3]]), np.array([[0, 1, 2, -1]]), np.array([[3, -1]]))
    loss, weight = multi_positive_softmax(jnp.array([[1.0, 0.0]]), table, candidates, 0.5)
    total = np.log(np.exp(2) + 1 + np.exp(-2))
    np.testing.assert_allclose(loss, [-((2 - total) + (0 - total) + (-2 - total)) / 3], rtol=1e-6)
    assert weight == 1
    for few in ([-1, -1, -1], [0, 1, -1]):
        loss, weight = multi_positive_softmax(
            jnp.array([[1.0, 0.0]]), table, candidates.replace(hits=np.array([few])), 0.5
        )
        assert weight == 0 and np.isfinite(loss).all()


def test_gradient_moves_the_query_to_its_positives():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(32, 4)).astype(np.float32)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    candidates = Candidates(np.arange(32).reshape(1, 32), np.array([[5, 9]]), np.array([[-1]]))
    q = jnp.asarray(rng.normal(size=(1, 4)), jnp.float32)
    f = lambda q: multi_positive_softmax(q / jnp.linalg.norm(q), table, candidates, 0.1)[0].sum()  # noqa: E731
    step = q - 0.05 * jax.grad(f)(q)
    toward = lambda q: float((q / jnp.linalg.norm(q) @ table[[5, 9]].mean(0))[0])  # noqa: E731
    assert f(step) < f(q) and toward(step) > toward(q)


@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from([8, 16, 64, 1000]))
@settings(max_examples=40, deadline=None)
def test_every_positive_is_a_candidate_and_none_is_drawn_twice(seed, positives, limit):
    rng = np.random.default_rng(seed)
    train = np.sort(rng.choice(200, 100, replace=False))
    wanted = rng.choice(train, (4, positives))
    wanted[0, 0] = -1
    outside = np.setdiff1d(np.arange(200), train)[:4]
    seeds = np.stack([rng.choice(train, 4), outside], axis=1)
    found = draw_candidates(rng, train, 200, wanted, seeds, limit)
    drawn = found.drawn.reshape(-1)
    assert len(drawn) == len(set(drawn)) == min(limit, 100) // 4 * 4 and set(drawn) <= set(train)
    there = found.hits >= 0
    assert (drawn[found.hits[there]] == wanted[there]).all()
    own = (wanted[..., None] == seeds[:, None]).any(-1)  # evaluation would not return a seed
    assert not there[own].any()
    if len(np.unique(wanted[wanted >= 0])) <= len(drawn):
        assert there[(wanted >= 0) & ~own].all()
    assert (found.seeds[:, 1] == -1).all()  # a seed that is no training item is nowhere in the softmax
    near = found.seeds[:, 0] >= 0
    assert (drawn[found.seeds[near, 0]] == seeds[near, 0]).all()


def test_padding_never_lands_on_the_last_candidate():
    table = np.eye(4, dtype=np.float32)
    plain = Candidates(np.arange(4).reshape(1, 4), np.array([[3]]), np.array([[-1]]))
    loss, _ = multi_positive_softmax(jnp.asarray(table[3:]), table, plain, 1.0)
    assert loss[0] == pytest.approx(np.log(np.e + 3) - 1, rel=1e-6)
