"""R4T's lines: scores worked out by hand, choices among rows, latency, and what chance finds."""

import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import fanouts, r4t
from experiments.configs import r4t as configs
from experiments.workdir import read_rows
from genret.catalogue.fanout import FanoutData
from genret.diffusion import edm
from genret.diffusion.retriever import Retriever
from genret.r4t import stages
from genret.r4t.fanout import SetRetriever
from genret.r4t.rewards import Rewards
from genret.retrieval.index import ExactIndex
from genret.types import InputError

ROOT = Path(__file__).resolve().parent.parent


def data_of(references=None):
    """Four contents on the axes of a plane and one query between two of them."""
    x = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    query = np.array([[0.6, 0.8]] * 3, np.float32)
    return FanoutData(
        "plane", ["east", "north", "west", "south"], x, ["a", "b", "c"], query, np.arange(3, dtype=np.int8),
        references,
    )  # fmt: skip


def run_of(references=None, depth=1):
    data = data_of(references)
    index = ExactIndex(data.embeddings)
    return SimpleNamespace(
        data=data, index=index, config=SimpleNamespace(evaluation=SimpleNamespace(depth=depth))
    )


def test_scores_by_hand():
    # Rows at 0.8 from east and exactly north; the second answer has one row, the third none.
    rows = np.array([[[0.8, 0.6], [0, 1]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]], np.float32)
    found = fanouts.score(run_of(), np.arange(3), fanouts.Fanout(rows))
    np.testing.assert_allclose(found["groundedness"], [0.9, 0.5, 0], atol=1e-6)
    # east and north are orthogonal: Vendi 2 of 2; one row alone: Vendi 1.
    np.testing.assert_allclose(found["diversity"], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found["alignment"], [0.7, 0.3, 0], atol=1e-6)
    np.testing.assert_allclose(found["relevant"], [0.7 * 2 / 2, 0.3 * 1 / 2, 0], atol=1e-6)
    np.testing.assert_allclose(found["composite"], [0.54 + 0.2 + 0.14, 0.3 + 0.06, 0], atol=1e-6)
    np.testing.assert_array_equal(found["valid"], [1, 1, 0])
    assert "recall" not in found


def test_recall_counts_the_union_of_what_all_rows_find():
    references = [np.array(r, np.int32) for r in ([0, 1, 2], [2], [1])]
    rows = np.array([[[0.8, 0.6], [0, 1]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]], np.float32)
    found = fanouts.score(run_of(references, depth=2), np.arange(3), fanouts.Fanout(rows))
    # The first finds {east, north} twice; the second {east, north or south}; the third nothing.
    np.testing.assert_allclose(found["recall"], [2 / 3, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(found["hit"], [1, 0, 0])
    # What a method has found by itself is taken as it is.
    own = fanouts.Fanout(rows, found=np.array([[[2], [3]], [[2], [2]], [[1], [0]]], np.int32))
    found = fanouts.score(run_of(references, depth=2), np.arange(3), own)
    np.testing.assert_allclose(found["recall"], [1 / 3, 1, 1], atol=1e-6)
    np.testing.assert_allclose(found["precision"], [1 / 2, 1, 1 / 2], atol=1e-6)


def test_training_leaves_out_a_query_that_goes_on_and_on(capsys):
    data = SimpleNamespace(queries=["a b", "a " * 90, "c"], rows=lambda part: np.array([2, 1, 0]))
    policy = SimpleNamespace(width=8, lengths=lambda queries: np.array([len(q.split()) for q in queries]))
    run = SimpleNamespace(data=data, policy=policy)
    assert r4t.FanoutRun.training_rows.func(run).tolist() == [2, 0]
    assert capsys.readouterr().out == "1 training queries of over 8 tokens left out\n"
    policy.width = 96
    assert r4t.FanoutRun.training_rows.func(run).tolist() == [2, 1, 0] and not capsys.readouterr().out


def test_the_warm_start_takes_several_parts_of_a_reference_set():
    references = [np.arange(4, dtype=np.int32)] * 3
    run = run_of(references)
    run.seed, run._warm_rows = 0, lambda: np.array([0])
    run.config.k, run.config.warm = 2, SimpleNamespace(queries=12)
    pairs = r4t.FanoutRun._retrieved(run)
    assert len(pairs) == 12 and {query for query, _ in pairs} == {"a"}
    assert all(len(set(part)) == 2 and set(part) <= set(run.data.contents) for _, part in pairs)
    assert len({frozenset(part) for _, part in pairs}) > 2  # not one part twelve times


def test_each_reward_is_trained_from_the_averaged_warm_start():
    fitted = []

    def fit(folder, stage, begin):
        fitted.append((folder, stage, begin))
        return SimpleNamespace(params=f"last of {folder}", ema=f"average of {folder}")

    run = SimpleNamespace(warm_stage=lambda: "warm stage", start="base", tuned=["folm", "other"], _fit=fit)
    run.policy_stage = lambda folder, warm: (folder, warm)
    r4t.FanoutRun.train_policy(run)
    average = "average of warm"  # the one that the table evaluates
    assert fitted[0] == ("warm", "warm stage", "base")
    assert fitted[1:] == [(name, (name, average), average) for name in ("folm", "other")]


def test_soft_coverage_is_of_the_contents_found():
    references = [np.array(r, np.int32) for r in ([0, 1], [2], [1])]
    rows = np.array([[[0.8, 0.6], [0.9, 0.1]], [[1, 0], [0, 1]], [[0, 0], [0, 0]]], np.float32)
    found = fanouts.score(run_of(references), np.arange(3), fanouts.Fanout(rows))
    # east alone is 1 from east and 0 from north; east and north are -1 and 0 from west; nothing is 0.
    np.testing.assert_allclose(found["soft_coverage"], [0.5, 0, 0], atol=1e-6)


def test_vendi_over_runs_by_both_protocols():
    east, north = np.array([[[1, 0]]], np.float32), np.array([[[0, 1]]], np.float32)
    assert fanouts.over_runs([east, east]) == pytest.approx({"vendi_runs": 0.5, "vendi_rows": 0.5})  # 1 of 2
    assert fanouts.over_runs([east, north]) == pytest.approx({"vendi_runs": 1.0, "vendi_rows": 1.0})
    # A run without an answer says nothing; with fewer than two there is nothing to compare.
    assert fanouts.over_runs([east, 0 * east]) == {}
    both = fanouts.over_runs([np.concatenate([east, east]), np.concatenate([east, 0 * east])])
    assert both == fanouts.over_runs([east, east])


def small_run(references=None, **evaluation):
    """A run of the plane whose settings are those of the smallest size."""
    run = run_of(references)
    run.config = configs.get_config("size=test")
    run.config.evaluation.update(index="exact", depth=1, queries=0, show=1, **evaluation)
    run.config.k, run.seed, run.index.name = 2, 0, "exact"
    return run


def answers(run, calls):
    """A method that draws, north alone where a query is asked again, and one that does not; `calls` notes
    which queries each is asked."""

    def method(name, draws):
        def answer(rows, seed):
            calls.append((name, rows.tolist()))
            both, seen = run.data.embeddings[:2], set()
            made = [both[[1, 1]] if row in seen else seen.add(row) or both for row in rows.tolist()]
            return fanouts.Fanout(np.stack(made))

        return fanouts.FanoutMethod(name, answer, draws)

    return lambda _: [method("drawn", True), method("fixed", False)]


def test_every_method_has_both_vendis_and_each_part_its_rows(tmp_path, monkeypatch):
    run, calls = small_run(runs=3, repeated=1), []
    object.__setattr__(run.data, "split", np.array([2, 1, 2]))
    monkeypatch.setattr(fanouts, "all_methods", answers(run, calls))
    path = tmp_path / "results.jsonl"
    for part in ("test", "test", "validation"):  # the second has nothing to do
        run.config.evaluation.part = part
        fanouts.evaluate_run(run, path)
    assert calls == [
        ("drawn", [0, 2, 0, 0]), ("fixed", [0, 2]), ("drawn", [1, 1, 1]), ("fixed", [1])
    ]  # fmt: skip
    rows = read_rows(path)
    assert [(r["method"], r["part"]) for r in rows] == [
        ("drawn", "test"), ("fixed", "test"), ("drawn", "validation"), ("fixed", "validation")
    ]  # fmt: skip
    east, north = np.eye(2, dtype=np.float32)
    first, again = np.array([[east, north]]), np.array([[north, north]])
    for r in rows:
        drawn = fanouts.over_runs([first, again, again] if r["method"] == "drawn" else [first] * 3)
        assert (r["vendi_runs"], r["vendi_rows"]) == pytest.approx(tuple(drawn.values()))
        assert (r["runs"], r["repeated"]) == (3, 1)
        assert set(r["per_query"]["diversity"]) == {1.0}  # of the first draw
    # The mean of east and north three times over is one of three; the rows are two of six.
    assert (rows[1]["vendi_runs"], rows[1]["vendi_rows"]) == pytest.approx((1 / 3, 1 / 3))
    # Rows of runs before there were parts are of test queries.
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "part"}) + "\n" for r in rows[:2]))
    run.config.evaluation.part = "test"
    asked = len(calls)
    fanouts.evaluate_run(run, path)
    assert len(calls) == asked
    fanouts.evaluate_run(run, tmp_path / "some.jsonl", "^fix")
    assert [name for name, _ in calls[asked:]] == ["fixed"]
    with pytest.raises(InputError, match="'none' is in no method's name. use some of: drawn, fixed"):
        fanouts.evaluate_run(run, path, "none")


def test_best_of_n_by_the_references_is_an_oracle_and_says_so():
    def best(references):
        return next(m for m in fanouts.all_methods(small_run(references)) if m.name.startswith("Best-of"))

    free, told = best(None), best([np.array([0], np.int32)] * 3)
    assert (free.name, free.reads, free.draws) == ("Best-of-2 few-shot LM", "", True)
    assert (told.name, told.reads, told.draws) == ("Best-of-2 few-shot LM, oracle", "references", True)


def test_best_of_n_takes_the_best_and_survives_queries_without_an_answer(monkeypatch):
    run = small_run()
    vectors = dict(zip(run.data.contents, run.data.embeddings, strict=True))
    encode = lambda texts: np.stack([vectors[text] for text in texts])  # noqa: E731
    run.rewards = lambda: Rewards(run.data, run.index, encode, k=2)
    run.few_shot = run.base = None
    # Of the first pair the second is nearer to the query, and two things; of the others one or none is read.
    said = [["west", "west"], ["east", "north"], None, ["south"], None, None]
    monkeypatch.setattr(fanouts, "sample_fanouts", lambda policy, base, asked, *_, **__: said[: len(asked)])
    line = next(m for m in fanouts.all_methods(run) if m.name.startswith("Best-of"))
    assert line.run(np.arange(3), 0).texts == [["east", "north"], ["south"], None]
    said[:] = [None] * 6
    assert not line.run(np.arange(3), 0).vectors.any()


def test_latency_is_told_with_the_encoding_and_without_and_a_batch_too_large_is_skipped(
    tmp_path, monkeypatch
):
    run = small_run(repeats=3)
    run.config.evaluation.latency = (2, 4)
    run.encoder = SimpleNamespace(encode=lambda texts, **_: time.sleep(0.02))

    def method(name, calls):
        def answer(rows, seed):
            if len(rows) == 4 and calls == "tokens":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
            return fanouts.Fanout(np.stack([run.data.embeddings[:2]] * len(rows)))

        return fanouts.FanoutMethod(name, answer, calls=calls)

    lines = [method(fanouts.FOLM, "tokens"), method(fanouts.DIFFUSION, 7), method("random pool", 0)]
    monkeypatch.setattr(fanouts, "all_methods", lambda _: lines)
    fanouts.time_run(run, tmp_path / "latency.jsonl")
    written, drawn, skipped, large = read_rows(tmp_path / "latency.jsonl")
    # A language model reads the text; who reads the embedding pays for it.
    assert written["encode_p50"] == 0 and written["seconds"] == written["alone"]
    assert drawn["encode_p50"] >= 0.02 and drawn["p50"] >= 0.02
    np.testing.assert_allclose(drawn["p50"], np.median(drawn["seconds"]))
    assert all(whole - alone >= 0.02 for whole, alone in zip(drawn["seconds"], drawn["alone"], strict=True))
    assert skipped["skipped"] == "out of memory" and "p50" not in skipped and large["batch"] == 4
    before = (tmp_path / "latency.jsonl").read_bytes()
    fanouts.time_run(run, tmp_path / "latency.jsonl")
    assert (tmp_path / "latency.jsonl").read_bytes() == before
    lines[0] = fanouts.FanoutMethod(fanouts.FOLM, lambda *_: bad(), calls="tokens")

    def bad():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        fanouts.time_run(run, tmp_path / "other.jsonl")


@pytest.mark.parametrize("references, depth", [(None, 1), ([np.array([0, 2])] * 3, 3)])
def test_latency_includes_a_search_as_deep_as_the_scores(tmp_path, monkeypatch, references, depth):
    run, searched = small_run(references, repeats=1), []
    run.config.evaluation.update(latency=(2,), depth=3)
    search = lambda queries, k: searched.append(k) or ExactIndex.search(index, queries, k)  # noqa: E731
    index, run.index = run.index, SimpleNamespace(search=search, name="exact", num_items=3)
    line = fanouts.FanoutMethod(
        fanouts.FOLM, lambda rows, _: fanouts.Fanout(np.stack([run.data.embeddings[:2]] * len(rows))),
        calls="tokens",
    )  # fmt: skip
    monkeypatch.setattr(fanouts, "all_methods", lambda _: [line])
    fanouts.time_run(run, tmp_path / "latency.jsonl")
    assert searched == [depth] * 2  # contents of the answer, or as many as recall counts


@pytest.mark.parametrize("references", [None, [np.array([0, 2])] * 3])
def test_a_set_is_chosen_by_its_contents_where_only_they_count(references):
    """Open-ended data alone, and only where there are rows to choose from; the search is timed."""
    run = small_run(references)
    run.trained = lambda folder: None  # no language model is asked
    retriever = Retriever(stages.set_dit("test", embedding=run.data.width))
    params = retriever.init(jax.random.key(0))
    for rows in (2, 5):
        model = SetRetriever(retriever, params, edm.plain_space(run.data.width, 0), rows)
        run.config.k, run.model = 2, lambda _, step=None, model=model: model
        line = next(m for m in fanouts.all_methods(run) if m.name.endswith("DPM-Solver++ 4"))
        made = line.run(np.arange(3), 0)
        assert made.vectors.shape == (3, 2, run.data.width)
        chosen = references is None and rows > 2
        assert (made.found is not None) == chosen == (made.searched > 0)
        as_drawn = next(m for m in fanouts.all_methods(run) if m.name == fanouts.AS_DRAWN)
        assert as_drawn.run(np.arange(3), 0).found is None
        if chosen:
            nearest = (made.vectors @ run.data.embeddings.T).argmax(-1)
            np.testing.assert_array_equal(made.found[..., 0], nearest)
            assert made.first(1).found.shape == (1, 2, 1)


def test_two_answers_of_a_language_model_may_be_chosen_among_alike(monkeypatch):
    """Of east twice and north with nothing: east and north, whatever is malformed; open-ended data alone."""
    run = small_run()
    vectors = dict(zip(run.data.contents, run.data.embeddings, strict=True))
    encode = lambda texts: np.stack([vectors[text] for text in texts])  # noqa: E731
    run.rewards = lambda: Rewards(run.data, run.index, encode, k=2)
    run.policy, run.trained = None, lambda folder: None
    said = [["east", "east"], ["north"], None, ["south"], None, None]
    monkeypatch.setattr(fanouts, "sample_fanouts", lambda policy, base, asked, *_, **__: said[: len(asked)])
    line = next(m for m in fanouts.all_methods(run) if m.name == fanouts.OF_TWO)
    made = line.run(np.arange(3), 0)
    assert made.found[..., 0].tolist() == [[1, 0], [3, -1], [-1, -1]]  # north is nearest to the query
    np.testing.assert_array_equal(made.vectors[0], run.data.embeddings[[1, 0]])
    assert not made.vectors[2].any()
    told = small_run([np.array([0, 2])] * 3)
    told.trained, told.model = lambda folder: None, lambda folder, step=None: None
    assert fanouts.OF_TWO not in [m.name for m in fanouts.all_methods(told)]


def test_chance_and_the_query_alone_find_as_many_contents_as_ten_rows_or_all_there_are():
    run = small_run([np.array([0, 2])] * 3)
    for depth, found in ((1, 2), (2, 4), (3, 4)):  # two rows, four contents
        run.config.evaluation.depth = depth
        for line in itertools.islice(fanouts.all_methods(run), 2):
            made = line.run(np.arange(3), 0)
            ids = made.found.reshape(3, -1)
            assert made.vectors.shape == (3, 2, 2) and ids.shape[1] == 2 * depth
            assert all(len(set(row[row >= 0])) == found == (row >= 0).sum() for row in ids)
            scored = fanouts.score(run, np.arange(3), made)["recall"]
            assert depth == 1 or (scored == 1).all()
