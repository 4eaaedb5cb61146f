"""What the trained model is asked, and how: order, blocks, guidance, roll-outs, samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genret.diffusion import edm
from genret.diffusion.dit import make_dit
from genret.diffusion.retriever import Retriever
from genret.modit import queries as qs
from genret.modit.baselines import seed_mean
from genret.modit.protocol import Contexts
from genret.modit.trajectories import sort_by_density
from genret.types import Condition, InputError


@pytest.fixture(scope="module")
def contexts(test_contexts):
    """A dozen real questions of both splits and all domains, some with fewer seeds than places."""
    short = (test_contexts.seeds < 0).any(1)
    some = test_contexts.take(np.r_[np.flatnonzero(short)[:4], np.flatnonzero(~short)[::4][:8]])
    assert len(some) == 12
    return some


@pytest.fixture(scope="module")
def untrained(molecules, fitted):
    """The seed mean, by a network that is zero."""
    network = make_dit("test", embedding=molecules.width, domains=4, max_context=10).clone(depth=2)
    retriever = Retriever(network)
    space = edm.Space(jnp.full(molecules.width, 0.06), jnp.zeros((5, molecules.width)))
    params = retriever.init(jax.random.key(0))
    return qs.MoDiT(retriever, params, space, molecules.embeddings, fitted.predicted, block=16)


@pytest.fixture(scope="module")
def model(untrained):
    """Parameters at random: a network that reads its whole context."""
    leaves, tree = jax.tree.flatten(untrained.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.15 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return dataclasses.replace(untrained, params=jax.tree.unflatten(tree, moved))


def test_untrained_posterior_mean_is_the_seed_mean(untrained, contexts):
    query = untrained.queries(contexts, 0.0)
    assert query.shape == (12, 1, 128)
    np.testing.assert_allclose(query[:, 0], seed_mean(untrained.embeddings, contexts), atol=1e-5)


def alone(model, contexts, q, guidance=None, domain=None, more=(), key=None, **options):
    """The retriever's own answer to context q: seeds sorted here, then `more`, nothing padded."""
    asked = contexts.domain[q]
    seeds = contexts.seeds[q][contexts.seeds[q] >= 0]
    seeds = seeds[np.argsort(model.density[asked, seeds])]
    rows = np.stack([*model.embeddings[seeds], *more])[None]
    given = Condition(rows, np.ones(rows.shape[:2], bool), np.array([asked if domain is None else domain]))
    key = jax.random.split(jax.random.key(0), 1) if key is None else key[None]
    return model.retriever.generate(model.params, model.space, given, key, guidance, **options)


def test_the_answer_is_the_retrievers_for_seeds_sorted_by_density(model, contexts):
    query = model.queries(contexts, 1.5)
    for q in (0, 4, 11):  # short contexts and full ones
        np.testing.assert_allclose(query[q : q + 1], alone(model, contexts, q, 1.5), atol=1e-4)


def test_seed_order_is_the_densitys_not_the_contexts(model, contexts):
    rng = np.random.default_rng(0)
    shuffled = dataclasses.replace(contexts, seeds=rng.permuted(contexts.seeds, axis=1))
    assert not np.array_equal(shuffled.seeds, contexts.seeds)
    query = model.queries(contexts, 0.0)
    np.testing.assert_allclose(model.queries(shuffled, 0.0), query, atol=1e-6)
    reverse = dataclasses.replace(model, density=-model.density)
    assert np.abs(reverse.queries(contexts, 0.0) - query).max() > 1e-2  # positions are read


def test_block_size_changes_nothing(model, contexts):
    for options in ({}, {"method": "heun", "samples": 2, "seed": 3}, {"rollout": 1}):
        whole = model.queries(contexts, 0.0, **options)
        blocks = dataclasses.replace(model, block=5).queries(contexts, 0.0, **options)
        np.testing.assert_allclose(blocks, whole, atol=1e-3 if "method" in options else 1e-5)


def test_guidance(model, contexts):
    query = model.queries(contexts, 0.0)
    w1, w2 = model.queries(contexts, 1.0), model.queries(contexts, 2.0)
    tiny = model.queries(contexts, 1e-6)  # the two-call path at no strength is the one-call path
    np.testing.assert_allclose(tiny, query, atol=1e-5)
    assert np.abs(w1 - query).max() > 1e-2 and np.abs(w2 - w1).max() > 1e-2
    # v(w) = (1 + w) v(domain) - w v(null) up to length: in the plane of the two, and the ratio of
    # its coefficients, -w / (1 + w) times a constant, is 4/3 as large at w = 2 as at w = 1.
    ordered = sort_by_density(contexts.seeds, model.density, contexts.domain)
    blind = model.queries(dataclasses.replace(contexts, seeds=ordered), 0.0, null=True)
    assert np.abs(blind - query).max() > 1e-2
    for q in range(12):
        plane = np.stack([query[q, 0], blind[q, 0]], 1).astype(np.float64)
        (one, e1, *_), (two, e2, *_) = (np.linalg.lstsq(plane, w[q, 0]) for w in (w1, w2))
        assert max(e1[0], e2[0]) < 1e-6 and one[0] > 0 > one[1]
        assert two[1] / two[0] == pytest.approx(4 / 3 * one[1] / one[0], rel=1e-2)


def test_the_null_domain_is_asked_in_the_order_given(model, contexts):
    ordered = sort_by_density(contexts.seeds, model.density, contexts.domain)
    query = model.queries(dataclasses.replace(contexts, seeds=ordered), 0.0, null=True)
    np.testing.assert_allclose(query[5:6], alone(model, contexts, 5, domain=4), atol=1e-4)
    as_given = model.queries(contexts, 0.0, null=True)
    # No attribute is known to such a model, so no domain's density may order its seeds.
    other = model.queries(dataclasses.replace(contexts, domain=(contexts.domain + 1) % 4), null=True)
    np.testing.assert_array_equal(as_given, other)


def test_roll_out_appends_the_query(untrained, contexts):
    # A zero network answers with the mean of its context, so each round can be followed by hand.
    x = np.asarray(untrained.embeddings, np.float64)
    for rounds in (1, 2):
        query = untrained.queries(contexts, 0.0, rollout=rounds)
        for q in range(12):
            items = list(x[contexts.seeds[q][contexts.seeds[q] >= 0]])
            for _ in range(rounds + 1):
                answer = np.mean(items, 0) / np.linalg.norm(np.mean(items, 0))
                items.append(answer)
            np.testing.assert_allclose(query[q, 0], answer, atol=1e-5)
    with pytest.raises(InputError, match="context"):  # 8 seeds and 3 answers do not fit 10 places
        untrained.queries(contexts, 0.0, rollout=3)


def test_roll_out_puts_the_query_right_after_the_seeds(model, contexts):
    first, second = (model.queries(contexts, 0.0, rollout=r) for r in (0, 1))
    for q in (0, 11):
        expected = alone(model, contexts, q, more=first[q])
        np.testing.assert_allclose(second[q : q + 1], expected, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0}, {"method": "heun", "samples": 3}, {"null": True}])
def test_queries_are_of_unit_length(model, untrained, contexts, options):
    for one in (model, untrained):
        made = one.queries(contexts, **options)
        assert made.shape == (12, options.get("samples", 1), 128)
        np.testing.assert_allclose(np.linalg.norm(made, axis=-1), 1, atol=1e-5)


def test_samples_differ_by_seed_and_draw_and_repeat(model, contexts):
    def sample(seed):
        return model.queries(contexts, 0.0, method="heun", samples=2, seed=seed)

    one = sample(0)
    np.testing.assert_array_equal(one, sample(0))
    assert np.abs(one - sample(1)).max() > 1e-2 and np.abs(one[:, 0] - one[:, 1]).max() > 1e-2
    same = Contexts(*(np.repeat(a[:1], 3, 0) for a in dataclasses.astuple(contexts)))
    twins = model.queries(same, 0.0, method="heun")
    assert np.abs(twins[0] - twins[1]).max() > 1e-2  # the same question again is another sample


@pytest.mark.parametrize("rollout", [0, 1])
def test_a_sample_is_its_keys_alone(model, contexts, rollout):
    # Draw i of context q is what (q, i)'s own key gives when nothing else is asked, and a roll-out goes
    # on from its own first answer, not from another draw's.
    some = contexts.take(np.array([0, 5]))
    options = dict(method="heun", steps=4)
    made = model.queries(some, samples=3, seed=9, rollout=rollout, **options)
    keys = jax.random.split(jax.random.key(9), 6)
    assert np.abs(made[:, :1] - made[:, 1:]).max(-1).min() > 1e-2
    for q in range(2):
        for i in range(3):
            answer, more = None, []
            for _ in range(rollout + 1):
                answer = alone(model, some, q, more=more, key=keys[3 * q + i], **options)
                more = [*more, np.asarray(answer)[0, 0]]
            np.testing.assert_allclose(made[q, i], answer[0, 0], atol=1e-3)


def test_steps_are_the_samplers(model, contexts):
    one = contexts.take(np.array([5]))
    few, default = (model.queries(one, method="heun", seed=1, **o) for o in ({"steps": 2}, {}))
    key = jax.random.split(jax.random.key(1), 1)[0]
    np.testing.assert_allclose(few, alone(model, one, 0, key=key, method="heun", steps=2), atol=1e-3)
    assert np.abs(few - default).max() > 1e-2
    np.testing.assert_array_equal(default, model.queries(one, method="heun", seed=1, steps=18))


def test_the_posterior_mean_has_no_randomness_and_no_question_no_answer(model, contexts):
    three = model.queries(contexts, samples=3, seed=4)
    np.testing.assert_allclose(three, np.repeat(model.queries(contexts), 3, 1), atol=1e-6)
    assert model.queries(contexts.take(np.array([], int)), samples=3).shape == (0, 3, 128)


def test_seeds_may_be_asked_for_in_the_other_order_or_as_they_come(model, contexts):
    falling = model.queries(contexts, order="descending")
    reverse = dataclasses.replace(model, density=-model.density)
    np.testing.assert_array_equal(falling, reverse.queries(contexts))
    # As they come: contexts sorted beforehand are asked as the ascending ones.
    ordered = sort_by_density(contexts.seeds, model.density, contexts.domain)
    ordered = dataclasses.replace(contexts, seeds=ordered)
    rising = model.queries(contexts)
    np.testing.assert_array_equal(model.queries(ordered, order="shuffled"), rising)
    assert np.abs(model.queries(contexts, order="shuffled") - rising).max() > 1e-2
    assert np.abs(falling - rising).max() > 1e-2
    with pytest.raises(InputError, match="order"):  # what such walks were sorted by, seeds do not have
        model.queries(contexts, order="noise")
