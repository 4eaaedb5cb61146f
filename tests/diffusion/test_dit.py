"""The transformer: identity at initialisation, symmetries it must have, and order it must see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genret.diffusion import edm
from genret.diffusion.dit import SHARDING_RULES, SIZES, make_dit
from genret.diffusion.retriever import Retriever
from genret.training.mesh import make_mesh, shardings
from genret.types import Condition, InputError

B, K, S, D, M = 3, 4, 5, 8, 2


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, *inputs):
    return model.apply(params, *inputs)


@pytest.fixture(scope="module", params=[False, True], ids=["prefix", "cross"])
def case(request):
    model = make_dit("test", embedding=D, domains=M, max_context=S, cross=request.param).clone(depth=2)
    rng = np.random.default_rng(0)
    context = rng.normal(size=(B, S, D)).astype(np.float32)
    mask = np.arange(S) < np.array([5, 3, 1])[:, None]
    memory = jnp.asarray(rng.normal(size=(B, 2, D)), jnp.float32) if request.param else None
    condition = Condition(jnp.asarray(context), jnp.asarray(mask), jnp.array([0, 1, 2]), memory)
    z, noise = jnp.asarray(rng.normal(size=(B, K, D)), jnp.float32), jnp.array([0.1, -1.0, 0.5])
    anchor = edm.unit(jnp.asarray(rng.normal(size=(B, D)), jnp.float32))
    params = jax.jit(model.init)(jax.random.key(0), z, noise, condition, anchor)
    # Zero-initialised layers hide everything behind them, so symmetries are tested off the origin.
    keys = iter(jax.random.split(jax.random.key(1), 200))
    moved = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(next(keys), p.shape), params)
    return model, params, moved, (z, noise, condition, anchor)


def test_zero_at_initialisation(case):
    model, params, _, inputs = case
    assert not apply(model, params, *inputs).any()


def test_equivariant_to_the_order_of_the_set(case):
    model, _, params, (z, *rest) = case
    order = jnp.array([2, 0, 3, 1])
    ours = apply(model, params, z[:, order], *rest)
    np.testing.assert_allclose(ours, apply(model, params, z, *rest)[:, order], atol=2e-5)


def test_padding_changes_nothing(case):
    model, _, params, (z, noise, condition, anchor) = case
    garbage = jnp.where(condition.mask[..., None], condition.context, 1e3)
    ours = apply(model, params, z, noise, condition.replace(context=garbage), anchor)
    np.testing.assert_allclose(ours, apply(model, params, z, noise, condition, anchor), atol=2e-5)
    shorter = condition.replace(context=condition.context[:, :3], mask=condition.mask[:, :3])
    np.testing.assert_allclose(
        apply(model, params, z, noise, shorter, anchor)[1:],
        apply(model, params, z, noise, condition, anchor)[1:],
        atol=2e-5,
    )  # fmt: skip


def test_reads_order_domain_noise_and_anchor(case):
    model, _, params, (z, noise, condition, anchor) = case
    base = apply(model, params, z, noise, condition, anchor)
    flipped = condition.replace(context=condition.context[:, ::-1], mask=condition.mask[:, ::-1])
    for other in (
        apply(model, params, z, noise, flipped, anchor)[0],
        apply(model, params, z, noise, condition.replace(domain=jnp.array([1, 1, 2])), anchor)[0],
        apply(model, params, z, noise + 1, condition, anchor)[0],
        apply(model, params, z, noise, condition, -anchor)[0],
    ):
        assert jnp.abs(other - base[0]).max() > 1e-2
    if condition.memory is not None:
        other = apply(model, params, z, noise, condition.replace(memory=-condition.memory), anchor)
        assert jnp.abs(other - base).max() > 1e-2


def test_mean_map_is_the_exact_network_of_shifted_gaussian_data(case):
    """z₀ ~ N(ν, 1) with ν linear in the anchor: D must be (z + σ² ν) / (1 + σ²) at every σ."""
    model, params, _, (z, _, condition, anchor) = case
    maps = jnp.asarray(np.random.default_rng(5).normal(size=(M + 1, D, D)), jnp.float32)
    params = {"params": {**params["params"], "mean_map": maps}}
    sigma = jnp.array([0.05, 1.0, 60.0])
    denoise = edm.denoiser(lambda x, noise: apply(model, params, x, noise, condition, anchor))
    mean = jnp.einsum("bd,bde->be", anchor * D**0.5, maps[condition.domain])[:, None]
    s2 = sigma[:, None, None] ** 2
    np.testing.assert_allclose(denoise(z, sigma), (z + s2 * mean) / (1 + s2), rtol=1e-4, atol=1e-4)


def test_examples_do_not_see_each_other(case):
    model, _, params, (z, noise, condition, anchor) = case
    alone = apply(model, params, z[1:2], noise[1:2], jax.tree.map(lambda x: x[1:2], condition), anchor[1:2])
    np.testing.assert_allclose(alone[0], apply(model, params, z, noise, condition, anchor)[1], atol=2e-5)


def test_bfloat16_matmuls_stay_near_float32(case):
    model, _, params, inputs = case
    import dataclasses

    half = dataclasses.replace(model, dtype=jnp.bfloat16, parent=None)
    exact = apply(model, params, *inputs)
    assert apply(half, params, *inputs).dtype == jnp.float32
    error = jnp.abs(apply(half, params, *inputs) - exact).max() / jnp.abs(exact).max()
    assert 1e-6 < error < 0.05


def test_a_condition_that_does_not_fit_is_refused(case):
    model, _, params, (z, noise, condition, anchor) = case
    with pytest.raises(InputError, match="8-d"):
        apply(model, params, z[..., :4], noise, condition, anchor)
    long = condition.replace(
        context=jnp.tile(condition.context, (1, 2, 1)), mask=jnp.tile(condition.mask, (1, 2))
    )
    with pytest.raises(InputError, match="context"):
        apply(model, params, z, noise, long, anchor)
    if model.cross:
        with pytest.raises(InputError, match="memory"):
            apply(model, params, z, noise, condition.replace(memory=None), anchor)
    with pytest.raises(InputError, match="demo"):
        make_dit("XXL", embedding=D, domains=M, max_context=S)


@pytest.mark.parametrize("size, millions", [("demo", 1.1), ("S", 33), ("B", 130), ("L", 456)])
def test_sizes_are_of_their_class_and_every_parameter_has_a_rule(size, millions):
    retriever = Retriever(make_dit(size, embedding=128, domains=4, max_context=16, cross=False))
    shapes = jax.eval_shape(retriever.init, jax.random.key(0))
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(shapes)) / 1e6
    assert abs(count / millions - 1) < 0.1, count
    placed = shardings(shapes, make_mesh(2, 2, 2), SHARDING_RULES)
    sharded = sum(
        np.prod(x.shape) for x, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True)
        if not s.is_fully_replicated
    )  # fmt: skip
    assert sharded / 1e6 > 0.95 * count
    assert set(SIZES) == {"test", "demo", "S", "B", "L"}


@pytest.fixture(scope="module", params=["adaln", "plain"])
def alone(request):
    """A model without prefix: the set, and a memory read by cross-attention."""
    form = {} if request.param == "adaln" else {"adaln": False, "mlp_ratio": 1}
    model = make_dit("test", embedding=D, domains=0, max_context=0, cross=True, **form).clone(depth=2)
    rng = np.random.default_rng(0)
    condition = Condition(
        jnp.zeros((B, 0, D)), jnp.zeros((B, 0), bool), jnp.zeros(B, jnp.int32),
        jnp.asarray(rng.normal(size=(B, 1, D)), jnp.float32),
    )  # fmt: skip
    z, noise = jnp.asarray(rng.normal(size=(B, K, D)), jnp.float32), jnp.array([0.1, -1.0, 0.5])
    params = Retriever(model).init(jax.random.key(0))
    moved = jax.tree.map(lambda p: p + 0.2 * jnp.float32(rng.normal(size=p.shape)), params)
    return model, params, moved, (z, noise, condition, jnp.zeros((B, D)))


def test_without_a_prefix_everything_but_the_set_comes_from_the_memory(alone):
    model, params, moved, (z, noise, condition, anchor) = alone
    answer = lambda *inputs, p=moved: apply(model, {"params": p}, *inputs)  # noqa: E731
    assert not answer(z, noise, condition, anchor, p=params).any()
    base = answer(z, noise, condition, anchor)
    np.testing.assert_array_equal(answer(z, noise, condition, anchor + 1), base)
    order = jnp.array([2, 0, 3, 1])
    np.testing.assert_allclose(answer(z[:, order], noise, condition, anchor), base[:, order], atol=2e-5)
    for other in (
        answer(z, noise, condition.replace(memory=-condition.memory), anchor),
        answer(z, noise + 1, condition, anchor),
        answer(z + 1, noise, condition, anchor),
    ):
        assert jnp.abs(other - base).max() > 1e-2
    assert not {"domain_embedding", "positions", "read_context", "mean_map"} & params.keys()


def test_one_row_of_memory_is_read_as_the_same_row_twice_is(alone):
    """Attention over one key needs no query, over two equal ones it computes the same mean; gradients too."""
    model, _, moved, (z, noise, condition, anchor) = alone

    def total(params, memory):
        out = apply(model, {"params": params}, z, noise, condition.replace(memory=memory), anchor)
        return jnp.sum(jnp.sin(out)), out

    grad = jax.jit(jax.value_and_grad(total, has_aux=True))
    twice = jnp.repeat(condition.memory, 2, axis=1)
    ((_, one), own), ((_, two), others) = grad(moved, condition.memory), grad(moved, twice)
    np.testing.assert_allclose(one, two, atol=2e-5)
    for a, b in zip(*map(jax.tree.leaves, (own, others)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_a_unit_norm_memory_enters_the_blocks_with_coordinate_variance_one(alone):
    model, _, moved, given = alone
    _, state = model.apply({"params": moved}, *given, capture_intermediates=True, mutable="intermediates")
    dense, memory = moved["block_0"]["memory_kv"], given[2].memory
    found = state["intermediates"]["block_0"]["memory_kv"]["__call__"][0]
    np.testing.assert_allclose(found, D**0.5 * memory @ dense["kernel"] + dense["bias"], rtol=1e-4, atol=1e-4)


def test_the_memorys_linear_mean_is_the_exact_network_of_shifted_gaussian_data(alone):
    """As `mean_map` is of the anchor; the plain block has nothing beside its trunk."""
    model, params, _, (z, _, condition, anchor) = alone
    if not model.adaln:
        assert "mean" not in params
        return
    rng = np.random.default_rng(5)
    mean = {"kernel": jnp.float32(rng.normal(size=(D, D))), "bias": jnp.float32(rng.normal(size=D))}
    sigma = jnp.array([0.05, 1.0, 60.0])
    denoise = edm.denoiser(
        lambda x, noise: model.apply({"params": {**params, "mean": mean}}, x, noise, condition, anchor)
    )
    nu = (condition.memory[:, 0] * D**0.5 @ mean["kernel"] + mean["bias"])[:, None]
    s2 = sigma[:, None, None] ** 2
    np.testing.assert_allclose(denoise(z, sigma), (z + s2 * nu) / (1 + s2), rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_there_are_read_by_nobody(case):
    model, _, params, (z, *rest) = case
    present = jnp.arange(K) < jnp.array([4, 2, 1])[:, None]
    ours = apply(model, params, z, *rest, present)
    other = apply(model, params, jnp.where(present[..., None], z, 9.0), *rest, present)
    np.testing.assert_allclose(ours[present], other[present], atol=2e-5)
    np.testing.assert_allclose(ours[1, :2], apply(model, params, z[:, :2], *rest)[1], atol=2e-5)
    assert jnp.abs(ours[1, :2] - apply(model, params, z, *rest)[1, :2]).max() > 1e-3


def test_row_positions_tell_rows_apart_and_are_enough_for_as_many_rows(alone):
    _, _, _, (z, noise, condition, anchor) = alone
    model = make_dit("test", embedding=D, domains=0, max_context=0, cross=True, row_positions=K)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda p: p + 0.2 * jnp.float32(rng.normal(size=p.shape)), Retriever(model).init(jax.random.key(0))
    )
    same = jnp.broadcast_to(z[:, :1], z.shape)
    out = apply(model, {"params": params}, same, noise, condition, anchor)
    assert jnp.abs(out[:, 0] - out[:, 1]).max() > 1e-2
    with pytest.raises(InputError, match="rows"):
        apply(model, {"params": params}, jnp.tile(z, (1, 2, 1)), noise, condition, anchor)
    with pytest.raises(InputError, match="cross"):
        Retriever(make_dit("test", embedding=D, domains=0, max_context=0)).init(jax.random.key(0))
