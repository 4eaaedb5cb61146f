"""Which pairs are kept: margin, filters, cap and the on-policy share, on pools drawn at random."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.modit.candidates import Pool
from genret.modit.pairs import FILTERS, PairRule, allowed, near_policy, select_pairs
from genret.retrieval.scoring import Counts
from genret.types import InputError

FREE = dict(improve=False, apart=np.pi)  # neither compared with the model's query nor by angle
ANY = PairRule(margin=1, filter="off", on_policy_share=0.0, **FREE)


def pool_of(rng, q, c, own, width=3):
    """Random directions; the last candidate is the model's one-call query."""
    x = rng.normal(size=(q, c, width))
    queries = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    on_policy = rng.random(c) < own
    on_policy[-1] = True
    return Pool(queries, tuple(f"made {i}" for i in range(c)), on_policy)


def counts_of(rng, q, c, k=8):
    purity, attribute = rng.integers(0, k + 1, (2, q, c))
    return Counts(rng.integers(0, np.minimum(purity, attribute) + 1), attribute, purity)


@st.composite
def drawn(draw):
    """(pool, counts, rule, the generator's seed)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    q, c = draw(st.integers(1, 12)), draw(st.integers(1, 7))
    pool = pool_of(rng, q, c, draw(st.sampled_from([0.0, 0.3, 0.8])))
    rule = PairRule(
        margin=draw(st.integers(1, 4)), filter=draw(st.sampled_from(FILTERS)), cap=draw(st.integers(1, 60)),
        on_policy_share=draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])),
        near=draw(st.sampled_from([0.0, 0.2, 0.8])), improve=draw(st.booleans()),
        apart=draw(st.sampled_from([0.5, 1.5, np.pi])),
    )  # fmt: skip
    return pool, counts_of(rng, q, c), rule, draw(st.integers(0, 2**31))


def permitted(pool, counts, rule, q, w, l):  # noqa: E741
    """The rule in words, one pair at a time; the last candidate is the reference."""
    joint, attribute, purity = (x[q] for x in counts)
    ok = joint[w] - joint[l] >= rule.margin
    if rule.filter in ("pair", "both", "dominance"):
        ok = ok and purity[w] >= purity[l]
    if rule.filter in ("reference", "both", "dominance"):
        ok = ok and purity[w] >= purity[-1]
    if rule.filter == "dominance":
        ok = ok and attribute[w] >= attribute[l]
    near = angles(pool, q, -1) <= rule.apart  # to the reference, for either side
    ok = ok and near[w] and near[l]
    return ok and (not rule.improve or joint[w] > joint[-1])


def angles(pool, q, w):
    """From candidate w to all of its context: 2 asin(‖u - v‖ / 2), accurate near 0."""
    x = pool.queries[q].astype(np.float64)
    return 2 * np.arcsin(np.clip(np.linalg.norm(x - x[w], axis=1) / 2, 0, 1))


def is_near(pool, q, w, near):
    """On policy, or the angle to some on-policy candidate is at most `near`."""
    return pool.on_policy[w] or bool((angles(pool, q, w)[pool.on_policy] <= near).any())


@given(drawn())
@settings(max_examples=200, deadline=None)
def test_every_pair_is_allowed_and_the_caps_and_shares_hold(case):
    pool, counts, rule, seed = case
    found = select_pairs(np.random.default_rng(seed), pool, counts, rule)
    q, c = counts.joint.shape
    triples = list(zip(found.context.tolist(), found.winner.tolist(), found.loser.tolist(), strict=True))
    assert len(found) == len(triples) == len(set(triples)) == len(found.own)
    for triple in triples:
        assert permitted(pool, counts, rule, *triple)
    own = {
        (i, w, v): is_near(pool, i, w, rule.near)
        for i in range(q) for w in range(c) for v in range(c) if permitted(pool, counts, rule, i, w, v)
    }  # fmt: skip
    assert found.own.tolist() == [own[t] for t in triples]
    if triples:
        assert found.own.mean() >= rule.on_policy_share
    kept, room = np.bincount(found.context, minlength=q), np.zeros(q, int)
    for i, *_ in own:
        room[i] += 1
    assert (kept <= np.minimum(rule.cap, room)).all()
    assert found.empty == (kept == 0).sum()
    # Before pairs are given up for the share, every context fills its places as far as it can.
    assert found.lost == np.minimum(rule.cap, room).sum() - len(found)
    # No more is given up than the share asks for: one more off-policy winner would break it.
    assert not found.lost or found.own.sum() / (len(found) + 1) < rule.on_policy_share
    assert rule.on_policy_share or not found.lost

    def margins(keys):
        return sorted((counts.joint[i, w] - counts.joint[i, v] for i, w, v in keys), reverse=True)

    first = int(np.ceil(rule.cap * rule.on_policy_share))
    for i in range(q):
        here = [t for t in own if t[0] == i]
        chosen = [t for t in triples if t[0] == i]
        # On-policy winners come first, those of the largest margin, and are never given up.
        best = margins(t for t in here if own[t])[:first]
        assert margins(t for t in chosen if own[t])[: len(best)] == best
        # The other places go to the largest margins of all that is left.
        rest = margins(chosen)
        for used in best:
            rest.remove(used)
        unused = margins(set(here) - set(chosen))
        assert found.lost or not rest or not unused or rest[-1] >= unused[0]


@given(drawn())
@settings(max_examples=50, deadline=None)
def test_the_same_generator_makes_the_same_pairs(case):
    pool, counts, rule, seed = case
    one, two = (select_pairs(np.random.default_rng(seed), pool, counts, rule) for _ in range(2))
    for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_filters_by_hand():
    # Candidates a, b, c and the reference r:   a     b     c     r
    counts = Counts(*(np.array([row]) for row in ([6, 4, 3, 1], [6, 9, 7, 3], [7, 6, 4, 5])))
    #                                   joint, attribute and purity.

    pool = pool_of(np.random.default_rng(0), 1, 4, 0.0)

    def pairs(**options):
        ok = allowed(pool, counts, PairRule(**{"margin": 2} | FREE | options))
        return {"abcr"[w] + "abcr"[v] for w, v in zip(*np.nonzero(ok[0]), strict=True)}

    every = {"ab", "ac", "ar", "br", "cr"}  # bc differs by one item
    assert pairs(filter="off") == every
    assert pairs(filter="pair") == every - {"cr"}  # c's purity, 4, is below r's 5
    assert pairs(filter="reference") == every - {"cr"}
    assert pairs(filter="both") == every - {"cr"}
    assert pairs(filter="dominance") == {"ar", "br"}  # a has less of the attribute than b and c
    assert pairs(filter="off", margin=3) == {"ac", "ar", "br"}
    assert pairs(filter="off", margin=1) == every | {"bc"}
    assert pairs(filter="off", margin=6) == set()
    # A reference that is hard to beat: only a has more than its Joint of 4 or its purity of 6.
    counts = counts._replace(joint=np.array([[6, 4, 1, 4]]), purity=np.array([[7, 5, 3, 6]]))
    assert pairs(filter="off") == {"ab", "ac", "ar", "bc", "rc"}
    assert pairs(filter="off", improve=True) == {"ab", "ac", "ar"}
    assert pairs(filter="pair") == {"ab", "ac", "ar", "bc", "rc"}
    assert pairs(filter="reference") == {"ab", "ac", "ar", "rc"}


def test_what_lies_far_from_the_models_query_is_on_neither_side():
    # a, b and c at .3, -.4 and .7 radians from the query r, which is the worst, then the best but for b.
    angle = np.array([0.3, -0.4, 0.7, 0.0])
    queries = np.stack([np.cos(angle), np.sin(angle)], -1)[None].astype(np.float32)
    pool = Pool(queries, ("made",) * 4, np.arange(4) == 3)

    def pairs(joint, apart):
        joint = np.array([joint])
        ok = allowed(pool, Counts(joint, joint, joint), dataclasses.replace(ANY, apart=apart))
        return {"abcr"[w] + "abcr"[v] for w, v in zip(*np.nonzero(ok[0]), strict=True)}

    # a and b are .7 from one another, and a and c .4; neither counts, only the way to r does.
    for apart, expected in (
        (0.2, set()), (0.35, {"ar"}), (0.45, {"ab", "ar", "br"}),
        (0.75, {"ab", "ac", "ar", "bc", "br", "cr"}),
    ):  # fmt: skip
        assert pairs([6, 4, 2, 0], apart) == expected
    assert pairs([2, 6, 0, 4], 0.45) == {"ba", "br", "ra"}  # r loses to b and wins against a
    assert pairs([2, 6, 0, 4], 0.35) == {"ra"}


def test_near_policy_by_hand():
    # On policy at angle 0 alone; candidates at .1, .19, .21 and π.
    angle = np.array([0.1, 0.19, 0.21, np.pi, 0.0])
    queries = np.stack([np.cos(angle), np.sin(angle)], -1)[None].astype(np.float32)
    pool = Pool(queries, ("made",) * 5, np.arange(5) == 4)
    np.testing.assert_array_equal(near_policy(pool, 0.2), [[True, True, False, False, True]])
    np.testing.assert_array_equal(near_policy(pool, 0.0), [[False, False, False, False, True]])


def test_without_a_cap_and_a_share_all_pairs_are_kept():
    rng = np.random.default_rng(0)
    pool, counts = pool_of(rng, 20, 6, 0.3), counts_of(rng, 20, 6)
    rule = dataclasses.replace(ANY, cap=36)
    found = select_pairs(rng, pool, counts, rule)
    at = np.nonzero(allowed(pool, counts, rule))
    kept = zip(found.context, found.winner, found.loser, strict=True)
    assert sorted(kept) == list(zip(*at, strict=True))
    assert found.context.dtype == found.winner.dtype == found.loser.dtype == np.int32


def test_the_largest_margins_are_kept_and_ties_are_drawn_evenly():
    # Of joints 7, 5, 5, 5, 0 and 0 the six pairs of margin 5 tie behind the two of margin 7; 4 places.
    q = 1500
    joint = np.tile(np.array([7, 5, 5, 5, 0, 0]), (q, 1))
    pool = pool_of(np.random.default_rng(0), q, 6, 0.0)
    found = select_pairs(np.random.default_rng(1), pool, Counts(joint, joint, joint), ANY)
    assert len(found) == 4 * q and found.empty == found.lost == 0
    times = np.bincount(found.winner * 6 + found.loser, minlength=36).reshape(6, 6)
    assert times[0].tolist() == [0, 0, 0, 0, q, q]
    # Each of the six is expected 2q/6 = 500 times, with a deviation of at most 19.
    assert (times[1:] > 0).sum() == 6 and np.abs(times[1:4, 4:] - 500).max() < 5 * 19


def test_on_policy_winners_come_first():
    # 14 pairs won off policy and one won on policy, at cap 4: the one is always among the kept.
    q = 50
    joint = np.tile(np.array([9, 8, 7, 6, 5, 1]), (q, 1))
    joint[:, 4] = 2  # candidate 4, on policy, beats the one-call query alone
    pool = pool_of(np.random.default_rng(0), q, 6, 0.0)
    pool.on_policy[4] = True
    counts = Counts(joint, joint, joint)
    rule = PairRule(margin=1, filter="off", cap=4, on_policy_share=0.5, near=0.0, **FREE)
    found = select_pairs(np.random.default_rng(1), pool, counts, rule)
    assert found.own.sum() == q and (found.winner[found.own] == 4).all() and found.empty == 0
    # Half of the winners are its own; of 3q others, q stay.
    assert len(found) == 2 * q and found.lost == 2 * q
    free = select_pairs(
        np.random.default_rng(1), pool, counts, dataclasses.replace(rule, on_policy_share=0.0)
    )
    assert not free.own.any() and len(free) == 4 * q  # its margin of 1 is the smallest


def test_empty_pools_are_counted():
    rng = np.random.default_rng(0)
    pool, flat = pool_of(rng, 5, 4, 0.5), np.full((5, 4), 3)
    found = select_pairs(rng, pool, Counts(flat, flat, flat), PairRule())
    assert len(found) == 0 and found.empty == 5 and found.lost == 0
    some = flat.copy()
    some[2, -1] = 9  # context 2 alone has a winner, and it is the model's own query
    found = select_pairs(rng, pool, Counts(some, some, some), PairRule(cap=2, **FREE))
    assert found.context.tolist() == [2, 2] and found.winner.tolist() == [3, 3] and found.empty == 4
    # Where no winner is on policy or near it, the share leaves none.
    pool = dataclasses.replace(pool, on_policy=np.arange(4) == 3)
    other = flat.copy()
    other[:, 0] = 9
    found = select_pairs(rng, pool, Counts(other, other, other), PairRule(near=0.0, cap=2, **FREE))
    assert len(found) == 0 and found.empty == 5 and found.lost == 10


def test_bad_rules_are_refused():
    with pytest.raises(InputError, match="filter: unknown mode 'pareto'. use one of off, pair"):
        PairRule(filter="pareto")
    for bad in ({"margin": 0}, {"cap": 0}, {"on_policy_share": -0.1}, {"on_policy_share": 1.1}):
        with pytest.raises(InputError, match="pairs: margin .* use a margin and a cap of 1 or more"):
            PairRule(**bad)
    for bad in ({"near": -0.1}, {"near": 3.2}, {"apart": 0.0}, {"apart": 3.2}, {"apart": np.nan}):
        with pytest.raises(InputError, match="pairs: near .* use radians in 0..3.14"):
            PairRule(**bad)
    PairRule(near=0.0, apart=np.pi), PairRule(near=np.pi, apart=1e-3)
