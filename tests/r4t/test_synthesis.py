"""Fan-outs on disk: what each row is, what is dropped, and runs that are killed."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.r4t.synthesis import SynthesisOptions, SyntheticSets, load_sets, synthesize
from genret.retrieval.index import ExactIndex
from genret.types import InputError

D = 16


def vector(text):
    """A unit vector that is the text's own."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    x = np.random.default_rng(seed).normal(size=D)
    return np.float32(x / np.linalg.norm(x))


def encode(texts):
    return np.stack([vector(t) for t in texts])


def world(queries=5, contents=12):
    names = [f"item {i}" for i in range(contents)]
    themes = [f"theme {q}" for q in range(queries)]
    return SimpleNamespace(queries=themes, query_embeddings=encode(themes), embeddings=encode(names))


def policy(queries, key):
    """Up to four of six sub-queries, repeats among them; one answer in five is malformed."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    answers = []
    for query in queries:
        count, bad = rng.integers(1, 5), rng.random() < 0.2
        words = [f"{query} side {i}" for i in rng.integers(0, 6, count)]
        answers.append(None if bad else words)
    return answers


def make(folder, data=None, rows=(0, 1, 2, 3, 4), ask=policy, reward=None, about=None, **options):
    data = data or world()
    options = {"regime": "oar", "fanouts": 6, "rows": 4, "shard": 2, "dtype": "float32", **options}
    return synthesize(
        folder, data, np.array(rows), ask, SynthesisOptions(**options), encode=encode,
        index=ExactIndex(data.embeddings), reward=reward, about=about,
    )  # fmt: skip


def expected(data, rows, fanouts, shard, seed=0):
    """(query, sub-queries) in the order they must be stored, from the policy itself."""
    for s in range(0, len(rows), shard):
        some = rows[s : s + shard]
        key = jax.random.fold_in(jax.random.key(seed), s // shard)
        asked = [row for row in some for _ in range(fanouts)]
        answers = policy([data.queries[row] for row in asked], key)
        yield from ((row, answer) for row, answer in zip(asked, answers, strict=True) if answer)


@pytest.mark.parametrize("context", [0.0, 0.5])
@pytest.mark.parametrize("regime", ["oar", "wscr"])
def test_every_row_is_what_its_sub_query_found_or_the_sub_query_itself(tmp_path, regime, context):
    data, rows = world(), (4, 0, 2, 1, 3)
    sets = make(tmp_path, data, rows, regime=regime, context=context)
    wanted = list(expected(data, rows, 6, 2))
    assert sets.query.tolist() == [row for row, _ in wanted]
    stored = sets.take(np.arange(len(sets)))
    assert stored.shape == (len(wanted), 4, D) and stored.dtype == np.float32
    for i, (query, answer) in enumerate(wanted):
        assert sets.present[i].tolist() == [True] * len(answer) + [False] * (4 - len(answer))
        assert not stored[i, len(answer) :].any()
        text = encode(answer) + context * data.query_embeddings[query]
        text /= np.linalg.norm(text, axis=1, keepdims=True)
        found = (text @ data.embeddings.T).argmax(1)
        target = data.embeddings[found] if regime == "oar" else text
        np.testing.assert_allclose(stored[i, : len(answer)], target, atol=1e-6)
        ids = found.tolist() if regime == "oar" else [-1] * len(answer)
        assert sets.items[i].tolist() == ids + [-1] * (4 - len(answer))
    assert sets.counts == {"asked": 30, "malformed": 30 - len(wanted), "repeated": 0}
    assert sets.counts["malformed"] > 0


def test_sets_are_read_in_any_order_across_shards_and_long_answers_are_cut(tmp_path):
    sets = make(tmp_path)
    at = np.random.default_rng(0).permutation(len(sets))
    np.testing.assert_array_equal(sets.take(at), sets.take(np.arange(len(sets)))[at])
    cut = make(
        tmp_path / "cut", rows=(0, 1, 2, 3, 4), ask=lambda q, key: [["a", "b", "c", "d", "e"]] * len(q)
    )
    assert cut.present.all() and cut.present.shape[1] == 4
    assert isinstance(cut.targets[0], np.memmap)


def test_float16_on_disk_is_unit_norm_when_read(tmp_path):
    exact, half = make(tmp_path / "32"), make(tmp_path / "16", dtype="float16")
    assert half.targets[0].dtype == np.float16
    read = half.take(np.arange(len(half)))
    np.testing.assert_allclose(np.linalg.norm(read, axis=-1)[half.present], 1, atol=1e-6)
    np.testing.assert_allclose(read, exact.take(np.arange(len(exact))), atol=5e-4)


def test_distinct_refills_contents_masks_sub_queries_and_drops_repeated_fanouts(tmp_path):
    data = world()
    said = [["x", "y", "x"], ["y", "x"], ["x", "y"], ["z", "x", "y"], None]

    def ask(queries, key):
        assert queries == [data.queries[0]] * 5
        return said

    wscr = make(tmp_path / "w", data, (0,), ask, regime="wscr", fanouts=5, distinct=True)
    # "x y x" loses its repeat, and "y x" and "x y" then say the same.
    assert wscr.present.tolist() == [[True, True, False, False], [True, True, True, False]]
    assert wscr.counts == {"asked": 5, "malformed": 1, "repeated": 2}
    np.testing.assert_allclose(wscr.take(np.array([1]))[0, :3], encode(["z", "x", "y"]), atol=1e-6)

    oar = make(tmp_path / "o", data, (0,), ask, fanouts=5, distinct=True)
    order = {t: np.argsort(-(data.embeddings @ vector(t))).tolist() for t in "xyz"}
    x, y = order["x"][0], order["y"][0]
    assert x != y
    refill = next(i for i in order["x"] if i not in (x, y))
    assert oar.items[0].tolist() == [x, y, refill, -1]
    assert sorted(oar.items[1][:2]) == sorted([x, y]) and oar.items[1][2] == -1
    for row in oar.items:
        assert len(set(row[row >= 0])) == (row >= 0).sum()
    with pytest.raises(InputError, match="distinct"):
        make(tmp_path / "few", world(contents=3), distinct=True)


def test_rewards_are_asked_with_malformed_answers_and_kept_with_their_fanout(tmp_path):
    def reward(rows, answers):
        return [[-1.0 if a is None else 100 * r + sum(map(len, a)) for a in g]
                for r, g in zip(rows, answers, strict=True)]  # fmt: skip

    data, rows = world(), (3, 1, 4)
    sets = make(tmp_path, data, rows, reward=reward)
    wanted = [100 * row + sum(map(len, answer)) for row, answer in expected(data, rows, 6, 2)]
    assert sets.reward.tolist() == wanted
    best = sets.best(0.5)
    for row in rows:
        mine = np.flatnonzero(sets.query == row)
        kept = np.intersect1d(mine, best)
        assert len(kept) == -(-len(mine) // 2)
        assert sets.reward[kept].min() >= np.sort(sets.reward[mine])[::-1][len(kept) - 1]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=30), st.floats(0.05, 1.0)
)
def test_best_keeps_the_share_of_each_query_that_it_says(pairs, fraction):
    query, reward = np.array(pairs).T
    n = len(pairs)
    sets = SyntheticSets(
        (np.zeros((n, 1, 2)),), np.ones((n, 1), bool), query, np.float32(reward), query, {}, {}
    )
    wanted = []
    for q in set(query.tolist()):
        mine = sorted(np.flatnonzero(query == q), key=lambda i: (-reward[i], i))
        wanted += mine[: int(np.ceil(fraction * len(mine)))]
    assert sets.best(fraction).tolist() == sorted(wanted)


RUN = """
import os, sys, numpy as np, jax
sys.path[:0] = [{root!r}, {here!r}]
import test_synthesis as t
from genret.r4t import synthesis
calls, save = [0], np.save

def ask(queries, key):
    calls[0] += 1
    if calls[0] == {die_at_call}:
        os._exit(9)
    return t.policy(queries, key)

def dying(file, array):
    save(file, array)
    if {die_at_file!r} in str(file):
        os._exit(9)

np.save = dying
t.make({folder!r}, ask=ask, reward=lambda rows, answers: [[len(a or "") for a in g] for g in answers])
print(calls[0])
"""


def run(folder, die_at_call=0, die_at_file="never"):
    here = Path(__file__).parent
    code = RUN.format(
        root=str(here.parent.parent), here=str(here), folder=str(folder), die_at_call=die_at_call,
        die_at_file=die_at_file,
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode in (0, 9), done.stderr
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_killed_run_goes_on_and_writes_what_an_undisturbed_one_does(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole) == 3  # shards
    assert run(cut, die_at_call=2) is None  # the first shard is there, the second not begun
    assert sorted(f.name for f in cut.glob("shard*")) == ["shard_00000"]
    first = contents(cut / "shard_00000"), (cut / "shard_00000").stat().st_mtime_ns
    assert run(cut, die_at_file="shard_00001.tmp/query") is None  # in the middle of writing it
    assert sorted(f.name for f in cut.glob("shard*")) == ["shard_00000", "shard_00001.tmp"]
    with pytest.raises(InputError, match="2 of 3 shards"):
        load_sets(cut)
    assert run(cut) == 2  # the first shard is not asked for again
    assert (contents(cut / "shard_00000"), (cut / "shard_00000").stat().st_mtime_ns) == first
    assert contents(cut) == contents(whole)
    assert run(cut) == 0


def test_other_options_do_not_read_a_folder(tmp_path):
    sets = make(tmp_path, about={"checkpoint": "a", "temperature": 0.9})
    again = make(tmp_path, ask=None, about={"checkpoint": "a", "temperature": 0.9})  # only opened
    np.testing.assert_array_equal(again.take(np.arange(len(sets))), sets.take(np.arange(len(sets))))
    assert again.card == json.loads((tmp_path / "card.json").read_text())
    whole = (tmp_path / "card.json").read_text()
    for cut in ("", whole[: len(whole) // 2], "[]", "{}"):
        (tmp_path / "card.json").write_text(cut)
        for read in (lambda: load_sets(tmp_path), lambda: make(tmp_path, ask=None, about={})):
            with pytest.raises(InputError, match=f"^{tmp_path}: is cut short or damaged .*delete it"):
                read()
    (tmp_path / "card.json").write_text(whole)
    data = world()
    data.embeddings[3] = -data.embeddings[3]
    for message, change in {
        "about": {}, "seed": {"seed": 1}, "fanouts": {"fanouts": 7}, "regime": {"regime": "wscr"},
        "distinct": {"distinct": True}, "queries": {"rows": (0, 1, 2, 4, 3)}, "contents": {"data": data},
    }.items():  # fmt: skip
        about = None if message == "about" else {"checkpoint": "a", "temperature": 0.9}
        with pytest.raises(InputError, match=f"made with {message}") as error:
            make(tmp_path, **{"about": about, **change})
        assert str(tmp_path) in str(error.value)


def test_bad_input_is_said_before_anything_is_asked(tmp_path):
    for options in ({"regime": "wild"}, {"dtype": "int8"}, {"fanouts": 0}):
        with pytest.raises(InputError, match="synthesis"):
            make(tmp_path, ask=None, **options)
    with pytest.raises(InputError, match="no query"):
        make(tmp_path, rows=())
    with pytest.raises(InputError, match="holds none"):
        load_sets(tmp_path)
    data = world()
    with pytest.raises(InputError, match="12 contents"):
        synthesize(tmp_path, data, np.arange(2), None, SynthesisOptions("oar"), encode=encode,
                   index=ExactIndex(data.embeddings[:5]))  # fmt: skip
    with pytest.raises(InputError, match="one answer each"):
        make(tmp_path / "short", ask=lambda queries, key: [])
    with pytest.raises(InputError, match="none of 30"):
        make(tmp_path / "mute", ask=lambda queries, key: [None, []] * (len(queries) // 2))
    with pytest.raises(InputError, match="reward"):
        make(tmp_path / "plain").best(0.5)
    with pytest.raises(InputError, match="keep_top"):
        load_sets(tmp_path / "plain").best(0.0)
