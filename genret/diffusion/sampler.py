"""Samplers for the EDM process in diffusion coordinates, and guidance as denoiser -> denoiser.

Each sampler is (denoise, z f32[B, K, D], sigmas f32[T]) -> z₀ and runs as one `lax.scan`; jit it at the
call site, where the shape is known. `sigmas` descends and ends in 0 (`schedule`). Calls of the network:

    posterior_mean 1      euler, exponential T-1      heun 2(T-1)-1      euler_maruyama T-1
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from genret.diffusion.edm import SIGMA_MAX, SIGMA_MIN, Denoiser
from genret.types import Array, InputError


def schedule(
    steps: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = 7.0
) -> np.ndarray:
    """σ_i = (σ_max^(1/ρ) + i/(n-1) (σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ, then 0: f32[steps+1] (EDM eq. 5)."""
    if steps < 1 or not 0 < sigma_min < sigma_max:
        raise InputError(
            "schedule", f"steps {steps}, sigma {sigma_min}..{sigma_max}",
            "use at least one step and 0 < sigma_min < sigma_max",
        )  # fmt: skip
    ramp = np.linspace(0, 1, steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.append((high + ramp * (low - high)) ** rho, 0.0).astype(np.float32)


def _over(step, z: Array, sigmas: Array) -> Array:
    """Scan `step(z, σ, σ', i)` over consecutive pairs of the schedule."""
    sigmas = jnp.asarray(sigmas, jnp.float32)
    pairs = (sigmas[:-1], sigmas[1:], jnp.arange(len(sigmas) - 1))
    return jax.lax.scan(lambda z, p: (step(z, *p), None), z, pairs)[0]


def _level(sigma: Array, z: Array) -> Array:
    return jnp.broadcast_to(sigma, z.shape[:1])


def euler(denoise: Denoiser, z: Array, sigmas: Array) -> Array:
    """Probability-flow ODE dz/dσ = (z - D(z; σ)) / σ, first order."""

    def step(z, s, t, _):
        return z + (t - s) * (z - denoise(z, _level(s, z))) / s

    return _over(step, z, sigmas)


def heun(denoise: Denoiser, z: Array, sigmas: Array) -> Array:
    """The same ODE, second order (EDM Algorithm 1 without churn); the last step, to σ = 0, is Euler."""

    def step(z, s, t, _):
        slope = (z - denoise(z, _level(s, z))) / s
        guess = z + (t - s) * slope
        return z + (t - s) / 2 * (slope + (guess - denoise(guess, _level(t, z))) / t)

    z = _over(step, z, sigmas[:-1])
    return euler(denoise, z, sigmas[-2:])


def exponential(denoise: Denoiser, z: Array, sigmas: Array) -> Array:
    """The same ODE by DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095): with λ = -ln σ and h = λ' - λ,

        z' = (σ'/σ) z + (1 - σ'/σ) D̂      D̂ = D + h / (2 h_before) (D - D_before)

    is exact for a constant D, and second order in one call a step. The first step, which has no D before it,
    and the last, to σ = 0, take D̂ = D.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)
    h = -jnp.diff(jnp.log(sigmas[:-1]))
    slope = jnp.zeros(len(sigmas) - 1).at[1:-1].set(h[1:] / (2 * h[:-1]))

    def step(carry, level):
        z, before = carry
        s, t, w = level
        found = denoise(z, _level(s, z))
        ahead = found + w * (found - before)
        return (t / s * z + (1 - t / s) * ahead, found), None

    return jax.lax.scan(step, (z, jnp.zeros_like(z)), (sigmas[:-1], sigmas[1:], slope))[0][0]


def euler_maruyama(denoise: Denoiser, z: Array, sigmas: Array, key: Array) -> Array:
    """Reverse-time SDE of the variance-exploding process: dz = 2 (z - D)/σ dσ + √(2σ |dσ|) dw.

    key: key[B], one per example, folded with the step. The last step, to σ = 0, adds no noise and is
    the denoised mean.
    """

    def step(z, s, t, i):
        noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), z.shape[1:]))(key)
        drift = 2 * (t - s) * (z - denoise(z, _level(s, z))) / s
        return z + drift + jnp.sqrt(jnp.maximum(s**2 - t**2, 0.0)) * noise

    z = _over(step, z, sigmas[:-1])
    return denoise(z, _level(jnp.asarray(sigmas)[-2], z))


def posterior_mean(denoise: Denoiser, z: Array, sigma: float = SIGMA_MAX) -> Array:
    """E[z₀ | c] ≈ D(z; σ_max): at the top of the schedule the input says nothing. One call."""
    return denoise(z, _level(jnp.float32(sigma), z))


def guide(conditional: Denoiser, unconditional: Denoiser, strength: float | Array) -> Denoiser:
    """Classifier-free guidance (1 + w) D(z | c) - w D(z | ∅); w = 0 is the conditional denoiser.

    strength: a scalar, or f32[B] for one strength per example.
    """
    w = jnp.asarray(strength, jnp.float32)
    w = w[:, None, None] if w.ndim else w
    return lambda z, s: (1 + w) * conditional(z, s) - w * unconditional(z, s)
