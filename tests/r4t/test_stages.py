"""The set stage: its symmetries, what padding and guidance may change, and sets that it must learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from genret.diffusion import edm, sampler
from genret.diffusion.dit import SHARDING_RULES
from genret.diffusion.retriever import Retriever
from genret.r4t import stages
from genret.r4t.fanout import SetRetriever
from genret.training.loop import FitOptions, draw_for, fit
from genret.training.mesh import make_mesh, shardings
from genret.training.rows import read_all
from genret.types import InputError

B, K, D = 4, 5, 8


def units(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape)
    return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


def moved(retriever, scale=0.2):
    """Parameters at random: zero-initialised layers hide everything behind them."""
    rng = np.random.default_rng(1)
    params = retriever.init(jax.random.key(0))
    return jax.tree.map(lambda x: x + scale * jnp.float32(rng.normal(size=x.shape)), params)


@pytest.fixture(scope="module", params=["adaln", "paper"])
def case(request):
    retriever = Retriever(stages.set_dit("test", embedding=D, rows=K, block=request.param))
    space = edm.plain_space(D, 0)
    given = stages.condition(units(2, B, D))
    return retriever, moved(retriever), space, given, jnp.asarray(units(3, B, K, D))


@functools.partial(jax.jit, static_argnames="model")
def apply(model, params, *inputs):
    return model.apply({"params": params}, *inputs)


def network(case, z, present=None):
    retriever, params, space, given, _ = case
    noise = jnp.array([0.3, -1.0, 0.5, 0.0])
    return apply(retriever.model, params, z, noise, given, space.anchor(given), present)


@functools.partial(jax.jit, static_argnames="retriever")
def loss_of(retriever, params, space, batch, draw, present=None):
    return retriever.loss(params, space, batch, draw, present).loss


@functools.partial(jax.jit, static_argnames="retriever")
def denoised(retriever, params, given, anchor, z, sigma):
    return retriever.denoiser(params, given, anchor)(z, sigma)


ORDER = jnp.array([3, 0, 4, 2, 1])


def test_the_default_is_equivariant_and_the_papers_block_is_not(case):
    z = case[-1]
    gap = jnp.abs(network(case, z[:, ORDER]) - network(case, z)[:, ORDER]).max()
    assert gap > 0.05 if case[0].model.row_positions else gap < 2e-5
    assert jnp.abs(network(case, z)).max() > 0.1  # there is something to compare


def test_the_loss_does_not_see_the_order_of_the_rows(case):
    """With the noise permuted alike; the paper's block must see it, hence its permutation in training."""
    retriever, params, space, given, target = case
    clean = space.encode(target, space.anchor(given))
    sigma, noise = jnp.array([0.1, 0.7, 3.0, 20.0]), jax.random.normal(jax.random.key(5), clean.shape)
    denoise = functools.partial(denoised, retriever, params, given, space.anchor(given))
    error = edm.denoising_error(denoise, clean, sigma, noise)
    other = edm.denoising_error(denoise, clean[:, ORDER], sigma, noise[:, ORDER])
    gap = jnp.abs(other / error - 1).max()
    assert gap > 1e-3 if retriever.model.row_positions else gap < 1e-5


def test_padding_rows_change_nothing(case):
    retriever, params, space, given, target = case
    present = np.arange(K) < np.array([5, 3, 1, 4])[:, None]
    garbage = jnp.where(present[..., None], target, 1e3)
    ours, theirs = (network(case, z, present=present) for z in (target, garbage))
    np.testing.assert_allclose(np.asarray(ours)[present], np.asarray(theirs)[present], atol=2e-5)
    short = network(case, target[:, :3])  # a set of three is a set of five of which two are not there
    np.testing.assert_allclose(ours[1, :3], short[1], atol=2e-5)
    assert jnp.abs(network(case, target)[1, :3] - short[1]).max() > 1e-3  # rows there are read

    draw = draw_for(0, jnp.int32(0), B)
    batch = stages.Batch(given, target, jnp.ones(B))
    ours = loss_of(retriever, params, space, batch, draw, present)
    other = loss_of(retriever, params, space, batch.replace(target=garbage), draw, present)
    np.testing.assert_allclose(ours, other, rtol=1e-5)
    full = np.ones((B, K), bool)
    np.testing.assert_allclose(
        loss_of(retriever, params, space, batch, draw, full),
        loss_of(retriever, params, space, batch, draw), rtol=1e-5,
    )  # fmt: skip


def test_loss_is_the_mean_over_rows_that_are_there(case):
    """A zero network's error of a row is (σ²‖z₀‖² + D) / (1 + σ²) on average over the noise."""
    retriever, space = case[0], case[2]
    n = 2048
    target, present = (
        units(4, n, K, D),
        np.arange(K) < np.random.default_rng(0).integers(1, K + 1, n)[:, None],
    )
    batch = stages.Batch(stages.condition(units(5, n, D)), target, np.ones(n, np.float32))
    draw = draw_for(0, jnp.int32(0), n)
    error = loss_of(retriever, retriever.init(jax.random.key(0)), space, batch, draw, present)
    s2 = edm.noise_level(draw.uniform) ** 2
    np.testing.assert_allclose(error.mean(), ((s2 * D + D) / (1 + s2) / D).mean(), rtol=0.01)


def test_guidance_zero_is_the_conditional_model_and_the_null_forgets_the_query(case):
    retriever, params, space, given, z = case
    anchor = space.anchor(given)
    sigma = jnp.array([0.1, 0.7, 3.0, 20.0])
    asked = functools.partial(denoised, retriever, params, given, anchor)
    null = functools.partial(denoised, retriever, params, retriever.null(given), anchor)
    np.testing.assert_allclose(sampler.guide(asked, null, 0.0)(z, sigma), asked(z, sigma), atol=1e-6)
    w = 0.7
    by_hand = asked(z, sigma) + w * (asked(z, sigma) - null(z, sigma))
    np.testing.assert_allclose(sampler.guide(asked, null, w)(z, sigma), by_hand, rtol=1e-4, atol=1e-5)
    other = stages.condition(units(9, B, D))
    same = denoised(retriever, params, retriever.null(other), anchor, z, sigma)
    np.testing.assert_array_equal(same, null(z, sigma))
    assert jnp.abs(asked(z, sigma) - null(z, sigma)).max() > 1e-2

    keys = jax.random.split(jax.random.key(0), B)
    run = lambda w: retriever.generate(params, space, given, keys, w, method="euler", steps=6, rows=K)  # noqa: E731
    np.testing.assert_allclose(run(0.0), run(None), atol=1e-5)
    assert jnp.abs(run(1.0) - run(None)).max() > 1e-2


@pytest.mark.parametrize("centred", [False, True])
def test_dropping_everything_trains_on_what_guidance_then_reads(case, centred):
    """With drop = 1 neither the loss nor the null branch may depend on the query, centred on it or not."""
    retriever, params, _, given, target = case
    space = edm.Space(jnp.full(D, 4.0), jnp.zeros((1, D)), centred=centred)
    always = dataclasses.replace(retriever, drop=1.0)
    draw = draw_for(0, jnp.int32(0), B)
    losses = [
        loss_of(always, params, space, stages.Batch(g, target, jnp.ones(B)), draw)
        for g in (given, stages.condition(units(9, B, D)))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    keys = jax.random.split(jax.random.key(0), B)
    # At w = -1 the guided denoiser is the null one: what it draws says nothing of the query.
    draws = [
        retriever.generate(params, space, g, keys, -1.0, method="posterior_mean", rows=1)
        for g in (given, stages.condition(units(9, B, D)))
    ]
    # Centred, the sampler starts from z = 0, which is the query, though seen from σ = 80 and at scale 4.
    np.testing.assert_allclose(*draws, atol=1e-2 if centred else 1e-5)
    assert np.abs(units(2, B, D) - units(9, B, D)).max() > 0.5


def test_centred_space_answers_with_the_query_before_training(sets_of):
    queries = units(0, 6, D)
    rows = edm.unit(jnp.asarray(queries[:, None] + 0.3 * units(1, 6, 7, D)))
    present = np.arange(7) < np.array([7, 3, 7, 7, 1, 7])[:, None]
    sets = sets_of(np.asarray(rows), np.arange(6), present)
    space = stages.fit_space(sets, queries, centred=True)
    residual = (np.asarray(rows) - queries[:, None])[present]
    np.testing.assert_allclose(space.scale, np.sqrt((residual**2).mean()), rtol=1e-5)
    retriever = Retriever(stages.set_dit("test", embedding=D, rows=7))
    got = retriever.query(retriever.init(jax.random.key(0)), space, stages.condition(queries), rows=7)
    np.testing.assert_allclose(got, np.broadcast_to(queries[:, None], got.shape), atol=1e-5)
    plain = stages.fit_space(sets, queries)
    np.testing.assert_allclose(plain.scale, D**-0.5)
    assert not plain.centred


@pytest.mark.parametrize("centred", [False, True])
def test_diffusion_in_a_few_directions_reads_and_draws_whole_embeddings(sets_of, centred):
    """Rows near a plane: noise stays in it, and what a row has outside it costs nothing."""
    rng = np.random.default_rng(0)
    plane = np.linalg.qr(rng.normal(size=(D, 2)))[0]
    queries = units(1, 64, D)
    rows = (queries[:, None] if centred else 0) + rng.normal(size=(64, K, 2)) @ plane.T
    sets = sets_of(rows / np.linalg.norm(rows, axis=-1, keepdims=True), np.arange(64))
    space = stages.fit_space(sets, queries, centred=centred, dims=3)
    retriever = Retriever(stages.set_dit("test", embedding=D, rows=K, dims=3))
    params = moved(retriever, 0.05)
    stage = stages.make_stage("set", retriever, space, sets, queries, batch=32)
    batch, draw = read_all(stage.batch(0, None)), draw_for(0, jnp.int32(0), 32)
    outside = np.linalg.svd(np.asarray(space.basis).T)[2][-1]
    other = batch.replace(target=batch.target + 0.3 * outside)
    loss = jax.jit(stage.loss)
    np.testing.assert_allclose(
        loss(params, space, batch, draw).loss, loss(params, space, other, draw).loss, rtol=1e-4
    )
    drawn = SetRetriever(retriever, params, space, K).sets(queries, method="heun", steps=6, guidance=0.5)
    assert drawn.shape == (64, K, D)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), 1, atol=1e-5)
    if not centred:
        np.testing.assert_allclose(drawn @ outside, 0, atol=1e-5)
    card = stage.card
    assert (card["embedding"], card["memory_width"]) == (3, D)
    assert "memory_width" not in stages.model_card(stages.set_dit("test", embedding=D), space, K)


def test_the_papers_model_has_the_papers_parameters():
    """53.9 M with a 512-frequency noise embedding (papers.md B.6, 6); the arithmetic of one layer by hand."""
    model = stages.set_dit("r4t", embedding=128, rows=12, block="paper")
    shapes = jax.eval_shape(Retriever(model).init, jax.random.key(0))
    count = lambda tree: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))  # noqa: E731
    w, e = 1024, 128
    attention = 4 * (w * w + w)
    cross = 2 * (w * w + w) + 2 * (e * w + w)
    assert count(shapes["block_0"]) == attention + cross + 2 * (w * w + w) + 3 * 2 * w
    assert 52.5e6 < count(shapes) < 53.9e6
    assert "modulation" not in shapes and shapes["row_positions"].shape == (12, w)
    shardings(shapes, make_mesh(2, 2, 2), SHARDING_RULES)  # every parameter has a rule
    shardings(
        jax.eval_shape(Retriever(stages.set_dit("S", embedding=384)).init, jax.random.key(0)),
        make_mesh(2, 2, 2), SHARDING_RULES,
    )  # fmt: skip


def test_batches_hold_the_sets_of_their_queries_best_first_and_are_functions_of_the_step(sets_of):
    targets, query = units(0, 40, K, D), np.repeat(np.arange(8), 5)
    reward = np.random.default_rng(1).permutation(40)
    sets, queries = sets_of(targets, query, reward=reward), units(2, 8, D)
    retriever = Retriever(stages.set_dit("test", embedding=D, rows=K))
    stage = stages.make_stage("set", retriever, edm.plain_space(D, 0), sets, queries, batch=64, keep_top=0.2)
    batch = read_all(stage.batch(3, None))
    again = read_all(stage.batch(3, None))
    np.testing.assert_array_equal(batch.target, again.target)
    assert np.abs(batch.target - np.asarray(stage.batch(4, None).target)).max() > 0.1
    found = [int(np.flatnonzero((np.abs(targets - t) < 1e-5).all((1, 2)))[0]) for t in batch.target]
    best = {q: max(range(5 * q, 5 * q + 5), key=lambda i: reward[i]) for q in range(8)}
    assert set(found) == set(best.values())  # the best of the five of each query, and no other
    np.testing.assert_array_equal(batch.query, queries[query[found]])
    assert batch.present.all()


def test_the_papers_block_sees_every_row_at_every_place(sets_of):
    sets = sets_of(units(0, 2, K, D), [0, 1], np.arange(K) < np.array([K, 3])[:, None])
    retriever = Retriever(stages.set_dit("test", embedding=D, rows=K + 1, block="paper"))
    stage = stages.make_stage(
        "set", retriever, edm.plain_space(D, 0), sets, units(2, 2, D), batch=4000, rows=K + 1
    )
    batch = read_all(stage.batch(0, None))
    target, present = np.asarray(batch.target), np.asarray(batch.present)
    assert set(present.sum(1)) == {3, K} and not target[~present].any()
    stored = sets.take(np.arange(2))
    for s, rows in ((0, K), (1, 3)):
        mine = present.sum(1) == rows
        for row in stored[s, :rows]:
            place = (np.abs(target[mine] - row) < 1e-5).all(-1)
            assert (place.sum(1) == 1).all()  # every row once
            share = place.mean(0) * (K + 1)
            np.testing.assert_allclose(share, 1, atol=0.2)  # at each of six places alike
    loss = jax.jit(stage.loss)
    assert np.abs(loss(moved(retriever), stage.frozen, batch, draw_for(0, jnp.int32(0), 4000)).loss).max() > 0


def test_a_stage_that_cannot_be_is_refused(sets_of):
    sets, space = sets_of(units(0, 4, K, D), [0, 1, 2, 3]), edm.plain_space(D, 0)
    retriever = Retriever(stages.set_dit("test", embedding=D, rows=K))
    make = lambda **kw: stages.make_stage("s", retriever, space, sets, units(1, 4, D), batch=2, **kw)  # noqa: E731
    with pytest.raises(InputError, match="sets of 5"):
        make(rows=3)
    with pytest.raises(InputError, match="positions"):
        make(regression=True)
    with pytest.raises(InputError, match="no reward"):
        make(keep_top=0.5)
    with pytest.raises(InputError, match="r4t"):
        stages.set_dit("XXL", embedding=D)
    with pytest.raises(InputError, match="block"):
        stages.set_dit("test", embedding=D, block="mlp")
    card = make().card
    assert card["rows"] == K and card["adaln"] and card["cross"] and not card["centred"]
    assert card != stages.model_card(stages.set_dit("test", embedding=D, block="paper"), space, K)


@pytest.mark.parametrize("regression", [False, True])
def test_neither_mesh_nor_microbatches_change_the_training(sets_of, tmp_path, regression):
    """Sets of unequal length on one device and on eight."""
    present = np.arange(K) < np.random.default_rng(0).integers(1, K + 1, 32)[:, None]
    sets, queries = sets_of(units(0, 32, K, D), np.arange(32), present), units(1, 32, D)
    model = stages.set_dit("test", embedding=D, rows=K, positions=regression)
    stage = stages.make_stage(
        "set", Retriever(model), edm.plain_space(D, 0), sets, queries, batch=16, regression=regression
    )
    one = make_mesh(devices=jax.devices()[:1])
    a, b = (
        fit(stage, tmp_path / name, FitOptions(steps=4, warmup=1, microbatches=parts), mesh=mesh).params
        for name, mesh, parts in (("one", one, 1), ("eight", make_mesh(), 2))
    )
    gaps = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)
    moved = jax.tree.map(
        lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, stage.init(jax.random.key(0))
    )
    assert max(jax.tree.leaves(gaps)) < 0.05 * max(jax.tree.leaves(moved))


# A known mixture of sets (papers.md D.2, point 3): a query of kind t has two answers of three rows each. Rows
# drawn one by one would mix the two and repeat themselves; only a joint draw gets whole answers.
KINDS, ANSWERS = units(1, 4, D), units(2, 4, 2, 3, D)


def ask(seed, n):
    """Queries f32[n, D] about their kinds, and the two answers f32[n, 2, 3, D]."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, len(KINDS), n)
    queries = KINDS[kind] + 0.05 * rng.normal(size=(n, D))
    return np.float32(queries / np.linalg.norm(queries, axis=-1, keepdims=True)), ANSWERS[kind]


def matched(sets, wanted):
    """Mean cosine f64[n, A] of sets f32[n, 3, D] with each of their answers, rows matched best."""
    cosine = np.einsum("nid,najd->naij", sets, wanted)
    return np.array([[c[linear_sum_assignment(-c)].mean() for c in each] for each in cosine])


@pytest.fixture(scope="module")
def mixture(sets_of):
    queries, wanted = ask(11, 2000)
    rng = np.random.default_rng(12)
    targets = wanted[np.arange(2000), rng.integers(0, 2, 2000)]
    targets = np.stack([t[rng.permutation(3)] for t in targets]) + 0.05 * rng.normal(size=targets.shape)
    return sets_of(targets / np.linalg.norm(targets, axis=-1, keepdims=True), np.arange(2000)), queries


def trained(folder, sets, queries, *, steps, regression=False, **model):
    model = stages.set_dit("test", embedding=D, rows=3, **model).clone(width=64, depth=2)
    retriever = Retriever(model, noise="log_normal")
    space = stages.fit_space(sets, queries)
    stage = stages.make_stage("set", retriever, space, sets, queries, batch=128, regression=regression)
    options = FitOptions(steps=steps, learning_rate=1e-2, warmup=30, log_every=steps // 2, ema_decay=0.99)
    params = fit(stage, folder, options, mesh=make_mesh(devices=jax.devices()[:1])).ema
    return SetRetriever(retriever, params, space, rows=3)


@pytest.mark.parametrize("block", ["adaln", "paper"])
def test_training_draws_whole_answers_of_a_known_mixture(mixture, tmp_path, block):
    model = trained(tmp_path, *mixture, steps=600, block=block)
    queries, wanted = ask(13, 128)
    one = np.random.default_rng(0).choice(6, (128, 3))  # right rows, drawn one by one
    alone = matched(np.take_along_axis(wanted.reshape(128, 6, D), one[..., None], 1), wanted).max(1)
    assert alone.mean() < 0.85 and (alone > 0.95).mean() < 0.15
    cosine = matched(model.sets(queries, method="euler_maruyama", steps=64, guidance=0.0), wanted)
    assert cosine.max(1).mean() > 0.93 and (cosine.max(1) > 0.95).mean() > 0.7
    assert 0.3 < cosine.argmax(1).mean() < 0.7  # both answers are given


def test_the_matched_regressor_finds_one_answer_and_averages_two(mixture, sets_of, tmp_path):
    """Given in random order, the rows of one answer are each found by a place of their own. At fixed places
    the optimum would be their mean; where two answers are right, even matched places fall between them."""
    queries, wanted = ask(11, 2000)
    rng = np.random.default_rng(12)
    single = sets_of(np.stack([a[0][rng.permutation(3)] for a in wanted]), np.arange(2000))
    test, answers = ask(13, 64)
    one, two = (
        trained(tmp_path / name, sets, queries, steps=100, regression=True, positions=True)
        for name, sets in (("one", single), ("two", mixture[0]))
    )
    draw = lambda model: model.sets(test, method="posterior_mean", guidance=0.0)  # noqa: E731
    mean = answers[:, :1].mean(2, keepdims=True)
    at_fixed_places = np.broadcast_to(mean / np.linalg.norm(mean, axis=-1, keepdims=True), (64, 1, 3, D))[
        :, 0
    ]
    assert matched(at_fixed_places, answers[:, :1]).mean() < 0.75
    assert matched(draw(one), answers[:, :1]).mean() > 0.95
    assert matched(draw(two), answers).max(1).mean() < 0.9


def test_matched_regression_loss_is_the_least_over_assignments():
    """Against scipy, with padding rows of the target, which cost nothing."""
    retriever = Retriever(stages.set_dit("test", embedding=D, rows=K, positions=True))
    params, space, given = moved(retriever), edm.plain_space(D, 0), stages.condition(units(2, B, D))
    target, present = units(3, B, K, D), np.arange(K) < np.array([5, 3, 1, 4])[:, None]
    batch = stages.SetBatch(units(2, B, D), target, present)
    loss = stages.matched_regression_loss(retriever, params, space, batch).loss
    z = space.encode(target, space.anchor(given))
    made = sampler.posterior_mean(retriever.denoiser(params, given, space.anchor(given)), jnp.zeros_like(z))
    for b in range(B):
        rows = int(present[b].sum())
        cost = np.square(np.asarray(made)[b, :, None] - np.asarray(z)[b, None, :rows]).sum(-1)
        assert len(np.unique(made[b].round(3), axis=0)) == K  # positions tell the places apart
        best = cost[linear_sum_assignment(cost)].sum()
        np.testing.assert_allclose(loss[b], best / (rows * D), rtol=1e-5)
