"""The softmax by hand, what it leaves out, and that training on it improves retrieval."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genret.modit import contrastive, softmax
from genret.modit import trajectories as tr
from genret.modit.protocol import Contexts
from genret.modit.softmax import make_corpus, multi_positive_softmax
from genret.modit.stages import TrainingSet
from genret.retrieval.index import ExactIndex
from genret.retrieval.metrics import judge
from genret.retrieval.ranking import rank
from genret.training.loop import FitOptions
from genret.training.rows import read_all

X = np.array([[1, 0], [0.96, 0.28], [0.8, 0.6]], np.float32)


def test_the_encoder_starts_at_the_seed_mean():
    model = contrastive.QueryEncoder(3)
    x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    domain = np.array([0, 1, 2, 0, 1, 2])
    params = jax.jit(model.init)(jax.random.key(0), x, domain)
    np.testing.assert_allclose(model.apply(params, x, domain), x, atol=1e-6)


def test_softmax_by_hand(monkeypatch):
    monkeypatch.setattr(softmax, "LEAST_POSITIVES", 1)

    # One query (1, 0), T = .05; candidates 0, 1, 2 at logits 20, 19.2, 16.
    def loss(hits, seeds):
        corpus = make_corpus(np.arange(3), 3, 1000)
        candidates = corpus.candidates(np.array([hits]), np.array([seeds]))
        value, weight = multi_positive_softmax(jnp.array(X[:1]), jnp.array(X), corpus.rows, candidates, 0.05)
        return float(value[0]), float(weight[0])

    e = np.exp
    # log(e^20 + e^19.2 + e^16) - 19.2 = .8 + log(1 + e^-.8 + e^-4) = 1.18367
    assert loss([1, -1], [-1, -1]) == (pytest.approx(1.18367, abs=1e-4), 1.0)
    # Item 0 is a seed and is not among the candidates: log(1 + e^-3.2).
    assert loss([1, -1], [0, -1]) == (pytest.approx(np.log(1 + e(-3.2)), abs=1e-5), 1.0)
    # Two positives: the mean of the two terms, not the log of their sum.
    both = 0.5 * (2 * np.log(1 + e(-3.2)) + 3.2)
    assert loss([1, 2], [-1, 0]) == (pytest.approx(both, abs=1e-4), 1.0)
    assert loss([-1, -1], [0, -1]) == (0.0, 0.0)  # nothing to find, nothing to learn
    monkeypatch.setattr(softmax, "LEAST_POSITIVES", 2)  # the least that counts
    assert [loss(hits, [-1, 0])[1] for hits in ([1, -1], [1, 2])] == [0.0, 1.0]


@pytest.fixture
def captured(monkeypatch):
    """The stage that fit_contrastive would train, and its untrained answer."""
    seen = {}

    def fit(stage, workdir, options, mesh):
        seen.update(stage=stage, params=jax.jit(stage.init)(jax.random.key(0)))
        return types.SimpleNamespace(ema=seen["params"])

    monkeypatch.setattr(contrastive, "fit", fit)
    return seen


def test_loss_of_three_items_by_hand(captured, monkeypatch, tmp_path):
    monkeypatch.setattr(softmax, "LEAST_POSITIVES", 1)
    cells = tr.Cells(np.array([[0, 1, 2]], np.int32), np.zeros((1, 3), np.int32), np.zeros(1, int))
    tails = tr.Tails(np.array([[[0, -1]]], np.int32), np.array([[[1]]], np.int32))
    none = np.zeros((1, 3), bool)
    data = TrainingSet(X, np.arange(3), np.zeros((1, 3)), none, cells, None, tails)
    positive = np.array([[True, True, False]])
    encode = contrastive.fit_contrastive(
        data, positive, tmp_path, FitOptions(1), seeds=2, batch=1, corpus=1000, temperature=0.05
    )
    np.testing.assert_allclose(encode(X, np.zeros(3, int)), X, atol=1e-6)
    stage = captured["stage"]
    batch = read_all(stage.batch(0, None))
    np.testing.assert_allclose(batch["x"], X[:1])  # the one item of the low half
    terms = jax.jit(stage.loss)(captured["params"], stage.frozen, batch, None)
    # 0 is a positive too, but it is the seed: log(1 + e^-3.2) over 1 and 2.
    np.testing.assert_allclose(terms.loss, [np.log(1 + np.exp(-3.2))], atol=1e-5)
    np.testing.assert_array_equal(terms.weight, [1.0])


def test_batches_are_functions_of_their_step_and_find_cell_positives(captured, world, tmp_path):
    data = world([40, 36])
    options = dict(seeds=4, batch=19, corpus=1000, temperature=0.05)
    contrastive.fit_contrastive(data, data.has, tmp_path, FitOptions(1), **options)
    stage = captured["stage"]
    one, two, other = map(read_all, (stage.batch(3, None), stage.batch(3, {"a": 1}), stage.batch(4, None)))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))
    assert not np.array_equal(one["x"], other["x"])
    np.testing.assert_array_equal(stage.frozen["corpus"], data.train)
    positives = [
        [set(np.flatnonzero(data.has[m])) & set(row[row >= 0]) for row in data.cells.members]
        for m in range(2)
    ]
    for domain, hits in zip(one["domain"], one["candidates"].hits, strict=True):
        # A seed is no positive of its own question, so a row may lack one of its cell's.
        assert any(set(hits[hits >= 0]) <= cell for cell in positives[domain])
    contrastive.fit_contrastive(data, data.has, tmp_path, FitOptions(1, seed=1), **options)
    assert not np.array_equal(captured["stage"].batch(3, None)["x"], one["x"])


def test_training_raises_joint_on_training_cells(molecules, splits, fitted, tmp_path):
    """Seeds of latent cells, an index of training items: what the encoder is trained to do."""
    data, rng = fitted.data, np.random.default_rng(0)
    positive = (molecules.labels == 1) & splits.train
    options = FitOptions(60, learning_rate=3e-3, warmup=5, ema_decay=0.9, log_every=1)
    encode = contrastive.fit_contrastive(
        data, positive, tmp_path / "encoder", options, seeds=8, batch=128, corpus=32768, temperature=0.03
    )
    first = np.flatnonzero(data.cells.run == 0)
    cell, domain = rng.choice(first, 400), rng.integers(0, 4, 400)
    seeds, _ = tr.seeds_and_tail(rng, data.tails, cell, domain, 8)
    patterns = data.cells.membership[0]
    reachable = (positive[domain] & (patterns == cell[:, None])).sum(1) > 8
    contexts = Contexts(seeds, domain, cell, domain * 0).take(np.flatnonzero(reachable))
    index = ExactIndex(molecules.embeddings)
    # Held-out rows are not ranked: to the ranking, their labels are unknown.
    known = dict(labels=np.where(splits.train, molecules.labels, -1).astype(np.int8), domain=contexts.domain)

    def joint(queries):
        ids = rank(index, queries, 20, exclude=contexts.seeds, **known)
        asked = dict(patterns=patterns, pattern=contexts.pattern, seeds=contexts.seeds)
        return judge(ids, **known, **asked).joint.mean()

    mean = (data.embeddings[contexts.seeds] * (contexts.seeds >= 0)[..., None]).sum(1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    trained, start = joint(encode(mean, contexts.domain)), joint(mean)
    assert trained > start + 0.05, (trained, start)
