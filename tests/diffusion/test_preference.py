"""The preference loss against arithmetic done by hand, its guards, and a case where plain DPO goes wrong."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.diffusion import edm
from genret.diffusion.dit import SHARDING_RULES, DiT
from genret.diffusion.preference import (
    PairBatch,
    Preference,
    preference_loss,
    preference_terms,
    safe_scale,
)
from genret.diffusion.retriever import Retriever
from genret.training.loop import FitOptions, accumulate, draw_for, fit
from genret.training.mesh import make_mesh
from genret.training.stage import Stage
from genret.types import Condition, InputError

D, M, S, K, B = 8, 2, 3, 2, 16
PLAIN = Preference(beta=1.0, safe=None, guard=0.0)


def one(row):
    """A residual f32[1, K, 1] from K numbers."""
    return jnp.asarray(row, jnp.float32)[None, :, None]


def terms(winner, loser, reference_winner, reference_loser, options):
    """(L, logged values) of one pair, as numbers."""
    loss, aux = preference_terms(
        one(winner), one(loser), jnp.array([reference_winner]), jnp.array([reference_loser]), options
    )
    return float(loss[0]), {n: float(v[0]) for n, v in aux.items()}


# The three triples (winner, loser, reference) below were worked out on paper by the author of this file
# (Claude); log and exp are a calculator's.


def test_first_triple_by_hand_plain():
    # ℓ(w) = 1² + 0² = 1 against 2: gain -1. ℓ(l) = 0² + 2² = 4 against 3: gain 1. u = -1 - 1 = -2.
    # Margin -β/2 u = -1 · -2 = 2 at β = 2, L = log(1 + e⁻²) = log 1.1353353 = .1269280.
    loss, aux = terms([1, 0], [0, 2], 2.0, 3.0, Preference(beta=2.0, safe=None, guard=0.0))
    assert loss == pytest.approx(0.1269280, abs=1e-6)
    # Errors are logged per coordinate, of which there are two.
    expected = dict(accuracy=1, margin=2, winner_error=-0.5, loser_error=0.5, loser_scale=1)
    assert aux == pytest.approx(expected, abs=1e-6)


def test_second_triple_by_hand_guard_and_anchor():
    # ℓ(w) = 1 + 1 = 2 against 1.5: gain .5. ℓ(l) = 1 + 0 = 1 against 2: gain -1. u = .5 + 1 = 1.5.
    # Margin -4/2 · 1.5 = -3, -log sigmoid = log(1 + e³) = log 21.0855369 = 3.0485874.
    # Guard .5 · 4/2 · .5 = .5. Anchor .1 · 2 / 2 = .1. L = 3.6485874.
    shared = dict(beta=4.0, safe=None)
    loss, aux = terms([1, 1], [1, 0], 1.5, 2.0, Preference(guard=0.5, anchor=0.1, **shared))
    assert loss == pytest.approx(3.6485874, abs=1e-6)
    expected = dict(accuracy=0, margin=-3, winner_error=0.25, loser_error=-0.5, loser_scale=1)
    assert aux == pytest.approx(expected, abs=1e-6)
    # Each term by itself; a winner that is better than the reference is not guarded.
    assert terms([1, 1], [1, 0], 1.5, 2.0, Preference(guard=0.5, **shared))[0] == pytest.approx(3.5485874)
    assert terms([1, 1], [1, 0], 1.5, 2.0, Preference(guard=0, **shared))[0] == pytest.approx(3.0485874)
    better = [terms([1, 1], [1, 0], 2.5, 3.0, Preference(guard=b, **shared))[0] for b in (0.0, 7.0)]
    assert better[0] == better[1]


def test_third_triple_by_hand_safe_scale_acts_on_the_gradient_alone():
    # ℓ(w) = 4 + 1 = 5 against 6: gain -1. ℓ(l) = 1 + 1 = 2 against 1: gain 1. u = -2, β = 1: margin 1.
    # L = log(1 + e⁻¹) = log 1.3678794 = .3132617, whatever s is.
    # s = (1 - .9) · 5 / (2·1 + 1·1) = .5 / 3 = 1/6.
    # dL/dmargin = -sigmoid(-1) = -.2689414; dmargin/dr_w = -½ · 2 r_w, dmargin/dr_l = s r_l. Hence
    # dL/dr_w = .2689414 · (2, 1), dL/dr_l = -.2689414/6 · (1, 1) = -.0448236 · (1, 1).
    options = Preference(beta=1.0, safe=0.9, guard=0.0)
    loss, aux = terms([2, 1], [1, 1], 6.0, 1.0, options)
    assert loss == pytest.approx(0.3132617, abs=1e-6)
    assert aux["loser_scale"] == pytest.approx(1 / 6) and aux["margin"] == pytest.approx(1)

    def total(winner, loser, options):
        return preference_terms(winner, loser, jnp.array([6.0]), jnp.array([1.0]), options)[0].sum()

    g_w, g_l = jax.grad(total, (0, 1))(one([2, 1]), one([1, 1]), options)
    np.testing.assert_allclose(g_w[0, :, 0], [0.5378828, 0.2689414], rtol=1e-5)
    np.testing.assert_allclose(g_l[0, :, 0], [-0.0448236, -0.0448236], rtol=1e-5)
    # Without it the same value and six times the loser's gradient.
    plain = dataclasses.replace(options, safe=None)
    assert total(one([2, 1]), one([1, 1]), plain) == pytest.approx(loss, abs=1e-6)
    np.testing.assert_allclose(jax.grad(total, 1)(one([2, 1]), one([1, 1]), plain), 6 * g_l, rtol=1e-5)


def test_safe_scale_by_hand():
    # Orthogonal and opposed gradients leave the loser alone; parallel ones allow (1 - μ) ‖w‖ / ‖l‖.
    winner = jnp.array([[[3.0], [4.0]]] * 5)
    loser = jnp.array([[[-4.0], [3.0]], [[-3.0], [-4.0]], [[6.0], [8.0]], [[0.3], [0.4]], [[0.0], [0.0]]])
    # μ = .5: 1, 1, .5 · 25/50 = .25, clip(.5 · 25/2.5 = 5) = 1, and a loser without error: 1.
    np.testing.assert_allclose(safe_scale(winner, loser, 0.5), [1, 1, 0.25, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(safe_scale(winner, loser, 0.0)[2], 0.5, rtol=1e-6)
    np.testing.assert_allclose(safe_scale(winner, loser, 1.0), [1, 1, 0, 0, 1])


eighths = st.integers(-80, 80).map(lambda n: n / 8)  # no product of these is lost to underflow


@given(st.lists(eighths, min_size=4, max_size=4), st.lists(eighths, min_size=4, max_size=4), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_the_winners_error_does_not_rise_to_first_order(winner, loser, mu):
    # A step along -(g_w - s g_l) changes ℓ(w) by -g_w · (g_w - s g_l), which is at most -μ ‖g_w‖².
    w, v = (np.asarray(x, np.float32) for x in (winner, loser))
    s = float(safe_scale(jnp.asarray(w)[None, :, None], jnp.asarray(v)[None, :, None], mu)[0])
    w, v = w.astype(np.float64), v.astype(np.float64)
    assert 0 <= s <= 1
    rounding = 1e-5 * (w @ w + abs(w) @ abs(v))
    assert w @ (w - s * v) >= mu * (w @ w) - rounding
    # And it is the largest such scale: s = 1, or the bound is met.
    assert s == 1 or w @ (w - s * v) <= mu * (w @ w) + rounding


def test_at_the_reference_the_loss_is_log_two_and_a_swap_negates_the_margin():
    rng = np.random.default_rng(0)
    w, v = (jnp.asarray(rng.normal(size=(6, K, 3)), jnp.float32) for _ in range(2))
    error_w, error_l = (jnp.sum(x**2, (1, 2)) for x in (w, v))
    for safe in (None, 0.9):
        loss, aux = preference_terms(w, v, error_w, error_l, Preference(beta=3.0, safe=safe))
        np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
        assert not aux["margin"].any() and not aux["accuracy"].any()
    reference = jnp.asarray(rng.uniform(1, 9, (2, 6)), jnp.float32)
    loss, aux = preference_terms(w, v, *reference, PLAIN)
    swapped, other = preference_terms(v, w, *reference[::-1], PLAIN)
    assert np.abs(aux["margin"]).min() > 1e-2
    np.testing.assert_allclose(other["margin"], -aux["margin"], rtol=1e-5)
    np.testing.assert_allclose(swapped - loss, aux["margin"], rtol=1e-4)  # softplus(x) - softplus(-x) = x


@pytest.mark.parametrize("beta_mean, n, beta_sum", [(5000, 16_384, 0.305176), (50, 128, 0.390625)])
def test_beta_of_a_mean_is_n_times_that_of_a_sum(beta_mean, n, beta_sum):
    # The docstring's two examples, against Diffusion-DPO written with errors averaged over n coordinates.
    assert beta_mean / n == pytest.approx(beta_sum, rel=1e-5)
    rng = np.random.default_rng(1)
    w, v = (rng.normal(size=(4, 2, n // 2)) for _ in range(2))
    reference = rng.uniform(0.99, 1.01, (2, 4)) * n
    mean_w, mean_l = ((x**2).mean((1, 2)) for x in (w, v))
    inside = -beta_mean / 2 * ((mean_w - reference[0] / n) - (mean_l - reference[1] / n))
    loss, aux = preference_terms(
        *(jnp.asarray(x, jnp.float32) for x in (w, v, *reference)),
        Preference(beta=beta_mean / n, safe=None, guard=0.0),
    )
    assert np.abs(inside).max() > 0.5
    np.testing.assert_allclose(aux["margin"], inside, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(loss, np.logaddexp(0, -inside), rtol=1e-3, atol=1e-2)


def test_bad_options_are_refused():
    for bad in ({"beta": 0.0}, {"beta": -1.0}, {"beta": float("nan")}, {"draws": 0}):
        with pytest.raises(InputError, match="preference: beta .* use beta > 0"):
            Preference(**{"beta": 1.0} | bad)
    for bad in ({"safe": -0.1}, {"safe": 1.1}, {"guard": -1.0}, {"anchor": -0.1}):
        with pytest.raises(InputError, match="preference: safe .* use safe in 0..1"):
            Preference(beta=1.0, **bad)
    Preference(beta=1.0, safe=0.0, guard=0.0), Preference(beta=1.0, safe=1.0)


# Through a network


def make_pairs(step, _=None, size=B):
    rng = np.random.default_rng([3, step])
    x = rng.normal(size=(size, S + 2 * K, D)).astype(np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    condition = Condition(x[:, :S], np.ones((size, S), bool), rng.integers(0, M, size).astype(np.int32))
    return PairBatch(condition, x[:, S : S + K], x[:, S + K :], np.ones(size, np.float32))


@pytest.fixture(scope="module")
def retriever():
    return Retriever(DiT(width=16, depth=1, heads=2, embedding=D, domains=M, max_context=S))


@pytest.fixture(scope="module")
def models(retriever):
    """Two networks that are not zero: the policy and its reference."""

    def moved(seed):
        leaves, tree = jax.tree.flatten(retriever.init(jax.random.key(0)))
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        return jax.tree.unflatten(
            tree, [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        )

    return moved(1), moved(2)


@pytest.fixture(scope="module")
def space():
    return edm.Space(jnp.full(D, 0.4), jnp.zeros((M + 1, D)))


def gradient(loss, params, frozen, batch, draw):
    """(Terms, gradient of their sum)."""

    def total(params):
        found = loss(params, frozen, batch, draw)
        return found.loss.sum(), found

    slope, found = jax.jit(jax.grad(total, has_aux=True))(params)
    return found, slope


def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def test_at_the_reference_a_network_starts_at_log_two(retriever, models, space):
    loss = preference_loss(retriever, Preference(beta=0.4, draws=2))
    draw = draw_for(0, jnp.int32(0), B)
    found, slope = gradient(loss, models[0], {"space": space, "reference": models[0]}, make_pairs(0), draw)
    np.testing.assert_allclose(found.loss, np.log(2), atol=1e-5)
    np.testing.assert_allclose(found.aux["margin"], 0, atol=1e-5)
    assert largest(slope) > 1e-2  # and it is no stationary point
    frozen = {"space": space, "reference": models[1]}
    away = jax.jit(loss)(models[0], frozen, make_pairs(0), draw)
    assert np.abs(away.loss - np.log(2)).min() > 1e-4


def test_a_set_against_itself_has_no_margin_and_no_gradient(retriever, models, space):
    # Only the same σ and ε on both sides can make the two errors cancel.
    batch, frozen = make_pairs(1), {"space": space, "reference": models[1]}
    draw = draw_for(0, jnp.int32(1), B)
    loss = preference_loss(retriever, dataclasses.replace(PLAIN, draws=2))
    found, slope = gradient(loss, models[0], frozen, batch.replace(loser=batch.winner), draw)
    assert not found.aux["margin"].any()
    np.testing.assert_array_equal(found.aux["winner_error"], found.aux["loser_error"])
    np.testing.assert_allclose(found.loss, np.log(2), rtol=1e-6)
    against, full = gradient(loss, models[0], frozen, batch, draw)
    assert np.abs(against.aux["margin"]).min() > 1e-4 and largest(slope) < 1e-5 * largest(full)


def test_the_loss_of_a_network_is_put_together_from_its_errors(retriever, models, space):
    options = Preference(beta=0.3, safe=0.8, guard=0.7, anchor=0.2, draws=3)
    batch, draw = make_pairs(2), draw_for(0, jnp.int32(2), B)
    weight = np.linspace(0, 2, B).astype(np.float32)
    found = jax.jit(preference_loss(retriever, options))(
        models[0], {"space": space, "reference": models[1]}, batch.replace(weight=weight), draw
    )
    np.testing.assert_array_equal(found.weight, weight)
    anchor = space.anchor(batch.condition)
    sides = [(x - anchor[:, None]) / 0.4 for x in (batch.winner, batch.loser)]

    @jax.jit
    def error(params, clean, sigma, noise):
        return edm.denoising_error(retriever.denoiser(params, batch.condition, anchor), clean, sigma, noise)

    total, levels = np.zeros(B), []
    for turn in range(3):
        sigma = edm.noise_level((draw.uniform + turn / 3) % 1, "log_uniform")
        levels.append(np.asarray(sigma))
        noise = [jax.random.normal(jax.random.fold_in(k, turn), (K, D)) for k in draw.key]
        errors = [error(p, z, sigma, jnp.stack(noise)) for p in models for z in sides]
        ours_w, ours_l, theirs_w, theirs_l = (np.asarray(e, np.float64) for e in errors)
        u = (ours_w - theirs_w) - (ours_l - theirs_l)
        total += np.logaddexp(0, 0.15 * u) + 0.7 * 0.15 * np.maximum(ours_w - theirs_w, 0)
        total += 0.2 * ours_w / (K * D)
    np.testing.assert_allclose(found.loss, total / 3, rtol=1e-4)
    # The three draws of a pair fall into three thirds of the noise levels' distribution.
    third = np.floor(np.log(np.stack(levels) / 2e-3) / np.log(80 / 2e-3) * 3 - 1e-5)
    np.testing.assert_array_equal(np.sort(third, 0), np.arange(3)[:, None].repeat(B, 1))


def test_residual_squares_to_the_error(retriever, models, space):
    batch, draw = make_pairs(3), draw_for(0, jnp.int32(3), B)
    anchor = space.anchor(batch.condition)
    clean = space.encode(batch.winner, anchor)
    denoise = retriever.denoiser(models[0], batch.condition, anchor)
    sigma, noise = edm.noise_level(draw.uniform), edm.gaussian_noise(draw.key, (K, D))
    residual = edm.denoising_residual(denoise, clean, sigma, noise)
    raw = denoise(clean + sigma[:, None, None] * noise, sigma) - clean
    weight = (sigma**2 + 1) / sigma**2  # λ(σ)
    np.testing.assert_allclose(residual, jnp.sqrt(weight)[:, None, None] * raw, rtol=1e-5)
    expected = weight * jnp.sum(raw**2, (1, 2))
    np.testing.assert_allclose(edm.denoising_error(denoise, clean, sigma, noise), expected, rtol=1e-5)


def test_plain_dpo_lets_the_winner_go_and_the_defaults_hold_it(retriever, space):
    # Winner and loser lie close together and far from the reference's answer (the seed mean): along
    # w - l the margin grows for ever, and beyond the winner its own error grows with it.
    condition = make_pairs(4).condition
    anchor = np.asarray(space.anchor(condition))
    sides = [anchor + 0.6 * np.eye(D)[0] + sign * 0.1 * np.eye(D)[1] for sign in (1, -1)]
    sides = [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)[:, None] for x in sides]
    batch = PairBatch(condition, *sides, np.ones(B, np.float32))
    reference = retriever.init(jax.random.key(0))
    frozen = {"space": space, "reference": reference}

    def trained(options, steps=40):
        loss, tx = preference_loss(retriever, options), optax.adam(3e-3)

        @jax.jit
        def step(params, state, i):
            def mean(params):
                found = loss(params, frozen, batch, draw_for(0, i, B))
                return found.loss.mean(), found.aux

            slope, aux = jax.grad(mean, has_aux=True)(params)
            updates, state = tx.update(slope, state)
            return optax.apply_updates(params, updates), state, {n: v.mean() for n, v in aux.items()}

        params, state, history = reference, tx.init(reference), []
        for i in range(steps):
            params, state, aux = step(params, state, jnp.int32(i))
            history.append(aux)
        late = history[-10:]
        return {n: float(np.mean([h[n] for h in late])) for n in ("winner_error", "loser_error", "accuracy")}

    plain = trained(Preference(beta=1.0, safe=None, guard=0.0, draws=2))
    assert plain["accuracy"] > 0.9 and plain["loser_error"] > plain["winner_error"]
    assert plain["winner_error"] > 1.0  # the pair is told apart, and the winner is lost
    safe = trained(Preference(beta=1.0, draws=2))
    assert safe["winner_error"] < -0.1 and safe["accuracy"] > 0.5


@pytest.fixture(scope="module")
def stage(retriever, models, space):
    loss = preference_loss(retriever, Preference(beta=0.4, draws=2))
    frozen = {"space": space, "reference": models[1]}
    return Stage("pairs", retriever.init, loss, make_pairs, SHARDING_RULES, frozen=frozen)


def same(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6, rtol=2e-5)


def test_neither_microbatch_nor_padding_changes_a_gradient(stage, models):
    weight = (np.arange(B) < 12).astype(np.float32)
    batch = make_pairs(0).replace(weight=weight)

    def step(parts, params, batch):
        return accumulate(stage, params, stage.frozen, batch, draw_for(0, jnp.int32(0), B), parts)

    whole, quarters = (jax.jit(functools.partial(step, n)) for n in (1, 4))
    one = whole(models[0], batch)
    assert largest(one[0]) > 1e-2 and np.isfinite(one[1]["loss"])
    junk = np.where(weight[:, None, None] > 0, batch.winner, 7.0).astype(np.float32)
    same(one, whole(models[0], batch.replace(winner=junk)))
    same(one, quarters(models[0], batch))


@pytest.fixture(scope="module")
def step_on(stage, models, tmp_path_factory):
    """mesh -> (the gradient of one step of `fit`, as Adam's first moment holds it, and its metrics)."""

    def run(mesh):
        folder = tmp_path_factory.mktemp("step")
        options = FitOptions(steps=1, clip=1e9, warmup=0, log_every=1)
        state = fit(stage, folder, options, mesh=mesh, init_from=models[0])
        metrics = json.loads((folder / "metrics.jsonl").read_text())
        names = ("loss", "margin", "loser_scale", "winner_error", "loser_error", "grad_norm")
        return optax.tree.get(state.opt_state, "mu"), [metrics[n] for n in names]

    return run


@pytest.fixture(scope="module")
def on_one_device(step_on):
    found = step_on(make_mesh(devices=jax.devices()[:1]))
    assert found[1][-1] > 0.1
    return found


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2)])
def test_the_mesh_changes_nothing(step_on, on_one_device, shape):
    same(on_one_device, step_on(make_mesh(*shape)))
