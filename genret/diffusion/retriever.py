"""A retriever: the network, its space and a condition, bound into a denoiser, a loss and queries."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from genret.diffusion import edm, sampler
from genret.diffusion.dit import DiT
from genret.types import Array, Batch, Condition, Draw, InputError, PyTree, Terms

Method = Literal["posterior_mean", "heun", "euler", "exponential", "euler_maruyama"]


@dataclass(frozen=True)
class Retriever:
    """A DiT with the training options that belong to its loss.

    noise: distribution of σ in training. drop: share of examples whose condition is dropped (`null`),
    which is what classifier-free guidance needs.
    """

    model: DiT
    noise: edm.NoiseKind = "log_uniform"
    drop: float = 0.1

    @functools.partial(jax.jit, static_argnames="self")
    def init(self, key: Array) -> PyTree:
        """Parameters, float32."""
        d, m = self.model.embedding, self.model.domains
        seeds = min(1, self.model.max_context)
        condition = Condition(
            jnp.zeros((1, seeds, d)), jnp.ones((1, seeds), bool), jnp.full((1,), m, jnp.int32),
            jnp.zeros((1, 1, self.model.memory_width or d)) if self.model.cross else None,
        )  # fmt: skip
        z = jnp.zeros((1, 1, d))
        return self.model.init(key, z, jnp.zeros(1), condition, jnp.zeros((1, d)))["params"]

    def denoiser(
        self, params: PyTree, condition: Condition, anchor: Array, present: Array | None = None
    ) -> edm.Denoiser:
        """D(z; σ | condition) in diffusion coordinates. present: bool[B, K], see `DiT`."""

        def network(z, noise):
            return self.model.apply({"params": params}, z, noise, condition, anchor, present)

        return edm.denoiser(network)

    def null(self, condition: Condition, dropped: Array | bool = True) -> Condition:
        """What guidance compares with: where `dropped` bool[B], the null domain and a zero memory.

        The memory enters through linear maps with a bias, so the bias is the null that each block learns.
        The context stays.
        """
        dropped = jnp.broadcast_to(dropped, condition.domain.shape)
        memory = condition.memory
        return condition.replace(
            domain=jnp.where(dropped, self.model.domains, condition.domain),
            memory=None if memory is None else jnp.where(dropped[:, None, None], 0.0, memory),
        )

    def loss(
        self, params: PyTree, space: edm.Space, batch: Batch, draw: Draw, present: Array | None = None
    ) -> Terms:
        """EDM denoising loss per coordinate of the target set: λ(σ) ‖D - z₀‖² / (K D), f32[B].

        present: bool[B, K]; rows without it are padding, outside the attention and the mean.
        """
        keys = jax.vmap(lambda k: jax.random.split(k))(draw.key)  # [B, 2]
        dropped = jax.vmap(jax.random.uniform)(keys[:, 0]) < self.drop
        condition = self.null(batch.condition, dropped)
        anchor = _anchor(space, condition, batch.condition)
        clean = space.encode(batch.target, anchor)
        sigma = edm.noise_level(draw.uniform, self.noise)
        noise = edm.gaussian_noise(keys[:, 1], clean.shape[1:])
        denoise = self.denoiser(params, condition, anchor, present)
        error = edm.denoising_error(denoise, clean, sigma, noise, present)
        rows = clean.shape[1] if present is None else jnp.maximum(present.sum(1), 1)
        return Terms(error / (rows * clean.shape[2]), batch.weight)

    @functools.partial(jax.jit, static_argnames=("self", "rows"))
    def query(self, params: PyTree, space: edm.Space, condition: Condition, rows: int = 1) -> Array:
        """The one-call query D(0; σ_max), unit-norm f32[B, rows, D]: the posterior mean under `loss`."""
        anchor = space.anchor(condition)
        z = jnp.zeros((len(anchor), rows, self.model.embedding))
        denoise = self.denoiser(params, condition, anchor)
        return space.decode(sampler.posterior_mean(denoise, z), anchor)

    def regression_loss(self, params: PyTree, space: edm.Space, batch: Batch, draw: Draw) -> Terms:
        """The same network without diffusion: ‖D(0; σ_max) - z₀‖² / (K D), an ordinary regressor."""
        anchor = space.anchor(batch.condition)
        clean = space.encode(batch.target, anchor)
        denoise = self.denoiser(params, batch.condition, anchor)
        error = sampler.posterior_mean(denoise, jnp.zeros_like(clean)) - clean
        return Terms(jnp.mean(error**2, axis=(1, 2)), batch.weight)

    @functools.partial(jax.jit, static_argnames=("self", "method", "steps", "rows", "levels"))
    def generate(
        self,
        params: PyTree,
        space: edm.Space,
        condition: Condition,
        key: Array,
        guidance: Array | float | None = None,
        *,
        method: Method = "posterior_mean",
        steps: int = 18,
        rows: int = 1,
        levels: tuple[float, float] = (edm.SIGMA_MIN, edm.SIGMA_MAX),
    ) -> Array:
        """Queries, unit-norm f32[B, rows, D].

        key: key[B], one per context. guidance: w of `sampler.guide` between the condition and
        its `null`, scalar or f32[B]; None spares the second network call. steps: of the
        schedule between `levels` (least σ, largest σ); `sampler` says how many network calls they cost.
        """
        anchor = space.anchor(condition)
        denoise = self.denoiser(params, condition, anchor)
        if guidance is not None:
            null = self.null(condition)
            own = _anchor(space, null, condition)
            shift = space.encode(anchor[:, None], own)  # from our coordinates to those of the null
            away = self.denoiser(params, null, own)
            denoise = sampler.guide(denoise, lambda z, s: away(z + shift, s) - shift, guidance)
        shape = (rows, self.model.embedding)
        if method == "posterior_mean":
            z = sampler.posterior_mean(denoise, jnp.zeros((anchor.shape[0], *shape)))
        else:
            sigmas = sampler.schedule(steps, sigma_min=levels[0], sigma_max=levels[1])
            z = sigmas[0] * edm.gaussian_noise(key, shape)
            if method == "euler_maruyama":
                keys = jax.vmap(lambda k: jax.random.fold_in(k, 1))(key)
                z = sampler.euler_maruyama(denoise, z, sigmas, keys)
            elif method in ("heun", "euler", "exponential"):
                z = getattr(sampler, method)(denoise, z, sigmas)
            else:
                raise InputError("method", f"unknown sampler {method!r}", "see sampler.py for the names")
        return space.decode(z, anchor)


def _anchor(space: edm.Space, given: Condition, asked: Condition) -> Array:
    """Anchor of what is given: without a dropped memory, but still of the domain asked for, so that guidance
    on the domain compares like with like."""
    return space.anchor(given.replace(domain=asked.domain))
