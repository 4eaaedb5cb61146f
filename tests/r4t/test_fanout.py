"""What a trained set model is asked, and how: blocks, keys, rows, calls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genret.diffusion import edm
from genret.diffusion.retriever import Retriever
from genret.r4t import stages
from genret.r4t.baselines import regressor
from genret.r4t.fanout import SetRetriever, kept, network_calls
from genret.retrieval.index import ExactIndex
from genret.types import InputError

D, L = 6, 4


def units(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape)
    return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


def make(**model):
    """Parameters at random: a network that reads its query."""
    retriever = Retriever(stages.set_dit("test", embedding=D, rows=L, **model))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: x + 0.2 * jnp.float32(rng.normal(size=x.shape)), retriever.init(jax.random.key(0))
    )
    return SetRetriever(retriever, params, edm.plain_space(D, 0), rows=L, block=4)


@pytest.fixture(scope="module")
def model():
    return make()


HEUN = {"method": "heun", "steps": 3}


def test_sets_are_the_retrievers_own_whatever_the_blocks(model):
    queries = units(2, 6, D)
    sets = model.sets(queries, guidance=0.3, **HEUN)
    assert sets.shape == (6, L, D) and sets.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(sets, axis=-1), 1, atol=1e-5)
    keys = jax.random.split(jax.random.key(0), 6)
    for q in (0, 3, 5):  # of both blocks, each asked alone
        alone = model.retriever.generate(
            model.params,
            model.space,
            stages.condition(queries[q : q + 1]),
            keys[q : q + 1],
            0.3,
            rows=L,
            **HEUN,
        )
        np.testing.assert_allclose(sets[q], alone[0], atol=1e-4)
    whole = dataclasses.replace(model, block=64).sets(queries, guidance=0.3, **HEUN)
    np.testing.assert_allclose(sets, whole, atol=1e-4)


def test_of_the_rows_drawn_those_of_maximal_marginal_relevance_are_emitted(model):
    """All L as they were drawn; fewer by definition: the most relevant, then what is like the query and
    unlike those before it."""
    queries = units(2, 3, D)
    sets = model.sets(queries, guidance=0.0, **HEUN)
    for query, drawn, emitted in zip(
        queries, sets, model.sets(queries, 2, guidance=0.0, **HEUN), strict=True
    ):
        first = (drawn @ query).argmax()
        rest = np.delete(drawn, first, 0)
        second = rest[(rest @ query - rest @ drawn[first]).argmax()]
        np.testing.assert_array_equal(emitted, [drawn[first], second])


def test_a_row_that_repeats_another_is_the_one_left_out():
    query = np.eye(D, dtype=np.float32)[0]
    rows = 0.5 * query + np.float32(np.sqrt(0.75)) * np.eye(D, dtype=np.float32)[[1, 2, 1, 3]]  # as relevant
    np.testing.assert_array_equal(kept(query[None], rows[None], 3)[0], rows[[0, 1, 3]])


def test_rows_are_chosen_by_the_contents_they_land_on(model):
    """By definition: the content nearest to the query and its row, then what is unlike those before."""
    queries, contents, weight = units(2, 3, D), units(5, 99, D), 0.7
    drawn = model.sets(queries, guidance=0.0, **HEUN)
    asked = (queries, 3, ExactIndex(contents), contents)
    rows, ids = model.grounded(*asked, weight=weight, guidance=0.0, **HEUN)
    for q, query in enumerate(queries):
        cosine = drawn[q] @ contents.T  # [L, N]
        landed = cosine.argmax(1)
        relevance = contents[landed] @ query + weight * cosine.max(1)
        picks = [relevance.argmax()]
        while len(picks) < 3:
            nearest = (contents[landed] @ contents[landed[picks]].T).max(1)
            picks.append(max(set(range(L)) - set(picks), key=lambda i: relevance[i] - nearest[i]))
        np.testing.assert_array_equal(ids[q], landed[picks])
        np.testing.assert_array_equal(rows[q], drawn[q, picks])
    blocks = dataclasses.replace(model, block=1).grounded(*asked, weight=weight, guidance=0.0, **HEUN)
    np.testing.assert_array_equal(blocks[1], ids)
    # Heavy enough, only the nearness of rows to contents counts.
    rows, ids = model.grounded(*asked, weight=1e6, guidance=0.0, **HEUN)
    near = (drawn @ contents.T).max(-1)
    np.testing.assert_allclose((rows * contents[ids]).sum(-1), -np.sort(-near)[:, :3], atol=1e-6)
    with pytest.raises(InputError, match="5 of the 4"):
        model.grounded(queries, 5, *asked[2:], weight=weight)


def test_a_model_without_row_positions_draws_more_rows_than_it_was_trained_on(model):
    sets = dataclasses.replace(model, rows=L + 2).sets(units(2, 3, D), L, guidance=0.0, **HEUN)
    assert sets.shape == (3, L, D)
    np.testing.assert_allclose(np.linalg.norm(sets, axis=-1), 1, atol=1e-5)


def test_seeds_queries_and_guidance_are_read(model):
    queries = units(2, 3, D)
    base = model.sets(queries, guidance=0.0, **HEUN)
    np.testing.assert_array_equal(model.sets(queries, guidance=0.0, **HEUN), base)
    others = (
        model.sets(queries, guidance=0.0, seed=1, **HEUN),
        model.sets(queries[::-1], guidance=0.0, **HEUN),
        model.sets(queries, guidance=2.0, **HEUN),
    )
    for other in others:
        assert np.abs(other - base).max() > 1e-2
    assert np.abs(base[:, 0] - base[:, 1]).max() > 1e-2  # rows differ by their noise


def test_an_untrained_model_draws_rows_uniform_on_the_sphere():
    """A zero network is the exact denoiser of N(0, 1/D): directions without preference."""
    retriever = Retriever(stages.set_dit("test", embedding=D, rows=L))
    params = retriever.init(jax.random.key(0))
    model = SetRetriever(retriever, params, edm.plain_space(D, 0), rows=L, block=512)
    sets = model.sets(units(2, 512, D), steps=16, guidance=0.0).reshape(-1, D)
    np.testing.assert_allclose(sets.T @ sets / len(sets), np.eye(D) / D, atol=0.02)
    assert np.abs(sets.mean(0)).max() < 0.03


def test_the_posterior_mean_needs_row_positions(model):
    queries = units(2, 3, D)
    with pytest.raises(InputError, match="posterior_mean"):
        model.sets(queries, method="posterior_mean")
    np.testing.assert_allclose(
        np.linalg.norm(model.sets(queries, 1, method="posterior_mean"), axis=-1), 1, atol=1e-5
    )
    rows = regressor(make(positions=True))(queries, L, 0)  # one call
    assert np.abs(rows[:, 0] - rows[:, 1]).max() > 1e-2
    with pytest.raises(InputError, match="5 of the 4"):
        model.sets(queries, 5)
    with pytest.raises(InputError, match="with a position"):
        dataclasses.replace(make(positions=True), rows=L + 1).sets(queries, **HEUN)
    with pytest.raises(InputError, match="sampler"):
        model.sets(queries, method="ddpm")


@pytest.mark.parametrize(
    "method, calls",
    [("posterior_mean", 1), ("euler", 5), ("exponential", 5), ("euler_maruyama", 5), ("heun", 9)],
)
def test_network_calls_are_those_that_are_made(model, method, calls):
    """Counted by running the sampler on a denoiser that counts."""
    from genret.diffusion import sampler

    count = [0]

    def denoise(z, sigma):
        jax.debug.callback(lambda: count.__setitem__(0, count[0] + 1))
        return 0.5 * z

    z, sigmas = jnp.ones((1, 2, D)), sampler.schedule(5)
    run = {
        "posterior_mean": lambda: sampler.posterior_mean(denoise, z),
        "euler_maruyama": lambda: sampler.euler_maruyama(
            denoise, z, sigmas, jax.random.split(jax.random.key(0), 1)
        ),
    }
    run.get(method, lambda: getattr(sampler, method)(denoise, z, sigmas))().block_until_ready()
    jax.effects_barrier()
    assert count[0] == calls == network_calls(method, 5)
    assert network_calls(method, 5, 0.1) == 2 * calls
