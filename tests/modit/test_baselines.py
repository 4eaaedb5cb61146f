"""Each rival against a second way of computing it: by hand, by brute force, by scikit-learn."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from genret.modit import baselines as bl
from genret.modit.density import Labels
from genret.modit.memory import make_memory
from genret.modit.protocol import Contexts, Searcher
from genret.retrieval.index import ExactIndex
from genret.training.rows import read_all

ALPHAS = (0.1, 10.0)


@pytest.fixture(scope="module")
def base(searcher, fitted):
    f = fitted
    ridge = bl.fit_ridge(f.data, seeds=8, alphas=ALPHAS, batches=2, size=256)
    return bl.Baselines(
        searcher, f.data, f.labels, f.predicted, f.normals, f.gradient, ridge, make_memory(f.data)
    )


@pytest.fixture(scope="module")
def six(catalogue_of):
    """Six items and one seed, item 0. Looked up: 1 and 4 have the attribute, 2 and 5 lack it."""
    x = [[1, 0, 0], [0.8, 0.6, 0], [0.6, 0, 0.8], [0.28, 0.96, 0], [0, 1, 0], [-1, 0, 0]]
    catalogue = catalogue_of(x, {"a": [False, True, False, True, True, False]})
    seen = np.array([[-1, 1, 0, -1, 1, 0]], np.int8)
    searcher = Searcher(catalogue, ExactIndex(catalogue.embeddings), k=2)
    labels = Labels(np.array([0]), None, None, seen)
    made = bl.Baselines(searcher, None, labels, None, np.array([[0, 0, 1]], np.float32), None, {}, None)
    zero = np.zeros(1, np.int32)
    return made, Contexts(np.array([[0, -1]]), zero, zero, zero)


def normal(v):
    v = np.asarray(v, np.float64)
    return v / np.linalg.norm(v)


def seeds_of(contexts, q):
    return contexts.seeds[q][contexts.seeds[q] >= 0]


def test_seed_mean_and_medoid_by_brute_force(base, test_contexts):
    x = np.asarray(base.embeddings, np.float64)
    mean, medoid = base.mean(test_contexts), base.medoid(test_contexts, None)
    sizes = set()
    for q in range(len(test_contexts)):
        seeds = seeds_of(test_contexts, q)
        sizes.add(len(seeds))
        np.testing.assert_allclose(mean[q], normal(x[seeds].mean(0)), atol=1e-5)
        total = {i: sum(x[i] @ x[j] for j in seeds if j != i) for i in seeds}
        chosen = next(i for i in seeds if np.array_equal(x[i], np.float64(medoid[q, 0])))
        assert total[chosen] > max(total.values()) - 1e-5
    assert len(sizes) > 1  # padding is among what was checked


def test_padding_is_no_medoid(catalogue_of):
    # The last row, which an index of -1 would read, is the mean of seeds 0 and 1 itself.
    x = [[1, 0], [0, 1], [-1, 0], [0, -1], [1, 1]]
    catalogue = catalogue_of(x, {"a": [True, False, True, False, True]})
    searcher, zero = Searcher(catalogue, None, k=1), np.zeros(1, np.int32)
    made = bl.Baselines(searcher, None, None, None, None, None, {}, None)
    medoid = made.medoid(Contexts(np.array([[0, 1, -1]]), zero, zero, zero), None)[0, 0]
    assert medoid.tolist() in ([1, 0], [0, 1])


def test_direction_is_the_difference_of_means(base, test_contexts):
    query = base.direction(test_contexts, None)[:, 0]
    x, seen = np.asarray(base.embeddings, np.float64), base.labels.seen
    for m in range(4):
        way = normal(x[seen[m] == 1].mean(0) - x[seen[m] == 0].mean(0))
        here = query[test_contexts.domain == m]
        np.testing.assert_allclose(here, np.broadcast_to(way, here.shape), atol=1e-5)


def test_steering_adds_the_probe_normal(base, test_contexts, six):
    mean = base.mean(test_contexts)
    np.testing.assert_array_equal(base.steering(test_contexts, 0.0)[:, 0], bl.unit(mean))
    np.testing.assert_allclose(base.steering(test_contexts, 0.0)[:, 0], mean, atol=1e-6)
    normals = base.normals[test_contexts.domain][:, None]
    cosine = [(base.steering(test_contexts, s) * normals).sum(-1) for s in bl.STRENGTHS]
    assert (np.diff(cosine, axis=0) > 0).all()
    made, context = six  # by hand: (1, 0, 0) + .75 (0, 0, 1) = (.8, 0, .6) x 1.25
    np.testing.assert_allclose(made.steering(context, 0.75), [[[0.8, 0, 0.6]]], atol=1e-6)


def test_rocchio_by_hand(six):
    made, context = six
    # The seed's nearest three are 1 (has it), 2 (lacks it) and 3 (not looked up).
    query = made.rocchio(context, (3, 1.0, 0.5))[0, 0]
    np.testing.assert_allclose(query, normal([1 + 0.8 - 0.5 * 0.6, 0.6, -0.5 * 0.8]), atol=1e-6)
    # All five: positives 1 and 4, mean (.4, .8, 0); negatives 2 and 5, mean (-.2, 0, .4).
    query = made.rocchio(context, (5, 0.5, 1.0))[0, 0]
    np.testing.assert_allclose(query, normal([1 + 0.2 + 0.2, 0.4, -0.4]), atol=1e-6)
    # Depth 1 finds no negative: nothing is subtracted.
    query = made.rocchio(context, (1, 1.0, 1.0))[0, 0]
    np.testing.assert_allclose(query, normal([1.8, 0.6, 0]), atol=1e-6)


def test_predictor_step_and_steering_bring_the_attribute(base, test_contexts):
    c = base.mean(test_contexts)
    ascent = base.gradient(c, test_contexts.domain)
    step = base.predictor_step(test_contexts, 0.3)
    np.testing.assert_allclose(step[:, 0], bl.unit(c + 0.3 * ascent), atol=1e-6)

    def attribute(queries):
        s = base.searcher
        return s.judge(s.rank(queries, test_contexts), test_contexts).attribute.mean()

    start, steered = attribute(c[:, None]), base.steering(test_contexts, 0.3)
    for queries in (step, steered, base.rocchio(test_contexts, (20, 1.0, 0.25))):
        assert attribute(queries) > start + 0.03


def test_ridge_is_sklearns(fitted, monkeypatch):
    drawn = []
    draw = bl.tail_batch
    monkeypatch.setattr(bl, "tail_batch", lambda *a: drawn.append(read_all(draw(*a))) or drawn[-1])
    weights = bl.fit_ridge(fitted.data, seeds=8, alphas=ALPHAS, batches=2, size=512)
    assert len(drawn) == 2 and set(weights) == set(ALPHAS)
    context = np.concatenate([b.condition.context for b in drawn]).astype(np.float64)
    domain = np.concatenate([b.condition.domain for b in drawn])
    target = np.concatenate([b.target[:, 0] for b in drawn])
    mean = context.sum(1) / np.linalg.norm(context.sum(1), axis=1, keepdims=True)
    features = np.append(mean, np.ones((len(mean), 1)), 1)  # the intercept is penalised too
    for alpha in ALPHAS:
        for m in range(4):
            peer = Ridge(alpha, fit_intercept=False).fit(features[domain == m], target[domain == m])
            np.testing.assert_allclose(weights[alpha][m], peer.coef_.T, atol=1e-4)


def test_ridge_query_and_its_steering(base, test_contexts):
    c = base.mean(test_contexts)
    plain = base.ridge_query(test_contexts, (10.0, 0.0))[:, 0]
    steered = base.ridge_query(test_contexts, (10.0, 0.5))[:, 0]
    for q in range(len(c)):
        m = test_contexts.domain[q]
        expected = normal(np.append(c[q], 1) @ base.ridge[10.0][m])
        np.testing.assert_allclose(plain[q], expected, atol=1e-5)
        np.testing.assert_allclose(steered[q], normal(expected + 0.5 * base.normals[m]), atol=1e-5)


def test_reranked_is_the_top_by_prediction(base, test_contexts):
    c, x = base.mean(test_contexts), np.asarray(base.embeddings)
    ids, queries = base.reranked(test_contexts, 50)
    np.testing.assert_array_equal(queries[:, 0], base.mean(test_contexts))
    assert ids.shape == (len(test_contexts), 20) and np.issubdtype(ids.dtype, np.integer)
    for q in range(len(c)):
        score = x @ c[q]
        score[seeds_of(test_contexts, q)] = -2
        top = np.argsort(-score, kind="stable")[:50]
        assert score[ids[q]].min() >= score[top[-1]] - 1e-6
        rho = base.predicted[test_contexts.domain[q]]
        assert (np.diff(rho[ids[q]]) <= 0).all()
        np.testing.assert_allclose(np.sort(rho[ids[q]]), np.sort(rho[top])[-20:], atol=1e-6)
    same, _ = base.reranked(test_contexts, 20)  # nothing to choose from: the seed mean's own items
    ranked = base.searcher.rank(c[:, None], test_contexts)
    np.testing.assert_array_equal(np.sort(same, 1), np.sort(ranked, 1))


def test_nearest_tail_is_a_lookup(base, test_contexts):
    x, data, c = np.asarray(base.embeddings, np.float64), base.data, base.mean(test_contexts)
    query = base.nearest_tail(test_contexts, None)[:, 0]
    centres = np.stack([normal(x[row[row >= 0]].mean(0)) for row in data.cells.members])
    for q in range(len(c)):
        cell = (centres @ c[q]).argmax()
        tail = data.tails.tail[test_contexts.domain[q], cell]
        np.testing.assert_allclose(query[q], normal(x[tail[tail >= 0]].mean(0)), atol=1e-5)


def test_references_read_the_pattern(base, test_contexts):
    catalogue, x = base.searcher.catalogue, np.asarray(base.embeddings, np.float64)
    predicted, true = (m.run(test_contexts, None)[:, 0] for m in base.references())
    for q in range(len(test_contexts)):
        m, rows = test_contexts.domain[q], catalogue.patterns == test_contexts.pattern[q]
        positive = rows & (catalogue.labels[m] == 1)
        np.testing.assert_allclose(true[q], normal(x[positive].mean(0)), atol=1e-5)
        rows = np.flatnonzero(rows)
        size = max(8, int(np.ceil(0.1 * len(rows))))
        top = rows[np.argsort(-base.predicted[m, rows])[:size]]
        np.testing.assert_allclose(predicted[q], normal(x[top].mean(0)), atol=1e-5)


def test_methods_read_what_they_say(base, test_contexts):
    """No method moves with the pattern asked for or a label not bought; references do."""
    catalogue = base.searcher.catalogue
    flipped = dataclasses.replace(catalogue, labels=(1 - catalogue.labels).astype(np.int8))
    searcher = dataclasses.replace(base.searcher, catalogue=flipped)
    blind = dataclasses.replace(base, searcher=searcher)
    hidden = dataclasses.replace(test_contexts, pattern=np.roll(test_contexts.pattern, 30))
    nothing = dataclasses.replace(
        base, labels=None, predicted=None, normals=None, gradient=None, ridge={}, data=None
    )
    for method, other in zip(base.methods(), blind.methods(), strict=True):
        setting = method.grid[-1]
        answer = method.run(test_contexts, setting)
        again = other.run(hidden, setting)
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (answer, again)), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=method.name)
        if method.uses == "nothing":
            rerun = next(m for m in nothing.methods() if m.name == method.name)
            np.testing.assert_array_equal(answer, rerun.run(test_contexts, setting))
    uses = [m.uses for m in base.references()]
    assert uses == ["pattern", "all labels"]
    for method, other in zip(base.references(), blind.references(), strict=True):
        assert not np.allclose(method.run(test_contexts, None), method.run(hidden, None))
        same = np.allclose(method.run(test_contexts, None), other.run(test_contexts, None))
        assert same == (method.uses == "pattern")


def test_every_setting_answers(base, test_contexts):
    few = test_contexts.take(np.arange(0, len(test_contexts), 9))
    names = []
    for method in (*base.methods(), *base.references()):
        names.append(method.name)
        assert len(set(method.grid)) == len(method.grid) >= 1
        for setting in method.grid:
            out = method.run(few, setting)
            if isinstance(out, tuple):
                ids, out = out
                assert ids.shape == (len(few), 20) and np.issubdtype(ids.dtype, np.integer)
            assert out.shape[:2] == (len(few), 1)
            np.testing.assert_allclose(np.linalg.norm(out, axis=-1), 1, atol=1e-5)
    assert len(set(names)) == len(names)
