"""Network, space and condition together: what an untrained and a trained model must do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genret.diffusion import edm
from genret.diffusion.dit import SHARDING_RULES, make_dit
from genret.diffusion.retriever import Retriever
from genret.training.loop import FitOptions, draw_for, fit
from genret.training.mesh import make_mesh
from genret.training.stage import Stage
from genret.types import Batch, Condition, InputError

D, M = 8, 2


@pytest.fixture(scope="module")
def retriever():
    return Retriever(make_dit("test", embedding=D, domains=M, max_context=4))


def contexts(n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3, D)).astype(np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return Condition(x, np.ones((n, 3), bool), rng.integers(0, M, n).astype(np.int32))


def test_untrained_centred_model_answers_with_its_anchor(retriever):
    params, condition = retriever.init(jax.random.key(0)), contexts(5)
    space = edm.Space(jnp.full(D, 0.1), jnp.zeros((M + 1, D)))
    keys = jax.random.split(jax.random.key(1), 5)
    query = retriever.generate(params, space, condition, keys)
    mean = condition.context.mean(1)
    np.testing.assert_allclose(query[:, 0], mean / np.linalg.norm(mean, axis=-1, keepdims=True), atol=1e-5)
    guided = retriever.generate(params, space, condition, keys, 2.0)
    np.testing.assert_allclose(guided, query, atol=1e-5)  # both branches agree before training
    with pytest.raises(InputError, match="sampler"):
        retriever.generate(params, space, condition, keys, method="ddpm")


def test_untrained_samples_spread_as_the_space_says(retriever):
    # A zero network is the exact denoiser of N(μ, s²), so samples scatter around the anchor with std s.
    params, condition = retriever.init(jax.random.key(0)), contexts(400)
    space = edm.Space(jnp.full(D, 0.02), jnp.zeros((M + 1, D)))
    keys = jax.random.split(jax.random.key(1), 400)
    for method in ("heun", "euler_maruyama"):
        q = retriever.generate(params, space, condition, keys, method=method, steps=64, rows=2)
        off = np.asarray(q - space.anchor(condition)[:, None])
        # Normalising removes the radial one of D directions.
        np.testing.assert_allclose(off.std(), 0.02 * np.sqrt((D - 1) / D), rtol=0.08)
    again = retriever.generate(params, space, condition, keys, method="heun", steps=64, rows=2)
    first = retriever.generate(
        params,
        space,
        jax.tree.map(lambda x: x[:7], condition),
        keys[:7],
        method="heun",
        steps=64,
        rows=2,
    )
    np.testing.assert_allclose(again[:7], first, atol=1e-5)  # a context's sample is its key's alone


def test_training_finds_the_conditional_mean(retriever, tmp_path):
    # Targets lie a fixed way from the seed mean, one way per domain: the posterior mean must find it,
    # and guidance must go further along the difference between the domains.
    ways = np.eye(D, dtype=np.float32)[:M] * 0.8

    def batch(step, _):
        condition = contexts(64, seed=step)
        mean = condition.context.mean(1)
        mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
        target = mean + ways[condition.domain]
        target /= np.linalg.norm(target, axis=-1, keepdims=True)
        return Batch(condition, target[:, None], np.ones(64, np.float32))

    first = batch(0, None)
    space = edm.fit_space(first.condition, first.target, np.zeros((M + 1, D)))
    stage = Stage("toy", retriever.init, retriever.loss, batch, SHARDING_RULES, space)
    options = FitOptions(steps=400, learning_rate=3e-3, warmup=20, log_every=200, ema_decay=0.98)
    params = fit(stage, tmp_path, options, mesh=make_mesh(devices=jax.devices()[:1])).ema
    test = batch(10_000, None)
    keys = jax.random.split(jax.random.key(1), 64)
    cosine = lambda q: float((q[:, 0] * test.target[:, 0]).sum(-1).mean())  # noqa: E731
    before = cosine(retriever.generate(retriever.init(jax.random.key(0)), space, test.condition, keys))
    after = retriever.generate(params, space, test.condition, keys)
    assert before < 0.85 and cosine(after) > 0.97
    along = lambda q: (np.asarray(q[:, 0]) * ways[test.condition.domain]).sum(-1).mean()  # noqa: E731
    guided = retriever.generate(params, space, test.condition, keys, 1.0)
    assert along(guided) > along(after) + 0.02


def test_loss_at_initialisation_is_the_energy_of_the_target(retriever):
    # Zero network, any σ: λ(σ) E‖c_skip(z₀ + σε) - z₀‖² = ‖z₀‖²/(1+σ²) + KD/(1+σ²)·... worked out:
    # D - z₀ = (σε - σ²z₀)/(1+σ²), so λ E‖·‖² = (σ²‖z₀‖² + KD)/(1+σ²) per example, averaged over ε.
    params, condition = retriever.init(jax.random.key(0)), contexts(4096)
    target = edm.unit(jax.random.normal(jax.random.key(3), (4096, 1, D)))
    space = edm.fit_space(condition, target, np.zeros((M + 1, D)))
    draw = draw_for(0, jnp.int32(0), 4096)
    terms = jax.jit(retriever.loss)(params, space, Batch(condition, target, jnp.ones(4096)), draw)
    z0 = space.encode(target, space.anchor(condition))
    s2 = edm.noise_level(draw.uniform) ** 2
    expected = (s2 * jnp.sum(z0**2, (1, 2)) + D) / (1 + s2) / D
    np.testing.assert_allclose(terms.loss.mean(), expected.mean(), rtol=0.02)


def test_guidance_compares_branches_in_the_coordinates_they_were_trained_in(retriever):
    """With drop = 1 training must still use the anchor of the domain asked for."""
    condition = contexts(64)
    directions = np.zeros((M + 1, D), np.float32)
    directions[:M] = np.eye(D)[:M]
    space = edm.Space(jnp.full(D, 0.1), jnp.asarray(directions))
    batch = Batch(condition, space.anchor(condition)[:, None], jnp.ones(64))
    params, draw = retriever.init(jax.random.key(0)), draw_for(0, jnp.int32(0), 64)
    always = dataclasses.replace(retriever, drop=1.0)
    never = dataclasses.replace(retriever, drop=0.0)
    # A zero network's loss depends on the target's coordinates alone, hence on the anchor alone.
    np.testing.assert_allclose(
        always.loss(params, space, batch, draw).loss, never.loss(params, space, batch, draw).loss, rtol=1e-5
    )
