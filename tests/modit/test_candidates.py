"""HPPO's pool on a small world: every construction by its formula, and what may be read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.diffusion import edm
from genret.diffusion.dit import DiT
from genret.diffusion.retriever import Retriever
from genret.modit import candidates as cd
from genret.modit import trajectories as tr
from genret.modit.density import Labels
from genret.modit.queries import MoDiT
from genret.types import InputError

D, M = 4, 2  # of `world`
DETERMINISTIC = [
    "seed centroid", "seed medoid", "tail centroid, 5%", "tail centroid, 10%", "tail centroid, 20%",
    "slerp to the tail, 0.25", "slerp to the tail, 0.5", "slerp to the tail, 0.75", "slerp to the tail, 1.25",
    "Rocchio", "known positives", "steering, 0.2", "steering, 0.4", "steering, 0.8",
    "predictor step, 0.2", "predictor step, 0.4", "predictor step, 0.8",
    "tail + steering, 0.4", "tail + steering, 0.8",
]  # fmt: skip
FEEDBACK = [f"feedback, {s}" for s in (0.1, 0.2, 0.4, -0.1, -0.2)]
MODEL = [
    *["sample"] * 8, *["sample, guidance .5"] * 4, *["sample, roll-out of 2"] * 4, *["tempered sample"] * 8,
    "one-call query, guidance -0.5", "one-call query, guidance 0.5", "one-call query, guidance 1.0",
    "one-call query",
]  # fmt: skip


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def data(world):
    """Three cells and their union, with labels for six items in ten, and labels for the held-out rows that
    nothing may read."""
    made = world([60, 45, 33])
    rng = np.random.default_rng(5)
    seen = rng.choice([-1, 0, 1], made.has.shape, p=[0.4, 0.4, 0.2]).astype(np.int8)
    seen[:, np.setdiff1d(np.arange(len(made.embeddings)), made.train)] = 1
    tails = tr.fit_tails(made.cells, made.density, seen, share=0.1, least=8)
    return dataclasses.replace(made, has=seen == 1, tails=tails)


@pytest.fixture(scope="module")
def labels(data):
    seen = np.where(data.has, 1, -1).astype(np.int8)
    low = data.tails.low
    for m in range(M):
        seen[m, low[m][low[m] >= 0]] = 0
    return Labels(data.train[:3], np.zeros((M, 3), int), np.ones((M, 3), int), seen)


@pytest.fixture(scope="module")
def normals():
    return unit(np.random.default_rng(6).normal(size=(M, D))).astype(np.float32)


def gradient(queries, domain):
    """A unit vector that depends on both arguments."""
    turned = np.roll(queries, 1, axis=1) * np.where(domain == 0, 1, -1)[:, None]
    return unit(turned).astype(np.float32)


@pytest.fixture(scope="module")
def contexts(data):
    return cd.draw_contexts(np.random.default_rng(0), data, 60, 8)


@pytest.fixture(scope="module")
def untrained(data):
    """The seed mean, by a network that is zero."""
    retriever = Retriever(DiT(width=16, depth=1, heads=2, embedding=D, domains=M, max_context=10))
    space = edm.Space(jnp.full(D, 0.3), jnp.zeros((M + 1, D)))
    params = retriever.init(jax.random.key(0))
    return MoDiT(retriever, params, space, data.embeddings, data.density, block=64)


@pytest.fixture(scope="module")
def model(untrained):
    leaves, tree = jax.tree.flatten(untrained.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return dataclasses.replace(untrained, params=jax.tree.unflatten(tree, moved))


def slow_slerp(u, v, t):
    """The rotation by t times the angle in the plane of u and v, in float64."""
    angle = 2 * np.arcsin(np.clip(np.linalg.norm(u - v) / 2, 0, 1))
    across = v - (u @ v) * u
    return np.cos(t * angle) * u + np.sin(t * angle) * across / np.linalg.norm(across)


def test_every_construction_by_its_formula(data, labels, normals, contexts):
    made, names = cd.deterministic(data, labels, normals, gradient, contexts)
    assert names == DETERMINISTIC and made.shape == (60, 19, D) and made.dtype == np.float32
    x = data.embeddings.astype(np.float64)
    for q in range(60):
        m, cell = contexts.domain[q], contexts.pattern[q]
        seeds = contexts.seeds[q][contexts.seeds[q] >= 0]
        members = data.cells.members[cell]
        free = np.setdiff1d(members[members >= 0], seeds)
        rising = free[np.argsort(data.density[m, free])]
        c_s = unit(x[seeds].mean(0))
        # The densest 5, 10 and 20 %, three items at least.
        tails = [unit(x[rising[-max(3, -(-len(free) * p // 100)) :]].mean(0)) for p in (5, 10, 20)]
        known = labels.seen[m, free]
        positive, negative = x[free[known == 1]].mean(0), x[free[known == 0]].mean(0)
        step = gradient(c_s[None], contexts.domain[q : q + 1])[0]
        expected = {
            "seed centroid": c_s,
            "seed medoid": x[seeds[np.argmax(x[seeds] @ c_s)]],
            **{f"tail centroid, {p}%": t for p, t in zip((5, 10, 20), tails, strict=True)},
            **{f"slerp to the tail, {t}": slow_slerp(c_s, tails[1], t) for t in (0.25, 0.5, 0.75, 1.25)},
            "Rocchio": unit(c_s + 0.75 * positive - 0.25 * negative),
            "known positives": unit(positive),
            **{f"steering, {s}": unit(c_s + s * normals[m]) for s in (0.2, 0.4, 0.8)},
            **{f"predictor step, {s}": unit(c_s + s * step) for s in (0.2, 0.4, 0.8)},
            **{f"tail + steering, {s}": unit(tails[1] + s * normals[m]) for s in (0.4, 0.8)},
        }
        assert list(expected) == names
        for i, name in enumerate(names):
            np.testing.assert_allclose(made[q, i], expected[name], atol=2e-5, err_msg=f"{q} {name}")


def test_a_seed_is_no_part_of_its_own_tail(data, labels, normals, contexts):
    # With the seeds the densest of all, the tails are those of the other items.
    one = contexts.take(np.array([0]))
    seeds = one.seeds[one.seeds >= 0]
    denser = data.density.copy()
    denser[:, seeds] = 2.0
    moved = dataclasses.replace(data, density=denser)
    made = [cd.deterministic(d, labels, normals, gradient, one)[0] for d in (data, moved)]
    np.testing.assert_array_equal(*made)


def test_held_out_rows_change_nothing(data, labels, normals, contexts):
    out = np.setdiff1d(np.arange(len(data.embeddings)), data.train)
    x, density, seen = data.embeddings.copy(), data.density.copy(), labels.seen.copy()
    x[out], density[:, out], seen[:, out] = -x[out], 9.0, 1 - seen[:, out]
    other = dataclasses.replace(data, embeddings=x, density=density, has=seen == 1)
    poisoned = dataclasses.replace(labels, seen=seen)
    again = cd.draw_contexts(np.random.default_rng(0), other, 60, 8)
    for a, b in zip(dataclasses.astuple(contexts), dataclasses.astuple(again), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        cd.deterministic(data, labels, normals, gradient, contexts)[0],
        cd.deterministic(other, poisoned, normals, gradient, again)[0],
    )


def test_candidates_of_real_molecules_are_unit_and_finite(fitted):
    contexts = cd.draw_contexts(np.random.default_rng(1), fitted.data, 200, 8)
    made, names = cd.deterministic(fitted.data, fitted.labels, fitted.normals, fitted.gradient, contexts)
    assert np.isfinite(made).all()
    np.testing.assert_allclose(np.linalg.norm(made, axis=-1), 1, atol=1e-5)
    # They are nineteen different queries, but for short tails, which hold the same three items.
    distinct = [len(np.unique(np.round(row, 5), axis=0)) for row in made]
    assert min(distinct) >= 15 and np.mean(distinct) > 17


# SLERP


def angle_between(u, v):
    """2 asin(‖u - v‖ / 2), accurate where the arc cosine of the product is not."""
    return 2 * np.arcsin(np.clip(np.linalg.norm(u.astype(np.float64) - v, axis=-1) / 2, 0, 1))


@given(st.integers(0, 2**31), st.floats(-7, 0.4), st.sampled_from([2, 4, 128]))
@settings(max_examples=100, deadline=None)
def test_slerp_moves_along_the_great_circle(seed, magnitude, width):
    # v is u turned by an angle of 10^magnitude: from all but none to 2.5 radians.
    rng, angle = np.random.default_rng(seed), min(10**magnitude, 2.5)
    u = unit(rng.normal(size=(5, width)))
    across = rng.normal(size=(5, width))
    across = unit(across - (across * u).sum(-1, keepdims=True) * u)
    u, v = (x.astype(np.float32) for x in (u, np.cos(angle) * u + np.sin(angle) * across))
    np.testing.assert_allclose(cd.slerp(u, v, 0.0), u, atol=1e-6)
    np.testing.assert_allclose(cd.slerp(u, v, 1.0), v, atol=1e-6)
    for t in (0.25, 0.5, 0.75, 1.25):
        at = cd.slerp(u, v, t)
        assert at.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(at, axis=1), 1, atol=1e-6)
        # Proportional to t from u; from v what is left, or what it went past.
        assert np.abs(angle_between(at, u) - t * angle).max() < 2e-5
        assert np.abs(angle_between(at, v) - abs(1 - t) * angle).max() < 2e-5
    np.testing.assert_allclose(cd.slerp(u, v, 0.5), unit(u + v), atol=2e-6)


def test_slerp_by_hand():
    # From e₁ to e₂ a third of the way is 30°; 4/3 of it is 120°.
    e = np.eye(2, dtype=np.float32)
    np.testing.assert_allclose(cd.slerp(e[:1], e[1:], 1 / 3), [[np.sqrt(3) / 2, 0.5]], atol=1e-6)
    np.testing.assert_allclose(cd.slerp(e[:1], e[1:], 4 / 3), [[-0.5, np.sqrt(3) / 2]], atol=1e-6)


def test_slerp_between_equal_vectors_stays(molecules):
    # Products of float32 unit vectors with themselves round to either side of 1.
    x = np.asarray(molecules.embeddings[:200], np.float32)
    for t in cd.SLERP:
        np.testing.assert_allclose(cd.slerp(x, x, t), x, atol=1e-6)


# Contexts


def test_training_contexts_are_asked_as_in_evaluation(fitted, splits):
    data, seen = fitted.data, fitted.labels.seen
    contexts = cd.draw_contexts(np.random.default_rng(2), data, 3000, 8)
    again = cd.draw_contexts(np.random.default_rng(2), data, 3000, 8)
    for one, two in zip(dataclasses.astuple(contexts), dataclasses.astuple(again), strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.dtype == np.int32
    assert len(contexts) == 3000 and not contexts.split.any()
    sizes, known_only = set(), 0
    for seeds, m, cell in zip(contexts.seeds, contexts.domain, contexts.pattern, strict=True):
        given = seeds[seeds >= 0]
        members = data.cells.members[cell]
        members = members[members >= 0]
        assert (seeds[: len(given)] >= 0).all() and len(set(given)) == len(given)
        assert np.isin(given, members).all() and splits.train[given].all()
        assert not data.has[m, given].any()  # a known positive is no seed
        if (seen[m, members] == 0).sum() >= 8:
            known_only += 1
            assert (seen[m, given] == 0).all()
        assert (seen[m, members] == 1).sum() >= 3
        sizes.add(len(given))
    assert sizes == {4, 5, 6, 7, 8} and known_only > 1000
    # Every pair of a domain and a cell that qualifies is asked, and no other.
    asked = set(zip(contexts.domain.tolist(), contexts.pattern.tolist(), strict=True))
    possible = {
        (m, c)
        for m in range(4)
        for c, row in enumerate(data.cells.members)
        if (seen[m, row[row >= 0]] == 1).sum() >= 3 and (data.tails.low[m, c] >= 0).sum() >= 4
    }
    assert asked == possible
    assert len(possible) < 4 * len(data.cells.members)  # some do not qualify


def test_cells_without_enough_positives_are_never_asked(data):
    has = data.has.copy()
    small = data.cells.members[2]
    has[1, small[small >= 0]] = False
    has[1, small[:2]] = True  # two known positives are too few
    poor = dataclasses.replace(data, has=has)
    contexts = cd.draw_contexts(np.random.default_rng(0), poor, 400, 8)
    asked = set(zip(contexts.domain.tolist(), contexts.pattern.tolist(), strict=True))
    assert asked == {(m, c) for m in range(M) for c in range(4)} - {(1, 2)}
    again = cd.draw_contexts(np.random.default_rng(0), poor, 400, 8, least_positives=2)
    assert (1, 2) in set(zip(again.domain.tolist(), again.pattern.tolist(), strict=True))
    with pytest.raises(InputError, match="hppo: no latent cell has 99 known positives. raise the label"):
        cd.draw_contexts(np.random.default_rng(0), data, 4, 8, least_positives=99)


def test_fewer_seeds_than_four_may_be_asked_for(data):
    contexts = cd.draw_contexts(np.random.default_rng(0), data, 50, 2)
    assert contexts.seeds.shape == (50, 2) and (contexts.seeds >= 0).all()


# Pools


def feedback(queries, contexts):
    """A unit direction that depends on the query asked about."""
    return np.roll(queries, 2, axis=1) * np.float32(np.where(contexts.domain == 0, 1, -1))[:, None]


def test_feedback_steps_by_hand():
    # From e₁ by .4 and -.2 along e₂; without a direction the query stays.
    e = np.eye(2, dtype=np.float32)
    made, names = cd.feedback_steps(np.stack([e[0], e[0]]), np.stack([e[1], 0 * e[1]]))
    assert names == FEEDBACK and made.shape == (2, 5, 2) and made.dtype == np.float32
    np.testing.assert_allclose(made[0, 2], np.array([1, 0.4]) / np.sqrt(1.16), atol=1e-6)
    np.testing.assert_allclose(made[0, 4], np.array([1, -0.2]) / np.sqrt(1.04), atol=1e-6)
    np.testing.assert_array_equal(made[1], np.tile(e[0], (5, 1)))


def test_pools_hold_the_policies_asked_for(data, labels, normals, model, contexts):
    some = contexts.take(np.arange(12))

    def pool(policy, seed=3):
        return cd.make_pool(policy, model, data, labels, normals, gradient, feedback, some, seed=seed)

    hybrid, offline, online = (pool(p) for p in ("hybrid", "deterministic", "on_policy"))
    assert hybrid.names == (*DETERMINISTIC, *FEEDBACK, *MODEL) and hybrid.queries.shape == (12, 52, D)
    assert offline.names == (*DETERMINISTIC, "one-call query") and online.names == (*FEEDBACK, *MODEL)
    # Feedback starts from the model's own query, so it is the policy's.
    np.testing.assert_array_equal(hybrid.on_policy, np.arange(52) >= 19)
    np.testing.assert_array_equal(offline.on_policy, np.arange(20) == 19)
    assert online.on_policy.all()
    fixed, _ = cd.deterministic(data, labels, normals, gradient, some)
    one_call = model.queries(some)[:, 0]
    near, _ = cd.feedback_steps(one_call, feedback(one_call, some))
    assert np.abs(near - one_call[:, None]).max(-1).min() > 1e-2
    for made in (hybrid, offline):
        np.testing.assert_array_equal(made.queries[:, :19], fixed)
    np.testing.assert_array_equal(online.queries[:, :5], near)
    np.testing.assert_array_equal(hybrid.queries[:, 19:], online.queries)
    for made in (hybrid, offline, online):
        np.testing.assert_array_equal(made.queries[:, -1], one_call)
        assert made.queries.dtype == np.float32 and np.isfinite(made.queries).all()
        np.testing.assert_allclose(np.linalg.norm(made.queries, axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(online.queries, pool("on_policy").queries)
    other = pool("on_policy", seed=4).queries
    sampled = np.array(["sample" in name for name in online.names])
    assert sampled.sum() == 24
    # Another seed draws all samples afresh, and moves no query that is not one.
    assert np.abs(other - online.queries)[:, sampled].max(-1).min() > 1e-4
    np.testing.assert_array_equal(other[:, ~sampled], online.queries[:, ~sampled])
    plain = cd.make_pool("hybrid", model, data, labels, normals, gradient, None, some, seed=3)
    kept = ~np.isin(hybrid.names, FEEDBACK)
    assert plain.names == (*DETERMINISTIC, *MODEL)
    np.testing.assert_array_equal(plain.queries, hybrid.queries[:, kept])
    np.testing.assert_array_equal(plain.on_policy, hybrid.on_policy[kept])
    few = cd.make_pool("hybrid", model, data, labels, normals, gradient, feedback, some, samples=2, seed=3)
    assert [few.names.count(n) for n in dict.fromkeys(MODEL)] == [2, 1, 1, 2, 1, 1, 1, 1]
    with pytest.raises(InputError, match="unknown pool 'off_policy'. use one of hybrid, deterministic"):
        pool("off_policy")


def test_the_models_candidates_by_kind(model, untrained, contexts):
    some = contexts.take(np.arange(5))
    made, names = cd.on_policy(model, some, seed=7)
    assert names == MODEL and made.shape == (5, 28, D)
    # No two of the sixteen samples share their noise, whatever kind they are.
    spread = made[:, :16, None] - made[:, None, :16]
    assert np.abs(spread).max(-1)[:, ~np.eye(16, dtype=bool)].min() > 1e-4
    plain, _ = cd.on_policy(untrained, some, seed=7)
    spread = plain[:, :8, None] - plain[:, None, 8:12]  # guidance is nothing here, the noise is
    assert np.abs(spread).max(-1).min() > 1e-4
    shared = dict(method="heun", steps=6)
    for part, expected in (
        (made[:, :8], model.queries(some, samples=8, seed=7, **shared)),
        (made[:, 8:12], model.queries(some, 0.5, samples=4, seed=8, **shared)),
        (made[:, 12:16], model.queries(some, samples=4, rollout=2, seed=9, **shared)),
        (made[:, 24:27], np.concatenate([model.queries(some, w) for w in (-0.5, 0.5, 1.0)], 1)),
        (made[:, 27:], model.queries(some)),
    ):
        np.testing.assert_array_equal(part, expected)
    unguided = model.queries(some, samples=4, seed=8, **shared)
    assert np.abs(made[:, 8:12] - unguided).max() > 1e-3
    first = model.queries(some, samples=4, seed=9, **shared)
    assert np.abs(made[:, 12:16] - first).max() > 1e-3
    # Half as many are guided and rolled out as are plain; the rest follows from them.
    few, names = cd.on_policy(model, some, samples=3, seed=7)
    assert names == [*MODEL[:3], *MODEL[8:9], *MODEL[12:13], *MODEL[16:19], *MODEL[24:]]
    np.testing.assert_array_equal(few[:, :3], model.queries(some, samples=3, seed=7, **shared))
    for q in range(5):  # a quarter of the way from the one-call query to each of the eight samples
        query = made[q, 27].astype(np.float64)
        for i in range(8):
            np.testing.assert_allclose(made[q, 16 + i], slow_slerp(query, made[q, i], 0.25), atol=1e-5)
