"""The Diffusion Transformer over [domain ; anchor ; context ; set] tokens, with adaLN-Zero.

Peebles & Xie 2023 (arXiv 2212.09748) for the block; the layout is papers' prefix conditioning: the
context is read bidirectionally and never sees the set, the set sees everything. Set rows carry no
positions, so the network is equivariant to their order; positions on the context carry metric order.

A model of `max_context` 0 has no prefix: its tokens are the set alone, and what it is conditioned on is the
memory, by cross-attention. With `adaln=False, mlp_ratio=1` and `row_positions` it is the block that R4T's
parameter count points to (papers.md B.6, point 6).
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from genret.attention import attend
from genret.types import Array, Condition, InputError

SIZES = {  # width, depth, heads
    "test": (32, 1, 2),
    "demo": (128, 3, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
}

# Ordered: the first pattern found in a parameter's path decides; a leaf that matches none raises.
SHARDING_RULES = (
    (r"(qkv|query|memory_kv|mlp_in|modulation)/kernel", P("fsdp", "tensor")),
    (r"(attention_out|memory_out|mlp_out)/kernel", P("tensor", "fsdp")),
    (r"(read|write|noise|mean)\w*/kernel", P("fsdp", "tensor")),
    (r"mean_map$", P(None, "fsdp", "tensor")),
    (r"(bias|scale|embedding|positions)$", P()),
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


def _product(x: Array, kernel: Array, *_: Any, **more: Any) -> Array:
    """x [..., W] times kernel [W, F] as one matrix product: with more axes XLA transposes what the kernel's
    gradient reads, which takes a CPU as long again."""
    rows = jax.lax.dot(x.reshape(-1, x.shape[-1]), kernel, **more)
    return rows.reshape(*x.shape[:-1], kernel.shape[1])


def _modulation(c: Array, parts: int, width: int) -> list[Array]:
    """adaLN-Zero: `parts` vectors f32[B, 1, W] read from c f32[B, W], all zero at initialisation."""
    zero = nn.initializers.zeros
    out = nn.Dense(parts * width, kernel_init=zero, name="modulation")(nn.silu(c))
    return jnp.split(out[:, None], parts, axis=-1)


class Block(nn.Module):
    """Attention, optional cross-attention and MLP, each scaled, shifted and gated by the condition (adaLN),
    or an ordinary pre-LayerNorm block."""

    width: int
    heads: int
    cross: bool
    adaln: bool
    mlp_ratio: int
    dtype: Any
    attention: str | None

    @nn.compact
    def __call__(self, x: Array, c: Array, mask: Array | None, memory: Array | None, rows: int) -> Array:
        """x f32[B, T, W] -> f32[B, rows, W]: the last `rows` tokens, the others are keys and values alone."""

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, dot_general=_product, name=name)

        def split(h: Array, n: int) -> list[Array]:  # [B, T, n·W] -> n × [B, T, H, W/H]
            h = h.reshape(*h.shape[:2], n * self.heads, self.width // self.heads)
            return jnp.split(h, n, axis=2)

        branches = 3 if self.cross else 2
        parts = _modulation(c, 3 * branches, self.width) if self.adaln else [1.0] * 3 * branches

        def normed(branch: int) -> Array:
            if not self.adaln:
                return nn.LayerNorm(name=f"norm_{branch}")(x).astype(self.dtype)
            shift, scale = parts[3 * branch : 3 * branch + 2]
            return (_norm(x) * (1 + scale) + shift).astype(self.dtype)

        q, k, v = split(dense(3 * self.width, "qkv")(normed(0)), 3)
        if rows < x.shape[1]:
            x, q, mask = x[:, -rows:], q[:, -rows:], None if mask is None else mask[:, :, -rows:]
        h = self.attend(q, k, v, mask)
        x = x + parts[2] * dense(self.width, "attention_out")(h.reshape(*x.shape))
        if self.cross:
            k, v = split(dense(2 * self.width, "memory_kv")(memory.astype(self.dtype)), 2)
            if memory.shape[1] > 1 or self.is_initializing():
                (q,) = split(dense(self.width, "query")(normed(1)), 1)
                h = self.attend(q, k, v, None)
            else:  # a softmax over one key is 1: every row reads its value, whatever it asks
                h = v
            x = x + parts[5] * dense(self.width, "memory_out")(h.reshape(*h.shape[:2], self.width))
        h = nn.gelu(dense(self.mlp_ratio * self.width, "mlp_in")(normed(branches - 1)))
        return x + parts[-1] * dense(self.width, "mlp_out")(h)

    def attend(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        """q [B, R, H, D], k and v [B, T, H, D] -> [B, R, H, D]."""
        # cuDNN has no gradient of a masked attention over an odd number of tokens.
        if self.attention and not (self.attention == "cudnn" and (q.shape[1] % 2 or k.shape[1] % 2)):
            return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=self.attention)
        return attend(*(x.swapaxes(1, 2) for x in (q, k, v)), mask).swapaxes(1, 2)


class DiT(nn.Module):
    """F(z; c_noise, c): f32[B, K, D] -> f32[B, K, D]. Zero at initialisation (adaLN-Zero).

    width, depth, heads: transformer size (see SIZES). embedding: D. domains: M (the null domain M is
    added). max_context: longest context S; 0 for no prefix. cross: read `condition.memory` by
    cross-attention. adaln: False adds the noise level to every token instead, and norms are learned.
    mlp_ratio: hidden width of the MLPs over `width`. row_positions: rows that get a position of their own; 0
    keeps the network equivariant to the order of the set. memory_width: E, where it is not D.
    dtype: of the matmuls; norms, residual stream and parameters stay float32. attention: None is
    `genret.attention`'s, else an implementation of `jax.nn.dot_product_attention`: "cudnn" asks for the fused
    GPU kernel (bfloat16).
    """

    width: int
    depth: int
    heads: int
    embedding: int
    domains: int
    max_context: int
    cross: bool = False
    adaln: bool = True
    mlp_ratio: int = 4
    row_positions: int = 0
    memory_width: int | None = None
    dtype: Any = jnp.float32
    attention: str | None = None

    @nn.compact
    def __call__(
        self, z: Array, noise: Array, condition: Condition, anchor: Array, present: Array | None = None
    ) -> Array:
        """z: f32[B, K, D]; noise: c_noise f32[B]; anchor: f32[B, D] (`Space.anchor`). present: bool[B, K],
        the rows that exist (None: all); nothing reads the others, whose own output means nothing.

        Raises InputError when the condition does not fit the model.
        """
        batch, rows, width = z.shape
        seeds = condition.context.shape[1]
        self._check(rows, width, condition)

        def dense(name: str, **kw: Any) -> nn.Dense:
            return nn.Dense(self.width, dtype=self.dtype, dot_general=_product, name=name, **kw)

        root = math.sqrt(width)  # unit-norm rows enter with coordinate variance 1
        memory = condition.memory
        if memory is not None:
            memory = memory * math.sqrt(memory.shape[-1])
        tokens = dense("read_set")(z)
        mask = None if present is None else present[:, None, None]  # [B, 1, 1, K]
        c = nn.Dense(self.width, name="noise_in")(_fourier(noise))
        c = nn.Dense(self.width, name="noise_out")(nn.silu(c))
        if self.max_context:
            domain = nn.Embed(self.domains + 1, self.width, embedding_init=_normal, name="domain_embedding")(
                condition.domain
            )  # [B, W]
            kind = nn.Embed(4, self.width, embedding_init=_normal, name="type_embedding")(jnp.arange(4))
            positions = self.param("positions", _normal, (self.max_context, self.width))
            tokens = jnp.concatenate(
                [
                    domain[:, None] + kind[0],
                    dense("read_anchor")(anchor * root)[:, None] + kind[1],
                    dense("read_context")(condition.context * root) + positions[:seeds] + kind[2],
                    tokens + kind[3],
                ],
                axis=1,
            )  # [B, 2+S+K, W]
            there = jnp.ones((batch, rows), bool) if present is None else present
            fixed = jnp.ones((batch, 2), bool)
            context = jnp.concatenate([fixed, condition.mask, jnp.zeros((batch, rows), bool)], 1)
            everything = jnp.concatenate([fixed, condition.mask, there], 1)
            is_set = jnp.arange(tokens.shape[1]) >= 2 + seeds
            mask = jnp.where(is_set[None, :, None], everything[:, None], context[:, None])[:, None]
            c = c + domain
        tokens = tokens.astype(jnp.float32)
        if self.row_positions:
            place = self.param("row_positions", _normal, (self.row_positions, self.width))
            tokens = tokens.at[:, -rows:].add(place[:rows])
        if not self.adaln:
            tokens = tokens + c[:, None]
        for i in range(self.depth):
            block = Block(
                self.width, self.heads, self.cross, self.adaln, self.mlp_ratio, self.dtype, self.attention,
                name=f"block_{i}",
            )  # fmt: skip
            # What comes after the last block reads the set alone.
            last = i == self.depth - 1
            tokens = block(tokens, c, mask, memory, rows if last else tokens.shape[1])

        if self.adaln:
            shift, scale = _modulation(c, 2, self.width)
            h = _norm(tokens) * (1 + scale) + shift
        else:
            h = nn.LayerNorm(name="norm")(tokens)
        out = nn.Dense(width, kernel_init=nn.initializers.zeros, name="write_set")(h)
        if not self.adaln:
            return out

        # A linear conditional mean ν beside the trunk, of the anchor (per domain) or of the memory: it
        # generalises from few patterns. For Gaussian data of mean ν the exact F is σ/√(1+σ²) ν plus what
        # the preconditioning already does.
        if self.max_context:
            maps = self.param("mean_map", nn.initializers.zeros, (self.domains + 1, width, width))
            # Every domain's product, then its own: a gather of D x D maps costs twenty times more.
            means = jnp.einsum("bd,mde->bme", anchor * root, maps)
            mean = jnp.take_along_axis(means, condition.domain[:, None, None], axis=1)[:, 0]
        else:
            mean = nn.Dense(width, kernel_init=nn.initializers.zeros, name="mean")(memory.mean(1))
        sigma = jnp.exp(4 * noise)[:, None]
        return out + (mean * sigma * jax.lax.rsqrt(1 + sigma**2))[:, None]

    def _check(self, rows: int, width: int, condition: Condition) -> None:
        context = condition.context.shape[-1] if self.max_context else width
        if width != self.embedding or context != self.embedding:
            got = f"{width} in the set, {context} in the context"
            raise InputError(
                "embedding", f"the model reads {self.embedding}-d embeddings, got {got}",
                "use the catalogue the checkpoint was trained on",
            )  # fmt: skip
        if condition.context.shape[1] > self.max_context:
            raise InputError(
                "context", f"{condition.context.shape[1]} items, more than {self.max_context}",
                "pass fewer seeds or train with a larger max_context",
            )  # fmt: skip
        if not (self.max_context or self.cross):
            raise InputError("cross", "missing in a model without context", "set it, or a max_context")
        if self.cross and condition.memory is None:
            raise InputError("memory", "missing for a cross-attention model", "pass the query embedding")
        if 0 < self.row_positions < rows:
            raise InputError(
                "rows", f"{rows}, more than the {self.row_positions} with a position",
                "ask for fewer rows or train with more row_positions",
            )  # fmt: skip


def make_dit(size: str, *, embedding: int, domains: int, max_context: int, **kw: Any) -> DiT:
    """A DiT of a named size; raises InputError for an unknown name."""
    if size not in SIZES:
        raise InputError("size", f"unknown size {size!r}", f"use one of {', '.join(SIZES)}")
    width, depth, heads = SIZES[size]
    return DiT(width, depth, heads, embedding, domains, max_context, **kw)
