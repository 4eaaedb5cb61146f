"""The metrics against a corpus worked out by hand, and the identities they must satisfy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.retrieval.metrics import Judgement, judge, macro
from genret.types import InputError

# Ten items, two patterns and one item in none, two domains; all values below are worked by hand.
#
#   item      0  1  2  3  4  5  6  7  8  9
#   pattern   0  0  0  0  0  1  1  1  1  -
#   domain 0  1  1  0  1  0  1  1  0  0  1
#   domain 1  0  1  ?  0  0  0  0  0  1  1
PATTERNS = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, -1])
LABELS = np.array([[1, 1, 0, 1, 0, 1, 1, 0, 0, 1], [0, 1, -1, 0, 0, 0, 0, 0, 1, 1]], np.int8)

CONTEXTS = {
    # Context 0: domain 0, pattern 0, seeds 2 4. T = 0 5 1 9: attribute 1 1 1 1, pattern 1 0 1 0.
    #   Attribute 4/4, Purity 2/4, Joint 2/4. Positives of pattern 0 are 0 1 3, none a seed:
    #   Headroom min(4, 3)/4 = 3/4, so normalised 2/3.
    # Context 1: domain 0, pattern 1, seed 5. T = 6 7 0 2: attribute 1 0 1 0, pattern 1 1 0 0.
    #   Attribute 2/4, Purity 2/4, Joint 1/4. Positives are 5 and 6, 5 is the seed:
    #   Headroom 1/4, so normalised 1.
    # Context 2: domain 1, pattern 0, seed 0. T = 3 4 8 1: attribute 0 0 1 1, pattern 1 1 0 1.
    #   Attribute 2/4, Purity 3/4, Joint 1/4. The one positive is 1 (2 is unknown):
    #   Headroom 1/4, so normalised 1.
    "ids": np.array([[0, 5, 1, 9], [6, 7, 0, 2], [3, 4, 8, 1]]),
    "domain": np.array([0, 0, 1]),
    "pattern": np.array([0, 1, 0]),
    "seeds": np.array([[2, 4], [5, -1], [0, 0]]),  # a seed given twice is one item
}
EXPECTED = Judgement(
    joint=[2 / 4, 1 / 4, 1 / 4],
    attribute=[4 / 4, 2 / 4, 2 / 4],
    purity=[2 / 4, 2 / 4, 3 / 4],
    headroom=[3 / 4, 1 / 4, 1 / 4],
    normalised_joint=[2 / 3, 1, 1],
)


def judge_hand(**changes):
    return judge(**{**CONTEXTS, "labels": LABELS, "patterns": PATTERNS, **changes})


def test_by_hand():
    judged = judge_hand()
    for name, value in judged._asdict().items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, np.float32(getattr(EXPECTED, name)), err_msg=name)


def test_macro_by_hand():
    # Pattern 0 holds contexts 0 and 2: (2/4 + 1/4) / 2 = 3/8; pattern 1 holds context 1: 1/4.
    # Their mean is 5/16; the plain mean, 1/3, would weigh pattern 0 twice.
    assert macro(judge_hand().joint, CONTEXTS["pattern"]) == 5 / 16


@pytest.mark.parametrize(
    ("field", "ids", "problem"),
    [
        ("ids", [3, 4, 8, 2], "context 2 returns an item whose label is unknown"),
        ("ids", [3, 4, 8, 0], "context 2 returns one of its seeds"),
        ("ids", [3, 4, 8, 3], "context 2 returns an item twice"),
        ("ids", [3, 4, 8, -1], "context 2 returns fewer than K items"),
    ],
)
def test_lists_that_cannot_be_judged(field, ids, problem):
    with pytest.raises(InputError, match=f"{field}: {problem}"):
        judge_hand(ids=np.array([*CONTEXTS["ids"][:2].tolist(), ids]))


def test_contexts_that_cannot_be_satisfied():
    # Domain 1 has the one positive 1 in pattern 0; as a seed it leaves nothing to find.
    seeds = np.array([[2, 4], [5, -1], [1, 1]])
    ids = np.array([*CONTEXTS["ids"][:2].tolist(), [3, 4, 8, 0]])
    with pytest.raises(InputError, match="context 2 has no positive item in its pattern"):
        judge_hand(seeds=seeds, ids=ids)
    with pytest.raises(InputError, match="context 1 asks for no pattern"):
        judge_hand(pattern=np.array([0, -1, 0]))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(0, 4))
def test_identities(seed, k, num_seeds):
    rng = np.random.default_rng(seed)
    n, q = 40, 6
    labels = rng.integers(-1, 2, (2, n)).astype(np.int8)
    patterns = rng.integers(-1, 3, n)
    labels[:, :6] = 1  # two positives of each pattern that are never seeds: headroom is not zero
    patterns[:6] = np.arange(6) % 3
    domain, pattern = rng.integers(2, size=q), rng.integers(3, size=q)
    seeds = np.stack([rng.permutation(np.arange(6, n))[:num_seeds] for _ in range(q)])
    seeds[rng.random(seeds.shape) < 0.3] = -1
    known = [np.setdiff1d(np.flatnonzero(labels[m] >= 0), s) for m, s in zip(domain, seeds, strict=True)]
    k = min(k, *map(len, known))
    ids = np.stack([rng.permutation(row)[:k] for row in known])
    context = {"domain": domain, "pattern": pattern, "seeds": seeds}
    judged = judge(ids, labels=labels, patterns=patterns, **context)
    joint, attribute, purity, headroom, normalised = judged

    assert (joint <= np.minimum(attribute, purity)).all()
    assert (joint >= attribute + purity - 1 - 1e-6).all()  # one rounding of the sum
    assert (joint <= headroom).all() and (normalised <= 1).all()
    assert (np.stack(judged) >= 0).all() and (headroom > 0).all()
    np.testing.assert_allclose(normalised, joint / headroom, rtol=1e-6)

    # The slow reading of the definitions, item by item.
    for i in range(q):
        a, p = labels[domain[i]] == 1, patterns == pattern[i]
        assert joint[i] == np.float32(sum(a[t] and p[t] for t in ids[i]) / k)
        reachable = [t for t in range(n) if a[t] and p[t] and t not in seeds[i]]
        assert headroom[i] == np.float32(min(k, len(reachable)) / k)

    # Neither the order of a list nor the names of the items matter.
    shuffled = rng.permuted(ids, axis=1)
    new = rng.permutation(n)  # item i is called new[i]
    renamed = np.empty_like(labels), np.empty_like(patterns)
    renamed[0][:, new], renamed[1][new] = labels, patterns
    new_seeds = np.where(seeds >= 0, new[seeds], -1)
    other = judge(
        new[shuffled],
        labels=renamed[0],
        patterns=renamed[1],
        domain=domain,
        pattern=pattern,
        seeds=new_seeds,
    )
    np.testing.assert_array_equal(np.stack(other), np.stack(judged))

    # An item that was not returned and is no positive of a pattern changes nothing when unlabelled.
    spare = np.setdiff1d(np.flatnonzero((labels != 1).all(axis=0)), ids)
    forgotten = labels.copy()
    forgotten[:, spare] = -1
    again = judge(ids, labels=forgotten, patterns=patterns, **context)
    np.testing.assert_array_equal(np.stack(again), np.stack(judged))


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1)), min_size=1, max_size=30))
def test_macro_against_a_dictionary(pairs):
    groups: dict[int, list[float]] = {}
    for pattern, value in pairs:
        groups.setdefault(pattern, []).append(value)
    expected = np.mean([np.mean(values) for values in groups.values()])
    pattern, values = np.array([p for p, _ in pairs]), np.array([v for _, v in pairs])
    assert macro(values, pattern) == pytest.approx(expected, abs=1e-12)
