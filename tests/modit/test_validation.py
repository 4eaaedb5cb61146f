"""Predictor validation: orders inside a pattern, by hand and by planted truth."""

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import ndcg_score

from genret.modit.density import knn_density
from genret.modit.protocol import SPLITS
from genret.modit.validation import (
    Spread,
    calibration_error,
    predictor_report,
    sampled,
    true_density,
    within_pattern,
)
from genret.retrieval.index import ExactIndex


def test_orders_inside_patterns_by_hand():
    truth = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.1, 0.2, 0.3, 0.4])
    pattern = np.repeat([0, 1], 5)
    # Pattern 0 in perfect order. Pattern 1 (truth ranks 5 1 2 3 4) predicted 1 2 3 4 5:
    # Spearman 1 - 6·(16+1+1+1+1)/120 = 0, Kendall (6 - 4)/10 = .2.
    predicted = np.array([1, 2, 3, 4, 5, 1, 2, 3, 4, 5.0])
    found = within_pattern(predicted, truth, pattern)
    assert found["spearman"] == pytest.approx((1 + 0) / 2)
    assert found["kendall"] == pytest.approx((1 + 0.2) / 2)
    assert found["patterns"] == 2 and 0.8 < found["ndcg"] < 1
    # A shift per pattern changes nothing: only the order inside a pattern counts.
    assert within_pattern(predicted + 100 * pattern, truth, pattern) == found
    assert within_pattern(predicted, np.full(10, 0.3), pattern)["patterns"] == 0


def test_patterns_of_one_size_are_judged_as_one_by_one():
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 12, 180)  # sizes repeat
    truth = np.where(rng.random(180) < 0.1, np.nan, rng.integers(0, 5, 180) / 4)
    predicted = rng.integers(0, 9, 180) / 8  # both with ties
    each = []
    for p in range(12):
        here = (pattern == p) & np.isfinite(truth)
        f, y = predicted[here], truth[here]
        each.append((spearmanr(f, y)[0], kendalltau(f, y)[0], ndcg_score(y[None], f[None])))
    found = within_pattern(predicted, truth, pattern)
    assert found.pop("patterns") == 12
    np.testing.assert_allclose(list(found.values()), np.mean(each, axis=0), atol=5.1e-5)  # four decimals


def test_calibration_error_is_zero_for_the_truth_and_the_shift_for_a_shift():
    truth = np.random.default_rng(0).random(200)
    assert calibration_error(truth, truth) == 0
    assert calibration_error(truth + 0.1, truth) == pytest.approx(0.1)


def test_true_density_is_attribute_at_k_by_brute_force(molecules):
    items = np.array([3, 77, 500])
    found = true_density(molecules, items, ExactIndex(molecules.embeddings), 10)
    cosine = molecules.embeddings[items] @ molecules.embeddings.T
    cosine[np.arange(3), items] = -2
    nearest = np.argsort(-cosine, axis=1)[:, :10]
    np.testing.assert_allclose(found, (molecules.labels[:, nearest] == 1).mean(-1))


def test_the_report_has_a_row_per_budget_predictor_domain_and_split(molecules, splits, fitted):
    index = ExactIndex(molecules.embeddings)
    truth = true_density(molecules, np.arange(2000), index, 20)
    knows = Spread(0.5, fitted.labels, truth, fitted.normals, fitted.intercepts)
    own = Spread(0.2, fitted.labels, fitted.predicted, fitted.normals, fitted.intercepts)
    rows = predictor_report(molecules, splits, iter([own, knows]), index, 20)
    names = ("metric predictor (MLP)", "kNN of the probes", "linear probe")
    keys = [(r["budget"], r["split"], r["predictor"], r["domain"]) for r in rows]
    assert keys == [
        (b, s, n, d) for b in (0.2, 0.5) for s in SPLITS for n in names for d in molecules.attribute_names
    ]  # fmt: skip
    for row in rows:
        holdout = splits.holdout(row["split"], "test")
        items = np.flatnonzero(holdout.items & np.isin(molecules.patterns, holdout.patterns))
        assert not splits.train[items].any()
        assert (row["items"], row["lookups"]) == (len(items), fitted.labels.lookups)
        m, x = molecules.attribute_names.index(row["domain"]), molecules.embeddings[items]
        mlp = truth if row["budget"] == 0.5 else fitted.predicted
        predicted = {
            names[0]: mlp[m, items],
            names[1]: knn_density(molecules, fitted.labels, x)[m],
            # The very product that the report takes: another order of summation swaps near ties.
            names[2]: (fitted.normals @ x.T + fitted.intercepts[:, None])[m],
        }[row["predictor"]]
        expected = within_pattern(predicted, truth[m, items], molecules.patterns[items])
        found = [row[n] for n in ("spearman", "kendall", "ndcg", "patterns")]
        np.testing.assert_allclose(found, list(expected.values()), atol=1e-9)
        if row["predictor"] == names[2]:  # a direction is not calibrated
            assert row["calibration"] is None
        else:
            assert row["calibration"] == calibration_error(predicted, truth[m, items])
    exact = [r for r in rows if r["budget"] == 0.5 and r["predictor"] == names[0]]
    assert all(r["spearman"] > 0.999 and r["calibration"] == 0 and r["patterns"] > 0 for r in exact)


def test_a_sample_is_of_whole_patterns_and_few_items_are_all_taken():
    pattern = np.repeat(np.arange(40), np.arange(1, 41))
    items = np.random.default_rng(0).permutation(5000)[: len(pattern)]
    np.testing.assert_array_equal(sampled(items, pattern, most=len(items)), items)
    some = sampled(items, pattern, most=300)
    assert 250 < len(some) <= 300 and set(some) < set(items)
    taken = np.isin(items, some)
    for p in range(40):
        assert taken[pattern == p].all() or not taken[pattern == p].any()
