"""Attention as every network here does it: dot products scaled by 1/√D, softmax in float32."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from genret.types import Array


def attend(
    q: Array, k: Array, v: Array, allowed: Array | None = None, shared: tuple[Array, Array] | None = None
) -> Array:
    """softmax(q kᵀ / √D) v: q [B, H, R, D], k and v [B, H, T, D] -> [B, H, R, D], in the dtype of v.

    allowed: bool, broadcast to [B, H, R, T], the keys that a row reads (None: all); a row of none reads all
    alike. shared: keys and values [H, F, D] that every row of the batch reads besides, never copied for each.
    Two plain products over (B, H): a CPU is faster at them than at `jax.nn.dot_product_attention`, whose axes
    are [B, T, H, D].
    """

    def scores(keys: Array, product: str) -> Array:
        return jnp.einsum(product, q, keys, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])

    own = scores(k, "bhrd,bhtd->bhrt")
    if allowed is not None:
        own = jnp.where(allowed, own, -1e30)
    if shared is None:
        return jnp.einsum("bhrt,bhtd->bhrd", jax.nn.softmax(own).astype(v.dtype), v)
    front = shared[0].shape[1]
    both = jnp.concatenate([scores(shared[0], "bhrd,htd->bhrt"), own], -1)
    weight = jax.nn.softmax(both).astype(v.dtype)
    read = jnp.einsum("bhrt,htd->bhrd", weight[..., :front], shared[1])
    return read + jnp.einsum("bhrt,bhtd->bhrd", weight[..., front:], v)
