"""Samplers against exact solutions: order of convergence, Gaussian moments, mixture weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genret.diffusion import sampler
from genret.types import InputError

pytestmark = pytest.mark.usefixtures("optimized")


def linear_denoiser(mean, covariance):
    """Exact denoiser of N(mean, covariance) in eigen-coordinates of the covariance."""
    values, vectors = np.linalg.eigh(covariance)

    def denoise(z, s):
        gain = values / (values + s[:, None, None] ** 2)
        return mean + (((z - mean) @ vectors) * gain) @ vectors.T

    return denoise


def gaussian_flow(z, mean, variance, start):
    """Exact probability-flow solution from σ = start to 0: deviations shrink by √(v / (v + σ²))."""
    return mean + (z - mean) * jnp.sqrt(variance / (variance + start**2))


@pytest.mark.parametrize("name, order", [("euler", 1), ("exponential", 2), ("heun", 2)])
def test_order_of_convergence(name, order):
    jax.config.update("jax_enable_x64", True)
    try:
        z = jax.random.normal(jax.random.key(0), (8, 1, 4), jnp.float64) * 10

        def denoise(z, s):
            return (0.5 * z + s[:, None, None] ** 2 * 0.3) / (0.5 + s[:, None, None] ** 2)

        truth = gaussian_flow(z, 0.3, 0.5, 10.0)
        steps, errors = np.array([16, 32, 64, 128]), []
        for n in steps:
            sigmas = np.append(np.geomspace(10.0, 1e-4, n), 0.0)
            out = getattr(sampler, name)(denoise, z, sigmas)
            errors.append(float(jnp.abs(out - truth).max()))
    finally:
        jax.config.update("jax_enable_x64", False)
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(-slope - order) < 0.25, (slope, errors)


COVARIANCE = np.array([[1.0, 0.6, 0.0], [0.6, 0.8, -0.2], [0.0, -0.2, 0.3]])
MEAN = np.array([0.5, -1.0, 0.2])


@pytest.mark.parametrize("name", ["heun", "euler_maruyama"])
def test_samples_of_a_gaussian_have_its_mean_and_covariance(name):
    keys = jax.random.split(jax.random.key(1), 20_000)
    z = 80.0 * jax.vmap(lambda k: jax.random.normal(k, (1, 3)))(keys)
    denoise = linear_denoiser(MEAN, COVARIANCE)
    if name == "heun":
        out = jax.jit(lambda z: sampler.heun(denoise, z, sampler.schedule(32)))(z)
    else:
        sde = lambda z, k: sampler.euler_maruyama(denoise, z, sampler.schedule(256), k)  # noqa: E731
        out = jax.jit(sde)(z, jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys))
    out = np.asarray(out[:, 0])
    np.testing.assert_allclose(out.mean(0), MEAN, atol=0.03)
    np.testing.assert_allclose(np.cov(out.T), COVARIANCE, atol=0.04)


@pytest.mark.parametrize("name", ["heun", "euler", "exponential", "euler_maruyama"])
def test_samples_of_a_two_point_mixture_are_its_points_in_equal_shares(name):
    points = jnp.array([[1.5, 0.0], [-1.0, 1.0]])

    def denoise(z, s):
        distance = jnp.sum((z[:, :, None] - points) ** 2, -1)
        return jax.nn.softmax(-distance / (2 * s[:, None, None] ** 2)) @ points

    keys = jax.random.split(jax.random.key(2), 4000)
    z = 80.0 * jax.vmap(lambda k: jax.random.normal(k, (1, 2)))(keys)
    sigmas = sampler.schedule(64)
    more = (keys,) if name == "euler_maruyama" else ()
    out = jax.jit(lambda z: getattr(sampler, name)(denoise, z, sigmas, *more))(z)[:, 0]
    distance = jnp.linalg.norm(out[:, None] - points, axis=-1)
    assert float(jnp.quantile(distance.min(1), 0.99)) < 0.01
    assert abs(float((distance[:, 0] < distance[:, 1]).mean()) - 0.5) < 0.03
    # At the top of the schedule the posterior mean is the mixture's mean, whatever the input.
    mean = sampler.posterior_mean(denoise, jnp.zeros((1, 1, 2)))
    np.testing.assert_allclose(mean[0, 0], points.mean(0), atol=1e-3)


def test_schedule_is_eq_5_of_edm():
    ours = sampler.schedule(18)
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(ours[:-1], expected, rtol=1e-6)
    assert ours[-1] == 0 and ours[0] == np.float32(80)
    with pytest.raises(InputError, match="sigma"):
        sampler.schedule(0)


def test_heun_uses_35_calls_at_18_steps():
    calls = []

    def denoise(z, s):
        jax.debug.callback(lambda: calls.append(1))
        return z / (1 + s[:, None, None] ** 2)

    sampler.heun(denoise, jnp.ones((1, 1, 2)), sampler.schedule(18)).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 35


def test_guidance_is_an_extrapolation_and_the_identity_at_zero():
    z, s = jnp.ones((2, 1, 3)), jnp.ones(2)
    conditional, unconditional = lambda z, s: 2 * z, lambda z, s: 5 * z
    guided = lambda w: sampler.guide(conditional, unconditional, w)(z, s)  # noqa: E731
    np.testing.assert_array_equal(guided(0.0), 2 * z)
    np.testing.assert_allclose(guided(0.5), 2 * z + 0.5 * (2 * z - 5 * z))
    np.testing.assert_allclose(guided(jnp.array([0.0, 1.0]))[:, 0, 0], [2.0, -1.0])
