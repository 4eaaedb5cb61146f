"""The decoder: goldens by transformers, and what masks, caches, adapters and meshes must not change."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from genret.language.decoder import SHARDING_RULES, Decoder, DecoderConfig, empty_cache, init_lora
from genret.training import mesh as meshes
from genret.types import InputError

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("llama", "qwen3")
TOKENS = np.random.default_rng(1).integers(0, 300, (2, 9))

# Logits [2 rows, columns 0, 3, 8, first 4 of 300] by transformers 5.23 with torch 2.13 on the weights and
# tokens of this folder.
GOLDEN = {
    "llama": [
        [[0.19011, 1.25245, -0.65619, 2.26577], [0.78574, -0.43354, -0.07479, 3.00564],
         [1.25742, 0.97473, 1.34707, 1.73711]],
        [[-1.43792, 2.62612, 0.12629, 0.61598], [-0.21501, 0.35157, -2.51578, 3.41474],
         [-0.93976, 1.30586, -2.55783, 2.71164]],
    ],
    "qwen3": [
        [[1.35234, -2.06251, -0.29032, 2.27523], [0.58711, -1.54829, -0.9172, 2.14045],
         [-0.21271, -1.66436, 0.1008, 0.45905]],
        [[-0.1326, -1.21865, 2.27791, -1.61444], [2.36912, -1.89013, -0.83677, -1.47648],
         [0.57503, 0.35029, 0.96145, -0.07459]],
    ],
}  # fmt: skip


def full(config, params, tokens, mask=None, **kw):
    mask = np.ones(np.shape(tokens), bool) if mask is None else mask
    return jax.jit(Decoder(config, **kw).apply)({"params": params}, tokens, mask)


@pytest.mark.parametrize("kind", KINDS)
def test_golden_logits(tiny, kind):
    logits = full(*tiny[kind], TOKENS)
    assert logits.shape == (2, 9, 300) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[:, [0, 3, 8], :4], GOLDEN[kind], atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_changes_nothing(tiny, kind):
    plain = full(*tiny[kind], TOKENS)
    padded = np.pad(TOKENS, ((0, 0), (3, 2)), constant_values=7)
    mask = np.pad(np.ones_like(TOKENS, bool), ((0, 0), (3, 2)))
    logits = full(*tiny[kind], padded, mask)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[:, 3:-2], plain, atol=1e-5)


def test_a_token_sees_those_before_it_and_no_later_one(tiny):
    changed = TOKENS.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 300
    difference = np.abs(full(*tiny["llama"], changed) - full(*tiny["llama"], TOKENS)).max(-1)
    assert (difference[:, :5] == 0).all() and (difference[:, 5:] > 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [(4, 1, 1, 3), (9,), (1,) * 9])
def test_reading_in_pieces_through_a_cache_is_reading_at_once(tiny, kind, pieces):
    """Row 1 is left-padded by 3, and the cache has slots to spare."""
    config, params = tiny[kind]
    mask = np.ones(TOKENS.shape, bool)
    mask[1, :3] = False
    apply = jax.jit(Decoder(config).apply)
    cache, start, parts = empty_cache(config, 2, 12), 0, []
    for piece in pieces:
        cut = slice(start, start + piece)
        logits, cache = apply({"params": params}, TOKENS[:, cut], mask[:, cut], cache)
        parts.append(logits)
        start += piece
    assert int(cache.filled) == 9 and cache.mask.sum() == mask.sum()
    whole = full(config, params, TOKENS, mask)
    np.testing.assert_allclose(np.concatenate(parts, 1)[mask], whole[mask], atol=2e-5)


def test_bfloat16_matmuls_are_near(tiny):
    config, params = tiny["llama"]
    exact, near = full(config, params, TOKENS), full(config, params, TOKENS, dtype=jnp.bfloat16)
    assert near.dtype == jnp.float32
    error = np.sqrt(np.mean((near - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.03


# ---- adapters


def random_lora(decoder, seed=3):
    lora = init_lora(decoder, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def test_lora_starts_as_the_identity_and_is_then_the_merged_weight(tiny):
    config, params = tiny["qwen3"]
    decoder = Decoder(config, lora_rank=4, lora_alpha=8.0)
    mask = np.ones(TOKENS.shape, bool)
    apply = jax.jit(decoder.apply)
    start = apply({"params": params, "lora": init_lora(decoder, jax.random.key(0))}, TOKENS, mask)
    np.testing.assert_array_equal(start, full(config, params, TOKENS))

    wanted = jax.eval_shape(decoder.init, jax.random.key(0), TOKENS, mask)["lora"]
    first = init_lora(decoder, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(first, wanted)
    drawn = [np.asarray(f["a"]) for p in first.values() for f in p.values()]
    assert len({a.tobytes() for a in drawn}) == len(drawn)  # no two alike
    scaled = np.concatenate([(a * np.sqrt(len(a))).ravel() for a in drawn])
    assert abs(scaled.mean()) < 4 / np.sqrt(scaled.size)
    assert abs(scaled.var() - 1) < 4 * np.sqrt(2 / scaled.size)

    lora = random_lora(decoder)
    merged = jax.tree.map(lambda x: x, params)
    for layer, projections in lora.items():
        assert len(projections) == 7
        for name, factors in projections.items():
            kernel = params[layer][name]["kernel"]
            merged[layer][name] = {"kernel": kernel + 8 / 4 * factors["a"] @ factors["b"]}
    ours = apply({"params": params, "lora": lora}, TOKENS, mask)
    np.testing.assert_allclose(ours, full(config, merged, TOKENS), atol=5e-4)
    assert np.abs(ours - start).max() > 0.1


def test_the_gradient_is_of_the_factors_alone_and_reaches_each(tiny):
    """At B = 0 the gradient of A is 0, and that of B is not."""
    config, params = tiny["llama"]
    decoder = Decoder(config, lora_rank=2)
    lora = init_lora(decoder, jax.random.key(0))
    mask = np.ones(TOKENS.shape, bool)

    def loss(lora):
        return jnp.mean(decoder.apply({"params": params, "lora": lora}, TOKENS, mask) ** 2)

    gradient = jax.jit(jax.grad(loss))(lora)
    assert jax.tree.structure(gradient) == jax.tree.structure(lora)
    for projections in gradient.values():
        for factors in projections.values():
            assert np.abs(factors["a"]).max() == 0 < np.abs(factors["b"]).max()


def test_lora_layers_counts_from_the_top(tiny):
    config, params = tiny["llama"]
    decoder = Decoder(config, lora_rank=2, lora_layers=1)
    lora = random_lora(decoder)
    assert set(lora) == {"layers_1"}
    mask = np.ones(TOKENS.shape, bool)
    logits = jax.jit(decoder.apply)({"params": params, "lora": lora}, TOKENS, mask)
    assert np.abs(logits - full(config, params, TOKENS)).max() > 1e-3


def flops(config, tokens, **kw):
    """FLOPs of a gradient step, as XLA counts them, with respect to the factors or to all weights."""
    decoder = Decoder(config, **kw)
    mask = jnp.ones(tokens.shape, bool)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), tokens, mask)
    tuned = "lora" if decoder.lora_rank else "params"

    def loss(some, rest):
        return jnp.mean(decoder.apply({**rest, tuned: some}, tokens, mask))

    rest = {name: tree for name, tree in shapes.items() if name != tuned}
    return jax.jit(jax.grad(loss)).lower(shapes[tuned], rest).cost_analysis()["flops"]


def test_frozen_weights_cost_no_weight_gradient():
    """Forward, gradient of activations and of weights cost alike: LoRA saves a third, fewer layers more."""
    config = DecoderConfig(64, 128, 8, 4, 2, 32, 256, 1e-5, 1e4, True, False)
    tokens = jnp.zeros((2, 16), jnp.int32)
    whole, lora = flops(config, tokens), flops(config, tokens, lora_rank=1)
    top = flops(config, tokens, lora_rank=1, lora_layers=2)
    assert lora < 0.75 * whole and top < 0.7 * lora


@pytest.mark.parametrize("rank", [0, 2])
def test_remat_gives_the_same_gradient(tiny, rank):
    config, params = tiny["qwen3"]
    mask = np.ones(TOKENS.shape, bool)
    mask[0, :2] = False

    def gradient(remat):
        decoder = Decoder(config, lora_rank=rank, remat=remat)
        lora = random_lora(decoder) if rank else {}

        def loss(lora, params):
            logits = decoder.apply({"params": params, "lora": lora}, TOKENS, mask)
            return jnp.mean(jnp.where(mask[..., None], logits, 0) ** 2)

        return jax.jit(jax.grad(loss, 0 if rank else 1))(lora, params)

    plain, again = gradient(False), gradient(True)
    assert jax.tree.structure(plain) == jax.tree.structure(again)
    chex.assert_trees_all_close(again, plain, atol=2e-5, rtol=2e-4)


def test_remat_saves_memory():
    """Under a scheduler that goes in order: what lies between the layers is kept, not what is in them."""
    code = """
import jax
import jax.numpy as jnp
from genret.language.decoder import Decoder, DecoderConfig

config = DecoderConfig(64, 64, 4, 4, 2, 16, 256, 1e-5, 1e4, True, False)
tokens, mask = jnp.zeros((4, 64), jnp.int32), jnp.ones((4, 64), bool)

def temporary(remat):
    decoder = Decoder(config, remat=remat)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), tokens, mask)
    gradient = jax.jit(jax.grad(lambda v: decoder.apply(v, tokens, mask).mean()))
    return gradient.lower(shapes).compile().memory_analysis().temp_size_in_bytes

assert temporary(True) < 0.5 * temporary(False)
"""
    flags = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


# ---- meshes


@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_has_a_rule(tiny, kind):
    config, params = tiny[kind]
    tree = {"params": params, "lora": init_lora(Decoder(config, lora_rank=2), jax.random.key(0))}
    placed = meshes.shardings(tree, meshes.make_mesh(2, 2, 2), SHARDING_RULES)
    flat = {meshes.path_name(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(placed)}
    assert flat["params/layers_0/q_proj/kernel"] == P("fsdp", "tensor")
    assert flat["params/layers_1/down_proj/kernel"] == P("tensor", "fsdp")
    assert flat["params/layers_1/input_layernorm/scale"] == P()
    assert flat["lora/layers_0/o_proj/a"] == P("tensor", None)
    assert flat["lora/layers_0/v_proj/b"] == P(None, "tensor")


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_a_mesh_changes_nothing(tiny, shape):
    """Logits and gradients of base and factors, with 2 key-value heads over up to 8 devices."""
    config, params = tiny["llama"]
    decoder = Decoder(config, lora_rank=2)
    tree = {"params": params, "lora": random_lora(decoder)}
    tokens = np.random.default_rng(2).integers(0, 300, (8, 7))
    mask = np.arange(7) >= np.arange(8)[:, None] % 4

    def loss(tree, tokens, mask):
        logits = decoder.apply(tree, tokens, mask)
        return jnp.mean(jnp.where(mask[..., None], logits, 0) ** 2)

    expected = jax.jit(jax.value_and_grad(loss))(tree, tokens, mask)
    mesh = meshes.make_mesh(*shape)
    placed = meshes.shardings(tree, mesh, SHARDING_RULES)
    rows = meshes.batch_shardings(tokens, mesh)

    def step(tree, tokens, mask):  # as the trainer reads parameters
        tree = jax.lax.with_sharding_constraint(tree, meshes.gathered(placed))
        return jax.value_and_grad(loss)(tree, tokens, mask)

    found = jax.jit(step, in_shardings=(placed, rows, rows))(meshes.place(tree, placed), tokens, mask)
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-4)


# ---- bad input


@pytest.mark.parametrize(
    "change, field",
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rope_theta": float("nan")}, "rope_theta"),
    ],
)
def test_sizes_that_do_not_fit(tiny, change, field):
    with pytest.raises(InputError) as error:
        dataclasses.replace(tiny["llama"][0], **change)
    assert error.value.field == field


@pytest.mark.parametrize("kw", [{"lora_rank": -1}, {"lora_rank": 1, "lora_layers": 3}])
def test_adapters_that_do_not_fit(tiny, kw):
    with pytest.raises(InputError, match="lora"):
        full(*tiny["llama"], TOKENS, **kw)
    with pytest.raises(InputError, match="no factors"):
        init_lora(Decoder(tiny["llama"][0]), jax.random.key(0))
