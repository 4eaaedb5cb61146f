"""Label budgets by hand and by brute force; the predictor against a planted density and kNN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom, spearmanr
from sklearn.linear_model import LogisticRegression

from genret.modit import density as dn
from genret.retrieval.index import ExactIndex
from genret.training.loop import FitOptions
from genret.types import InputError

# Degrees on a circle: the two nearest others of each training item are the two before it, so that
# (by hand) 0: {1, 2}, 1: {0, 2}, 2: {1, 0}, 3: {2, 1}, 4: {3, 2}, 5: {4, 3}; nobody has 5.
ANGLES = [0, 1, 3, 7, 15, 31]
HELD_OUT = [0.4, 6.9, 30.9]  # each nearer to a training item than any other training item is


def circle(degrees):
    r = np.radians(degrees)
    return np.stack([np.cos(r), np.sin(r)], 1)


@pytest.fixture(scope="module")
def hand(catalogue_of):
    attributes = {
        "a": [True, False, True, True, False, True, False, False, False],
        "b": [False, True, None, False, True, True, False, False, False],
    }
    return catalogue_of(circle(ANGLES + HELD_OUT), attributes), np.arange(9) < 6


def test_labels_bought_by_hand(hand):
    labels = dn.buy_labels(*hand, budget=1.0, k=2, seed=0)
    np.testing.assert_array_equal(labels.probes, range(6))
    np.testing.assert_array_equal(labels.positives, [[1, 2, 1, 1, 2, 1], [1, 0, 1, 1, 0, 1]])
    np.testing.assert_array_equal(labels.trials, [[2] * 6, [1, 1, 2, 1, 1, 2]])  # b of 2 is unknown
    # Item 5 is nobody's neighbour and the last three are held out: their labels stay unread.
    np.testing.assert_array_equal(
        labels.seen, [[1, 0, 1, 1, 0, -1, -1, -1, -1], [0, 1, -1, 0, 1, -1, -1, -1, -1]]
    )
    assert labels.lookups == 5 + 4


def test_part_of_the_budget_by_hand(hand):
    rows = {0: (1, 2), 1: (0, 2), 2: (0, 1), 3: (1, 2), 4: (2, 3), 5: (3, 4)}
    labels = dn.buy_labels(*hand, budget=0.5, k=2, seed=3)
    assert len(labels.probes) == 3 == len(set(labels.probes))
    read = sorted({n for p in labels.probes for n in rows[p]})
    np.testing.assert_array_equal(np.flatnonzero(labels.seen[0] >= 0), read)
    full = dn.buy_labels(*hand, budget=1.0, k=2, seed=0)
    np.testing.assert_array_equal(labels.positives, full.positives[:, labels.probes])


def test_duplicates_do_not_make_an_item_its_own_neighbour(catalogue_of):
    # Four copies at 0 degrees, two items near 90, K = 2. Of equals the search returns the lower id,
    # so by hand 0: {1, 2}, 1: {0, 2}, 2: {0, 1}, 3: {0, 1}, 4: {5, 0}, 5: {4, 0}.
    attribute = {"a": [True, False, False, False, True, True]}
    catalogue = catalogue_of(circle([0, 0, 0, 0, 90, 91]), attribute)
    labels = dn.buy_labels(catalogue, np.ones(6, bool), budget=1.0, k=2, seed=0)
    np.testing.assert_array_equal(labels.positives, [[0, 1, 1, 1, 2, 2]])
    assert (labels.trials == 2).all()


def test_counts_on_molecules_by_brute_force(molecules, splits):
    labels = dn.buy_labels(molecules, splits.train, budget=0.1, k=20, seed=1)
    x, train = np.asarray(molecules.embeddings, np.float64), np.flatnonzero(splits.train)
    assert len(labels.probes) == round(0.1 * len(train)) and splits.train[labels.probes].all()
    read = set()
    for j, probe in enumerate(labels.probes):
        others = train[train != probe]
        near = others[np.argsort(-(x[others] @ x[probe]), kind="stable")]
        scores = x[near] @ x[probe]
        tied = scores[19] - scores[20] < 1e-6  # which of two equals is read is the index's choice
        if not tied:
            np.testing.assert_array_equal(
                labels.positives[:, j], (molecules.labels[:, near[:20]] == 1).sum(1)
            )
            read |= set(near[:20])
    seen = np.flatnonzero((labels.seen >= 0).any(0))
    assert read <= set(seen) and len(seen) - len(read) < 0.1 * len(seen)
    np.testing.assert_array_equal(labels.seen[:, seen], molecules.labels[:, seen])
    assert labels.lookups == 4 * len(seen)  # MOSES has no unknown label
    assert (labels.seen[:, ~splits.train] == -1).all()


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.5, 1e-6, float("nan")])
def test_bad_budgets_are_named(hand, budget):
    with pytest.raises(InputError, match="budget"):
        dn.buy_labels(*hand, budget=budget, k=2, seed=0)


def test_binomial_loss_is_the_likelihood():
    rng = np.random.default_rng(0)
    trials = rng.integers(1, 21, (7, 3))
    positives = rng.integers(0, trials + 1)
    logits = rng.normal(0, 2, (7, 3))
    log_p = binom.logpmf(positives, trials, 1 / (1 + np.exp(-logits)))
    coefficient = binom.logpmf(positives, trials, 0.5) + trials * np.log(2)
    expected = (-(log_p - coefficient) / trials).mean(1)
    value = dn.binomial_loss(*(jnp.asarray(a, jnp.float32) for a in (logits, positives, trials)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_binomial_loss_rests_at_the_observed_share():
    positives, trials = jnp.array([[3.0, 10.0, 0.0]]), jnp.array([[20.0, 20.0, 0.0]])
    at = jnp.array([[np.log(3 / 17), 0.0, 5.0]])  # f = k/K; where nothing is known, anywhere
    slope = jax.grad(lambda z: dn.binomial_loss(z, positives, trials).sum())(at)
    np.testing.assert_allclose(slope, 0, atol=1e-7)
    # Off it by hand: d/dz = (K f - k) / K / M = (.5 - .15) / 3.
    slope = jax.grad(lambda z: dn.binomial_loss(z, positives, trials).sum())(at.at[0, 0].set(0.0))
    assert slope[0, 0] == pytest.approx(0.35 / 3, rel=1e-5)


def test_predictor_recovers_a_planted_density_better_than_knn(catalogue_of, tmp_path):
    # 32 dimensions, 600 probes, k₊ ~ Binomial(20, sigmoid(8 w·e)): smooth, but no probe is near.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1400, 32))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    ways = rng.normal(size=(32, 2))
    true = 1 / (1 + np.exp(-8 * x @ (ways / np.linalg.norm(ways, axis=0)))).T  # [M, N]
    catalogue = catalogue_of(x, {"a": true[0] > 0.5, "b": true[1] > 0.5})
    trials, unread = np.full((2, 600), 20), np.full((2, 1400), -1)
    labels = dn.Labels(np.arange(600), rng.binomial(trials, true[:, :600]), trials, unread)
    options = FitOptions(60, learning_rate=3e-3, warmup=10, ema_decay=0.9, log_every=1)
    fitted = dn.fit_predictor(catalogue, labels, tmp_path, options)
    unseen = np.asarray(catalogue.embeddings[600:])
    ours, knn = fitted.density(unseen), dn.knn_density(catalogue, labels, unseen)
    for m in range(2):
        rank, rival = (spearmanr(r[m], true[m, 600:]).statistic for r in (ours, knn))
        assert rank > 0.9 and rank > rival + 0.1, (rank, rival)
        error, rival = (np.abs(r[m] - true[m, 600:]).mean() for r in (ours, knn))
        assert error < 0.5 * rival, (error, rival)
    again = dn.fit_predictor(catalogue, labels, tmp_path, options)  # a finished run is read back
    np.testing.assert_array_equal(again.density(unseen), ours)


def test_predictor_on_molecules(molecules, splits, fitted):
    # The true density of held-out molecules, searched as probes are: among training items.
    x, train = np.asarray(molecules.embeddings), np.flatnonzero(splits.train)
    held = np.flatnonzero(~splits.train)
    near = train[np.argsort(-(x[held] @ x[train].T), axis=1)[:, :20]]
    true = (molecules.labels[:, near] == 1).mean(-1)
    rank = [spearmanr(p, t).statistic for p, t in zip(fitted.predicted[:, held], true, strict=True)]
    assert min(rank) > 0.5, rank
    error = np.abs(fitted.predicted[:, held] - true).mean(1)
    base = np.abs(true - true.mean(1, keepdims=True)).mean(1)
    assert (error < 0.9 * base).all(), (error, base)  # and calibrated, not only in order


def test_density_is_a_probability_whatever_the_block():
    model = dn.DensityMLP(3)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8)))["params"]
    x = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
    predictor = dn.Predictor(model, params)
    whole = predictor.density(x, block=16)
    np.testing.assert_allclose(predictor.density(x, block=4), whole, atol=1e-6)
    logits = model.apply({"params": params}, x).T
    np.testing.assert_allclose(whole, 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_predictor_gradient_is_the_finite_difference_of_the_log_odds():
    model = dn.DensityMLP(2)
    predictor = dn.Predictor(model, model.init(jax.random.key(1), jnp.zeros((1, 6)))["params"])
    x = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    domain = np.array([0, 1, 0, 1, 1])
    ascent = predictor.gradient(x, domain)

    def log_odds(e):
        p = predictor.density(e.astype(np.float32), block=8).astype(np.float64)
        return (np.log(p) - np.log1p(-p))[domain, np.arange(5)]

    h = 1e-2
    numeric = np.stack([log_odds(x + h * b) - log_odds(x - h * b) for b in np.eye(6)], 1)
    numeric /= np.linalg.norm(numeric, axis=1, keepdims=True)
    np.testing.assert_allclose((ascent * numeric).sum(1), 1, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(ascent, axis=1), 1, atol=1e-5)


def test_linear_probes_are_logistic_regressions_on_what_was_read(molecules, fitted):
    for m in range(molecules.num_domains):
        rows = np.flatnonzero(fitted.labels.seen[m] >= 0)
        peer = LogisticRegression(C=10.0, max_iter=300)
        peer.fit(molecules.embeddings[rows], molecules.labels[m, rows])
        norm = np.linalg.norm(peer.coef_)
        np.testing.assert_allclose(fitted.normals[m], peer.coef_[0] / norm, atol=1e-6)
        assert fitted.intercepts[m] == pytest.approx(peer.intercept_[0] / norm, abs=1e-6)
        side = molecules.embeddings[rows] @ fitted.normals[m] + fitted.intercepts[m] > 0
        np.testing.assert_array_equal(side, peer.predict(molecules.embeddings[rows]) == 1)


def test_one_class_is_named(hand):
    catalogue, train = hand
    labels = dn.buy_labels(catalogue, train, budget=1.0, k=2, seed=0)
    seen = labels.seen.copy()
    seen[1] = np.where(seen[1] == 0, -1, seen[1])
    one_class = dn.Labels(labels.probes, labels.positives, labels.trials, seen)
    with pytest.raises(InputError, match="attribute/b.*one class"):
        dn.linear_probes(catalogue, one_class)


def test_knn_density_by_hand(hand):
    catalogue, train = hand
    labels = dn.buy_labels(catalogue, train, budget=1.0, k=2, seed=0)
    # The three probes nearest to 2 degrees are 1, 3 and 0: a (2+1+1)/2/3, b (0/1 + 1/2 + 1/1)/3.
    value = dn.knn_density(catalogue, labels, circle([2.1]).astype(np.float32), k=3)
    np.testing.assert_allclose(value[:, 0], [4 / 6, 1.5 / 3], rtol=1e-6)


def test_a_search_in_parts_is_the_search_and_says_how_far_it_is(capsys):
    rng = np.random.default_rng(0)
    index, queries = ExactIndex(np.float32(rng.normal(size=(50, 8)))), np.float32(rng.normal(size=(23, 8)))
    whole = index.search(queries, 5)[0]
    np.testing.assert_array_equal(dn.search_in_parts(index, queries, 5, "probes", part=10), whole)
    assert "probes 23/23" in "".join(capsys.readouterr())
    np.testing.assert_array_equal(dn.search_in_parts(index, queries, 5, "probes"), whole)
    assert not capsys.readouterr().out
