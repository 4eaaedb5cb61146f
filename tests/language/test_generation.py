"""Sampling: equal to the uncached forward, one key a row, exact in distribution; and log-probabilities."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core

from genret.language import generation
from genret.language.decoder import Decoder, init_lora
from genret.language.generation import generate, nucleus, token_log_probs
from genret.types import InputError

RNG = np.random.default_rng(4)
PROMPTS = RNG.integers(0, 300, (4, 6))
MASK = np.arange(6) >= np.array([0, 3, 5, 1])[:, None]  # left-padded, down to one token
PREFIX = RNG.integers(0, 300, 5)
KEYS = jax.random.split(jax.random.key(0), 4)


@pytest.fixture(scope="module")
def model(tiny):
    """A decoder with adapters that are not the identity, and its variables."""
    config, params = tiny["qwen3"]
    decoder = Decoder(config, lora_rank=2)
    lora = init_lora(decoder, jax.random.key(1))
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), lora)
    return decoder, {"params": params, "lora": lora}


def joined(prefix, mask, tokens, out=None):
    """[prefix ; prompt ; answer] and its mask."""
    rows = len(tokens)
    front = np.tile(PREFIX, (rows, 1)) if prefix else np.zeros((rows, 0), int)
    parts = [front, tokens] + ([] if out is None else [out.tokens])
    masks = [np.ones(front.shape, bool), mask] + ([] if out is None else [out.mask])
    return np.concatenate(parts, 1), np.concatenate(masks, 1)


@pytest.mark.parametrize("prefix", [False, True])
def test_greedy_is_the_argmax_of_the_uncached_forward(model, prefix):
    decoder, variables = model
    out = generate(
        decoder, variables, PROMPTS, MASK, KEYS, max_new=5, temperature=0, prefix=PREFIX if prefix else None
    )
    assert out.tokens.shape == (4, 5) and out.tokens.dtype == jnp.int32 and out.mask.all()
    tokens, mask = joined(prefix, MASK, PROMPTS, out)
    log_probs = jax.nn.log_softmax(jax.jit(decoder.apply)(variables, tokens, mask))
    before = np.asarray(log_probs)[:, -6:-1]  # [4, 5, V]
    np.testing.assert_array_equal(out.tokens, before.argmax(-1))
    np.testing.assert_allclose(out.log_probs, before.max(-1), atol=1e-4)


@pytest.mark.parametrize("prefix", [False, True])
def test_log_probs_of_the_sampler_are_those_of_training(model, prefix):
    decoder, variables = model
    shared = PREFIX if prefix else None
    out = generate(
        decoder,
        variables,
        PROMPTS,
        MASK,
        KEYS,
        max_new=8,
        temperature=0.7,
        top_p=0.8,
        stop=(5,),
        prefix=shared,
    )
    tokens, mask = joined(False, MASK, PROMPTS, out)
    again = token_log_probs(decoder, variables, tokens, mask, 0.7, start=6, prefix=shared)
    assert (again[:, :6] == 0).all()
    np.testing.assert_allclose(again[:, 6:], out.log_probs, atol=1e-4)
    assert out.log_probs.min() < -0.5  # and the draws are not all the mode


def test_token_log_probs_against_the_whole_softmax(model, monkeypatch):
    """In chunks of 2 columns (the last one padded), with padding on both sides."""
    monkeypatch.setattr(generation, "_LOGIT_ROWS", 8)
    decoder, variables = model
    mask = MASK.copy()
    mask[0, 4:] = False

    def plain(variables):
        logits = decoder.apply(variables, PROMPTS, mask)[:, :-1] / 1.3
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), PROMPTS[:, 1:, None], -1)[..., 0]
        return jnp.where(mask[:, 1:] & mask[:, :-1], chosen, 0)

    def ours(variables):
        return token_log_probs(decoder, variables, PROMPTS, mask, 1.3)

    found = jax.jit(ours)(variables)
    assert found.shape == (4, 6) and (found[:, 0] == 0).all() and (found[2] == 0).all()
    np.testing.assert_allclose(found[:, 1:], jax.jit(plain)(variables), atol=2e-5)

    weights = RNG.normal(size=(4, 6))
    gradients = [
        jax.jit(jax.grad(lambda v, f=f, w=w: (f(v) * w).sum()))(variables)
        for f, w in ((plain, weights[:, 1:]), (ours, weights))
    ]
    chex.assert_trees_all_close(*gradients, atol=1e-4, rtol=1e-3)


def test_a_prefix_is_differentiated_through(model):
    """The gradient of [prefix ; row] read in two parts is that of the whole text."""
    decoder, variables = model
    tokens, mask = joined(True, MASK, PROMPTS)

    def whole(lora):
        return token_log_probs(decoder, {**variables, "lora": lora}, tokens, mask, start=7)[:, 6:].sum()

    def parts(lora):
        all_ = {**variables, "lora": lora}
        return token_log_probs(decoder, all_, PROMPTS, MASK, start=2, prefix=PREFIX)[:, 1:].sum()

    # Column 7 of the whole is column 2 of a row; first tokens of rows are given by neither.
    first = np.pad(MASK, ((0, 0), (1, 0)))[:, :-1]
    assert (MASK & first).any()
    left, right = (jax.jit(jax.value_and_grad(f))(variables["lora"]) for f in (whole, parts))
    chex.assert_trees_all_close(right, left, atol=1e-4, rtol=1e-3)


def arrays(jaxpr):
    """Every intermediate array of a program, those of its sub-programs too."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for part in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, core.ClosedJaxpr)):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from arrays(inner)


def test_logits_of_the_whole_text_are_never_formed(model):
    decoder, variables = model
    tokens, mask = jnp.zeros((8, 400), jnp.int32), jnp.ones((8, 400), bool)

    def loss(lora):
        return token_log_probs(decoder, {**variables, "lora": lora}, tokens, mask).sum()

    program = jax.make_jaxpr(jax.grad(loss))(variables["lora"])
    sizes = [a.size for a in arrays(program.jaxpr) if a.ndim and a.shape[-1] == 300]
    assert 1 < max(sizes) <= 1024 * 300 < 8 * 400 * 300


# ---- stopping


def test_rows_stop_alone_and_the_loop_with_the_last(model):
    decoder, variables = model
    free = generate(decoder, variables, PROMPTS, MASK, KEYS, max_new=8)
    tokens = np.asarray(free.tokens)
    stop = int(tokens[1, 2])  # a token that row 1 draws third
    out = generate(decoder, variables, PROMPTS, MASK, KEYS, max_new=8, stop=(299, stop))
    for row in range(4):
        ends = np.flatnonzero(np.isin(tokens[row], (299, stop)))
        length = ends[0] + 1 if len(ends) else 8
        expected = np.where(np.arange(8) < length, tokens[row], 0)
        np.testing.assert_array_equal(out.tokens[row], expected)
        np.testing.assert_array_equal(out.mask[row], np.arange(8) < length)
        near = np.where(out.mask[row], free.log_probs[row], 0)
        np.testing.assert_allclose(out.log_probs[row], near, atol=1e-5)
    assert out.tokens[1, 2] == stop and out.mask[1].sum() == 3 < out.mask.sum(1).max()
    every = generate(decoder, variables, PROMPTS, MASK, KEYS, max_new=8, stop=tuple(range(300)))
    np.testing.assert_array_equal(every.mask.sum(1), 1)
    np.testing.assert_array_equal(every.tokens[:, 0], tokens[:, 0])


def test_the_loop_ends_when_all_rows_have(model, monkeypatch):
    """Counted: one forward for the prompt, none after a first token that stops every row."""
    decoder, variables = model
    steps = []
    real = generation._sample

    def counted(logits, *args):
        jax.debug.callback(lambda: steps.append(1))
        return real(logits, *args)

    monkeypatch.setattr(generation, "_sample", counted)
    jax.clear_caches()
    generate(
        decoder, variables, PROMPTS, MASK, KEYS, max_new=50, stop=tuple(range(300))
    ).tokens.block_until_ready()
    jax.effects_barrier()
    assert len(steps) == 1
    generate(decoder, variables, PROMPTS, MASK, KEYS, max_new=7).tokens.block_until_ready()
    jax.effects_barrier()
    assert len(steps) == 1 + 7
    jax.clear_caches()


@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_rows_that_have_stopped_leave_the_batch(model, prefix, monkeypatch):
    """Every row as if it had been decoded to the end beside all others; and the sizes of the batches."""
    decoder, variables = model
    at, sizes = np.arange(40) % 4, []
    asked = (PROMPTS[at], MASK[at], jax.random.split(jax.random.key(5), 40))
    settings = dict(max_new=24, stop=tuple(range(40)), prefix=prefix)  # a draw in seven or so stops a row
    monkeypatch.setattr(generation, "_FEWEST", 99)
    whole = generate(decoder, variables, *asked, **settings)
    monkeypatch.setattr(generation, "_FEWEST", 4)
    jax.clear_caches()
    real = generation._sample

    def counted(logits, *args):
        jax.debug.callback(lambda: sizes.append(len(logits)))
        return real(logits, *args)

    monkeypatch.setattr(generation, "_sample", counted)
    halved = generate(decoder, variables, *asked, **settings)
    jax.effects_barrier()
    jax.clear_caches()
    np.testing.assert_array_equal(halved.tokens, whole.tokens)
    np.testing.assert_array_equal(halved.mask, whole.mask)
    np.testing.assert_allclose(halved.log_probs, whole.log_probs, atol=1e-5)
    # A batch is halved when the rows that go on fit into the half, and not before.
    going = np.asarray(whole.mask).sum(0)  # rows that draw column t
    wanted, size = [], 40
    for count in going[going > 0]:
        while size // 2 >= 4 and count <= size // 2:
            size //= 2
        wanted.append(size)
    assert sizes == wanted and {40, 20, 10} <= set(sizes)


# ---- randomness


def test_a_row_depends_on_its_own_key_and_prompt_only(model):
    decoder, variables = model
    settings = dict(max_new=6, temperature=0.9, top_p=0.9)
    out = generate(decoder, variables, PROMPTS, MASK, KEYS, **settings)
    order = np.array([2, 0, 3])
    some = generate(decoder, variables, PROMPTS[order], MASK[order], KEYS[order], **settings)
    np.testing.assert_array_equal(some.tokens, out.tokens[order])
    same = np.zeros(4, int)
    out = generate(decoder, variables, PROMPTS[same], MASK[same], KEYS, **settings)
    assert len({tuple(row) for row in np.asarray(out.tokens).tolist()}) == 4


@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_a_prompt_of_several_answers_is_read_once(model, prefix, monkeypatch):
    decoder, variables = model
    of, keys, read = np.array([2, 0, 0, 3, 2, 2]), jax.random.split(jax.random.key(6), 6), []
    settings = dict(max_new=6, temperature=0.9, prefix=prefix)
    each = generate(decoder, variables, PROMPTS[of], MASK[of], keys, **settings)
    jax.clear_caches()  # what was traced is traced again
    real = Decoder.hidden
    monkeypatch.setattr(
        Decoder, "hidden", lambda self, t, *rest: (read.append(t.shape), real(self, t, *rest))[1]
    )
    once = generate(decoder, variables, PROMPTS, MASK, keys, of=of, **settings)
    assert read == [(1, 5)] * (prefix is not None) + [(4, 6), (6, 1)]
    np.testing.assert_array_equal(once.tokens, each.tokens)
    np.testing.assert_allclose(once.log_probs, each.log_probs, atol=1e-5)
    with pytest.raises(InputError, match="0..4 of 4 prompts"):
        generate(decoder, variables, PROMPTS, MASK, keys[:2], of=np.array([0, 4]), max_new=1)


def test_steps_draw_afresh(tiny):
    """All weights zero: every token has probability 1/300, whatever came before."""
    config, params = tiny["llama"]
    zeros = {"params": jax.tree.map(jnp.zeros_like, params)}
    tokens, keys = np.zeros((500, 1), int), jax.random.split(jax.random.key(7), 500)
    out = generate(Decoder(config), zeros, tokens, tokens == 0, keys, max_new=3)
    np.testing.assert_allclose(out.log_probs, -np.log(300), rtol=1e-5)
    drawn = np.asarray(out.tokens) / 299  # uniform on [0, 1]: variance 1/12
    assert np.abs(drawn.mean(0) - 0.5).max() < 0.06
    correlation = np.corrcoef(drawn.T)
    assert np.abs(correlation - np.eye(3)).max() < 0.2


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 0.7), (2.0, 0.35)])
def test_draws_have_the_distribution_they_should(temperature, top_p):
    """Pearson's chi-squared over 20,000 draws, and nothing from outside the nucleus."""
    logits = np.random.default_rng(5).normal(size=40) * 2
    probs = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    kept = probs >= reference_threshold(probs, top_p)
    expected = np.where(kept, probs, 0) / probs[kept].sum()
    n = 20_000
    keys = jax.random.split(jax.random.key(6), n)
    sample = jax.jit(generation._sample, static_argnums=(2, 3))
    token, log_prob = sample(jnp.tile(jnp.array(logits, jnp.float32), (n, 1)), keys, temperature, top_p)
    counts = np.bincount(token, minlength=40)
    assert (counts[~kept] == 0).all()
    chi = ((counts - n * expected)[kept] ** 2 / (n * expected[kept])).sum()
    freedom = kept.sum() - 1
    assert abs(chi - freedom) < 4.5 * np.sqrt(2 * freedom)
    np.testing.assert_allclose(log_prob, np.log(probs)[np.asarray(token)], atol=1e-5)  # before top-p


# Multiples of 1/2048: every sum of them is exact, so that a level between two of them has one answer.
@given(st.lists(st.integers(0, 3), min_size=1, max_size=700).filter(any), st.integers(0, 2**10 - 1))
@settings(max_examples=60, deadline=None)
def test_a_draw_is_where_the_running_sum_passes_its_level(counts, level):
    """One block of 256, a part of one, several, and zeros across their borders."""
    counts = np.pad(counts, (0, 701 - len(counts)))
    probs, level = (counts / 2048).astype(np.float32), np.float32(level / 2**10)
    expected = np.searchsorted(np.cumsum(counts), float(level) * counts.sum(), side="right")
    # The same one column on, and a level that rounding took up to the total.
    levels = np.array([level, level, 1], np.float32)
    found = DRAWN(np.stack([probs, np.roll(probs, 1), probs]), levels)
    assert found[0] == expected and found[1] == expected + 1
    assert counts[expected] and counts[found[2]]


DRAWN = jax.jit(generation._drawn)


def reference_threshold(probs, top_p):
    """The last probability of the shortest sorted head that reaches top_p."""
    ordered = np.sort(probs)[::-1]
    reached = np.cumsum(ordered) >= top_p
    return ordered[np.argmax(reached)] if reached.any() else 0.0


# Dyadic numbers: every sum is exact, so ties and exact hits of top_p are decided alike.
@given(st.lists(st.integers(0, 8), min_size=24, max_size=24), st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_nucleus_against_a_sort(counts, offset):
    """At every top_p that some tokens reach exactly, and at others between them."""
    counts = np.array(counts)
    counts[0] += 256 - counts.sum()
    probs = (counts / 256).astype(np.float32)
    reached = np.cumsum(np.sort(probs)[::-1])
    top_p = np.append(reached, (offset + 0.5) / 256).astype(np.float32)
    found = jax.jit(nucleus)(np.tile(probs, (25, 1)), top_p)
    np.testing.assert_array_equal(found, [reference_threshold(probs, p) for p in top_p])


def test_nucleus_of_few_and_of_many():
    """One sure token; all alike; the smallest number that float32 tells from 0."""
    sure, even = np.eye(1, 8, dtype=np.float32)[0], np.full(8, 0.125, np.float32)
    tiny = np.array([1e-40] * 7 + [1 - 1e-6], np.float32)
    out = jax.jit(nucleus)(np.stack([sure, even, tiny]), 0.9)
    np.testing.assert_array_equal(out[:2], [1, 0.125])
    assert out[2] == tiny[-1]


# ---- bad input


@pytest.mark.parametrize(
    "change, field",
    [
        ({"max_new": 0}, "max_new"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"stop": (300,)}, "stop"),
        ({"mask": MASK[:, ::-1]}, "mask"),
        ({"mask": MASK.astype(int)}, "tokens"),
        ({"mask": MASK[:2]}, "tokens"),
        ({"tokens": PROMPTS[0]}, "tokens"),
        ({"tokens": PROMPTS + 300}, "tokens"),
        ({"prefix": PREFIX[:0]}, "prefix"),
        ({"prefix": PREFIX - 300}, "prefix"),
        ({"key": KEYS[:2]}, "key"),
        ({"key": jnp.zeros(4)}, "key"),
    ],
)
def test_bad_arguments(model, change, field):
    decoder, variables = model
    arguments = {"tokens": PROMPTS, "mask": MASK, "key": KEYS, "max_new": 2} | change
    with pytest.raises(InputError) as error:
        generate(decoder, variables, **arguments)
    assert error.value.field == field


@pytest.mark.parametrize(
    "kw, field", [({"start": 0}, "start"), ({"start": 6}, "start"), ({"temperature": -1}, "temperature")]
)
def test_bad_arguments_of_log_probs(model, kw, field):
    with pytest.raises(InputError) as error:
        token_log_probs(*model, PROMPTS, MASK, **kw)
    assert error.value.field == field
