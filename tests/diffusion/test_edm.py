"""EDM against closed forms: the Gaussian denoiser, the two-point mixture, and hand-computed constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from genret.diffusion import edm
from genret.types import Condition, InputError


def gaussian_denoiser(mean, variance):
    """E[z₀ | z] for z₀ ~ N(mean, variance I)."""
    return lambda z, s: (variance * z + s[:, None, None] ** 2 * mean) / (variance + s[:, None, None] ** 2)


def two_point_denoiser(points):
    """E[z₀ | z] for z₀ uniform on the rows of points f32[2, D]."""

    def denoise(z, s):
        distance = jnp.sum((z[:, :, None] - points) ** 2, -1)  # [B, K, 2]
        return jax.nn.softmax(-distance / (2 * s[:, None, None] ** 2)) @ points

    return denoise


def test_preconditioning_constants_at_sigma_two():
    # By hand, σ_data = 1, σ = 2: c_skip = 1/5, c_out = 2/√5, c_in = 1/√5, c_noise = ln 2 / 4.
    seen = {}

    def network(x, noise):
        seen.update(x=x, noise=noise)
        return jnp.ones_like(x)

    z = jnp.full((1, 1, 3), 5.0)
    out = edm.denoiser(network)(z, jnp.array([2.0]))
    np.testing.assert_allclose(out, 5 / 5 + 0.8944272, rtol=1e-6)
    np.testing.assert_allclose(seen["x"], 5 * 0.4472136, rtol=1e-6)
    np.testing.assert_allclose(seen["noise"], 0.1732868, rtol=1e-6)
    np.testing.assert_allclose(edm.loss_weight(jnp.array([2.0])), 5 / 4)


def test_zero_network_is_the_exact_denoiser_of_unit_gaussian_data():
    z = jax.random.normal(jax.random.key(0), (64, 2, 5))
    sigma = jnp.linspace(0.01, 50, 64)
    ours = edm.denoiser(lambda x, _: jnp.zeros_like(x))(z, sigma)
    np.testing.assert_allclose(ours, gaussian_denoiser(0.0, 1.0)(z, sigma), rtol=1e-5, atol=1e-7)


def test_network_input_has_unit_variance_at_every_noise_level():
    z0 = jax.random.normal(jax.random.key(0), (4096, 1, 8))
    for sigma in (0.01, 1.0, 40.0):
        seen = []
        denoise = edm.denoiser(lambda x, _, seen=seen: seen.append(x) or x)
        denoise(z0 + sigma * jax.random.normal(jax.random.key(1), z0.shape), jnp.full(4096, sigma))
        assert abs(float(jnp.std(seen[0])) - 1) < 0.02


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_error_of_the_exact_gaussian_denoiser_is_its_posterior_variance(sigma):
    # E‖D - z₀‖² = K D v σ² / (v + σ²), times λ(σ).
    v, shape = 2.5, (20_000, 1, 4)
    z0 = 0.7 + jnp.sqrt(v) * jax.random.normal(jax.random.key(0), shape)
    noise = jax.random.normal(jax.random.key(1), shape)
    level = jnp.full(shape[0], sigma)
    exact = edm.denoising_error(gaussian_denoiser(0.7, v), z0, level, noise)
    expected = (sigma**2 + 1) / sigma**2 * 4 * v * sigma**2 / (v + sigma**2)
    np.testing.assert_allclose(exact.mean(), expected, rtol=0.02)
    for wrong in (
        gaussian_denoiser(0.9, v),
        gaussian_denoiser(0.7, 2.0),
        gaussian_denoiser(0.7, 3.2),
    ):
        worse = edm.denoising_error(wrong, z0, level, noise)
        assert worse.mean() > exact.mean()


def test_the_exact_mixture_denoiser_minimises_the_error():
    points = jnp.array([[1.0, 0.0], [-1.0, 0.5]])
    z0 = points[jax.random.bernoulli(jax.random.key(0), 0.5, (20_000, 1)).astype(int)]
    noise, level = jax.random.normal(jax.random.key(1), z0.shape), jnp.full(20_000, 0.8)
    exact = two_point_denoiser(points)
    best = edm.denoising_error(exact, z0, level, noise).mean()
    for change in (0.05, -0.05):
        assert edm.denoising_error(lambda z, s, c=change: exact(z, s) + c, z0, level, noise).mean() > best
        assert (
            edm.denoising_error(lambda z, s, c=change: exact(z, s) * (1 + c), z0, level, noise).mean() > best
        )


def test_log_uniform_levels_are_the_quantiles_of_their_distribution():
    sigma = edm.noise_level(jnp.array([0.0, 0.5, 1.0 - 1e-7]))
    np.testing.assert_allclose(sigma, [2e-3, 0.4, 80.0], rtol=1e-4)  # √(2e-3 · 80) = 0.4


def test_log_normal_levels_match_scipy():
    u = np.linspace(0.02, 0.98, 49)
    ours = edm.noise_level(jnp.asarray(u, jnp.float32), "log_normal")
    expected = np.clip(stats.lognorm(s=1.2, scale=np.exp(-0.4)).ppf(u), 2e-3, 80)
    np.testing.assert_allclose(ours, expected, rtol=2e-5)
    with pytest.raises(InputError, match="log_normal"):
        edm.noise_level(jnp.array([0.5]), "cosine")


@given(st.floats(0, 1, exclude_max=True), st.sampled_from(["log_uniform", "log_normal"]))
@settings(max_examples=30, deadline=None)
def test_stratified_uniforms_put_one_level_in_each_quantile(offset, kind):
    u = (np.arange(32) / 32 + offset) % 1.0
    edges = edm.noise_level(jnp.linspace(0, 1, 33)[1:-1], kind)
    where = np.searchsorted(np.asarray(edges), np.asarray(edm.noise_level(jnp.asarray(u, jnp.float32), kind)))
    # Rounding may move a level that sits on an edge into the next stratum, never further.
    assert np.abs(np.sort(where) - np.arange(32)).max() <= 1


def random_condition(rng, batch=6, seeds=3, width=8, domains=2):
    x = rng.normal(size=(batch, seeds, width)).astype(np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    mask = np.arange(seeds) < rng.integers(1, seeds + 1, batch)[:, None]
    return Condition(x * mask[..., None], mask, rng.integers(0, domains + 1, batch).astype(np.int32))


def test_anchor_is_the_normalised_mean_plus_the_domain_direction():
    rng = np.random.default_rng(0)
    condition = random_condition(rng)
    directions = rng.normal(size=(3, 8)).astype(np.float32) * [[1], [1], [0]]
    anchor = edm.Space(jnp.ones(8), jnp.asarray(directions)).anchor(condition)
    for i in range(6):
        mean = condition.context[i][condition.mask[i]].mean(0)
        expected = mean / np.linalg.norm(mean) + directions[condition.domain[i]]
        np.testing.assert_allclose(anchor[i], expected / np.linalg.norm(expected), rtol=2e-5, atol=1e-6)
    plain = edm.plain_space(8, 2)
    assert not plain.anchor(condition).any()
    np.testing.assert_allclose(plain.scale, 8**-0.5)


@pytest.mark.parametrize("per_coordinate", [False, True])
def test_fitted_space_has_unit_variance_and_decodes_what_it_encoded(per_coordinate):
    rng = np.random.default_rng(1)
    condition = random_condition(rng, batch=512)
    target = edm.unit(jnp.asarray(rng.normal(size=(512, 1, 8)) * np.linspace(0.5, 2, 8), jnp.float32))
    space = edm.fit_space(condition, target, np.zeros((3, 8)), per_coordinate=per_coordinate)
    anchor = space.anchor(condition)
    z = space.encode(target, anchor)
    np.testing.assert_allclose(jnp.mean(z**2), 1, rtol=1e-4)
    if per_coordinate:
        np.testing.assert_allclose(jnp.mean(z**2, (0, 1)), 1, rtol=1e-4)
    np.testing.assert_allclose(space.decode(z, anchor), target, atol=2e-6)


def test_targets_equal_to_their_anchor_are_refused():
    condition = random_condition(np.random.default_rng(0))
    space = edm.Space(jnp.ones(8), jnp.zeros((3, 8)))
    with pytest.raises(InputError, match="target"):
        edm.fit_space(condition, space.anchor(condition)[:, None], np.zeros((3, 8)))


def test_without_a_context_the_memory_is_the_anchor():
    rng = np.random.default_rng(0)
    memory = jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32)
    condition = Condition(jnp.zeros((3, 0, 4)), jnp.zeros((3, 0), bool), jnp.zeros(3, jnp.int32), memory)
    space = edm.Space(jnp.ones(4), jnp.zeros((1, 4)))
    mean = np.asarray(memory).mean(1)
    wanted = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(space.anchor(condition), wanted, rtol=1e-5)
    assert not space.anchor(condition.replace(memory=0 * memory)).any()
    seeds = Condition(jnp.ones((3, 1, 4)), jnp.ones((3, 1), bool), jnp.zeros(3, jnp.int32), memory)
    np.testing.assert_allclose(space.anchor(seeds), 0.5, rtol=1e-5)  # a context goes before it


def test_error_sums_over_the_rows_that_are_there():
    rng = np.random.default_rng(0)
    clean, noise = jnp.asarray(rng.normal(size=(2, 2, 3, 4)), jnp.float32)
    sigma, present = jnp.array([0.5, 2.0]), jnp.array([[True, False, True], [False, True, False]])
    denoise = lambda z, s: 0.3 * z  # noqa: E731
    residual = np.asarray(edm.denoising_residual(denoise, clean, sigma, noise))
    wanted = [(residual[0, [0, 2]] ** 2).sum(), (residual[1, 1] ** 2).sum()]
    np.testing.assert_allclose(edm.denoising_error(denoise, clean, sigma, noise, present), wanted, rtol=1e-5)


def test_a_basis_holds_the_principal_directions_of_the_residual():
    """Against the SVD, for either form; what lies outside is neither seen nor drawn."""
    rng = np.random.default_rng(0)
    context = edm.unit(jnp.asarray(rng.normal(size=(200, 1, 6)), jnp.float32))
    condition = Condition(context, jnp.ones((200, 1), bool), jnp.zeros(200, jnp.int32))
    spread = np.array([3.0, 2.0, 1.0, 0.5, 0.2, 0.1]) * rng.normal(size=(200, 2, 6))
    target = edm.unit(context + jnp.asarray(spread @ np.linalg.qr(rng.normal(size=(6, 6)))[0], jnp.float32))
    for centred in (True, False):
        space = edm.fit_space(condition, target, np.zeros((1, 6)), centred=centred, dims=3)
        anchor = space.anchor(condition)
        assert bool(anchor.any()) == centred and anchor.shape == (200, 6)
        residual = np.asarray(target - anchor[:, None]).reshape(-1, 6)
        _, singular, directions = np.linalg.svd(residual, full_matrices=False)
        np.testing.assert_allclose(np.abs(space.basis.T @ directions[:3].T), np.eye(3), atol=1e-4)
        assert (space.basis[np.abs(space.basis).argmax(0), np.arange(3)] > 0).all()  # one sign on any machine
        np.testing.assert_allclose(space.scale, np.sqrt((singular[:3] ** 2).mean() / 400), rtol=1e-4)
        z = space.encode(target, anchor)
        assert z.shape == (200, 2, 3)
        np.testing.assert_allclose((z**2).mean(), 1, rtol=1e-4)
        outside = edm.unit(jnp.asarray(directions[5], jnp.float32))
        np.testing.assert_allclose(space.encode(target + 0.5 * outside, anchor), z, atol=1e-4)
        rebuilt = residual @ directions[:3].T @ directions[:3]
        wanted = edm.unit(anchor[:, None] + rebuilt.reshape(200, 2, 6))
        np.testing.assert_allclose(space.decode(z, anchor), wanted, atol=1e-4)
        whole = edm.fit_space(condition, target, np.zeros((1, 6)), centred=centred, dims=6)
        np.testing.assert_allclose(whole.decode(whole.encode(target, anchor), anchor), target, atol=1e-5)
    with pytest.raises(InputError, match="7 directions of 6"):
        edm.fit_space(condition, target, np.zeros((1, 6)), dims=7)
