"""The Diffusion Transformer over [domain ; anchor ; context ; set] tokens, with adaLN-Zero.

Peebles & Xie 2023 (arXiv 2212.09748) for the block; the layout is papers' prefix conditioning: the
context is read bidirectionally and never sees the set, the set sees everything. Set rows carry no
positions, so the network is equivariant to their order; positions on the context carry metric order.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from genret.types import Array, Condition, InputError

SIZES = {  # width, depth, heads
    "test": (32, 2, 2),
    "demo": (128, 3, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
}

# Ordered: the first pattern found in a parameter's path decides; a leaf that matches none raises.
SHARDING_RULES = (
    (r"(qkv|query|memory_kv|mlp_in|modulation)/kernel", P("fsdp", "tensor")),
    (r"(attention_out|memory_out|mlp_out)/kernel", P("tensor", "fsdp")),
    (r"(read|write|noise)\w*/kernel", P("fsdp", "tensor")),
    (r"mean_map$", P(None, "fsdp", "tensor")),
    (r"(bias|embedding|positions)$", P()),
)

_normal = nn.initializers.normal(0.02)


def _norm(x: Array) -> Array:
    """Parameter-free LayerNorm in float32 (adaLN supplies scale and shift)."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def _fourier(noise: Array, features: int = 128) -> Array:
    """Sinusoidal features f32[B, features] of c_noise = ln σ / 4, periods from 1/16 to 16."""
    angle = noise[:, None] * (2 * math.pi) * 2.0 ** jnp.linspace(-4, 4, features // 2)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


class Block(nn.Module):
    """Attention, optional cross-attention and MLP, each scaled, shifted and gated by the condition."""

    width: int
    heads: int
    cross: bool
    dtype: Any
    attention: str | None

    @nn.compact
    def __call__(self, x: Array, c: Array, mask: Array, memory: Array | None) -> Array:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        def split(h: Array, n: int) -> list[Array]:  # [B, T, n·W] -> n × [B, T, H, W/H]
            h = h.reshape(*h.shape[:2], n * self.heads, self.width // self.heads)
            return jnp.split(h, n, axis=2)

        branches = 3 if self.cross else 2
        modulation = nn.Dense(
            3 * branches * self.width, kernel_init=nn.initializers.zeros, name="modulation"
        )(nn.silu(c))
        parts = jnp.split(modulation[:, None], 3 * branches, axis=-1)  # each [B, 1, W], float32

        def modulated(branch: int) -> Array:
            shift, scale = parts[3 * branch : 3 * branch + 2]
            return (_norm(x) * (1 + scale) + shift).astype(self.dtype)

        q, k, v = split(dense(3 * self.width, "qkv")(modulated(0)), 3)
        h = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=self.attention)
        x = x + parts[2] * dense(self.width, "attention_out")(h.reshape(*x.shape))
        if self.cross:
            (q,) = split(dense(self.width, "query")(modulated(1)), 1)
            k, v = split(dense(2 * self.width, "memory_kv")(memory.astype(self.dtype)), 2)
            h = jax.nn.dot_product_attention(q, k, v, implementation=self.attention)
            x = x + parts[5] * dense(self.width, "memory_out")(h.reshape(*x.shape))
        h = nn.gelu(dense(4 * self.width, "mlp_in")(modulated(branches - 1)))
        return x + parts[-1] * dense(self.width, "mlp_out")(h)


class DiT(nn.Module):
    """F(z; c_noise, c): f32[B, K, D] -> f32[B, K, D]. Zero at initialisation (adaLN-Zero).

    width, depth, heads: transformer size (see SIZES). embedding: D. domains: M (the null domain M is
    added). max_context: longest context S. cross: read `condition.memory` by cross-attention.
    dtype: of the matmuls; norms, residual stream and parameters stay float32. attention: implementation
    of `jax.nn.dot_product_attention`: None lets JAX choose, "cudnn" asks for the fused GPU kernel (bfloat16).
    """

    width: int
    depth: int
    heads: int
    embedding: int
    domains: int
    max_context: int
    cross: bool = False
    dtype: Any = jnp.float32
    attention: str | None = None

    @nn.compact
    def __call__(self, z: Array, noise: Array, condition: Condition, anchor: Array) -> Array:
        """z: f32[B, K, D]; noise: c_noise f32[B]; anchor: f32[B, D] (`Space.anchor`).

        Raises InputError when the condition does not fit the model.
        """
        batch, rows, width = z.shape
        seeds = condition.context.shape[1]
        self._check(width, condition)

        def dense(name: str, **kw: Any) -> nn.Dense:
            return nn.Dense(self.width, dtype=self.dtype, name=name, **kw)

        domain = nn.Embed(self.domains + 1, self.width, embedding_init=_normal, name="domain_embedding")(
            condition.domain
        )  # [B, W]
        kind = nn.Embed(4, self.width, embedding_init=_normal, name="type_embedding")(jnp.arange(4))
        positions = self.param("positions", _normal, (self.max_context, self.width))
        root = math.sqrt(width)  # unit-norm rows enter with coordinate variance 1

        tokens = jnp.concatenate(
            [
                domain[:, None] + kind[0],
                dense("read_anchor")(anchor * root)[:, None] + kind[1],
                dense("read_context")(condition.context * root) + positions[:seeds] + kind[2],
                dense("read_set")(z) + kind[3],
            ],
            axis=1,
        ).astype(jnp.float32)  # [B, 2+S+K, W]

        fixed = jnp.ones((batch, 2), bool)
        context = jnp.concatenate([fixed, condition.mask, jnp.zeros((batch, rows), bool)], 1)
        everything = jnp.concatenate([fixed, condition.mask, jnp.ones((batch, rows), bool)], 1)
        is_set = jnp.arange(tokens.shape[1]) >= 2 + seeds
        mask = jnp.where(is_set[None, :, None], everything[:, None], context[:, None])[:, None]

        c = nn.Dense(self.width, name="noise_in")(_fourier(noise))
        c = nn.Dense(self.width, name="noise_out")(nn.silu(c)) + domain
        for i in range(self.depth):
            block = Block(self.width, self.heads, self.cross, self.dtype, self.attention, name=f"block_{i}")
            tokens = block(tokens, c, mask, condition.memory)

        shift, scale = jnp.split(
            nn.Dense(2 * self.width, kernel_init=nn.initializers.zeros, name="modulation")(nn.silu(c))[
                :, None
            ],
            2,
            axis=-1,
        )
        h = _norm(tokens[:, 2 + seeds :]) * (1 + scale) + shift
        out = nn.Dense(width, kernel_init=nn.initializers.zeros, name="write_set")(h)

        # A linear conditional mean ν per domain beside the trunk: it generalises from few patterns. For
        # Gaussian data of mean ν the exact F is σ/√(1+σ²) ν plus what the preconditioning already does.
        maps = self.param("mean_map", nn.initializers.zeros, (self.domains + 1, width, width))
        # Every domain's product, then its own: a gather of D x D maps per example costs twenty times more.
        means = jnp.einsum("bd,mde->bme", anchor * root, maps)
        mean = jnp.take_along_axis(means, condition.domain[:, None, None], axis=1)[:, 0]
        sigma = jnp.exp(4 * noise)[:, None]
        return out + (mean * sigma * jax.lax.rsqrt(1 + sigma**2))[:, None]

    def _check(self, width: int, condition: Condition) -> None:
        if width != self.embedding or condition.context.shape[-1] != self.embedding:
            got = f"{width} in the set, {condition.context.shape[-1]} in the context"
            raise InputError(
                "embedding", f"the model reads {self.embedding}-d embeddings, got {got}",
                "use the catalogue the checkpoint was trained on",
            )  # fmt: skip
        if condition.context.shape[1] > self.max_context:
            raise InputError(
                "context", f"{condition.context.shape[1]} items, more than {self.max_context}",
                "pass fewer seeds or train with a larger max_context",
            )  # fmt: skip
        if self.cross and condition.memory is None:
            raise InputError("memory", "missing for a cross-attention model", "pass the query embedding")


def make_dit(size: str, *, embedding: int, domains: int, max_context: int, **kw: Any) -> DiT:
    """A DiT of a named size; raises InputError for an unknown name."""
    if size not in SIZES:
        raise InputError("size", f"unknown size {size!r}", f"use one of {', '.join(SIZES)}")
    width, depth, heads = SIZES[size]
    return DiT(width, depth, heads, embedding, domains, max_context, **kw)
