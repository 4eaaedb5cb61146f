"""The bootstrap against scipy's, a normal interval, and how often it covers the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from genret.retrieval.metrics import macro
from genret.retrieval.significance import paired_bootstrap
from genret.types import InputError


def test_one_context_per_pattern_agrees_with_scipy():
    difference = np.random.default_rng(0).gamma(2.0, 0.1, 80) - 0.15
    mean, low, high = paired_bootstrap(difference, np.arange(80))
    peer = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    # Two sets of 10,000 draws place a 2.5 % quantile within about 3 % of a standard error.
    assert mean == pytest.approx(difference.mean())
    assert (low, high) == pytest.approx(peer.confidence_interval, abs=0.1 * peer.standard_error)


def test_mean_is_the_macro_average():
    # By hand: pattern 7 has mean (.1 + .3) / 2 = .2, pattern 4 has -.1; the average is .05.
    difference, pattern = np.array([0.1, -0.1, 0.3]), np.array([7, 4, 7])
    mean, low, high = paired_bootstrap(difference, pattern)
    assert mean == pytest.approx(0.05) == macro(difference, pattern)
    # Two patterns are drawn from two: both 4 with chance 1/4, both 7 with chance 1/4.
    assert (low, high) == pytest.approx((-0.1, 0.2))


def test_covers_a_planted_effect():
    """Patterns differ by sd .1 around .05 and contexts by sd .05: 95 % of intervals hold .05."""
    rng, held = np.random.default_rng(3), 0
    pattern = np.repeat(np.arange(60), 2)
    for trial in range(400):
        difference = 0.05 + rng.normal(0, 0.1, 60)[pattern] + rng.normal(0, 0.05, 120)
        _, low, high = paired_bootstrap(difference, pattern, resamples=1_000, seed=trial)
        held += low <= 0.05 <= high
    assert 0.91 <= held / 400 <= 0.98  # 3 standard errors of 400 trials around 94.5 %


def test_copies_of_a_context_bring_no_certainty():
    """Drawing contexts instead of patterns would shrink the interval by the square root of 5."""
    difference = np.random.default_rng(4).normal(0.02, 0.1, 40)
    once = paired_bootstrap(difference, np.arange(40))
    copied = paired_bootstrap(np.repeat(difference, 5), np.repeat(np.arange(40), 5))
    assert copied == pytest.approx(once)


def test_no_difference_is_exactly_zero():
    assert paired_bootstrap(np.zeros(9), np.arange(9) % 4) == (0.0, 0.0, 0.0)


def test_blocks_do_not_change_the_draws():
    """6,000 patterns take several blocks; the interval is the normal one, 1.96 sd / sqrt(P)."""
    difference = np.random.default_rng(5).normal(0.01, 0.2, 6_000)
    mean, low, high = paired_bootstrap(difference, np.arange(6_000), resamples=2_000)
    half = 1.96 * difference.std() / np.sqrt(6_000)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.12 * half)
    assert (mean, low, high) == paired_bootstrap(difference, np.arange(6_000), resamples=2_000)


@pytest.mark.parametrize(
    "difference, cluster, problem",
    [
        ([0.1, 0.2], [0], "shape"),
        ([], [], "shape"),
        ([0.1, np.nan], [0, 1], "not finite"),
    ],
)
def test_refuses(difference, cluster, problem):
    with pytest.raises(InputError, match=problem):
        paired_bootstrap(np.array(difference), np.array(cluster))
