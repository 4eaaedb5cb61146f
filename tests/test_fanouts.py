"""R4T's lines: scores worked out by hand, the report's figures, and a whole small run on the real model."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import fanout_report, fanout_rows, fanouts, r4t, r4t_checks
from experiments.configs import r4t as configs
from experiments.workdir import read_rows, same_run
from genret.catalogue import words
from genret.catalogue.fanout import SPLITS, FanoutData
from genret.diffusion import edm
from genret.diffusion.retriever import Retriever
from genret.r4t import stages
from genret.r4t.fanout import SetRetriever
from genret.r4t.rewards import COMPONENTS, Rewards
from genret.retrieval.index import ExactIndex
from genret.types import InputError
from tests import quick
from tests.commands import ENVIRONMENT, tiny_r4t, together, write_warm_pairs

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
        fanouts.evaluate_run(run, path, lambda _: True)
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
    fanouts.evaluate_run(run, path, lambda _: pytest.fail("asked again"))


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
        run.config.k, run.model = 2, lambda _, model=model: model
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
    told.trained, told.model = lambda folder: None, lambda folder: None
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


def test_wrong_arguments_are_named(tmp_path):
    long = "data=" + 5_000 * "9"  # longer than a path may be
    for argument, field in (
        ("size=huge", "size"),
        ("data=songs", "data"),
        (long, "data"),
        ("seeds=x", "seeds"),
    ):
        with pytest.raises(InputError, match=f"^{field}: "):
            configs.get_config(argument)
    config = configs.get_config("size=test,data=playlists")
    with pytest.raises(InputError, match="^raw: nothing given for playlists"):
        r4t.open_fanout(config, None)


def test_a_folder_of_ones_own_is_a_data_set(tmp_path):
    """With references the answers are searched in the context of their query, without them by themselves."""
    (folder := tmp_path / "shop").mkdir()
    (folder / "contents.txt").write_text("umbrella\nboots\ntea\n")
    for references, context in (({"references": ["boots", "tea"]}, 1.0), ({}, 0.0)):
        lines = [json.dumps({"query": f"q{i}", "split": s} | references) for i, s in enumerate(SPLITS)]
        (folder / "queries.jsonl").write_text("\n".join(lines))
        config = configs.get_config(f"size=test,data={folder}")
        texts = r4t.fanout_texts(config)
        assert (texts.name, texts.contents, texts.queries) == (
            "shop",
            ["umbrella", "boots", "tea"],
            ["q0", "q1", "q2"],
        )
        data = SimpleNamespace(references=texts.references)
        assert r4t.FanoutRun(config, data, None, tmp_path, 0).context == context
        asked = configs.get_config(f"size=test,data={folder},regime=oar")
        assert r4t.fanout_texts(asked).references is None and "regime=oar" in asked.command


def test_what_no_run_can_do_is_said_before_anything_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(r4t, "load_encoder", lambda: pytest.fail("opened"))
    for argument, part, said in (
        ("data=playlists,ablations=rewards", "test", "^ablations: rewards compares components .* playlists"),
        ("ablations=reward", "test", "^ablations: unknown 'reward'"),
        ("data=playlists,regime=wscr", "test", "^regime: unknown regime 'wscr'. use oar"),
        ("data=words", "train", "^evaluation.part: 'train' is asked of no method"),
    ):
        config = configs.get_config(f"size=test,{argument}")
        config.evaluation.part = part
        with pytest.raises(InputError, match=said):
            next(r4t.open_runs(config, tmp_path))
    wrong = [
        ("diffusion", "rows", 2),
        ("evaluation", "spare", (-1, 4)),
        ("evaluation", "spare", (4,)),
        ("evaluation", "levels", (3.0, 1.0)),
    ]
    wrong += [("evaluation", "grounded", value) for value in (-1.0, math.nan)]
    wrong += [("evaluation", "few", (few,)) for few in ("heun", "heun 0", "sde 8", "heun -1")]
    for section, name, value in wrong:
        config = configs.get_config("size=test")
        config[section][name] = value
        with pytest.raises(InputError, match=f"^{section}.{name}: "):
            next(r4t.open_runs(config, tmp_path))


def test_a_run_may_be_evaluated_on_another_part_but_not_at_another_depth(tmp_path):
    config = configs.get_config("size=test")
    same_run(config, [], tmp_path)
    config.evaluation.part, config.evaluation.latency, config.fanout.folder = "validation", (1,), "elsewhere"
    config.evaluation.repeats = 1
    same_run(config, [], tmp_path)
    config.evaluation.depth = 7
    with pytest.raises(InputError, match="another evaluation"):
        same_run(config, [], tmp_path)


def test_every_leaf_is_read():
    config = configs.get_config("size=test")
    source = "".join(Path(m.__file__).read_text() for m in (r4t, fanouts))
    fits = [config.mesh, config.warm.fit, config.rl.fit, config.diffusion.fit, config.regressor]
    for section in (config, *(v for v in config.values() if hasattr(v, "keys"))):
        if section not in fits:  # these go whole to what knows their names
            names = [n for n in section if n != "command"]  # that is read by `same_run`
            assert not [n for n in names if not re.search(rf"[.\[]\"?{n}\b", source) and n not in COMPONENTS]


def test_a_configuration_that_asks_more_than_the_data_hold_names_its_option():
    data = data_of([np.array([0, 2])] * 3)
    for changes, said in (
        ({"k": 5}, "^k: 5 of 4 contents. pass --config.k=N, 1 to 4"),
        ({"rl": {"count": 2}}, "^rl.count: 2 of 1 training queries"),
        ({"reward": {"depth": 100}}, "^reward.depth: 100 of 4 contents"),
        ({"evaluation": {"depth": 0}}, "^evaluation.depth: 0 of 4 contents"),
    ):
        config = configs.get_config("size=test")
        config.update({"rl": {"count": 1}, "reward": {"depth": 4}, "evaluation": {"depth": 4}})
        r4t_checks.check_fits(config, data)
        config.update(changes)
        with pytest.raises(InputError, match=said):
            r4t_checks.check_fits(config, data)


@pytest.mark.long
def test_a_small_folder_of_ones_own_goes_through_all_steps(tmp_path):
    """Ninety contents, with reference sets: fewer than ten rows at the depth of recall would find."""
    (folder := tmp_path / "shop").mkdir()
    texts = words.themed(size=300, count=150, seed=0)
    (folder / "contents.txt").write_text("\n".join(texts.contents[:90]))
    lines = [
        {"query": q, "references": list(texts.contents[i : i + 5])} for i, q in enumerate(texts.queries[:60])
    ]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config, *flags = tiny_r4t(tmp_path)
    asked = [f"{config},data={folder}", *flags, f"--workdir={tmp_path / 'run'}"]
    write_warm_pairs(tmp_path / "run")
    asked += ["--config.reward.depth=20", "--config.evaluation.depth=40", "--config.evaluation.latency=()"]
    for name in ("run", "evaluate"):
        together(["-m", f"experiments.{name}", *asked], count=1)
    rows = {row["method"]: row for row in read_rows(tmp_path / "run" / "results.jsonl")}
    assert rows["no fan-out"]["recall"] == rows["random pool"]["recall"] == 1  # 3 x 40 of 90 contents
    assert 0 < rows["R4T-Diffusion"]["recall"] <= 1 and len(rows) > 12


@pytest.mark.smollm2
@pytest.mark.long
def test_a_whole_run_and_a_second_one_that_does_nothing(tmp_path):
    folder = tmp_path / "run"
    asked = ["--config=experiments/configs/r4t.py:size=test", f"--workdir={folder}"]
    asked += [f"--config.fanout.folder={tmp_path / 'data'}", "--config.evaluation.index=exact"]
    # One device, as on a laptop.
    alone = os.environ | ENVIRONMENT | {"XLA_FLAGS": quick.flags()}

    for name in ("run", "evaluate"):
        subprocess.run([sys.executable, "-m", f"experiments.{name}", *asked], check=True, cwd=ROOT, env=alone)
    rows = read_rows(folder / "results.jsonl")
    config = configs.get_config("size=test")
    config.fanout.folder, config.evaluation.index = str(tmp_path / "data"), "exact"
    (one,) = r4t.open_runs(config, folder)
    assert [r["method"] for r in rows] == [m.name for m in fanouts.all_methods(one)]
    for r in rows:
        assert all(np.isfinite(v).all() for v in r["per_query"].values())
        assert r["runs"] == 2 and r["repeated"] == 4
        assert {"vendi_runs", "vendi_rows"} <= r.keys() or (r["calls"] == "tokens" and r["valid"] < 1)
        assert len(r["shown"]) == 3 * (r["method"] != "random pool") and r["contents"] == 2_000
    by_name = {r["method"]: r for r in rows}
    assert by_name["no fan-out"]["alignment"] == max(
        r["alignment"] for r in rows if r["k"] == 3 and not r["calls"]
    )
    assert by_name["random pool"]["groundedness"] == pytest.approx(1, abs=1e-5)
    latency = read_rows(folder / "latency.jsonl")
    assert {(w["method"], w["batch"]) for w in latency} >= {("R4T-FOLM", 8), ("R4T-Diffusion", 8)}
    said = fanout_report.text_report(fanout_rows.read_fanouts(folder))
    assert "of R4T-FOLM over few-shot LM" in said and "the fan-out alone" in said
    # The sampler's log-probabilities are those of training, on the real model as well.
    logged = [json.loads(line) for line in open(folder / "seed_0" / "folm" / "metrics.jsonl")]
    assert len(logged) == 2 and all(row["sampler_difference"] < 1e-4 for row in logged)
    # A second run finds everything done, on other devices as well.
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl")}
    one.train()
    fanouts.evaluate_run(one, folder / "results.jsonl", lambda name: True)
    fanouts.time_run(one, folder / "latency.jsonl")
    assert before == {p: p.stat().st_mtime_ns for p in before}
