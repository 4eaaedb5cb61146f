"""Nothing that is fitted moves when every held-out row is replaced by another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genret.diffusion import edm
from genret.diffusion.dit import make_dit
from genret.diffusion.retriever import Retriever
from genret.modit import baselines, stages
from genret.modit import density as dn
from genret.training.checkpoint import restore_params
from genret.training.loop import FitOptions
from genret.training.rows import read_all

STEPS = FitOptions(6, warmup=1, log_every=1)


@pytest.fixture(scope="module")
def other(molecules, splits):
    """The same catalogue with other held-out rows: random vectors, labels flipped, order kept."""
    rng = np.random.default_rng(0)
    out = ~splits.train
    x = np.array(molecules.embeddings)
    noise = rng.normal(size=(out.sum(), x.shape[1]))
    x[out] = noise / np.linalg.norm(noise, axis=1, keepdims=True)
    labels = np.where(out, 1 - molecules.labels, molecules.labels).astype(np.int8)
    return dataclasses.replace(molecules, embeddings=x, labels=labels)


@pytest.fixture(scope="module")
def both(molecules, other, splits, prepare, tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("real", "other")]
    made = [
        prepare(c, splits, folder, predictor=STEPS)
        for c, folder in zip((molecules, other), folders, strict=True)
    ]
    return folders, made


def same(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_labels_are_the_same(both):
    _, (one, two) = both
    for name in ("probes", "positives", "trials", "seen"):
        np.testing.assert_array_equal(getattr(one.labels, name), getattr(two.labels, name))


def test_predictor_is_the_same(both, molecules, splits):
    folders, (one, two) = both
    model = dn.DensityMLP(4)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, molecules.width)))["params"])
    card = dn.predictor_card(molecules, one.labels)
    params = [restore_params(f / "predictor" / "checkpoints", shapes, card=card) for f in folders]
    same(*params)
    for rows, moved in ((splits.train, False), (~splits.train, True)):  # the held-out rows did move
        assert np.array_equal(one.predicted[:, rows], two.predicted[:, rows]) != moved


def test_probes_cells_neighbours_and_tails_are_the_same(both, splits):
    _, (one, two) = both
    np.testing.assert_array_equal(one.normals, two.normals)
    np.testing.assert_array_equal(one.intercepts, two.intercepts)
    for name in ("members", "membership", "run"):
        np.testing.assert_array_equal(getattr(one.data.cells, name), getattr(two.data.cells, name))
    np.testing.assert_array_equal(one.data.neighbours, two.data.neighbours)
    np.testing.assert_array_equal(one.data.tails.low, two.data.tails.low)
    np.testing.assert_array_equal(one.data.tails.tail, two.data.tails.tail)
    np.testing.assert_array_equal(one.data.train, two.data.train)
    np.testing.assert_array_equal(one.data.density[:, splits.train], two.data.density[:, splits.train])
    for table in (one.data.cells.members, one.data.neighbours[splits.train], one.data.tails.tail):
        assert splits.train[table[table >= 0]].all()


def test_spaces_batches_and_ridge_are_the_same(both, molecules):
    _, (one, two) = both
    retriever = Retriever(make_dit("test", embedding=molecules.width, domains=4, max_context=15))
    term = stages.RetrievalTerm(1.0, 0.05, 512)
    directions = np.zeros((5, molecules.width), np.float32)
    for name in stages.STAGES:
        drawn = [stages.draw_batch(name, np.random.default_rng(0), f.data, 256, 8) for f in (one, two)]
        batches = read_all(drawn)
        same(*batches)
        spaces = [edm.fit_space(b.condition, b.target, directions, per_coordinate=True) for b in batches]
        same(*spaces)
        for options in ({}, {"retrieval": term}) if name == "sft" else ({},):
            made = [
                stages.make_stage(name, retriever, spaces[0], f.data, batch=64, length=8, **options)
                for f in (one, two)
            ]
            same(*read_all([s.batch(3, None) for s in made]))
    same(*(baselines.fit_ridge(f.data, seeds=8, batches=1, size=256) for f in (one, two)))


def test_the_perturbation_would_show(molecules, other, splits):
    """Fitted on everything instead, the same code does move: the tests above have teeth."""
    everything = np.ones(2000, bool)
    one, two = (dn.buy_labels(c, everything, budget=0.2, k=20, seed=0) for c in (molecules, other))
    assert (one.positives != two.positives).mean() > 0.2
    assert not np.array_equal(one.seen, two.seen)


def test_a_finished_fit_is_read_back_and_other_options_are_not(both, molecules, splits, prepare, monkeypatch):
    (folder, _), (one, _) = both
    monkeypatch.setattr(dn, "buy_labels", lambda *a, **k: pytest.fail("fitted again"))
    again = prepare(molecules, splits, folder, predictor=STEPS)
    for name in ("predicted", "normals", "intercepts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    same(vars(one.data.cells), vars(again.data.cells))
    np.testing.assert_array_equal(one.labels.seen, again.labels.seen)
    with pytest.raises(pytest.fail.Exception, match="fitted again"):
        prepare(molecules, splits, folder, predictor=STEPS, budget=0.1)
