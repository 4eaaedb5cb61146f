"""R4T's lines: scores worked out by hand, the report's figures, and a whole small run on the real model."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import fanout_report, fanouts, r4t
from experiments.configs import r4t as configs
from experiments.workdir import append_rows, read_rows
from genret.catalogue.fanout import FanoutData
from genret.r4t.rewards import COMPONENTS
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


def test_the_warm_start_takes_several_parts_of_a_reference_set():
    references = [np.arange(4, dtype=np.int32)] * 3
    run = run_of(references)
    run.seed, run._warm_rows = 0, lambda: np.array([0])
    run.config.k, run.config.warm = 2, SimpleNamespace(queries=12)
    pairs = r4t.FanoutRun._retrieved(run)
    assert len(pairs) == 12 and {query for query, _ in pairs} == {"a"}
    assert all(len(set(part)) == 2 and set(part) <= set(run.data.contents) for _, part in pairs)
    assert len({frozenset(part) for _, part in pairs}) > 2  # not one part twelve times


def test_vendi_over_runs_by_both_protocols():
    east, north = np.array([[[1, 0]]], np.float32), np.array([[[0, 1]]], np.float32)
    same = fanouts.over_runs(None, [fanouts.Fanout(east), fanouts.Fanout(east)])
    assert same == pytest.approx({"vendi_runs": 0.5, "vendi_rows": 0.5})  # one of two
    apart = fanouts.over_runs(None, [fanouts.Fanout(east), fanouts.Fanout(north)])
    assert apart == pytest.approx({"vendi_runs": 1.0, "vendi_rows": 1.0})
    # A run without an answer says nothing; with fewer than two there is nothing to compare.
    assert fanouts.over_runs(None, [fanouts.Fanout(east), fanouts.Fanout(0 * east)])["vendi_runs"] == 0


def row(method, values, seed=0, name="composite", **more):
    made = {"method": method, "seed": seed, "data": "plane", "queries": 3, "k": 2, "contents": 4, "calls": 1}
    made |= {name: float(np.mean(values)), "relevant": float(np.mean(values)), "shown": []}
    return made | {"per_query": {name: values, "relevant": values}} | more


def test_the_report_by_hand(tmp_path):
    rows = [
        row("random pool", [0.1, 0.1, 0.1]), row("zero-shot LM", [0.2, 0.3, 0.4]),
        row("Best-of-5 few-shot LM", [0.4, 0.5, 0.6]), row("R4T-FOLM", [0.4, 0.6, 0.8]),
        row("k-means of neighbours", [0.05, 0.1, 0.1]),
    ]  # fmt: skip
    append_rows(tmp_path / "results.jsonl", rows)
    fast = {"batch": 8, "seed": 0, "calls": 7, "device": "cpu", "k": 2, "search_p50": 0.1, "repeats": 3}
    slow = fast | {"method": "R4T-FOLM", "p50": 2.0, "p95": 2.5, "calls": "tokens"}
    append_rows(
        tmp_path / "latency.jsonl", [slow, fast | {"method": "R4T-Diffusion", "p50": 0.1, "p95": 0.2}]
    )
    r = fanout_report.read_fanouts(tmp_path)
    said = fanout_report.text_report(r)
    assert " 2.00  [2.00, 2.00]  composite of R4T-FOLM over zero-shot LM; difference +0.300" in said
    assert " 1.20  [" in said and "over Best-of-5 few-shot LM; difference +0.100" in said
    assert "not above the random pool in relev: k-means of neighbours" in said
    assert "0.100 (0.200) 20x" in said and "2.000 (2.500)" in said
    assert fanout_report.write(tmp_path, r).stat().st_size > 5_000
    packed = fanout_report.save_fanouts(r, tmp_path / "packed.jsonl")
    assert fanout_report.text_report(fanout_report.read_fanouts(packed)) == said
    assert fanout_report.is_fanout(tmp_path) and fanout_report.is_fanout(packed)
    (tmp_path / "other").mkdir()
    append_rows(tmp_path / "other" / "results.jsonl", [{"method": "MO-DiT"}])
    assert not fanout_report.is_fanout(tmp_path / "other")
    with pytest.raises(InputError, match="holds no results"):
        fanout_report.read_fanouts(tmp_path / "none")


def test_the_ratio_of_means_and_its_interval():
    one, other = np.array([0.2, 0.4, 0.6, 0.8]), np.array([0.1, 0.2, 0.3, 0.4])
    assert fanout_report.ratio(one, other) == pytest.approx((2, 2, 2))
    found, low, high = fanout_report.ratio(one, np.full(4, 0.5))
    assert found == pytest.approx(1) and low < 0.8 and high > 1.2


def test_wrong_arguments_are_named(tmp_path):
    for argument, field in (("size=huge", "size"), ("data=songs", "data"), ("seeds=x", "seeds")):
        with pytest.raises(InputError, match=f"^{field}: "):
            configs.get_config(argument)
    config = configs.get_config("size=test,data=playlists")
    with pytest.raises(InputError, match="^raw: nothing given for playlists"):
        r4t.open_fanout(config, None)


def test_every_leaf_is_read():
    config = configs.get_config("size=test")
    source = "".join(Path(m.__file__).read_text() for m in (r4t, fanouts))
    fits = [config.mesh, config.warm.fit, config.rl.fit, config.diffusion.fit, config.regressor]
    for section in (config, *(v for v in config.values() if hasattr(v, "keys"))):
        if section not in fits:  # these go whole to what knows their names
            names = [n for n in section if n != "command"]  # that is read by `same_run`
            assert not [n for n in names if not re.search(rf"[.\[]\"?{n}\b", source) and n not in COMPONENTS]


@pytest.mark.smollm2
def test_a_whole_run_and_a_second_one_that_does_nothing(tmp_path):
    folder = tmp_path / "run"
    asked = ["--config=experiments/configs/r4t.py:size=test", f"--workdir={folder}"]
    asked += [f"--config.fanout.folder={tmp_path / 'data'}", "--config.evaluation.index=exact"]
    alone = os.environ | {"XLA_FLAGS": ""}  # one device, as on a laptop

    def both():
        for name in ("run", "evaluate"):
            subprocess.run(
                [sys.executable, "-m", f"experiments.{name}", *asked], check=True, cwd=ROOT, env=alone
            )

    both()
    rows = read_rows(folder / "results.jsonl")
    config = configs.get_config("size=test")
    config.fanout.folder, config.evaluation.index = str(tmp_path / "data"), "exact"
    (one,) = r4t.open_runs(config, folder)
    assert [r["method"] for r in rows] == [m.name for m in fanouts.all_methods(one)]
    for r in rows:
        assert all(np.isfinite(v).all() for v in r["per_query"].values())
        assert len(r["shown"]) == 3 * (r["method"] != "random pool") and r["contents"] == 2_000
    by_name = {r["method"]: r for r in rows}
    assert by_name["no fan-out"]["alignment"] == max(
        r["alignment"] for r in rows if r["k"] == 3 and not r["calls"]
    )
    assert by_name["random pool"]["groundedness"] == pytest.approx(1, abs=1e-5)
    latency = read_rows(folder / "latency.jsonl")
    assert {(w["method"], w["batch"]) for w in latency} >= {("R4T-FOLM", 8), ("R4T-Diffusion", 1)}
    said = fanout_report.text_report(fanout_report.read_fanouts(folder))
    assert "of R4T-FOLM over few-shot LM" in said
    # A second run finds everything done.
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.jsonl")}
    both()
    assert before == {p: p.stat().st_mtime_ns for p in before}
