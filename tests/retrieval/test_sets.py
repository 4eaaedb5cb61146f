"""Set metrics: closed forms, the authors' own Vendi package, and brute force for MMR and DPP."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import vendi_score.vendi as package
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.retrieval import sets
from genret.types import InputError


def unit_rows(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


# The package still names a SciPy class by its old path.
pytestmark = pytest.mark.filterwarnings("ignore:Please import `csr_matrix`:DeprecationWarning")

sizes = st.tuples(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 20))


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_vendi_is_the_authors_package_primal_and_dual(size):
    seed, n, width = size
    rows = unit_rows(np.random.default_rng(seed), n, width).astype(np.float64)
    found = sets.vendi(rows)
    assert found.score == pytest.approx(package.score_X(rows), rel=1e-6)
    assert found.score == pytest.approx(package.score_dual(rows), rel=1e-6)
    assert found.share == pytest.approx(found.score / n)
    assert 1 - 1e-6 <= found.score <= min(n, width) + 1e-6  # rows are unit-norm in float32
    assert found.normalised == pytest.approx((found.score - 1) / max(n - 1, 1), abs=1e-6)


def test_vendi_closed_forms():
    copies = np.tile(unit_rows(np.random.default_rng(0), 1, 7), (5, 1))
    assert sets.vendi(copies) == pytest.approx((1, 0, 0.2), abs=1e-6)
    assert sets.vendi(np.eye(6)[:4]) == pytest.approx((4, 1, 1), abs=1e-9)
    assert sets.vendi(np.eye(3)[[0, 0, 1, 1]]) == pytest.approx((2, 1 / 3, 0.5), abs=1e-9)  # dual: 3 < 4
    # Two rows with cosine c: eigenvalues (1 ± c) / 2.
    c = 0.6
    expected = np.exp(-sum(p * np.log(p) for p in ((1 + c) / 2, (1 - c) / 2)))
    assert sets.vendi(np.array([[1, 0], [c, 0.8]])).score == pytest.approx(expected, rel=1e-9)
    assert sets.vendi(np.array([[1.0, 0.0]])) == (1, 0, 1)


def test_vendi_groups_match_the_one_by_one_score_and_ignore_padding_and_order():
    rng = np.random.default_rng(1)
    groups = unit_rows(rng, 32, 10, 24)
    groups[0] = groups[0, :1]  # copies
    groups[1, :10] = np.eye(24)[:10]
    for i, missing in enumerate((3, 9, 10)):
        groups[2 + i, 10 - missing :] = 0
    found = np.asarray(sets.vendi_groups(jnp.asarray(groups)))
    expected = [sets.vendi(g[(g != 0).any(-1)]).score if g.any() else 0.0 for g in groups]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    assert found[:2] == pytest.approx([1, 10], rel=1e-5) and found[3] == pytest.approx(1) and found[4] == 0
    shuffled = np.stack([g[rng.permutation(10)] for g in groups])
    np.testing.assert_allclose(sets.vendi_groups(jnp.asarray(shuffled)), found, rtol=2e-5, atol=1e-6)


def test_vendi_refuses_what_is_no_set_of_unit_rows():
    for rows in (np.eye(3) * 2, np.zeros((2, 3)), np.empty((0, 3)), np.ones(3), np.full((1, 2), np.nan)):
        with pytest.raises(InputError, match="rows"):
            sets.vendi(rows)


def test_the_papers_two_vendi_protocols_differ():
    # Run 1 asks e1 and e2, run 2 asks e2 and e1: the runs' means agree, their sub-queries do not.
    runs = [np.eye(3)[[0, 1]], np.eye(3)[[1, 0]]]
    assert sets.vendi_of_runs(runs).score == pytest.approx(1)
    assert sets.vendi_of_subqueries(runs).score == pytest.approx(2)
    # Runs of different sizes: means e1 and (e1 + e2) / √2, cosine 1/√2.
    runs = [np.eye(3)[[0]], np.eye(3)[[0, 1]]]
    c = np.sqrt(0.5)
    expected = np.exp(-sum(p * np.log(p) for p in ((1 + c) / 2, (1 - c) / 2)))
    assert sets.vendi_of_runs(runs).score == pytest.approx(expected)
    shares = np.array([2, 1]) / 3  # e1 twice, e2 once
    assert sets.vendi_of_subqueries(runs).score == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    with pytest.raises(InputError, match="averages to zero"):
        sets.vendi_of_runs([np.array([[1.0, 0], [-1, 0]])])
    with pytest.raises(InputError, match="runs"):
        sets.vendi_of_runs([])


def test_coherence_is_the_mean_cosine_over_pairs():
    rng = np.random.default_rng(2)
    rows = unit_rows(rng, 6, 5, 8)
    rows[1, 3:] = 0
    rows[2, 1:] = 0
    for i, count in enumerate((5, 3)):
        pairs = [rows[i, a] @ rows[i, b] for a, b in itertools.combinations(range(count), 2)]
        assert sets.coherence(rows)[i] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert sets.coherence(rows)[2] == 1 and sets.coherence(0 * rows)[2] == 0
    assert sets.coherence(np.eye(4)) == pytest.approx(0)
    assert sets.coherence(np.tile(np.eye(4)[:1], (3, 1))) == pytest.approx(1)


def test_duplicate_rate_by_hand():
    ids = np.array([[3, 1, 2, 4], [7, 7, 7, 7], [5, 2, 5, -1], [-1, -1, -1, -1], [9, 9, -1, -1]])
    np.testing.assert_allclose(sets.duplicate_rate(ids), [0, 3 / 4, 1 / 3, 0, 1 / 2])


def test_found_by_hand_and_against_python_sets():
    ids = np.array([[[1, 2, 3], [3, 4, 5]], [[9, 8, 7], [-1, -1, -1]]])
    found = sets.found(ids, [np.array([3, 5, 60, 61]), np.array([1])])
    np.testing.assert_allclose(found.recall, [1 / 2, 0])
    np.testing.assert_allclose(found.hit, [1, 0])
    np.testing.assert_allclose(found.precision, [2 / 5, 0])
    np.testing.assert_allclose(found.pool, [5, 3])
    rng = np.random.default_rng(4)
    ids = rng.integers(-1, 40, (20, 3, 7))
    references = [rng.integers(0, 40, rng.integers(1, 9)) for _ in ids]
    found = sets.found(ids, references)
    for q, wanted in enumerate(references):
        pool, wanted = set(ids[q].ravel().tolist()) - {-1}, set(wanted.tolist())
        assert found.recall[q] == pytest.approx(len(pool & wanted) / len(wanted))
        assert found.precision[q] == pytest.approx(len(pool & wanted) / len(pool))
        assert found.hit[q] == bool(pool & wanted)
    # Neither the order of the searches nor that within them matters.
    again = sets.found(ids[:, ::-1, ::-1], references)
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="set 1 is empty"):
        sets.found(ids[:2], [np.array([1]), np.array([], int)])
    with pytest.raises(InputError, match="references"):
        sets.found(ids, references[:3])


def test_soft_coverage_by_hand():
    reference = np.eye(3)[:2]
    rows = np.array([[0.6, 0.8, 0], [0, 0, 1]])
    assert sets.soft_coverage(rows, reference) == pytest.approx(0.7)
    assert sets.soft_coverage(np.eye(3), reference) == pytest.approx(1)


def slow_mmr(relevance, rows, k, trade):
    chosen = []
    while len(chosen) < k:
        left = [i for i in range(len(rows)) if i not in chosen]
        if not chosen:
            best = max(left, key=lambda i: (relevance[i], -i))
        else:
            value = {
                i: trade * relevance[i] - (1 - trade) * max(rows[i] @ rows[j] for j in chosen) for i in left
            }
            best = max(left, key=lambda i: (value[i], -i))
        chosen.append(best)
    return chosen


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_mmr_is_its_definition(seed, trade):
    rng = np.random.default_rng(seed)
    rows = unit_rows(rng, 9, 4).astype(np.float64)
    relevance = rng.normal(size=9)
    found = sets.mmr(relevance, rows, 6, trade)
    assert found.tolist() == slow_mmr(relevance, rows, 6, trade)
    if trade == 1:
        assert found.tolist() == np.argsort(-relevance)[:6].tolist()


def log_det(quality, rows, chosen):
    scaled = rows[list(chosen)] * quality[list(chosen), None]
    return np.linalg.slogdet(np.eye(len(chosen)) + scaled @ scaled.T)[1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_greedy_dpp_takes_the_best_gain_each_time_and_keeps_its_bound(seed):
    rng = np.random.default_rng(seed)
    rows = unit_rows(rng, 8, 5).astype(np.float64)
    quality = rng.uniform(0.2, 3, 8)
    found = sets.greedy_dpp(quality, rows, 4).tolist()
    for i in range(4):
        left = [j for j in range(8) if j not in found[:i]]
        gains = [log_det(quality, rows, [*found[:i], j]) for j in left]
        assert log_det(quality, rows, found[: i + 1]) == pytest.approx(max(gains), abs=1e-9)
    best = max(log_det(quality, rows, chosen) for chosen in itertools.combinations(range(8), 4))
    assert log_det(quality, rows, found) >= (1 - 1 / np.e) * best - 1e-9


def test_greedy_dpp_prefers_what_is_new_and_what_is_good():
    rows = np.eye(3)[[0, 0, 1, 2]]
    assert sets.greedy_dpp(np.ones(4), rows, 3).tolist() == [0, 2, 3]
    assert sets.greedy_dpp(np.array([1, 2, 1, 3.0]), rows, 3).tolist() == [3, 1, 2]
    assert sets.greedy_dpp(np.array([9.0, 9, 0.1, 0.1]), rows, 2).tolist() == [0, 1]


def test_selection_refuses_bad_input():
    rows = np.eye(3)
    for call in (
        lambda: sets.mmr(np.ones(3), rows, 4),
        lambda: sets.mmr(np.ones(2), rows, 1),
        lambda: sets.mmr(np.ones(3), rows, 1, 1.5),
        lambda: sets.mmr(np.array([1, np.nan, 1]), rows, 1),
        lambda: sets.greedy_dpp(np.array([1, -1, 1]), rows, 1),
        lambda: sets.greedy_dpp(np.ones(3), rows, 0),
    ):
        with pytest.raises(InputError):
            call()
