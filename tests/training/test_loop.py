"""The trainer's promises: mesh, microbatch and padding change nothing; resuming is bitwise."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from genret.diffusion import edm
from genret.diffusion.dit import SHARDING_RULES, make_dit
from genret.diffusion.retriever import Retriever
from genret.training.checkpoint import restore_params
from genret.training.log import counted_flops
from genret.training.loop import (
    FitOptions,
    NonFiniteLoss,
    accumulate,
    begin,
    compiled_step,
    draw_for,
    fit,
)
from genret.training.mesh import make_mesh, shardings, with_rows
from genret.training.stage import Stage
from genret.types import Batch, Condition, InputError, Terms

pytestmark = pytest.mark.long
D, M, S, B = 16, 2, 3, 16
# Adam divides by the gradient's own size, so rounding reaches parameters in proportion to the rate.
OPTIONS = dict(learning_rate=1e-3, warmup=2, log_every=2, save_every=3)


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def make_batch(step, _=None, size=B, targets=1):
    rng = np.random.default_rng([7, step])
    x = rng.normal(size=(size, S + targets, D)).astype(np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    condition = Condition(x[:, :S], np.ones((size, S), bool), rng.integers(0, M, size).astype(np.int32))
    return Batch(condition, x[:, S:], np.ones(size, np.float32))


@pytest.fixture(scope="module")
def stage():
    retriever = Retriever(make_dit("test", embedding=D, domains=M, max_context=S))
    return Stage(
        "toy", retriever.init, retriever.loss, make_batch, SHARDING_RULES,
        frozen=edm.plain_space(D, M), card={"width": 32},
    )  # fmt: skip


def gradients(stage, params, batch, draw, parts=1):
    return jax.jit(lambda p, b: accumulate(stage, p, stage.frozen, b, draw, parts))(params, batch)


def difference(a, b):
    gaps = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)
    return max(jax.tree.leaves(gaps))


@pytest.fixture(scope="module")
def start(stage):
    """Parameters at random: at its initialisation the network is zero, and so is most of its gradient."""
    leaves, tree = jax.tree.flatten(jax.jit(stage.init)(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.map(np.array, jax.tree.unflatten(tree, moved))


@pytest.fixture(scope="module")
def reference(stage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return fit(stage, folder, FitOptions(steps=6, **OPTIONS), mesh=one_device()), folder


@pytest.fixture(scope="module")
def six_steps(stage, start, tmp_path_factory):
    """(shape of the mesh, microbatches) -> (state after six steps from `start`, the mean of their gradients).

    Targets are sets of two: XLA once got the gradients of those wrong, and of one right, on 2x2x2.
    """
    sets = dataclasses.replace(stage, batch=lambda step, _: make_batch(step, targets=2))

    @functools.cache
    def run(shape=None, parts=1):
        options = FitOptions(steps=6, microbatches=parts, **OPTIONS | {"save_every": 6})
        mesh = make_mesh(*shape) if shape else one_device()
        state = fit(sets, tmp_path_factory.mktemp("six"), options, mesh=mesh, init_from=start)
        return state, optax.tree.get(state.opt_state, "mu")

    return run


def agree(one, two):
    """The same gradients, and the same parameters where these are more than rounding: Adam enlarges that."""
    assert difference(one[1], two[1]) < 1e-6
    large = jax.tree.map(lambda g: np.abs(g) > 1e-4, one[1])
    assert np.mean([x.mean() for x in jax.tree.leaves(large)]) > 0.7
    assert difference(*(jax.tree.map(np.multiply, large, s.params) for s, _ in (one, two))) < 1e-5


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), pytest.param((1, 4, 2), marks=pytest.mark.scale)])
def test_the_mesh_changes_nothing(six_steps, shape):
    state, _ = found = six_steps(shape)
    agree(six_steps(), found)
    if shape[1] * shape[2] > 1:
        assert not state.params["block_0"]["mlp_in"]["kernel"].sharding.is_fully_replicated


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
def test_microbatches_change_nothing(six_steps, shape):
    agree(six_steps(), six_steps(shape, parts=4))


def test_gradient_is_that_of_the_weighted_mean(stage):
    params = jax.jit(stage.init)(jax.random.key(0))
    batch, draw = make_batch(0), draw_for(0, jnp.int32(0), B)
    weight = np.linspace(0.0, 2.0, B).astype(np.float32)
    batch = batch.replace(weight=weight)

    def mean(params):
        terms = stage.loss(params, stage.frozen, batch, draw)
        return jnp.sum(weight * terms.loss) / weight.sum()

    for parts in (1, 4):
        ours = jax.jit(lambda p, parts=parts: gradients(stage, p, batch, draw, parts))
        gradient, metrics = ours(params)
        assert difference(gradient, jax.jit(jax.grad(mean))(params)) < 1e-6
        np.testing.assert_allclose(metrics["loss"], jax.jit(mean)(params), rtol=1e-5)


def test_rows_of_weight_zero_change_nothing(stage):
    params = jax.jit(stage.init)(jax.random.key(0))
    draw = draw_for(0, jnp.int32(0), B)
    batch = make_batch(0)
    weight = (np.arange(B) < 12).astype(np.float32)
    garbage = np.where(weight[:, None, None] > 0, batch.target, 7.0).astype(np.float32)
    clean, _ = gradients(stage, params, batch.replace(weight=weight), draw)
    dirty, _ = gradients(stage, params, batch.replace(weight=weight, target=garbage), draw)
    assert difference(clean, dirty) < 1e-7


def test_uniforms_are_stratified_and_keys_differ_by_row_and_step():
    draw, later = draw_for(0, jnp.int32(3), 32), draw_for(0, jnp.int32(4), 32)
    u = np.asarray(draw.uniform, np.float64)
    assert sorted(np.floor((u - u.min() + 1e-6) * 32).astype(int)) == list(range(32))
    keys = np.concatenate([jax.random.key_data(d.key) for d in (draw, later)])
    assert len(np.unique(keys, axis=0)) == 64


@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
def test_resuming_is_bitwise_on_the_same_mesh(stage, tmp_path, shape):
    mesh = make_mesh(*shape) if shape else one_device()
    whole = fit(stage, tmp_path / "whole", FitOptions(steps=6, **OPTIONS), mesh=mesh)
    # The schedule is a function of the total, so the short run must know it: stop it from outside.
    asked = []

    def batch(step, params):
        asked.append(step)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return make_batch(step)

    with pytest.raises(KeyboardInterrupt):
        fit(
            dataclasses.replace(stage, batch=batch), tmp_path / "cut",
            FitOptions(steps=6, **OPTIONS), mesh=mesh,
        )  # fmt: skip
    resumed = fit(stage, tmp_path / "cut", FitOptions(steps=6, **OPTIONS), mesh=mesh)
    assert difference(whole, resumed) == 0.0
    steps = [json.loads(r)["step"] for r in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))  # the repeated steps are logged once


def test_resuming_on_another_mesh_continues_the_same_run(stage, reference, tmp_path):
    shutil.copytree(reference[1] / "checkpoints" / "3", tmp_path / "checkpoints" / "3")
    state = fit(stage, tmp_path, FitOptions(steps=6, **OPTIONS), mesh=make_mesh(2, 2, 2))
    assert difference(state.params, reference[0].params) < 1e-5


def test_a_finished_run_returns_at_once_and_init_from_starts_where_told(stage, reference, tmp_path):
    def never(step, params):
        raise AssertionError("asked for a batch")

    state, folder = reference
    again = fit(
        dataclasses.replace(stage, batch=never),
        folder,
        FitOptions(steps=6, **OPTIONS),
        mesh=one_device(),
    )
    assert difference(again, state) == 0.0
    still = fit(
        stage, tmp_path, FitOptions(steps=1, **{**OPTIONS, "learning_rate": 0.0}),
        mesh=one_device(), init_from=state.ema,
    )  # fmt: skip
    assert difference(still.params, state.ema) == 0.0


def test_ema_and_adamw_follow_optax(stage, reference, tmp_path):
    """One step by hand: the same gradient through the same optax chain, EMA decay min(.999, 1/10)."""
    start = jax.jit(stage.init)(jax.random.key(0))
    options = FitOptions(steps=1, **OPTIONS)
    state = fit(stage, tmp_path, options, mesh=one_device())
    gradient, _ = gradients(stage, start, make_batch(0), draw_for(0, jnp.int32(0), B))
    norm = optax.tree.norm(gradient)
    kernels = jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key == "kernel", start)
    tx = optax.adamw(1e-3 / 2, b1=0.9, b2=0.95, weight_decay=0.01, mask=kernels)
    clipped = jax.tree.map(lambda g: g / jnp.maximum(1.0, norm), gradient)
    updates, _ = tx.update(clipped, tx.init(start), start)
    expected = optax.apply_updates(start, updates)
    assert difference(state.params, expected) < 1e-5
    ema = jax.tree.map(lambda e, p: 0.1 * e + 0.9 * p, start, expected)
    assert difference(state.ema, ema) < 1e-5


def test_a_loss_that_is_not_finite_stops_and_names_the_step(stage, tmp_path):
    def loss(params, frozen, batch, draw):
        terms = stage.loss(params, frozen, batch, draw)
        return Terms(terms.loss / (batch.target[:, 0, 0] < 100.0), terms.weight)

    def batch(step, params):
        made = make_batch(step)
        return made.replace(target=made.target + 1000.0) if step == 4 else made

    bad = dataclasses.replace(stage, loss=loss, batch=batch)
    with pytest.raises(NonFiniteLoss, match="at step 5 .*restart from step 3"):
        fit(bad, tmp_path, FitOptions(steps=6, **OPTIONS), mesh=one_device())
    good = fit(stage, tmp_path, FitOptions(steps=6, **OPTIONS), mesh=one_device())
    assert int(good.step) == 6 and all(np.isfinite(x).all() for x in jax.tree.leaves(good.params))


def test_a_checkpoint_of_another_model_is_refused_and_kept(stage, reference):
    other = dataclasses.replace(stage, card={"width": 64})
    with pytest.raises(InputError, match="width=32.*width=64"):
        fit(other, reference[1], FitOptions(steps=9, **OPTIONS), mesh=one_device())
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    folder = reference[1] / "checkpoints"
    ema = restore_params(folder, shapes, card=stage.card)
    assert difference(ema, reference[0].ema) == 0.0
    with pytest.raises(InputError, match="width"):
        restore_params(folder, shapes, card={"width": 64})
    with pytest.raises(InputError, match="step 77"):
        restore_params(folder, shapes, card=stage.card, step=77)
    with pytest.raises(InputError, match="does not exist"):
        restore_params(folder / "nowhere", shapes, card=stage.card)


def test_meshes_rules_and_batches_that_do_not_fit_are_refused(stage, tmp_path):
    with pytest.raises(InputError, match="8 devices"):
        make_mesh(3, 1, 1)
    with pytest.raises(InputError, match="no sharding rule matches b/kernel"):
        shardings({"b": {"kernel": jnp.ones((4, 4))}}, make_mesh(), [("a/kernel", P())])
    odd = shardings({"a": jnp.ones((3, 8))}, make_mesh(2, 2, 2), [("a", P("fsdp", "tensor"))])
    assert odd["a"].spec == P(None, "tensor")  # an axis that does not divide is dropped
    with pytest.raises(InputError, match="microbatches"):
        fit(stage, tmp_path, FitOptions(steps=1, microbatches=3, **OPTIONS), mesh=one_device())
    small = dataclasses.replace(stage, batch=lambda step, _: make_batch(step, size=6))
    with pytest.raises(InputError, match="batch_size"):
        fit(small, tmp_path, FitOptions(steps=1, **OPTIONS), mesh=make_mesh(8))


def test_arrays_follow_the_rows_of_the_batch():
    placed = jax.jit(with_rows(make_mesh(2, 2, 2)))(jnp.ones((3, 8, 5)))
    assert placed.sharding.spec == P(None, ("data", "fsdp")) and (placed == 1).all()
    odd = jnp.ones((3, 6))
    assert with_rows(make_mesh(2, 2, 2))(odd) is odd


def test_every_log_row_has_rates_and_flops(reference):
    rows = [json.loads(r) for r in (reference[1] / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [2, 3, 4, 6]
    for row in rows:
        assert {
            "loss",
            "grad_norm",
            "param_norm",
            "steps_per_s",
            "examples_per_s",
            "flop_per_s",
        } <= set(row)
        np.testing.assert_allclose(row["examples_per_s"], B * row["steps_per_s"], rtol=1e-6)
    assert list((reference[1] / "tensorboard").glob("events*"))


@pytest.mark.parametrize("parts", [1, 4])
def test_flops_are_those_of_the_matmuls(parts):
    """A linear model: forward 2BIO, backward 2BIO for the weights, in however many microbatches."""
    rows, inner, outer = 1024, 128, 256
    linear = Stage(
        "linear",
        init=lambda key: {"kernel": jnp.zeros((inner, outer))},
        loss=lambda p, _, b, d: Terms(jnp.sum((b["x"] @ p["kernel"]) ** 2, -1), jnp.ones(len(b["x"]))),
        batch=lambda step, _: {"x": np.ones((rows, inner), np.float32)},
        rules=(("", P()),),
    )
    options, mesh = FitOptions(steps=1, microbatches=parts), one_device()
    state, batch = begin(options, linear.init(None)), linear.batch(0, None)
    step, *_ = compiled_step(linear, options, mesh, shardings(state, mesh, linear.rules), batch)
    assert counted_flops(step.trace(state, None, batch)) == 4 * rows * inner * outer
