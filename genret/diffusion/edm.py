"""EDM: noise levels, preconditioning, loss weight, and the one denoising error every loss uses.

Equations are those of Karras et al. 2022 (arXiv 2206.00364, section 5 and Table 1).

Units, stated here once. Embeddings y are unit-norm rows. What is diffused is

    z = (y - μ(c)) / s        (`Space.encode`)        so that each coordinate has variance 1

and σ_data = 1 throughout; σ is therefore relative to the data. Two forms:

    centred  μ(c) = normalise(mean of the context + direction of the domain): the residual to a query
             that is already good. A network that outputs zero *is* that query. Without a context (S = 0)
             the memory takes its place: a text query, say.
    plain    μ = 0, s = 1/√D: the form of the image papers, kept for the ablation.

Either can run in the R principal directions P of y - μ(c) alone, z = Pᵀ (y - μ(c)) / s: what is left out is
mostly noise to a small network, and a row that is rebuilt lies nearer to real ones.

In embedding units the centred form reads D(x) = μ + c_skip (x - μ) + c_out F(c_in (x - μ), c).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from genret.types import Array, Condition, InputError

Denoiser = Callable[[Array, Array], Array]
"""(z f32[B, K, D], σ f32[B]) -> E[z₀ | z, σ] f32[B, K, D], the condition already bound."""

SIGMA_MIN, SIGMA_MAX = 2e-3, 80.0
NoiseKind = Literal["log_uniform", "log_normal"]


def unit(x: Array, axis: int = -1) -> Array:
    """x / ‖x‖ in float32; a zero vector stays zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), 1e-12))


@struct.dataclass
class Space:
    """The coordinates the diffusion runs in, fitted on training items only.

    scale: f32[D or R], standard deviation of y - μ(c) per coordinate (equal entries: one isotropic scale).
    directions: f32[M+1, D], added to the context mean per domain; row M (the null domain) is zero.
    centred: False gives the plain form. basis: P f32[D, R] with orthonormal columns; None for all of D.
    """

    scale: Array
    directions: Array
    centred: bool = struct.field(pytree_node=False, default=True)
    basis: Array | None = None

    def anchor(self, condition: Condition) -> Array:
        """μ(c) f32[B, D]: unit-norm in the centred form, zero in the plain form."""
        if not self.centred:
            return jnp.zeros((condition.context.shape[0], self.directions.shape[1]), jnp.float32)
        if condition.context.shape[1] == 0 and condition.memory is not None:
            mean = condition.memory.mean(1)
        else:
            weight = condition.mask.astype(jnp.float32)[..., None]  # [B, S, 1]
            mean = jnp.sum(condition.context * weight, 1) / jnp.maximum(jnp.sum(weight, 1), 1.0)
        return unit(unit(mean) + self.directions[condition.domain])

    def encode(self, y: Array, anchor: Array) -> Array:
        """Unit-norm f32[B, K, D] -> diffusion coordinates f32[B, K, D or R]."""
        residual = y - anchor[:, None]
        return (residual if self.basis is None else residual @ self.basis) / self.scale

    def decode(self, z: Array, anchor: Array) -> Array:
        """Diffusion coordinates -> unit-norm f32[B, K, D]."""
        residual = z * self.scale
        return unit(anchor[:, None] + (residual if self.basis is None else residual @ self.basis.T))


def plain_space(width: int, domains: int) -> Space:
    """The uncentred form: unit-norm rows have coordinate variance 1/D."""
    return Space(jnp.full(width, width**-0.5), jnp.zeros((domains + 1, width)), centred=False)


def fit_space(
    condition: Condition, target: Array, directions: Array, *, per_coordinate: bool = False,
    centred: bool = True, dims: int = 0,
) -> Space:  # fmt: skip
    """Space whose scale is the measured std of target - μ(c) over a sample of contexts.

    target: f32[B, K, D] unit-norm. per_coordinate: one scale per coordinate instead of one for all. dims: R;
    0 keeps all of D.
    """
    width = target.shape[-1]
    if not 0 <= dims <= width:
        raise InputError("dims", f"{dims} directions of {width}", f"use 1 to {width}, or 0 for all")
    space = Space(jnp.ones(width), jnp.asarray(directions, jnp.float32), centred)
    residual = target - space.anchor(condition)[:, None]
    if dims:
        basis = _principal(np.asarray(residual, np.float64).reshape(-1, width), dims)
        space = space.replace(basis=basis)
        residual = residual @ basis
    variance = jnp.mean(residual**2, axis=(0, 1))
    variance = variance if per_coordinate else jnp.broadcast_to(variance.mean(), variance.shape)
    if not np.all(np.asarray(variance) > 1e-10):
        raise InputError(
            "target", "does not differ from its anchor in some coordinate",
            "check that targets are not the context means themselves",
        )  # fmt: skip
    return space.replace(scale=jnp.sqrt(variance))


def _principal(rows: np.ndarray, count: int) -> Array:
    """The `count` directions of the largest second moment of rows f64[n, D]: f32[D, count].

    Each points to where its largest entry is positive, so that any machine gets the same ones.
    """
    directions = np.linalg.eigh(rows.T @ rows)[1][:, ::-1][:, :count]
    largest = np.abs(directions).argmax(0)
    return jnp.asarray(directions * np.sign(directions[largest, np.arange(count)]), jnp.float32)


def noise_level(uniform: Array, kind: NoiseKind = "log_uniform") -> Array:
    """σ f32[B] as a quantile of `uniform` f32[B] in [0, 1), so a stratified input stays stratified.

    log_uniform: ln σ ~ U[ln 2e-3, ln 80]. log_normal: ln σ ~ N(-0.4, 1.2²), clipped to that range; the
    mean is above the -1.2 used for images because one embedding has no spatial redundancy.
    """
    low, high = np.log(SIGMA_MIN), np.log(SIGMA_MAX)
    if kind == "log_uniform":
        return jnp.exp(low + uniform * (high - low))
    if kind == "log_normal":
        quantile = jax.scipy.special.ndtri(jnp.clip(uniform, 1e-6, 1 - 1e-6))
        return jnp.clip(jnp.exp(-0.4 + 1.2 * quantile), SIGMA_MIN, SIGMA_MAX)
    raise InputError("noise", f"unknown kind {kind!r}", "use log_uniform or log_normal")


def loss_weight(sigma: Array) -> Array:
    """λ(σ) = (σ² + σ_data²) / (σ σ_data)², σ_data = 1: the network's own error has weight 1 at every σ."""
    return (sigma**2 + 1) / sigma**2


def denoiser(network: Callable[[Array, Array], Array]) -> Denoiser:
    """D(z; σ) = c_skip z + c_out F(c_in z; ln σ / 4), eq. 7 and Table 1 with σ_data = 1.

    network: (f32[B, K, D], c_noise f32[B]) -> f32[B, K, D].
    """

    def denoise(z: Array, sigma: Array) -> Array:
        s = sigma[:, None, None]
        root = jnp.sqrt(s**2 + 1)
        return z / root**2 + s / root * network(z / root, jnp.log(sigma) / 4)

    return denoise


def denoising_residual(denoise: Denoiser, clean: Array, sigma: Array, noise: Array) -> Array:
    """√λ(σ) (D(z₀ + σ ε; σ) - z₀), f32[B, K, D].

    clean, noise: f32[B, K, D]; sigma: f32[B]. Every loss of the package is built on this difference.
    """
    residual = (denoise(clean + sigma[:, None, None] * noise, sigma) - clean).astype(jnp.float32)
    return jnp.sqrt(loss_weight(sigma))[:, None, None] * residual


def denoising_error(
    denoise: Denoiser, clean: Array, sigma: Array, noise: Array, present: Array | None = None
) -> Array:
    """λ(σ) ‖D(z₀ + σ ε; σ) - z₀‖², summed over the set and its coordinates: f32[B].

    present: bool[B, K], the rows to sum over (None: all).
    """
    where = None if present is None else present[..., None]
    return jnp.sum(denoising_residual(denoise, clean, sigma, noise) ** 2, axis=(1, 2), where=where)


def gaussian_noise(key: Array, shape: tuple[int, int]) -> Array:
    """ε f32[B, K, D] from one key per example, key[B], so it depends on neither mesh nor microbatch."""
    return jax.vmap(lambda k: jax.random.normal(k, shape))(key)
