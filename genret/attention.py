"""Attention as every network here does it: dot products scaled by 1/√D, softmax in float32."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from genret.types import Array


def attend(q: Array, k: Array, v: Array, allowed: Array | None = None) -> Array:
    """softmax(q kᵀ / √D) v: q [B, H, R, D], k and v [B, H, T, D] -> [B, H, R, D], in the dtype of v.

    allowed: bool, broadcast to [B, H, R, T], the keys that a row reads (None: all); a row of none reads all
    alike. Two plain products over (B, H): a CPU is faster at them than at `jax.nn.dot_product_attention`,
    whose axes are [B, T, H, D].
    """
    scores = jnp.einsum("bhrd,bhtd->bhrt", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if allowed is not None:
        scores = jnp.where(allowed, scores, -1e30)
    return jnp.einsum("bhrt,bhtd->bhrd", jax.nn.softmax(scores).astype(v.dtype), v)
