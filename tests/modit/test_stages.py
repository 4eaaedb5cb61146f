"""What each stage asks of the model, checked on worlds small enough to enumerate."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genret.diffusion import edm
from genret.diffusion.dit import make_dit
from genret.diffusion.retriever import Retriever
from genret.modit import stages
from genret.modit import trajectories as tr
from genret.modit.softmax import LEAST_POSITIVES
from genret.training.loop import draw_for
from genret.training.rows import read_all
from genret.types import Condition, InputError

D, M = 4, 2  # of `world`
NULL = M


@pytest.fixture(scope="module")
def stage_of():
    """(stage name, data, **options) -> Stage of an untrained model, centred on the seeds' mean."""
    retriever = Retriever(make_dit("test", embedding=D, domains=M, max_context=9))
    space = edm.Space(jnp.full(D, 0.5), jnp.zeros((M + 1, D)))

    def make(name, data, *, batch=32, length=8, **options):
        made = stages.make_stage(name, retriever, space, data, batch=batch, length=length, **options)
        return dataclasses.replace(made, batch=lambda *at: read_all(made.batch(*at)))

    return make


def rows_of(data, x):
    """Catalogue rows of embeddings [..., D], -1 for zero rows; every row of a world is distinct."""
    x = np.asarray(x)
    cosine = x @ data.embeddings.T
    best = cosine.argmax(-1)
    given = np.abs(x).sum(-1) > 0
    assert (cosine.max(-1)[given] > 1 - 1e-5).all()
    return np.where(given, best, -1)


def test_next_item_by_hand(world):
    data = world([6])
    walks = np.array([[3, 1, 2, 0], [0, 4, -1, -1], [5, 2, 4, 1]])
    walks = stages.Walks(walks, np.array([2, 1, 3]), np.array([0, 1, NULL]))
    batch = read_all(stages.next_item(data, walks))
    np.testing.assert_array_equal(rows_of(data, batch.target[:, 0]), [2, 4, 1])
    context = rows_of(data, batch.condition.context)
    np.testing.assert_array_equal(context, [[3, 1, -1], [0, -1, -1], [5, 2, 4]])
    np.testing.assert_array_equal(batch.condition.mask, context >= 0)
    np.testing.assert_array_equal(batch.condition.domain, [0, 1, NULL])
    assert batch.target.dtype == batch.condition.context.dtype == np.float32


def test_pretraining_is_raw_and_without_a_domain(world, stage_of):
    data = world([20, 12])
    batch = stage_of("pretrain", data, batch=400).batch(0, None)
    assert (batch.condition.domain == NULL).all() and (batch.weight == 1).all()
    prefix, target = rows_of(data, batch.condition.context), rows_of(data, batch.target[:, 0])
    items = (prefix >= 0).sum(1)
    assert (batch.condition.mask == (np.arange(7) < items[:, None])).all()  # packed to the left
    assert np.isin(prefix[prefix >= 0], data.train).all() and np.isin(target, data.train).all()
    assert set(items) == set(range(1, 8))  # every position is a target
    rising = data.density[0, target] >= data.density[0, prefix[:, 0]]
    assert 0.3 < rising.mean() < 0.7  # in no metric's order


def test_cpt_asks_for_a_denser_item_of_the_same_cell(world, stage_of):
    data = world([20, 12, 16])
    batch = stage_of("cpt", data, batch=400).batch(3, None)
    prefix, target = rows_of(data, batch.condition.context), rows_of(data, batch.target[:, 0])
    domain = batch.condition.domain
    assert np.bincount(domain, minlength=M).min() > 150  # all domains, mixed
    score = np.where(prefix >= 0, data.density[domain[:, None], prefix], -1)
    assert (np.diff(np.where(prefix >= 0, score, 2), axis=1) >= 0).all()  # ascending
    assert (data.density[domain, target] >= score.max(1)).all()
    assert set((prefix >= 0).sum(1)) == set(range(4, 8))  # the last half of the walk
    # Three cells in four are small; the fourth is everything.
    cell = np.append(data.cells.membership[0], -1)[np.column_stack([prefix, target])]
    together = [len(set(row[row >= 0])) == 1 for row in cell]
    assert abs(np.mean(together) - 0.75) < 0.1


def test_cells_smaller_than_a_walk_never_make_a_target_of_padding(world, stage_of):
    data = world([3, 5, 2, 4])
    batch = stage_of("cpt", data, batch=300, length=10).batch(0, None)
    prefix, target = rows_of(data, batch.condition.context), rows_of(data, batch.target[:, 0])
    items = (prefix >= 0).sum(1)
    assert items.min() == 1 and (batch.condition.mask == (np.arange(9) < items[:, None])).all()
    assert np.isin(target, data.train).all() and (np.linalg.norm(batch.target, axis=-1) > 0.99).all()
    assert not (prefix == target[:, None]).any()
    score = data.density[batch.condition.domain[:, None], prefix]
    best = np.where(prefix >= 0, score, -1).max(1)
    assert (data.density[batch.condition.domain, target] >= best).all()


def walks_of(order, data, size=200, length=10):
    """(walks i32[B, T], the places of the targets, domains) of one batch of CPT."""
    return stages.ordered_walks(np.random.default_rng(4), data, size, length, order)


def test_the_orders_walk_over_the_very_same_items(world):
    data = world([3, 20, 5, 12, 4])  # cells that are smaller than a walk among them
    rising, at, domain = walks_of("ascending", data)
    shuffled, somewhere, _ = walks_of("shuffled", data)
    falling, where, again = walks_of("descending", data)
    size = (rising >= 0).sum(1)
    assert size.min() == 3 and size.max() == 10 and (domain == again).all()
    for walks in (rising, shuffled, falling):
        np.testing.assert_array_equal(walks >= 0, np.arange(10) < size[:, None])  # padding stays last
        np.testing.assert_array_equal(np.sort(walks, axis=1), np.sort(rising, axis=1))
    for one, two, n in zip(rising, falling, size, strict=True):
        np.testing.assert_array_equal(two[:n], one[:n][::-1])
    # A target lies in the last half of its walk, whatever the order, and has something before it.
    for places in (at, somewhere, where):
        assert (places >= 1).all() and (places >= size // 2).all() and (places < size).all()
    np.testing.assert_array_equal(at, where)
    # Shuffled: the densest item is anywhere.
    whole = size == 10
    score = data.density[domain[whole, None], shuffled[whole]]
    assert np.bincount(score.argmax(1), minlength=10).min() > 0
    assert abs(score.argmax(1).mean() - 4.5) < 4 * 2.87 / np.sqrt(whole.sum())
    for name in ("true", "noise"):  # those differ by the density they are given, not in the walk
        np.testing.assert_array_equal(walks_of(name, data)[0], rising)


def test_a_stage_walks_in_the_order_asked(world, stage_of):
    data = world([20, 12, 16])
    made = {
        order: stage_of("cpt", data, batch=200, order=order).batch(3, None)
        for order in ("ascending", "shuffled", "descending")
    }
    found = {}
    for order, batch in made.items():
        prefix, target = rows_of(data, batch.condition.context), rows_of(data, batch.target[:, 0])
        score = data.density[batch.condition.domain[:, None], np.column_stack([prefix, target])]
        given = np.column_stack([prefix, target]) >= 0
        steps = np.where(given[:, 1:-1] & given[:, :-2], np.diff(score[:, :-1], axis=1), np.nan)
        ahead = (score[:, -1:] - score[:, :-1])[given[:, :-1]]  # of the target over what is before it
        found[order] = steps[np.isfinite(steps)], ahead
    assert all((x >= 0).all() for x in found["ascending"])
    assert all((x <= 0).all() for x in found["descending"])
    for x in found["shuffled"]:
        assert 0.4 < (x > 0).mean() < 0.6
    # Only CPT walks in an order: replay and SFT are what they were.
    replay = stage_of("cpt", data, replay=0.25, order="descending").batch(0, None)
    for a, b in zip(
        jax.tree.leaves(replay),
        jax.tree.leaves(stage_of("cpt", data, replay=0.25).batch(0, None)),
        strict=True,
    ):
        np.testing.assert_array_equal(a[24:], b[24:])


def test_true_density_is_counted_over_the_training_neighbours(world):
    data = world([30, 24])
    rng, out = np.random.default_rng(6), np.setdiff1d(np.arange(59), data.train)
    labels = rng.choice([-1, 0, 1], (M, 59), p=[0.5, 0.25, 0.25]).astype(np.int8)
    labels[0, data.neighbours[data.train[3]]] = -1  # nothing is known around this one
    made = stages.with_order(data, "true", labels, 0)
    for field in dataclasses.fields(data):  # nothing else is touched
        if field.name != "density":
            assert getattr(made, field.name) is getattr(data, field.name), field.name
    for m in range(M):
        for i in data.train:
            known = [labels[m, j] for j in data.neighbours[i] if labels[m, j] >= 0]
            share = sum(v == 1 for v in known) / len(known) if known else 0
            assert made.density[m, i] == pytest.approx(share, abs=1e-6)
    np.testing.assert_array_equal(made.density[:, out], data.density[:, out])  # as fitted
    assert made.density.dtype == np.float32 and made.density is not data.density
    # Labels outside training are not read.
    poisoned = labels.copy()
    poisoned[:, out] = 1 - np.abs(labels[:, out])
    assert not np.array_equal(poisoned, labels)
    np.testing.assert_array_equal(stages.with_order(data, "true", poisoned, 0).density, made.density)


def test_noise_for_density_is_that_of_its_seed(world):
    data = world([30, 24])
    one, same, other = (stages.with_order(data, "noise", None, seed).density for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert one.shape == data.density.shape and one.dtype == np.float32 and 0 <= one.min() < one.max() < 1
    for density in (other, data.density):
        assert abs(np.corrcoef(one.ravel(), density.ravel())[0, 1]) < 0.3
    for order in ("ascending", "shuffled", "descending"):  # these walk by the density as fitted
        assert stages.with_order(data, order, None, 0).density is data.density
    with pytest.raises(InputError, match="order: unknown order 'rising'. use one of ascending, shuffled"):
        stages.with_order(data, "rising", None, 0)


def test_sft_target_is_the_centroid_of_half_a_tail(world, stage_of):
    # Tails of four: each target is the centroid of one of the six pairs of its own cell's tail.
    data = world([20, 24], share=0.01, least=4)
    batch = stage_of("sft", data, batch=200).batch(5, None)
    domain, context = batch.condition.domain, rows_of(data, batch.condition.context)
    used = set()
    for b in range(200):
        seeds = set(context[b][context[b] >= 0])
        found = []
        for c in range(len(data.cells.members)):
            if not seeds <= set(data.tails.low[domain[b], c]):
                continue
            for pair in itertools.combinations(data.tails.tail[domain[b], c], 2):
                mean = data.embeddings[list(pair)].astype(np.float64).mean(0)
                if np.allclose(mean / np.linalg.norm(mean), batch.target[b, 0], atol=1e-5):
                    found.append((domain[b], c, pair))
        assert found, b
        used |= set(found)
    assert len(used) > 6 * 3  # different halves, cells and domains


def test_sft_contexts_are_sorted_seeds_of_varying_number(world, stage_of):
    data = world([40, 36])
    batch = stage_of("sft", data, batch=300).batch(0, None)
    context, domain = rows_of(data, batch.condition.context), batch.condition.domain
    items = (context >= 0).sum(1)
    assert set(items) == {4, 5, 6, 7, 8} and (batch.condition.mask == (np.arange(8) < items[:, None])).all()
    score = np.where(context >= 0, data.density[domain[:, None], context], 2)
    assert (np.diff(score, axis=1) >= 0).all()
    for m in range(M):  # fewer seeds are still a fair draw of the low half, not its lowest
        low = [data.density[m, t[t >= 0]].mean() for t in data.tails.low[m]]
        few = score[(domain == m) & (items == 4)][:, :4].mean()
        assert abs(few - np.mean(low)) < 0.06


def test_sft_seeds_survive_where_the_low_half_is_small(world, stage_of):
    # Four items known to lack it for eight places: however many are kept, padding displaces none.
    data = world([8, 8], least=2)
    seen = np.full(data.has.shape, -1, np.int8)
    seen[:, data.cells.members[:, :4]] = 0
    tails = tr.fit_tails(data.cells, data.density, seen, share=0.1, least=2)
    data = dataclasses.replace(data, has=seen == 1, tails=tails)
    batch = stage_of("sft", data, batch=200).batch(0, None)
    assert batch.condition.mask.sum(1).min() == 4
    # A cell whose items are all known to have the attribute has no seed to offer, and no weight.
    seen[0, data.cells.members[0]] = 1
    tails = tr.fit_tails(data.cells, data.density, seen, share=0.1, least=2)
    data = dataclasses.replace(data, has=seen == 1, tails=tails)
    batch = stage_of("sft", data, batch=200).batch(0, None)
    np.testing.assert_array_equal(batch.weight, batch.condition.mask.any(1))
    assert 0 < (batch.weight == 0).sum() < 100


def leaves_equal(one, two):
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), one, two)
    return all(jax.tree.leaves(same))


TERM = stages.RetrievalTerm(weight=1.0, temperature=0.05, corpus=64)


@pytest.mark.parametrize(
    "name, options",
    [("pretrain", {}), ("cpt", {"replay": 0.25}), ("sft", {}), ("sft", {"retrieval": TERM})],
)
def test_a_batch_is_a_function_of_its_step(world, stage_of, name, options):
    data = world([20, 24, 30])
    stage = stage_of(name, data, **options)
    first = stage.batch(7, None)
    stage.batch(8, None)  # no state between calls, and parameters are not read
    assert leaves_equal(first, stage.batch(7, {"any": "params"}))
    assert leaves_equal(first, stage_of(name, data, **options).batch(7, None))
    assert not leaves_equal(first, stage.batch(8, None))
    assert not leaves_equal(first, stage_of(name, data, seed=1, **options).batch(7, None))


def test_cpt_replays_its_share_of_pretraining(world, stage_of):
    data = world([20, 24])
    for replay, count in ((0.0, 0), (0.25, 8), (0.15, 5)):
        batch = stage_of("cpt", data, replay=replay).batch(0, None)
        assert len(batch.weight) == 32 and (batch.condition.domain == NULL).sum() == count


def test_regression_sees_the_same_batches_and_starts_at_the_seed_mean(world, stage_of):
    data = world([20, 24])
    plain, mse = stage_of("sft", data), stage_of("sft_mse", data, regression=True)
    batch = plain.batch(2, None)
    assert leaves_equal(batch, mse.batch(2, None)) and (plain.name, mse.name) == ("sft", "sft_mse")
    params = mse.init(jax.random.key(0))
    terms = mse.loss(params, mse.frozen, batch, draw_for(0, jnp.int32(0), 32))
    mean = np.asarray(batch.condition.context).sum(1)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    error = (((np.asarray(batch.target)[:, 0] - mean) / 0.5) ** 2).mean(1)
    np.testing.assert_allclose(terms.loss, error, rtol=1e-4)


def test_retrieval_term_by_hand(world, stage_of):
    # Untrained, the query is the seed mean; the softmax runs over all training items but the seeds.
    data = world([40, 36])
    stage = stage_of("sft", data, batch=19, retrieval=stages.RetrievalTerm(0.7, 0.1, 1000))
    plain = stage_of("sft", data, batch=19)
    batch = stage.batch(0, None)
    assert leaves_equal(batch.examples, plain.batch(0, None))
    params, draw = stage.init(jax.random.key(0)), draw_for(0, jnp.int32(0), 19)
    terms = jax.jit(stage.loss)(params, stage.frozen, batch, draw)
    denoising = plain.loss(params, plain.frozen, batch.examples, draw)
    np.testing.assert_array_equal(stage.frozen["corpus"], data.train)
    context, domain = (
        rows_of(data, batch.examples.condition.context),
        batch.examples.condition.domain,
    )
    for b in range(19):
        seeds = context[b][context[b] >= 0]
        mean = data.embeddings[seeds].sum(0)
        mean /= np.linalg.norm(mean)
        others = np.setdiff1d(data.train, seeds)
        logits = data.embeddings[others] @ mean / 0.1
        log_p = dict(zip(others, logits - np.log(np.exp(logits).sum()), strict=True))
        homes = [c for c in range(3) if set(seeds) <= set(data.tails.low[domain[b], c])]
        hits = [[i for i in data.cells.members[c] if i >= 0 and data.has[domain[b], i]] for c in homes]
        softmax = [-np.mean([log_p[i] for i in h]) if len(h) >= LEAST_POSITIVES else 0 for h in hits]
        gain = float(terms.loss[b] - denoising.loss[b]) / 0.7
        assert min(abs(gain - s) for s in softmax) < 1e-3, (gain, softmax)
    np.testing.assert_allclose(terms.loss, terms.aux["denoising"] + 0.7 * terms.aux["softmax"], rtol=1e-5)


def test_bad_stages_are_named_before_any_work(world, stage_of):
    data = world([20])
    with pytest.raises(InputError, match="pretrain, cpt, sft"):
        stage_of("rlhf", data)
    (
        stage_of("cpt", data, length=10),
        stage_of("sft", data, length=9),
    )  # a walk's last item is its target
    for name, length in (("cpt", 11), ("sft", 10), ("cpt", 1), ("sft", 0)):
        with pytest.raises(InputError, match="length"):
            stage_of(name, data, length=length)


def test_the_card_names_what_must_agree(world, stage_of):
    card = stage_of("sft", world([20])).card
    assert card["centred"] is True and card["domains"] == M and card["embedding"] == D


def test_condition_blanks_padding_whatever_its_row_holds():
    x = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    c = read_all(stages.condition(x, np.array([[0, -1], [2, 1]]), np.array([0, 1])))
    assert isinstance(c, Condition)
    np.testing.assert_array_equal(c.context, [[[1, 0], [0, 0]], [[-1, 0], [0, 1]]])
    np.testing.assert_array_equal(c.mask, [[True, False], [True, True]])
