"""The questions, the choice on validation, and the rows: recomputed from scratch on molecules."""

import dataclasses

import numpy as np
import pytest

from genret.catalogue.splits import make_splits
from genret.modit import protocol as pr
from genret.modit.baselines import seed_mean
from genret.retrieval.index import ExactIndex
from genret.types import InputError

REQUIRED = (
    "catalogue method domain split seed k n_items contexts joint attribute purity probes calls "
    "index ann_recall"
).split()
PROTOCOL = {"catalogue": "molecules", "seed": 0, "k": 20, "n_items": 2000}


@pytest.fixture(scope="module")
def mean_method(molecules):
    return pr.Method("seed mean", lambda c, _: seed_mean(molecules.embeddings, c)[:, None], uses="nothing")


@pytest.fixture(scope="module")
def steering(molecules, fitted):
    def run(contexts, strength):
        q = seed_mean(molecules.embeddings, contexts) + strength * fitted.normals[contexts.domain]
        return (q / np.linalg.norm(q, axis=1, keepdims=True))[:, None]

    return pr.Method("steering", run, (0.8, 0.4, 0.2, 0.0))


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_contexts_are_held_out_items_without_the_attribute(molecules, splits, stage):
    contexts = pr.draw_contexts(molecules, splits, stage)
    again = pr.draw_contexts(molecules, splits, stage)
    for one, two in zip(dataclasses.astuple(contexts), dataclasses.astuple(again), strict=True):
        np.testing.assert_array_equal(one, two)
    other = pr.draw_contexts(molecules, splits, stage, seed=1)
    assert not np.array_equal(contexts.seeds, other.seeds)
    asked = set()
    for q in range(len(contexts)):
        m, p, s = contexts.domain[q], contexts.pattern[q], contexts.split[q]
        holdout = splits.holdout(pr.SPLITS[s], stage)
        seeds = contexts.seeds[q]
        given = seeds[seeds >= 0]
        assert (seeds[: len(given)] >= 0).all() and 4 <= len(given) <= 8 == len(seeds)
        assert len(set(given)) == len(given)
        assert (molecules.labels[m, given] == 0).all() and (molecules.patterns[given] == p).all()
        assert holdout.items[given].all() and not splits.train[given].any() and p in holdout.patterns
        asked.add((s, m, p))
    # Every pair that can be asked is asked: twice, or once where the seeds leave no choice; and no other.
    possible, count = set(), 0
    for s, split in enumerate(pr.SPLITS):
        holdout = splits.holdout(split, stage)
        for p in holdout.patterns:
            for m in range(4):
                rows = molecules.patterns == p
                lacking = (rows & holdout.items & (molecules.labels[m] == 0)).sum()
                if lacking >= 4 and (rows & (molecules.labels[m] == 1)).sum() >= 5:
                    possible.add((s, m, p))
                    count += 2 if lacking > 8 else 1
    assert asked == possible and len(contexts) == count


def test_so_many_patterns_are_asked_at_most(molecules, splits):
    def pairs(contexts):
        made = zip(contexts.split.tolist(), contexts.domain.tolist(), contexts.pattern.tolist(), strict=True)
        return list(made)

    every = pr.draw_contexts(molecules, splits, "test")
    few = [pr.draw_contexts(molecules, splits, "test", patterns=3, seed=seed) for seed in (0, 1)]
    again = pr.draw_contexts(molecules, splits, "test", patterns=3)
    for one, two in zip(dataclasses.astuple(few[0]), dataclasses.astuple(again), strict=True):
        np.testing.assert_array_equal(one, two)
    possible = set(pairs(every))
    for contexts in few:
        asked = set(pairs(contexts))
        assert asked < possible  # only what could be asked without a limit
        for s in range(2):
            for m in range(4):
                here, there = ({p for a, b, p in x if (a, b) == (s, m)} for x in (asked, possible))
                assert len(here) == min(3, len(there))
        # Each is asked as often as without the limit.
        for pair in asked:
            assert pairs(contexts).count(pair) == pairs(every).count(pair)
        given = contexts.seeds[contexts.seeds >= 0]
        assert not splits.train[given].any()
    assert set(pairs(few[0])) != set(pairs(few[1]))
    # A limit that none reaches leaves none out.
    wide = pr.draw_contexts(molecules, splits, "test", patterns=1000)
    assert sorted(pairs(wide)) == sorted(pairs(every))


def test_validation_and_test_share_no_seed_and_no_pattern_of_a_split(validation, test_contexts):
    for s in range(2):
        one, two = (c.take(np.flatnonzero(c.split == s)) for c in (validation, test_contexts))
        assert not set(one.pattern) & set(two.pattern)
        assert not set(one.seeds[one.seeds >= 0]) & set(two.seeds[two.seeds >= 0])


def test_a_domain_without_a_question_is_named(molecules, splits):
    with pytest.raises(InputError, match="attribute/logp_low.*item_holdout/test"):
        pr.draw_contexts(molecules, splits, "test", least_positives=500)
    with pytest.raises(InputError, match="least_seeds"):
        pr.draw_contexts(molecules, splits, "validation", least_seeds=60)


def test_rows_recomputed_by_brute_force(molecules, searcher, mean_method, validation, test_contexts):
    # Some questions are left out, so that patterns have one or two: the mean is over patterns.
    test_contexts = test_contexts.take(np.flatnonzero(np.arange(len(test_contexts)) % 3 != 1))
    rows = pr.evaluate(mean_method, searcher, searcher.index, validation, test_contexts, PROTOCOL, 77)
    assert {(r["split"], r["domain"]) for r in rows} == {
        (s, m) for s in pr.SPLITS for m in molecules.attribute_names
    }
    x = np.asarray(molecules.embeddings, np.float64)
    for row in rows:
        assert set(REQUIRED) <= set(row)
        assert (row["method"], row["probes"], row["calls"], row["index"]) == (
            "seed mean",
            1,
            0,
            "exact",
        )
        assert row["ann_recall"] == 1.0 and row["uses"] == "nothing" and row["lookups"] == 0
        m = molecules.attribute_names.index(row["domain"])
        s = pr.SPLITS.index(row["split"])
        at = np.flatnonzero((test_contexts.split == s) & (test_contexts.domain == m))
        assert row["contexts"] == len(at)
        per = row["per_context"]
        np.testing.assert_array_equal(per["pattern"], test_contexts.pattern[at])
        assert row["patterns"] == len(set(per["pattern"]))
        counted = {"joint": [], "attribute": [], "purity": []}
        for q in at:
            seeds = test_contexts.seeds[q][test_contexts.seeds[q] >= 0]
            score = x @ x[seeds].mean(0)
            score[seeds] = -9
            top = np.argsort(-score, kind="stable")[:20]
            has = molecules.labels[m, top] == 1
            same = molecules.patterns[top] == test_contexts.pattern[q]
            for name, hit in (("joint", has & same), ("attribute", has), ("purity", same)):
                counted[name].append(hit.sum())
        for name, hits in counted.items():
            # A near-tie at rank 20 may fall either way.
            assert np.abs(np.array(per[name]) - hits).max() <= 1
            assert np.mean(np.array(per[name]) != hits) < 0.1
            pattern, share = np.array(per["pattern"]), np.array(per[name]) / 20
            macro = np.mean([share[pattern == p].mean() for p in set(pattern)])
            assert row[name] == pytest.approx(macro, abs=1e-6)
        assert row["joint"] <= min(row["attribute"], row["purity"]) + 1e-6
        assert row["joint"] <= row["headroom"] + 1e-6 and row["normalised_joint"] >= row["joint"] - 1e-6


def oracle(molecules, mean):
    """Answers domain `setting` with the pattern's positives and every other with the seed mean."""

    def run(contexts, setting):
        q = mean(contexts)
        for i in np.flatnonzero(contexts.domain == setting):
            rows = (molecules.patterns == contexts.pattern[i]) & (molecules.labels[setting] == 1)
            q[i] = molecules.embeddings[rows].mean(0)
        return (q / np.linalg.norm(q, axis=1, keepdims=True))[:, None]

    return run


def test_each_cell_chooses_its_own_setting(molecules, searcher, validation):
    run = oracle(molecules, lambda c: seed_mean(molecules.embeddings, c))
    chosen = pr.choose(pr.Method("oracle", run, (0, 1, 2, 3)), searcher, validation)
    assert chosen == {(s, m): m for s in range(2) for m in range(4)}
    tied = pr.Method("tied", lambda c, s: run(c, 9), ("first", "second"))
    assert set(pr.choose(tied, searcher, validation).values()) == {"first"}
    never = pr.Method("one setting", lambda c, s: pytest.fail("nothing to choose"), ("only",))
    assert set(pr.choose(never, searcher, validation).values()) == {"only"}


def test_the_choice_is_on_validation_alone(molecules, searcher, steering, validation, test_contexts):
    chosen = pr.choose(steering, searcher, validation)
    assert len(set(chosen.values())) > 1
    # The best by its own score, cell by cell.
    for (s, m), setting in chosen.items():
        here = validation.take(np.flatnonzero((validation.split == s) & (validation.domain == m)))
        joint = {}
        for strength in steering.grid:
            found = searcher.judge(searcher.rank(steering.run(here, strength), here), here).joint
            joint[strength] = np.mean([found[here.pattern == p].mean() for p in set(here.pattern)])
        assert joint[setting] == pytest.approx(max(joint.values()))
    # Labels of the test patterns flipped, test questions cut down: the same settings, other rows.
    asked = np.isin(molecules.patterns, list(set(test_contexts.pattern) - set(validation.pattern)))
    labels = np.where(asked, 1 - molecules.labels, molecules.labels).astype(np.int8)
    flipped = pr.Searcher(dataclasses.replace(molecules, labels=labels), searcher.index, 20)
    assert pr.choose(steering, flipped, validation) == chosen
    fewer = test_contexts.take(np.arange(0, len(test_contexts), 2))
    for test in (test_contexts, fewer):
        rows = pr.evaluate(steering, searcher, searcher.index, validation, test, PROTOCOL, 77)
        for row in rows:
            cell = pr.SPLITS.index(row["split"]), molecules.attribute_names.index(row["domain"])
            assert row["setting"] == chosen[cell]


def test_settings_below_the_purity_floor_are_passed_over(searcher, steering, validation):
    scores = {s: pr.validation_scores(steering, searcher, validation, s) for s in steering.grid}
    free = pr.choose(steering, searcher, validation)
    _, kept = scores[0.0]
    floor = {cell: p - 0.02 for cell, p in kept.items()}
    held = pr.choose(dataclasses.replace(steering, floor=floor), searcher, validation)
    assert held != free
    for cell, setting in held.items():
        allowed = [s for s in steering.grid if scores[s][1][cell] >= floor[cell]]
        assert setting in allowed
        assert scores[setting][0][cell] == max(scores[s][0][cell] for s in allowed)
    # A function is asked for the floor once a choice, and only where there is one.
    asked = []
    late = dataclasses.replace(steering, floor=lambda: asked.append(1) or floor)
    assert pr.choose(late, searcher, validation) == held and asked == [1]
    one = dataclasses.replace(steering, grid=(0.8,), floor=lambda: pytest.fail("nothing to choose"))
    assert set(pr.choose(one, searcher, validation).values()) == {0.8}
    none = dataclasses.replace(steering, floor=dict.fromkeys(kept, 2.0))  # then Joint alone decides
    assert pr.choose(none, searcher, validation) == free


def test_rankings_calls_and_sets_are_accounted(molecules, searcher, validation, test_contexts):
    x, rng = molecules.embeddings, np.random.default_rng(0)

    def ranked(contexts, _):
        query = seed_mean(x, contexts)[:, None]
        return searcher.rank(query, contexts), query

    def pair(contexts, _):
        noise = rng.normal(size=(len(contexts), 2, x.shape[1])).astype(np.float32) * 0.02
        q = seed_mean(x, contexts)[:, None] + noise
        return q / np.linalg.norm(q, axis=-1, keepdims=True)

    def rows(method):
        return pr.evaluate(method, searcher, searcher.index, validation, test_contexts, PROTOCOL, 77)

    plain = rows(pr.Method("mean", lambda c, _: seed_mean(x, c)[:, None]))
    for one, two in zip(plain, rows(pr.Method("its ranking", ranked)), strict=True):
        assert two["ann_recall"] == one["ann_recall"] and one["per_context"] == two["per_context"]
    method = pr.Method("pair", pair, (0.5,), probes=2, calls=lambda s: int(2 * s))
    for row in rows(method):
        assert (row["probes"], row["calls"], row["setting"]) == (2, 1, 0.5)
        assert (row["lookups"], row["tried"]) == (77, 1)
        assert all(0 <= h <= 20 for h in row["per_context"]["joint"])


def test_recall_is_measured_on_the_methods_own_queries(molecules, mean_method, validation, test_contexts):
    class Forgetful:
        """Exact search that has lost every third item."""

        name, num_items = "forgetful", 2000
        exact = ExactIndex(molecules.embeddings)

        def search(self, queries, k):
            ids, scores = self.exact.search(queries, self.num_items)
            order = np.argsort(ids % 3 == 0, axis=1, kind="stable")  # the lost come last
            ids, scores = (np.take_along_axis(a, order, 1)[:, :k] for a in (ids, scores))
            return ids, scores

    index = Forgetful()
    rows = pr.evaluate(
        mean_method,
        pr.Searcher(molecules, index, 20),
        index.exact,
        validation,
        test_contexts,
        PROTOCOL,
        77,
    )
    for row in rows:
        m = molecules.attribute_names.index(row["domain"])
        here = (test_contexts.split == pr.SPLITS.index(row["split"])) & (test_contexts.domain == m)
        queries = seed_mean(molecules.embeddings, test_contexts.take(np.flatnonzero(here)))
        exact, found = index.exact.search(queries, 20)[0], index.search(queries, 20)[0]
        overlap = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(exact, found, strict=True)])
        assert row["ann_recall"] == pytest.approx(overlap, abs=2e-3) and overlap < 0.9  # but for ties
        assert row["index"] == "forgetful"


def test_a_query_that_is_not_finite_names_its_method(searcher, validation):
    broken = pr.Method("broken", lambda c, _: np.full((len(c), 1, 128), np.nan, np.float32))
    with pytest.raises(InputError, match="broken.*not finite"):
        pr.ranking(broken, searcher, validation, None)


def test_contexts_follow_the_split_that_is_drawn(molecules):
    unmarked = dataclasses.replace(molecules, assigned=np.full(2000, -1, np.int8))
    for seed in (1, 2):
        drawn = make_splits(unmarked, seed=seed, pattern_fraction=0.3, item_fraction=0.4)
        seeds = pr.draw_contexts(unmarked, drawn, "test").seeds
        assert not drawn.train[seeds[seeds >= 0]].any()
