"""The bootstrap against scipy's, a normal interval, how often it covers the truth, and Holm by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from genret.retrieval.metrics import macro
from genret.retrieval.significance import holm, paired_bootstrap, paired_test
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


def test_p_by_hand():
    # Every resample is above zero: p = 2 (1 + 0) / (1 + R), never 0. None is: no side has weight.
    for sign in (1, -1):
        assert paired_test(sign * np.full(5, 0.1), np.arange(5), resamples=99).p == 2 / 100
    assert paired_test(np.zeros(5), np.arange(5), resamples=99) == (0, 0, 0, 1.0)
    # Two patterns of opposite difference: a resample is below zero with chance 1/4, zero with 1/2.
    assert paired_test(np.array([-0.1, 0.1]), np.arange(2)).p == 1.0
    # -.1 and .3: below zero only if both draws are the first, chance 1/4, so p is about 1/2.
    assert paired_test(np.array([-0.1, 0.3]), np.arange(2)).p == pytest.approx(0.5, abs=0.02)


def test_p_says_what_the_interval_says_and_agrees_with_t():
    rng = np.random.default_rng(6)
    for trial, shift in enumerate((0.0, 0.01, 0.02, 0.03, 0.05)):
        difference = rng.normal(shift, 0.1, 100)
        found = paired_test(difference, np.arange(100), seed=trial)
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
        assert found.p == pytest.approx(stats.ttest_1samp(difference, 0).pvalue, abs=0.03)
        assert found[:3] == paired_bootstrap(difference, np.arange(100), seed=trial)


def test_p_is_uniform_where_nothing_differs():
    """Patterns differ by sd .1 around 0 and contexts by sd .05: P(p <= a) = a, within 4 standard errors."""
    rng, found = np.random.default_rng(7), []
    pattern = np.repeat(np.arange(60), 2)
    for trial in range(600):
        difference = rng.normal(0, 0.1, 60)[pattern] + rng.normal(0, 0.05, 120)
        found.append(paired_test(difference, pattern, resamples=500, seed=trial).p)
    for level in (0.05, 0.2, 0.5, 0.8):
        share = np.mean(np.array(found) <= level)
        assert abs(share - level) < 4 * np.sqrt(level * (1 - level) / 600), level
    assert stats.kstest(found, "uniform").pvalue > 0.001


def test_cells_are_averaged_and_their_patterns_drawn_together():
    # By hand: cell 0 has pattern 3 (.1 + .3) / 2 = .2 and pattern 4 0, mean .1; cell 1 has pattern 3 .5.
    difference, pattern, cell = np.array([0.1, 0.3, 0.0, 0.5]), np.array([3, 3, 4, 3]), np.array([0, 0, 0, 1])
    found = paired_test(difference, pattern, cell)
    assert found.mean == pytest.approx((0.1 + 0.5) / 2)
    # Both draws 3: (.2 + .5) / 2 = .35; one of each: (.1 + .5) / 2; both 4: cell 1 is not there, 0.
    assert (found.low, found.high) == pytest.approx((0.0, 0.35))
    # The same difference in two cells of the same patterns is no more certain than in one.
    once = np.random.default_rng(8).normal(0.02, 0.1, 40)
    twice = paired_test(np.tile(once, 2), np.tile(np.arange(40), 2), np.repeat([0, 1], 40))
    assert twice == pytest.approx(paired_test(once, np.arange(40)))


def test_holm_by_hand():
    # Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04 -> running maximum .02 .03 .06 .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9, 0.02]) == pytest.approx([1.0, 1.0, 0.06])
    assert holm([0.3]) == [0.3] and len(holm([])) == 0


P_VALUES = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.05, 1.0]), min_size=1, max_size=8)


@given(P_VALUES)
def test_holm_is_the_step_down_procedure(p):
    """By Holm's own words: reject from the smallest on, at alpha / (hypotheses left), until one stands.

    The adjusted p-value is the least level at which a hypothesis falls; levels are tried between them.
    """

    def rejected(level):
        out, left = set(), sorted(range(len(p)), key=lambda i: p[i])
        while left and p[left[0]] * len(left) <= level:
            out.add(left.pop(0))
        return out

    adjusted = holm(p)
    edges = np.unique(np.append(adjusted, [0.0, 1.0]))
    for level in (edges[1:] + edges[:-1]) / 2:
        assert rejected(level) == set(np.flatnonzero(adjusted <= level))


@given(P_VALUES, st.randoms())
def test_holm_never_lowers_keeps_order_and_does_not_mind_it(p, random):
    adjusted = holm(p)
    assert (adjusted >= p).all() and (adjusted <= 1).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()
    turn = random.sample(range(len(p)), len(p))
    np.testing.assert_array_equal(holm(np.array(p)[turn]), adjusted[turn])


@pytest.mark.parametrize("p", [[0.1, np.nan], [-0.1], [1.1], [[0.1]]])
def test_holm_refuses(p):
    with pytest.raises(InputError, match="no probability"):
        holm(p)
