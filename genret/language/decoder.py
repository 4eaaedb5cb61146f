"""A causal language model of the Llama family, as SmolLM2 and Qwen3 need it, with adapters and a cache.

RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), rotary positions (Su et al. 2021, arXiv 2104.09864),
grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), SwiGLU (Shazeer 2020, arXiv 2002.05202),
LoRA (Hu et al. 2021, arXiv 2106.09685). Names of modules and sizes are those of hub checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from genret.attention import attend
from genret.types import Array, InputError, PyTree

# Ordered: the first pattern found in a leaf's path decides. `a` and `b` are the factors of LoRA.
SHARDING_RULES = (
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj|lm_head)/kernel$", P("fsdp", "tensor")),
    (r"(o_proj|down_proj)/kernel$", P("tensor", "fsdp")),
    (r"embed_tokens/embedding$", P("tensor", "fsdp")),
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/a$", P("fsdp", None)),
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/b$", P(None, "tensor")),
    (r"(o_proj|down_proj)/a$", P("tensor", None)),
    (r"(o_proj|down_proj)/b$", P(None, "fsdp")),
    (r"norm/scale$", P()),
)

_normal = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a checkpoint, under the names of its config.json.

    qk_norm: RMSNorm over each head of the queries and keys, before the rotation (Qwen3).
    Raises InputError for sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qk_norm: bool

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type == "bool":
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole or field.type == "float" and isinstance(value, float)) or not 0 < value < 2**31:
                problem = f"{value!r} is not positive and of type {field.type}"
                raise InputError(name, problem, "take the checkpoint's config.json")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"{self.num_attention_heads} query heads over {self.num_key_value_heads}"
            raise InputError("num_key_value_heads", heads, "use a divisor of num_attention_heads")
        if self.head_dim % 2:
            raise InputError(
                "head_dim", f"{self.head_dim} is odd", "rotary positions turn pairs: use an even one"
            )


@struct.dataclass
class Cache:
    """Keys and values of what was read so far, in T slots; slot t holds column t of the text.

    keys, values: one [B, Hkv, T, Dh] for each layer. mask: bool[B, T], slots that hold a real token.
    filled: i32[], slots written. shared: for each layer the keys and values [Hkv, F, Dh] of F tokens that
    come before every row; empty where F = 0.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    mask: Array
    filled: Array
    shared: tuple[tuple[Array, Array], ...] = ()

    def rows(self, at: Array) -> Cache:
        """The cache of rows i32[b], which may repeat."""
        keys, values, mask = jax.tree.map(lambda x: x[at], (self.keys, self.values, self.mask))
        return self.replace(keys=keys, values=values, mask=mask)


def empty_cache(config: DecoderConfig, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """A cache of `length` slots for `batch` rows, nothing in it."""
    shape = (batch, config.num_key_value_heads, length, config.head_dim)

    def zeros() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))

    return Cache(zeros(), zeros(), jnp.zeros((batch, length), bool), jnp.int32(0))


def _rotation(positions: Array, config: DecoderConfig) -> tuple[Array, Array]:
    """cos, sin f32[B, L, Dh/2] of position · θ^(-2i/Dh)."""
    half = config.head_dim // 2
    angle = positions[..., None] * config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Turns the pairs (i, i + Dh/2) of x [B, L, H, Dh], float32."""
    cos, sin = (r[:, :, None] for r in rotation)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · scale over the last axis, in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon) * scale


class Projection(nn.Module):
    """y = x W + (α/r) (x A) B, the product never formed: a frozen W then costs no weight gradient.

    W `kernel` in "params"; A `a` [in, r] normal and B `b` [r, out] zero in "lora", absent when rank is 0.
    """

    features: int
    rank: int
    alpha: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        into, rank = x.shape[-1], self.rank
        kernel = self.param("kernel", nn.initializers.normal(1 / math.sqrt(into)), (into, self.features))
        y = x @ kernel.astype(self.dtype)
        if rank:
            a = self.variable("lora", "a", lambda: _first_factor(self.make_rng("params"), (into, rank))).value
            b = self.variable("lora", "b", lambda: jnp.zeros((rank, self.features))).value
            y += (self.alpha / rank) * ((x @ a.astype(self.dtype)) @ b.astype(self.dtype))
        return y.reshape(*shape, self.features)


def _first_factor(key: Array, shape: tuple[int, ...]) -> Array:
    """A [..., in, r] with entries of variance 1/in, so that x A has the scale of x."""
    return jax.random.normal(key, shape) / math.sqrt(shape[-2])


class Block(nn.Module):
    """Attention and MLP, each behind an RMSNorm and added to the residual stream (float32)."""

    config: DecoderConfig
    rank: int
    alpha: float
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Array,
        rotation: tuple[Array, Array],
        allowed: Array,
        past: tuple[Array, Array, Array] | None,
        shared: tuple[Array, Array] | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """x f32[B, L, W], allowed bool[B, L, T] -> x and the keys and values [B, Hkv, T, Dh] it read.

        past: keys, values and the slot from which those of x are written; None: T = L, x alone. shared: keys
        and values of the tokens before all rows.
        """
        c = self.config
        batch, length, width = x.shape
        groups = c.num_attention_heads // c.num_key_value_heads

        def project(h: Array, features: int, name: str) -> Array:
            return Projection(features, self.rank, self.alpha, self.dtype, name=name)(h)

        def heads(h: Array, count: int, name: str) -> Array:  # -> [B, L, H, Dh]
            return project(h, count * c.head_dim, name).reshape(batch, length, count, c.head_dim)

        h = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x)
        q = heads(h, c.num_attention_heads, "q_proj")
        k, v = (heads(h, c.num_key_value_heads, name) for name in ("k_proj", "v_proj"))
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, name="k_norm")(k)
        q, k = (_rotate(part, rotation).astype(self.dtype) for part in (q, k))
        k, v = (part.swapaxes(1, 2) for part in (k, v))  # [B, Hkv, L, Dh]
        if past is not None:
            start = (0, 0, past[2], 0)
            k = jax.lax.dynamic_update_slice(past[0], k.astype(past[0].dtype), start)
            v = jax.lax.dynamic_update_slice(past[1], v.astype(past[1].dtype), start)
        # Queries that read the same keys are rows of one product.
        q = q.reshape(batch, length, c.num_key_value_heads, groups, c.head_dim).transpose(0, 2, 3, 1, 4)
        q = q.reshape(batch, c.num_key_value_heads, groups * length, c.head_dim)
        h = attend(q, k, v, jnp.tile(allowed, (1, groups, 1))[:, None], shared)
        h = h.reshape(batch, c.num_key_value_heads, groups, length, c.head_dim).transpose(0, 3, 1, 2, 4)
        h = h.reshape(batch, length, -1)
        x = x + project(h, width, "o_proj")
        h = RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x)
        h = nn.silu(project(h, c.intermediate_size, "gate_proj")) * project(h, c.intermediate_size, "up_proj")
        return x + project(h, width, "down_proj"), (k, v)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply_layer(layer: Block, remat: bool, variables: PyTree, *given: Any) -> Any:
    """Layers of the same shapes are traced and lowered once, and not thirty times."""
    return (jax.checkpoint(layer.apply) if remat else layer.apply)(variables, *given)


class Decoder(nn.Module):
    """tokens i32[B, L], mask bool[B, L] -> logits f32[B, L, V] of the next token.

    Base weights are the collection "params"; LoRA factors are "lora", so `jax.grad` with respect to that
    collection alone leaves the base frozen. Positions count real tokens, so left padding changes nothing.

    lora_rank: r, 0 for none. lora_layers: how many layers, from the top, have factors; 0 is all of them.
    lora_alpha: α. remat: recompute each layer in the backward pass; on CPU, XLA's default scheduler undoes
    the saving (XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false keeps it). dtype: of the
    matmuls and of keys and values; norms, residual stream, softmax and parameters stay float32.
    """

    config: DecoderConfig
    lora_rank: int = 0
    lora_layers: int = 0
    remat: bool = False
    dtype: Any = jnp.float32
    lora_alpha: float = 16.0

    def setup(self):
        c = self.config
        _check_lora(self)
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=_normal)
        plain = c.num_hidden_layers - (self.lora_layers or c.num_hidden_layers)
        self.layers = [
            Block(c, self.lora_rank if i >= plain else 0, self.lora_alpha, self.dtype)
            for i in range(c.num_hidden_layers)
        ]
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = Projection(c.vocab_size, 0, self.lora_alpha, self.dtype)

    def __call__(self, tokens: Array, mask: Array, cache: Cache | None = None):
        """Logits f32[B, L, V]; with a cache, the pair (logits, the cache with these tokens in it)."""
        if cache is None:
            return self.head(self.hidden(tokens, mask))
        h, cache = self.hidden(tokens, mask, cache)
        return self.head(h), cache

    def hidden(self, tokens: Array, mask: Array, cache: Cache | None = None):
        """Normalised states f32[B, L, W], what `head` reads; with a cache, the pair (states, new cache).

        The cache must have room: slots past its end would overwrite the last ones.
        """
        batch, length = tokens.shape
        real = jnp.cumsum(mask, axis=1)
        column = jnp.arange(length)
        if cache is None:
            positions = real - 1
            allowed = mask[:, None, :] & (column <= column[:, None])
        else:
            front = cache.shared[0][0].shape[1] if cache.shared else 0
            positions = real - 1 + front + cache.mask.sum(1, keepdims=True)
            known = jax.lax.dynamic_update_slice(cache.mask, mask, (0, cache.filled))
            slot = jnp.arange(known.shape[1])
            allowed = known[:, None, :] & (slot <= cache.filled + column[:, None])
        rotation = _rotation(jnp.maximum(positions, 0), self.config)
        x = self.embed_tokens(tokens).astype(jnp.float32)
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            past = None if cache is None else (cache.keys[i], cache.values[i], cache.filled)
            given = (x, rotation, allowed, past, cache.shared[i] if cache and cache.shared else None)
            if self.is_initializing():
                x, (k, v) = layer(*given)
            else:
                alone = layer.clone(parent=None, name=None)
                x, (k, v) = _apply_layer(alone, self.remat, layer.variables, *given)
            keys.append(k)
            values.append(v)
        x = self.norm(x)
        if cache is None:
            return x
        filled = cache.filled + length
        return x, cache.replace(keys=tuple(keys), values=tuple(values), mask=known, filled=filled)

    def head(self, x: Array) -> Array:
        """States f32[..., W] -> logits f32[..., V]."""
        if self.config.tie_word_embeddings:
            table = self.embed_tokens.embedding.astype(self.dtype)
            return jnp.einsum(
                "...w,vw->...v", x.astype(self.dtype), table, preferred_element_type=jnp.float32
            )
        return self.lm_head(x).astype(jnp.float32)


def _check_lora(decoder: Decoder) -> None:
    rank, layers, most = decoder.lora_rank, decoder.lora_layers, decoder.config.num_hidden_layers
    if rank < 0 or not 0 <= layers <= most:
        found = f"rank {rank}, {layers} layers of {most}"
        raise InputError("lora", found, "use a rank of 0 or more and at most as many layers as there are")


def init_lora(decoder: Decoder, key: Array) -> PyTree:
    """The "lora" collection at its start (B = 0: the identity); the base weights are not drawn.

    Raises InputError when `decoder` has no factors.
    """
    if not decoder.lora_rank:
        raise InputError("lora_rank", "0: there are no factors to draw", "use a positive rank")
    _check_lora(decoder)
    c, tokens, mask = decoder.config, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    count = decoder.lora_layers or c.num_hidden_layers
    # Layers have the same shapes: one is traced, and what all have of a factor is drawn at once.
    one = decoder.clone(config=dataclasses.replace(c, num_hidden_layers=1), lora_layers=0)
    shapes = jax.eval_shape(one.init, key, tokens, mask)["lora"]["layers_0"]
    names = sorted(shapes)

    @jax.jit
    def draw(key: Array) -> PyTree:
        def of_all(name: str, key: Array) -> PyTree:
            a = _first_factor(key, (count, *shapes[name]["a"].shape))
            return {"a": a, "b": jnp.zeros((count, *shapes[name]["b"].shape))}

        drawn = dict(zip(names, map(of_all, names, jax.random.split(key, len(names))), strict=True))
        first = c.num_hidden_layers - count
        return {f"layers_{first + i}": jax.tree.map(lambda x, i=i: x[i], drawn) for i in range(count)}

    return draw(key)
