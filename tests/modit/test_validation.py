"""Predictor validation: orders inside a pattern, by hand and by planted truth."""

import numpy as np
import pytest

from genret.modit.validation import calibration_error, true_density, within_pattern
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
