"""Counts of the scorer against `rank` and `judge`, and against a brute force written out here."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.modit.candidates import Pool
from genret.modit.pairs import PairRule, select_pairs
from genret.retrieval.index import ExactIndex, scann_index
from genret.retrieval.metrics import judge
from genret.retrieval.ranking import rank
from genret.retrieval.scoring import Counts, Scorer, count
from genret.types import InputError

N, D, M, R, Q, C, S, K = 700, 8, 3, 2, 9, 5, 4, 10
MESHES = {"one": (1,), "line": (8,), "cube": (2, 2, 2)}


def make_mesh(shape):
    names = ("data", "fsdp", "tensor")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


class World:
    """A corpus whose inner products are exact in f32 (multiples of 1/4, so most are tied), two partitions
    with items of no pattern, and questions whose answer is never empty."""

    def __init__(self, seed=0, *, unknown=0.3, n=N):
        rng = np.random.default_rng(seed)
        self.x = (rng.integers(-2, 3, (n, D)) / 4).astype(np.float32)
        known = rng.integers(0, 2, (M, n))
        self.labels = np.where(rng.random((M, n)) < unknown, -1, known).astype(np.int8)
        self.patterns = rng.integers(-1, 4, (R, n)).astype(np.int32)
        self.candidates = (rng.integers(-2, 3, (Q, C, D)) / 4).astype(np.float32)
        # Seeds include a candidate's best items, or excluding them would change nothing.
        best = np.argsort(-self.candidates[:, 0] @ self.x.T, axis=1, kind="stable")[:, : 2 * S : 2]
        self.exclude = np.where(rng.random((Q, S)) < 0.3, -1, best).astype(np.int32)
        self.asked = dict(
            domain=rng.integers(0, M, Q).astype(np.int32), partition=rng.integers(0, R, Q).astype(np.int32),
            pattern=rng.integers(0, 4, Q).astype(np.int32), exclude=self.exclude,
        )  # fmt: skip

    def scorer(self, k=K, **options):
        return Scorer(self.x, self.labels, self.patterns, k, **options)

    def score(self, k=K, **options):
        return self.scorer(k, **options)(self.candidates, **self.asked)

    def by_hand(self, k=K):
        """Counts of the first k items in order of score (ties: the lower id) that are judged and no seed."""
        out = np.zeros((3, Q, C), int)
        for q in range(Q):
            m, r, p = (self.asked[n][q] for n in ("domain", "partition", "pattern"))
            for c in range(C):
                order = np.argsort(-self.x @ self.candidates[q, c], kind="stable")
                top = [i for i in order if i not in self.exclude[q] and self.labels[m, i] >= 0][:k]
                has, same = self.labels[m, top] == 1, self.patterns[r, top] == p
                out[:, q, c] = (has & same).sum(), has.sum(), same.sum()
        return out


def test_counts_are_those_of_rank_and_judge():
    world = World()
    index, found = ExactIndex(world.x), world.score()
    assert isinstance(found, Counts) and all(a.shape == (Q, C) and a.dtype == np.int32 for a in found)
    for c in range(C):
        shared = dict(labels=world.labels, domain=world.asked["domain"])
        ids = rank(index, world.candidates[:, c], K, exclude=world.exclude, **shared)
        for q in range(Q):
            one = slice(q, q + 1)
            verdict = judge(
                ids[one], labels=world.labels, domain=shared["domain"][one],
                patterns=world.patterns[world.asked["partition"][q]], pattern=world.asked["pattern"][one],
                seeds=world.exclude[one],
            )  # fmt: skip
            hits = [float(v[0]) * K for v in (verdict.joint, verdict.attribute, verdict.purity)]
            np.testing.assert_allclose([a[q, c] for a in found], hits, atol=1e-4)
    np.testing.assert_array_equal(found, world.by_hand())
    assert 0 < found.joint.sum() < min(found.attribute.sum(), found.purity.sum())


@pytest.mark.parametrize("mesh", MESHES)
def test_counts_depend_on_neither_mesh_nor_block(mesh):
    world = World(1)
    expected = world.by_hand()
    for block in (2048, 32):  # 45 candidates: one block, and one with a shorter one after it
        found = world.score(mesh=make_mesh(MESHES[mesh]), block=block)
        np.testing.assert_array_equal(found, expected)


@given(seed=st.integers(0, 2**31), unknown=st.sampled_from([0.0, 0.5, 0.9]), k=st.sampled_from([1, 7]))
@settings(max_examples=15, deadline=None)
def test_counts_are_the_brute_forces(seed, unknown, k):
    world = World(seed, unknown=unknown, n=200)
    np.testing.assert_array_equal(world.score(k), world.by_hand(k))


def test_unknown_labels_are_passed_over_and_the_search_goes_deeper():
    world = World(2, unknown=0.95)
    scorer = world.scorer()
    assert scorer.spare == 0
    np.testing.assert_array_equal(scorer(world.candidates, **world.asked), world.by_hand())
    spare = scorer.spare
    assert spare > 0
    # The depth it needed is where it starts the next time.
    np.testing.assert_array_equal(scorer(world.candidates, **world.asked), world.by_hand())
    assert scorer.spare == spare
    full = World(2, unknown=0.0)
    scorer = full.scorer()
    scorer(full.candidates, **full.asked)
    assert scorer.spare == 0


def test_fewer_known_labels_than_places_are_all_counted():
    world = World(3)
    world.labels[:, 6:] = -1
    world.labels[:, :6] = 1
    found = world.score()
    expected = world.by_hand()
    np.testing.assert_array_equal(found, expected)
    assert expected[1].max() == 6 < K


def test_seeds_and_partitions_are_read():
    world = World(4)
    found = world.score()
    without = world.scorer()(world.candidates, **world.asked | {"exclude": np.full((Q, S), -1, np.int32)})
    assert not np.array_equal(found.joint, without.joint)
    flipped = world.asked | {"partition": 1 - world.asked["partition"]}
    other = world.scorer()(world.candidates, **flipped)
    np.testing.assert_array_equal(other.attribute, found.attribute)
    assert not np.array_equal(other.purity, found.purity)


def test_count_by_hand():
    # Ranking 4 2 0 1 3, K = 2. Domain 0 knows all but item 4: without seed 2 the first two are 0 and 1.
    # Item 0 has the attribute, both are of pattern 7. Domain 1 knows 4 and 3 alone: both have it, and
    # in partition 1 item 3 is of pattern 7. A third context has one usable item left: the seeds are the rest.
    ids = np.array([[4, 2, 0, 1, 3]] * 3)
    labels = np.array([[1, 0, 1, 1, -1], [-1, -1, -1, 1, 1]], np.int8)
    patterns = np.array([[7, 7, 7, 5, 5], [5, 5, 5, 7, -1]])
    exclude = np.array([[2, -1, -1], [-1, -1, -1], [0, 1, 2]])
    found = count(
        ids, labels, patterns, np.array([0, 1, 0]), np.array([0, 1, 1]), np.full(3, 7), exclude, k=2
    )
    np.testing.assert_array_equal(found, [[1, 1, 1], [1, 2, 1], [2, 1, 1], [2, 2, 1]])


def test_no_question_no_answer():
    world = World(5)
    empty = {n: a[:0] for n, a in world.asked.items()}
    assert all(a.shape == (0, C) for a in world.scorer()(world.candidates[:0], **empty))


def test_the_cost_of_a_candidate_is_two_operations_a_number():
    assert World(6).scorer().flops == 2 * N * D


def clustered(rng, rows, width=16, cells=40):
    centres = unit(rng.standard_normal((cells, width)))
    which = rng.integers(cells, size=rows)
    return unit(centres[which] + 0.6 * rng.standard_normal((rows, width)) / np.sqrt(width)), which


@pytest.mark.parametrize("leaves", [None, 2], ids=["every item scored", "two leaves of forty"])
def test_scann_counts_and_pairs(leaves):
    pytest.importorskip("scann", reason="no ScaNN wheel for this platform")
    rng = np.random.default_rng(7)
    x, patterns = clustered(rng, 2000)
    labels = rng.integers(0, 2, (M, 2000)).astype(np.int8)  # all known: both searches go equally deep
    exclude = rng.integers(0, 2000, (30, S)).astype(np.int32)
    queries = unit(x[exclude].mean(1)[:, None] + 0.3 * rng.standard_normal((30, C, 16)))
    asked = dict(
        domain=rng.integers(0, M, 30), partition=np.zeros(30, int), pattern=patterns[exclude[:, 0]],
        exclude=exclude,
    )  # fmt: skip
    options = {} if leaves is None else dict(num_leaves=40, leaves_to_search=leaves, reorder=100)
    indices = ExactIndex(x), scann_index(x, k=K + S, **options)
    exact, approximate = (Scorer(x, labels, patterns[None], K, index=i)(queries, **asked) for i in indices)
    flat = queries.reshape(-1, 16)
    lists = [rank(i, flat, K, exclude=exclude.repeat(C, 0)).tolist() for i in indices]
    shared = np.reshape([len(set(a) & set(b)) for a, b in zip(*lists, strict=True)], (30, C))
    for one, other in zip(exact, approximate, strict=True):
        # What recall leaves out is all that a count can differ by.
        assert (np.abs(one - other) <= K - shared).all()
    pool = Pool(queries, ("made",) * C, np.arange(C) >= 2)
    rule = PairRule(margin=2, filter="pair", cap=4, on_policy_share=0.5, improve=False, apart=np.pi)
    pairs = [select_pairs(np.random.default_rng(0), pool, counts, rule) for counts in (exact, approximate)]
    if leaves is None:
        assert shared.mean() == K
        np.testing.assert_array_equal(exact, approximate)
        for name in ("context", "winner", "loser", "own"):
            np.testing.assert_array_equal(*(getattr(p, name) for p in pairs))
        assert len(pairs[0]) > 10
    else:
        assert 0.3 * K < shared.mean() < 0.95 * K and not np.array_equal(exact.joint, approximate.joint)


def test_what_does_not_fit_is_refused():
    world = World(8)
    with pytest.raises(InputError, match=r"labels: \(3, 699\) labels and \(2, 700\) patterns for 700 items"):
        Scorer(world.x, world.labels[:, 1:], world.patterns, K)
    with pytest.raises(InputError, match=r"labels: .* \(2, 699\) patterns"):
        Scorer(world.x, world.labels, world.patterns[:, 1:], K)
    with pytest.raises(InputError, match=r"labels: .* \(700,\) patterns"):
        Scorer(world.x, world.labels, world.patterns[0], K)
    for k in (0, N, N + 1):
        with pytest.raises(InputError, match=f"k: {k} of 700 items. use 1 to 699"):
            world.scorer(k)
    with pytest.raises(InputError, match="row 3 is not finite"):
        bad = world.x.copy()
        bad[3] = np.nan
        Scorer(bad, world.labels, world.patterns, K)
