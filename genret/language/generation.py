"""Sampling with a cache, and the log-probabilities of given tokens.

A text is [prefix ; row]: an optional prefix that all rows share is read once, at batch size 1. Top-p
(nucleus) sampling: Holtzman et al. 2020, arXiv 1904.09751.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util

from genret.language.decoder import Cache, Decoder, empty_cache
from genret.types import Array, InputError, PyTree

# Logits of at most so many (row, column) pairs exist at once in `token_log_probs`: a CPU's cache holds these.
_LOGIT_ROWS = 256
# Logits whose probabilities are summed as one when a token is drawn.
_BLOCK = 256
# Decoding goes on with the half that is left, where that is so many rows: below, a step costs little less.
_FEWEST = 16


@struct.dataclass
class Generated:
    """What was sampled: tokens i32[B, T]; mask bool[B, T], False after the stop token (which is included);
    log_probs f32[B, T] of log softmax(logits / temperature), before top-p, 0 where the mask is False."""

    tokens: Array
    mask: Array
    log_probs: Array


def generate(
    decoder: Decoder,
    variables: PyTree,
    tokens: Array,
    mask: Array,
    key: Array,
    *,
    max_new: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop: tuple[int, ...] = (),
    prefix: Array | None = None,
    of: Array | None = None,
) -> Generated:
    """Continues each row of tokens i32[B, P] (mask bool[B, P], left-padded) by up to T = max_new tokens.

    key: key[B], one for each row; a row's draws come from its own key alone, so they do not depend on the
    batch it is in. of: i32[B], for tokens of fewer rows, the one that each of the B continues: a prompt of
    many answers is read once. temperature: 0 takes the most probable token (log_probs are then those of
    temperature 1). top_p: draw from the smallest set of most probable tokens whose probability reaches top_p
    (tokens as probable as its last all stay). stop: ids that end a row; decoding ends when all rows have.
    prefix: i32[F], tokens before every row. Columns of a mask that are False count nowhere; its last column
    must be True. One prefill, then a `lax.while_loop`, and on one device another for the rows that are left
    when half have stopped, and again; each compiled for its shapes and settings.
    Raises InputError for a setting out of range, and for shapes or a mask that do not fit.
    """
    _check_sampling(decoder, max_new, temperature, top_p, stop)
    _check_rows(decoder, tokens, mask, prefix)
    rows = tokens.shape[:1] if of is None else of.shape
    if key.shape != rows or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise InputError("key", f"{key.dtype}{list(key.shape)} for {rows[0]} rows", "pass split(key, B)")
    if of is not None and _is_here(of) and not 0 <= np.min(of) <= np.max(of) < len(tokens):
        raise InputError(
            "of", f"{np.min(of)}..{np.max(of)} of {len(tokens)} prompts", "number the rows of tokens"
        )
    if _is_here(mask) and not np.asarray(mask[:, -1]).all():
        raise InputError("mask", "a row ends in padding", "pad on the left, and give each row a token")
    sampling = Sampling(float(temperature), float(top_p), tuple(stop))
    going = _begin(decoder, sampling, variables, tokens, mask, key, prefix, of, max_new)
    # Rows of a mesh stay on their devices.
    halving = bool(stop) and _on_one_device((going, variables))
    left = rows[0]
    while halving and left // 2 >= _FEWEST:
        left //= 2
        going = _half(_decode(decoder, sampling, variables, key, going, left))
    return _decode(decoder, sampling, variables, key, going, 0).out


class Sampling(NamedTuple):
    """How a token is drawn, and which of them end a row."""

    temperature: float
    top_p: float
    stop: tuple[int, ...]


@struct.dataclass
class Going:
    """A batch B of which b rows are being decoded: t i32[], the next column; rows i32[b], which they are, or
    None, all of them (on a mesh an index would move them); of each its cache, last token i32[b] and whether
    it goes on, bool[b]; out, of all B."""

    t: Array
    rows: Array | None
    cache: Cache
    token: Array
    alive: Array
    out: Generated

    def drawn(self, logits: Array, key: Array, sampling: Sampling) -> Going:
        """With column t, sampled from logits f32[b, V]."""
        rows = slice(None) if self.rows is None else self.rows
        keys = jax.vmap(jax.random.fold_in, (0, None))(key[rows], self.t)
        token, log_prob = _sample(logits, keys, sampling.temperature, sampling.top_p)
        alive = self.alive
        token, log_prob = jnp.where(alive, token, 0), jnp.where(alive, log_prob, 0)
        new = Generated(token, alive, log_prob)
        out = jax.tree.map(lambda x, new: x.at[rows, self.t].set(new), self.out, new)
        goes_on = alive & ~jnp.isin(token, jnp.array(sampling.stop, jnp.int32))
        return self.replace(t=self.t + 1, token=token, alive=goes_on, out=out)


# Reading, decoding and halving are programs of their own: a prompt of another length or number of answers
# compiles the first alone, and most of the time goes into compiling the second.
@functools.partial(jax.jit, static_argnums=(0, 1, 8))
def _begin(decoder, sampling, variables, tokens, mask, key, prefix, of, max_new) -> Going:
    """Reads the prompts and draws the first column."""
    variables = _in_dtype(variables, decoder.dtype)
    cache = _read_prefix(decoder, variables, prefix, len(tokens), tokens.shape[1] + max_new - 1)
    h, cache = decoder.apply(variables, tokens, mask, cache, method="hidden")
    last = h[:, -1]
    if of is not None:
        last, cache = last[of], cache.rows(of)
    batch = len(last)
    nothing = jnp.zeros((batch, max_new))
    out = Generated(nothing.astype(jnp.int32), nothing.astype(bool), nothing)
    first = Going(jnp.int32(0), None, cache, jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool), out)
    return first.drawn(decoder.apply(variables, last, method="head"), key, sampling)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _decode(decoder, sampling, variables, key, going, least) -> Going:
    """Column after column, until no more than `least` of the rows go on."""
    variables = _in_dtype(variables, decoder.dtype)

    def step(at: Going) -> Going:
        h, cache = decoder.apply(variables, at.token[:, None], at.alive[:, None], at.cache, method="hidden")
        logits = decoder.apply(variables, h[:, 0], method="head")  # [b, V]
        return at.replace(cache=cache).drawn(logits, key, sampling)

    last = going.out.tokens.shape[1]
    return jax.lax.while_loop(lambda at: (at.t < last) & (at.alive.sum() > least), step, going)


@jax.jit
def _half(going: Going) -> Going:
    """The half of the rows that go on; there are no more."""
    on = jnp.argsort(~going.alive, stable=True)[: len(going.alive) // 2]
    return going.replace(
        rows=on if going.rows is None else going.rows[on],
        cache=going.cache.rows(on),
        token=going.token[on],
        alive=going.alive[on],
    )


def token_log_probs(
    decoder: Decoder,
    variables: PyTree,
    tokens: Array,
    mask: Array,
    temperature: float = 1.0,
    *,
    start: int = 1,
    prefix: Array | None = None,
) -> Array:
    """f32[B, L]: log p(tokens[:, t] | prefix, tokens[:, :t]) under softmax(logits / temperature).

    tokens: i32[B, L]. mask: bool[B, L], False at padding, on either side of a row. The result is 0 at
    padding, at a row's first token, and in columns before `start` (the length of a prompt, say: its logits
    are never formed). temperature: 0 reads as 1, as in `generate`. prefix: i32[F], tokens before every row,
    read once. Differentiable; logits of 256 tokens at most exist at a time, in the backward pass too.
    Raises InputError for shapes, a temperature or a start out of range.
    """
    if not temperature >= 0:
        raise InputError("temperature", f"{temperature} is negative", "use 0 or more")
    _check_rows(decoder, tokens, mask, prefix)
    batch, length = tokens.shape
    if not 1 <= start < max(length, 2):
        raise InputError("start", f"{start} is outside 1..{length - 1}", "column 0 has nothing before it")
    if prefix is None:
        h = decoder.apply(variables, tokens, mask, method="hidden")
    else:
        cache = _read_prefix(decoder, variables, prefix, batch, length)
        h, _ = decoder.apply(variables, tokens, mask, cache, method="hidden")

    head = functools.partial(_of_columns, decoder, temperature or 1.0, variables)
    count = length - start
    size = min(max(_LOGIT_ROWS // batch, 1), count)
    parts = -(-count // size)

    def split(x: Array) -> Array:  # [B, count, ...] -> [parts, size, B, ...]
        x = jnp.swapaxes(x, 0, 1)
        x = jnp.pad(x, [(0, parts * size - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(parts, size, *x.shape[1:])

    h, target = split(h[:, start - 1 : -1]), split(tokens[:, start:])
    log_probs = jax.lax.map(lambda pair: head(*pair), (h, target))  # [parts, size, B]
    log_probs = log_probs.reshape(parts * size, batch)[:count].T
    known = mask & jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(known, jnp.pad(log_probs, ((0, 0), (start, 0))), 0)


def _chosen(decoder: Decoder, temperature: float, variables: PyTree, h: Array, target: Array) -> Array:
    """ln softmax(head(h) / temperature) of the target: h f32[..., W], target i32[...] -> f32[...]."""
    logits = decoder.apply(variables, h, method="head") / temperature
    return jnp.take_along_axis(logits, target[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


# A row's gradient is made while its logits are there: they are formed once, and never kept. The gradient of
# the head's own weights, where somebody wants it, forms them again.
_of_columns = jax.custom_vjp(_chosen, nondiff_argnums=(0, 1))


def _of_columns_forward(decoder, temperature, variables, h, target):
    value, pull = jax.vjp(lambda h: _chosen(decoder, temperature, variables, h, target), h)
    return value, (variables, h, target, *pull(jnp.ones_like(value)))


def _of_columns_backward(decoder, temperature, kept, g):
    variables, h, target, slope = kept
    _, pull = jax.vjp(lambda v: _chosen(decoder, temperature, v, h, target), variables)
    return *pull(g), g[..., None] * slope, None


_of_columns.defvjp(_of_columns_forward, _of_columns_backward)


def _read_prefix(decoder: Decoder, variables: PyTree, prefix: Array | None, batch: int, room: int) -> Cache:
    """A cache of `room` slots for `batch` rows that come after the prefix."""
    cache = empty_cache(decoder.config, batch, room, decoder.dtype)
    if prefix is None:
        return cache
    alone = empty_cache(decoder.config, 1, len(prefix), decoder.dtype)
    mask = jnp.ones((1, len(prefix)), bool)
    _, alone = decoder.apply(variables, prefix[None], mask, alone, method="hidden")
    return cache.replace(shared=tuple((k[0], v[0]) for k, v in zip(alone.keys, alone.values, strict=True)))


def _sample(logits: Array, key: Array, temperature: float, top_p: float) -> tuple[Array, Array]:
    """One token i32[B] from logits f32[B, V] by key[B], and its log-probability f32[B] before top-p."""
    log_probs = jax.nn.log_softmax(logits / (temperature or 1.0))
    if temperature:
        probs = jnp.exp(log_probs)
        if top_p < 1:
            probs = jnp.where(probs >= nucleus(probs, top_p)[:, None], probs, 0)
        token = _drawn(probs, jax.vmap(jax.random.uniform)(key))
    else:
        token = jnp.argmax(logits, -1).astype(jnp.int32)
    return token, jnp.take_along_axis(log_probs, token[:, None], -1)[:, 0]


def _drawn(probs: Array, level: Array) -> Array:
    """The token i32[B] at which the running sum of probs f32[B, V] passes level f32[B] of its total.

    One uniform for each row: random bits for every logit would cost more than the matmuls, and so would the
    running sum of every logit. So whole blocks are summed, and one of them runs.
    """
    probs = jnp.pad(probs, ((0, 0), (0, -probs.shape[1] % _BLOCK)))
    probs = probs.reshape(len(probs), -1, _BLOCK)
    total = jnp.cumsum(probs.sum(-1), axis=-1)  # [B, V / block]
    level = level * total[:, -1]
    last = (total < total[:, -1:]).sum(-1)  # with mass: a level may be rounded up to the whole total
    block = jnp.minimum((total <= level[:, None]).sum(-1), last)[:, None]
    inside = jnp.take_along_axis(probs, block[..., None], 1)[:, 0]  # [B, block]
    before = jnp.where(block > 0, jnp.take_along_axis(total, (block - 1).clip(0), 1), 0)
    reached = (before + jnp.cumsum(inside, -1) > level[:, None]) & (inside > 0)
    # Where rounding keeps all of the block below the level: its most probable token.
    column = jnp.where(reached.any(-1), reached.argmax(-1), inside.argmax(-1))
    return (block[:, 0] * _BLOCK + column).astype(jnp.int32)


def nucleus(probs: Array, top_p: float) -> Array:
    """The largest f32[B] threshold that keeps at least `top_p` of probs f32[B, V]: Σ probs[probs >= it].

    Bisects the bit patterns, which are ordered as the numbers: exact, and far cheaper than a sort.
    """

    def body(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        at = jax.lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.where(probs >= at[:, None], probs, 0).sum(-1) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    one = int(np.float32(1).view(np.int32))
    bounds = jnp.zeros(len(probs), jnp.int32), jnp.full(len(probs), one + 1, jnp.int32)
    low, _ = jax.lax.fori_loop(0, one.bit_length(), body, bounds)
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _in_dtype(variables: PyTree, dtype: jax.typing.DTypeLike) -> PyTree:
    """Matrices in the dtype of the matmuls, converted once and not at every step; norms as they are."""
    flat = traverse_util.flatten_dict(variables)
    return traverse_util.unflatten_dict(
        {path: x if path[-1] == "scale" else x.astype(dtype) for path, x in flat.items()}
    )


def _check_sampling(decoder: Decoder, max_new: int, temperature: float, top_p: float, stop: tuple) -> None:
    if max_new < 1:
        raise InputError("max_new", f"{max_new} is not positive", "use 1 or more")
    if not 0 <= temperature < float("inf"):
        raise InputError("temperature", f"{temperature} is outside 0..inf", "use 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise InputError("top_p", f"{top_p} is outside (0, 1]", "use 1 to keep every token")
    if bad := [token for token in stop if not 0 <= token < decoder.config.vocab_size]:
        raise InputError("stop", f"{bad[0]} is not a token", f"use ids below {decoder.config.vocab_size}")


def _check_rows(decoder: Decoder, tokens: Array, mask: Array, prefix: Array | None) -> None:
    if tokens.ndim != 2 or not tokens.size or mask.shape != tokens.shape or mask.dtype != bool:
        found = f"tokens {list(tokens.shape)}, mask {mask.dtype}{list(mask.shape)}"
        raise InputError("tokens", found, "pass i32[B, L] and bool[B, L], neither empty")
    if prefix is not None and (prefix.ndim != 1 or not prefix.size):
        raise InputError("prefix", f"shape {list(prefix.shape)}", "pass i32[F], or None for no prefix")
    size = decoder.config.vocab_size
    for name, ids in (("tokens", tokens), ("prefix", prefix)):
        if ids is None or not _is_here(ids):
            continue
        ids = np.asarray(ids)
        if not 0 <= ids.min() <= ids.max() < size:
            problem = f"{ids.min()}..{ids.max()} is outside 0..{size - 1}"
            raise InputError(name, problem, "use this model's tokenizer")


def _on_one_device(tree: PyTree) -> bool:
    """False where any of it is being traced, too: it cannot be told then."""
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        return False
    return len(frozenset().union(*(x.sharding.device_set for x in leaves))) <= 1


def _is_here(x: Array) -> bool:
    """Whether its values can be looked at: it is not being traced, nor spread over other processes."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
