"""HPPO end to end on real molecules: labels, rounds, pairs on disk, a run killed inside a round."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genret.diffusion import edm
from genret.diffusion.dit import DiT
from genret.diffusion.preference import Preference
from genret.diffusion.retriever import Retriever
from genret.modit import hppo
from genret.modit.candidates import Pool, draw_contexts
from genret.modit.pairs import PairRule
from genret.modit.queries import MoDiT
from genret.modit.softmax import LEAST_POSITIVES
from genret.modit.stages import RetrievalTerm
from genret.retrieval.index import ExactIndex, scann_index
from genret.retrieval.ranking import rank
from genret.training.loop import FitOptions, draw_for, fit
from genret.training.mesh import make_mesh
from genret.training.rows import read_all
from genret.types import InputError

K, SEEDS, STEPS = 10, 8, 3  # of a ranking, a context and a round
OPTIONS = FitOptions(steps=6, learning_rate=1e-3, warmup=1, log_every=1, save_every=2)
RULE = PairRule(margin=2, filter="pair", cap=4, on_policy_share=0.3, improve=False, apart=np.pi)


@pytest.fixture(autouse=True)
def no_benchmark(monkeypatch):
    """A round compares its speed with a matmul's, which takes seconds to time."""
    monkeypatch.setattr(hppo, "matmul_flops", lambda: 1e9)


@pytest.fixture(scope="module")
def retriever():
    return Retriever(DiT(width=16, depth=1, heads=2, embedding=128, domains=4, max_context=SEEDS + 2))


@pytest.fixture(scope="module")
def space():
    return edm.Space(jnp.full(128, 0.06), jnp.zeros((5, 128)))


@pytest.fixture(scope="module")
def reference(retriever):
    """A network near the seed mean that is not zero."""
    leaves, tree = jax.tree.flatten(retriever.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.map(np.array, jax.tree.unflatten(tree, moved))


@pytest.fixture(scope="module")
def sparse(fitted):
    """The fit with some labels of every domain unknown: a third of those bought are forgotten again."""
    forgotten = np.random.default_rng(3).random(fitted.labels.seen.shape) < 1 / 3
    seen = np.where(forgotten, -1, fitted.labels.seen).astype(np.int8)
    seen[:, fitted.data.train[:50]] = -1  # and of some items, all
    labels = dataclasses.replace(fitted.labels, seen=seen)
    return dataclasses.replace(fitted, labels=labels, data=dataclasses.replace(fitted.data, has=seen == 1))


@pytest.fixture(scope="module")
def parts(retriever, space, reference):
    """(Fitted, folder, ...) -> (stage, refresh, the parameters that were validated, one per round made)."""

    def make(fitted, folder, *, rule=RULE, policy="hybrid", samples=4, contexts=40, seed=0):
        calls = []

        def validate(model):
            calls.append(jax.tree.map(np.array, model.params))
            return {"J": 0.25}

        def model(params):
            return MoDiT(retriever, params, space, fitted.data.embeddings, fitted.predicted, block=64)

        refresh = hppo.Refresh(
            model, hppo.make_labeller(fitted, K),
            hppo.Rounds(steps=STEPS, contexts=contexts, policy=policy, samples=samples, rule=rule),
            folder, SEEDS, seed, validate,
        )  # fmt: skip
        stage = hppo.make_hppo_stage(
            "hppo", retriever, space, reference, refresh,
            preference=Preference(beta=0.5, draws=2), batch=16, seed=seed,
        )  # fmt: skip
        return stage, refresh, calls

    return make


def run(stage, folder, reference, options=OPTIONS):
    mesh = make_mesh(devices=jax.devices()[:1])
    return fit(stage, folder, options, mesh=mesh, init_from=reference)


@pytest.fixture(scope="module")
def whole(parts, fitted, reference, tmp_path_factory):
    """Two rounds without a break: (folder, final state, parameters validated, what select_pairs gave)."""
    folder, chosen = tmp_path_factory.mktemp("whole"), []

    def select(rng, pool, counts, rule):
        chosen.append((pool, counts, select_pairs(rng, pool, counts, rule)))
        return chosen[-1][2]

    select_pairs = hppo.select_pairs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hppo, "matmul_flops", lambda: 1e9)
        patch.setattr(hppo, "select_pairs", select)
        stage, _, calls = parts(fitted, folder / "pairs")
        state = run(stage, folder, reference)
    return folder, state, calls, chosen


def read(folder, number):
    with np.load(folder / "pairs" / f"pairs_{number}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def largest_change(one, two):
    gaps = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), one, two)
    return max(jax.tree.leaves(gaps))


# Labels


def test_labels_are_those_bought_for_training_rows(sparse, splits):
    labeller, seen = hppo.make_labeller(sparse, K), sparse.labels.seen
    rows = np.flatnonzero(labeller.place >= 0)
    np.testing.assert_array_equal(labeller.place[rows], np.arange(len(rows)))
    np.testing.assert_array_equal(rows, np.flatnonzero(splits.train & (seen >= 0).any(0)))
    assert len(rows) < splits.train.sum()  # some were never looked up
    np.testing.assert_array_equal(labeller.scorer.labels, seen[:, rows])
    np.testing.assert_array_equal(labeller.scorer.patterns, sparse.data.cells.membership[:, rows])


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_counts_of_candidates_by_rank(sparse, kind):
    if kind == "scann":
        pytest.importorskip("scann", reason="no ScaNN wheel for this platform")
    data, seen = sparse.data, sparse.labels.seen
    rows = data.train[(seen[:, data.train] >= 0).any(0)]
    contexts = draw_contexts(np.random.default_rng(4), data, 30, SEEDS)
    rng = np.random.default_rng(5)
    x = data.embeddings[contexts.seeds[:, 0]][:, None] + 0.08 * rng.normal(size=(30, 6, 128))
    queries = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    index = (lambda x: scann_index(x, k=K + SEEDS)) if kind == "scann" else None
    pool = Pool(queries, ("made",) * 6, np.arange(6) == 5)
    found = hppo.make_labeller(sparse, K, index=index)(pool, contexts)
    place = {r: i for i, r in enumerate(rows)}
    exclude = np.array([[place.get(s, -1) for s in row] for row in contexts.seeds])
    assert (exclude >= 0).sum() > 100
    for c in range(6):
        ids = rank(
            ExactIndex(data.embeddings[rows]), queries[:, c], K, exclude=exclude,
            labels=seen[:, rows], domain=contexts.domain,
        )  # fmt: skip
        for q in range(30):
            top = rows[ids[q]]
            members = data.cells.members[contexts.pattern[q]]
            has, inside = seen[contexts.domain[q], top] == 1, np.isin(top, members[members >= 0])
            expected = (has & inside).sum(), has.sum(), inside.sum()
            assert [int(a[q, c]) for a in found] == [int(e) for e in expected]
    assert 0 < found.joint.sum() < min(found.attribute.sum(), found.purity.sum())


def test_feedback_by_hand(sparse):
    data, seen = sparse.data, sparse.labels.seen
    labeller = hppo.make_labeller(sparse, K)
    rows = np.flatnonzero(labeller.place >= 0)
    contexts = draw_contexts(np.random.default_rng(6), data, 40, SEEDS)
    x = np.asarray(data.embeddings, np.float64)
    mean = np.stack([x[s[s >= 0]].mean(0) for s in contexts.seeds])
    mean[30:] *= -1  # the other side of the sphere, where nothing of the pattern is
    queries = (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32)
    made, depth, none = labeller.feedback(queries, contexts), 3 * K + SEEDS, 0
    for q in range(40):
        m, members = contexts.domain[q], data.cells.members[contexts.pattern[q]]
        order = rows[np.argsort(-(x[rows] @ queries[q]), kind="stable")][:depth]
        usable = [i for i in order if seen[m, i] >= 0 and i not in contexts.seeds[q]]
        positive = [seen[m, i] == 1 and i in members for i in usable]
        hits = [i for i, yes in zip(usable, positive, strict=True) if yes]
        misses = [i for i, yes in zip(usable[:K], positive[:K], strict=True) if not yes]
        if hits and misses:
            way = x[hits].mean(0) - x[misses].mean(0)
            np.testing.assert_allclose(made[q], way / np.linalg.norm(way), atol=1e-5)
        else:
            none += 1
            assert not made[q].any()
    assert 10 <= none < 40 and made.dtype == np.float32


# Rounds


def test_a_run_of_two_rounds_starts_at_log_two_and_moves(whole, reference):
    folder, state, calls, _ = whole
    rows = [json.loads(r) for r in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert abs(rows[-1]["loss"] - np.log(2)) > 1e-3  # the reference stays where it was
    assert int(state.step) == 6 and largest_change(state.params, reference) > 1e-3
    assert {"accuracy", "margin", "winner_error", "loser_error", "loser_scale"} <= set(rows[0])
    # Each round validates once, with the parameters its pairs are made with.
    assert len(calls) == 2
    assert largest_change(calls[0], reference) == 0.0 < largest_change(calls[1], reference)
    assert sorted(p.name for p in (folder / "pairs").iterdir()) == ["pairs_0.npz", "pairs_1.npz"]


def test_pairs_on_disk_are_those_chosen(whole, fitted):
    folder, _, _, chosen = whole
    assert len(chosen) == 2
    for number, (pool, counts, pairs) in enumerate(chosen):
        found = read(folder, number)
        at = pairs.context
        assert len(pairs) > 16
        assert pool.queries.dtype == found["winner"].dtype == found["loser"].dtype == np.float32
        assert (counts.joint[at, pairs.winner] - counts.joint[at, pairs.loser] >= 2).all()
        assert (counts.purity[at, pairs.winner] >= counts.purity[at, pairs.loser]).all()
        np.testing.assert_array_equal(found["winner"], pool.queries[at, pairs.winner])
        np.testing.assert_array_equal(found["loser"], pool.queries[at, pairs.loser])
        for items, m in zip(found["items"], found["domain"], strict=True):
            given = items[items >= 0]
            assert 4 <= len(given) <= SEEDS and (items[len(given) :] == -1).all()
            # In the order in which the model is asked.
            assert (np.diff(fitted.predicted[m, given]) >= 0).all()
            assert np.isin(given, fitted.data.train).all() and (fitted.labels.seen[m, given] < 1).all()
        report = json.loads(str(found["report"]))
        assert (report["round"], report["contexts"], report["pairs"]) == (number, 40, len(pairs))
        assert report["empty_pools"] == 40 - len(set(at)) and report["dropped_for_share"] == pairs.lost
        assert report["on_policy_winners"] == pytest.approx(pairs.own.mean()) and pairs.own.mean() >= 0.3
        for name, values in counts._asdict().items():
            gain = (values[at, pairs.winner] - values[at, pairs.loser]).mean() / K
            assert report["pair_gain"][name] == pytest.approx(gain)
            assert report["query"][name] == pytest.approx(values[:, -1].mean() / K)
        assert report["best"] == pytest.approx(counts.joint.max(1).mean() / K)
        assert sum(report["winners"].values()) == len(pairs)
        for name, times in report["winners"].items():
            assert sum(pool.names[w] == name for w in pairs.winner) == times
        assert report["validation"] == {"J": 0.25}
        flops = report["candidates_per_s"] * 2 * 128 * (fitted.labels.seen >= 0).any(0).sum()
        assert report["scoring_flop_per_s"] == pytest.approx(flops)
        assert report["scoring_of_matmul"] == pytest.approx(flops / 1e9)
    # The second round's samples are those of other parameters, in other contexts.
    assert not np.array_equal(read(folder, 0)["items"], read(folder, 1)["items"])


def leaves_equal(one, two):
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True))


def test_a_batch_is_rows_of_its_rounds_pairs(whole, parts, fitted):
    folder = whole[0]
    stage, _, calls = parts(fitted, folder / "pairs")
    x = fitted.data.embeddings
    for step in (1, 4, 2, 1):  # pairs of either round, in any order
        batch, again = (read_all(stage.batch(step, None)) for _ in range(2))
        assert leaves_equal(batch, again) and batch.fresh is None
        batch, found = batch.pairs, read(folder, step // STEPS)
        assert batch.winner.shape == batch.loser.shape == (16, 1, 128) and (batch.weight == 1).all()
        pairs = list(zip(*(found[n] for n in ("winner", "loser", "domain", "items")), strict=True))
        for b in range(16):
            context = batch.condition.context[b][batch.condition.mask[b]]
            assert any(
                np.array_equal(w, batch.winner[b, 0])
                and np.array_equal(v, batch.loser[b, 0])
                and m == batch.condition.domain[b]
                and np.array_equal(x[items[items >= 0]], context)
                for w, v, m, items in pairs
            )
    assert not calls  # nothing was made again
    assert not leaves_equal(stage.batch(1, None), stage.batch(2, None))


def test_the_retrieval_term_is_that_of_fresh_contexts(whole, parts, fitted, retriever, space, reference):
    folder, term = whole[0], RetrievalTerm(weight=0.7, temperature=0.1, corpus=10_000)
    _, refresh, _ = parts(fitted, folder / "pairs")
    options = dict(preference=Preference(beta=0.5, draws=2), batch=8, fresh=2)
    stage = hppo.make_hppo_stage("hppo", retriever, space, reference, refresh, retrieval=term, **options)
    batch, data = read_all(stage.batch(1, None)), fitted.data
    plain = hppo.make_hppo_stage("hppo", retriever, space, reference, refresh, **options)
    assert leaves_equal(batch.pairs, plain.batch(1, None).pairs) and "table" not in plain.frozen
    assert leaves_equal(batch, read_all(stage.batch(1, None)))
    assert not leaves_equal(batch.fresh, stage.batch(2, None).fresh)
    np.testing.assert_array_equal(stage.frozen["corpus"], data.train)
    draw, loss = draw_for(0, jnp.int32(0), 8), jax.jit(stage.loss)
    terms = loss(reference, stage.frozen, batch, draw)
    np.testing.assert_allclose(terms.aux["preference"], np.log(2), atol=1e-5)
    np.testing.assert_array_equal(terms.weight, batch.pairs.weight)
    fresh = jax.tree.map(lambda x: x.reshape(16, *x.shape[2:]), batch.fresh)  # two beside each pair
    given = fresh.examples.condition
    query = np.asarray(jax.jit(retriever.query)(reference, space, given)[:, 0], np.float64)
    expected = np.zeros(16)
    for b in range(16):
        hits = fresh.candidates.hits[b]
        hits, m = hits[hits >= 0], given.domain[b]
        assert (fitted.labels.seen[m, hits] == 1).all()
        places = fresh.candidates.seeds[b]
        seeds = data.train[places[places >= 0]]
        context = given.context[b][given.mask[b]]
        np.testing.assert_array_equal(np.sort(data.embeddings[seeds], 0), np.sort(context, 0))
        others = np.setdiff1d(data.train, seeds)
        logits = np.asarray(data.embeddings[others], np.float64) @ query[b] / 0.1
        log_p = dict(zip(others, logits - np.log(np.exp(logits).sum()), strict=True))
        if len(hits) >= LEAST_POSITIVES:
            expected[b] = -0.7 * np.mean([log_p[i] for i in hits])
    assert (expected > 0).sum() > 8
    np.testing.assert_allclose(terms.loss, np.log(2) + expected.reshape(8, 2).mean(1), rtol=1e-4)
    # A fresh context that could not be drawn is padding.
    examples = batch.fresh.examples.replace(weight=np.zeros((8, 2), np.float32))
    empty = batch.replace(fresh=batch.fresh.replace(examples=examples))
    np.testing.assert_allclose(loss(reference, stage.frozen, empty, draw).loss, np.log(2), atol=1e-5)


@pytest.mark.parametrize("save_every", [2, 100], ids=["from a checkpoint", "from the start"])
def test_a_run_killed_inside_a_round_goes_on_with_its_pairs(
    whole, parts, fitted, reference, tmp_path, save_every
):
    options = dataclasses.replace(OPTIONS, save_every=save_every)
    stage, _, calls = parts(fitted, tmp_path / "pairs")

    def killed(step, params):
        if step == 4:  # one step into the second round
            raise KeyboardInterrupt
        return stage.batch(step, params)

    with pytest.raises(KeyboardInterrupt):
        run(dataclasses.replace(stage, batch=killed), tmp_path, reference, options)
    assert len(calls) == 2
    before = {p.name: p.read_bytes() for p in (tmp_path / "pairs").iterdir()}
    assert sorted(before) == ["pairs_0.npz", "pairs_1.npz"]
    stage, _, calls = parts(fitted, tmp_path / "pairs")
    state = run(stage, tmp_path, reference, options)
    assert not calls and {p.name: p.read_bytes() for p in (tmp_path / "pairs").iterdir()} == before
    assert largest_change((state.params, state.ema), (whole[1].params, whole[1].ema)) == 0.0
    for number in (0, 1):
        one, two = read(tmp_path, number), read(whole[0], number)
        for name in ("items", "domain", "winner", "loser"):
            np.testing.assert_array_equal(one[name], two[name])


def test_a_round_of_other_options_is_made_again(parts, fitted, reference, tmp_path):
    options = dict(policy="deterministic", contexts=8)
    _, refresh, calls = parts(fitted, tmp_path, **options)
    first = refresh(0, reference)
    again = parts(fitted, tmp_path, **options)[1](0, reference)
    assert leaves_equal(first, again) and len(calls) == 1
    labels = dataclasses.replace(fitted.labels, probes=fitted.labels.probes[:-1])
    others = [
        (fitted, {"rule": dataclasses.replace(RULE, margin=1)}), (fitted, {"contexts": 9}),
        (fitted, {"seed": 1}), (dataclasses.replace(fitted, labels=labels), {}),
    ]  # fmt: skip
    for one, changes in others:
        _, refresh, calls = parts(one, tmp_path, **options | changes)
        made = refresh(0, reference)
        assert len(calls) == 1 and str(made["card"]) != str(first["card"])
        assert refresh(0, reference) is made and len(calls) == 1
    # Back to the first options, back to the same pairs.
    back = parts(fitted, tmp_path, **options)[1](0, reference)
    for name in ("items", "domain", "winner", "loser", "card"):
        np.testing.assert_array_equal(back[name], first[name])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs_0.npz"]


def test_a_round_without_a_pair_is_an_error_that_says_what_to_do(parts, fitted, reference, tmp_path):
    stage, _, calls = parts(fitted, tmp_path, rule=dataclasses.replace(RULE, margin=K + 1), contexts=8)
    with pytest.raises(InputError, match="none of 8 contexts yields a pair in round 2. lower hppo.pairs"):
        stage.batch(2 * STEPS, reference)
    assert not list(tmp_path.iterdir()) and not calls


def test_a_later_round_without_a_pair_keeps_those_before(
    parts, fitted, reference, tmp_path, capsys, monkeypatch
):
    _, refresh, calls = parts(fitted, tmp_path, contexts=8)
    first, select = refresh(0, reference), hppo.select_pairs
    none = dataclasses.replace(RULE, margin=K + 1)
    monkeypatch.setattr(hppo, "select_pairs", lambda rng, pool, counts, _: select(rng, pool, counts, none))
    again = refresh(1, reference)
    assert len(calls) == 1 and "no pair in 8 contexts" in capsys.readouterr().out
    assert leaves_equal({**again, "report": 0}, {**first, "report": 0})
    assert json.loads(str(again["report"])) == {"round": 1, "contexts": 8, "pairs": 0, "empty_pools": 8}


def test_held_out_rows_change_no_pair(parts, fitted, reference, splits, tmp_path, capsys):
    out = ~splits.train
    rng = np.random.default_rng(7)
    x, seen = np.array(fitted.data.embeddings), fitted.labels.seen.copy()
    # Each is moved beside some training item, where a search that could see it would return it.
    noise = x[rng.choice(fitted.data.train, out.sum())] + 0.01 * rng.normal(size=(out.sum(), 128))
    x[out] = noise / np.linalg.norm(noise, axis=1, keepdims=True)
    seen[:, out] = rng.integers(0, 2, (4, out.sum()))  # as if they had been bought
    predicted, density = np.array(fitted.predicted), fitted.data.density.copy()
    predicted[:, out] = density[:, out] = rng.random((4, out.sum()))
    data = dataclasses.replace(fitted.data, embeddings=x, density=density, has=seen == 1)
    labels = dataclasses.replace(fitted.labels, seen=seen)
    poisoned = dataclasses.replace(fitted, data=data, labels=labels, predicted=predicted)
    flipped = np.where(fitted.labels.seen >= 0, 1 - fitted.labels.seen, -1).astype(np.int8)
    others = {
        "same": fitted,
        "poisoned": poisoned,
        "flipped": dataclasses.replace(fitted, labels=dataclasses.replace(fitted.labels, seen=flipped)),
    }
    made = {n: parts(f, tmp_path / n)[1](0, reference) for n, f in others.items()}
    for name in ("items", "domain", "winner", "loser"):
        np.testing.assert_array_equal(made["same"][name], made["poisoned"][name])
    # Labels that were bought do matter, or the comparison would show nothing.
    assert len(made["flipped"]["winner"]) != len(made["same"]["winner"]) or not np.array_equal(
        made["flipped"]["winner"], made["same"]["winner"]
    )
    assert "hppo round 0: " in (said := capsys.readouterr().out) and "validation J 0.2500" in said


def test_policies_and_seeds_reach_the_pool(parts, fitted, reference, tmp_path):
    rule = dataclasses.replace(RULE, margin=1, filter="off", on_policy_share=0.0)
    winners = {}
    for policy in ("deterministic", "on_policy"):
        _, refresh, _ = parts(fitted, tmp_path / policy, policy=policy, rule=rule, contexts=20)
        winners[policy] = json.loads(str(refresh(0, reference)["report"]))["winners"]
    own = ("sample", "one-call", "feedback")
    assert not any(word in name for name in winners["deterministic"] for word in own[::2])
    assert all(any(word in name for word in own) for name in winners["on_policy"])
    made = [
        parts(fitted, tmp_path / f"seed {s}", policy="on_policy", rule=rule, contexts=20, seed=s)[1]
        for s in (1, 2)
    ]
    one, two = (refresh(0, reference) for refresh in made)
    assert not np.array_equal(one["items"], two["items"])
