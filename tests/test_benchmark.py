"""The benchmark: its rows, its formulas against XLA's counts and ours, and peers that compute the same."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import flops as fl
from experiments.benchmark import peers
from experiments.benchmark.measure import Machine, Work, measure, sampled, table, traced_flops
from experiments.benchmark.world import SCALES, World, read_vectors
from genret.diffusion.dit import make_dit
from genret.language.decoder import Decoder
from genret.r4t import stages as sets
from genret.types import Condition, InputError

ROOT = Path(__file__).resolve().parent.parent
LINES = ("train predictor", "sample posterior_mean", "search exact", "lm prefill")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    benchmark.main(str(path), "|".join(LINES), "test", "", False, 3)
    return json.loads(path.read_text())


def test_the_file_says_what_ran_where(report):
    for name in ("device", "backend", "cpu", "threads", "versions", "date", "command", "size", "vectors"):
        assert report[name], name
    assert {"jax", "jaxlib", "flax", "numpy", "python"} <= report["versions"].keys()
    assert [row["line"] for row in report["rows"]] == ["matmul", *LINES]


def test_rows_are_times_and_what_follows_from_them(report):
    for row in report["rows"]:
        low, high = row["quartiles_s"]
        assert 0 < low <= row["median_s"] <= high
        assert len(row["seconds"]) == row["repeats"] and row["first_call_s"] > 0 <= row["compile_s"]
        assert row["median_s"] == pytest.approx(np.median(row["seconds"]))
        assert row["items_per_s"] == pytest.approx(row["items"] / row["median_s"])
        assert row["formula"] and row["flops_counted"] > 0
        assert row["flop_per_s"] == pytest.approx(row["flops_formula"] / row["median_s"])
        assert row["mfu"] == pytest.approx(row["flop_per_s"] / report["peak_flop_per_s"])
    search = report["rows"][3]
    share = search["bytes"] / search["median_s"] / report["memory_bytes_per_s"]
    assert search["bandwidth_fraction"] == pytest.approx(share) and search["traffic"]
    assert report["rows"][1]["host_batch_s"] > 0


def test_on_a_cpu_the_plain_matmul_is_the_yardstick(report):
    if jax.default_backend() != "cpu":
        pytest.skip("the data sheet is")
    assert report["rows"][0]["mfu"] == pytest.approx(1)


def test_the_table_has_a_line_for_every_row(report):
    lines = table(report["rows"]).splitlines()
    assert len(lines) == 1 + len(report["rows"])
    assert all(line.startswith(row["line"]) for line, row in zip(lines[1:], report["rows"], strict=True))


def test_the_first_call_and_the_warm_up_are_left_out():
    calls = []
    first, seconds = sampled(lambda: calls.append(0), 4)
    assert len(calls) == 6 and len(seconds) == 4 and first > 0
    row = measure("x", Work(lambda: None, "", 10, "things", 50.0, bytes=30.0), Machine(5.0, "", 3.0), 3)
    assert row["mfu"] == pytest.approx(10 / row["median_s"])
    assert row["bandwidth_fraction"] == pytest.approx(10 / row["median_s"])


def test_a_peer_is_compared_with_the_line_it_rivals():
    rows = [
        {"line": "a", "items_per_s": 6.0},
        {"line": "b", "items_per_s": 2.0, "peer_of": "a"},
        {"line": "c", "items_per_s": 2.0, "peer_of": "absent"},
    ]
    benchmark.compare(rows)
    assert rows[1]["ours_over_peer"] == 3 and "ours_over_peer" not in rows[2]


# ---- formulas


def xla_flops(function, *args):
    """As XLA counts them, element-wise arithmetic included, before fusion."""
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def _dit(kind):
    if kind == "set":
        return sets.set_dit("demo", embedding=128, rows=10), sets.condition(jnp.zeros((4, 128))), 10, 0
    model = make_dit("demo", embedding=128, domains=4, max_context=15)
    given = Condition(jnp.zeros((4, 8, 128)), jnp.ones((4, 8), bool), jnp.zeros(4, jnp.int32))
    return model, given, 1, 8


@pytest.mark.parametrize("kind", ["prefix", "set"])
def test_a_dit_costs_what_xla_counts(kind):
    model, given, rows, context = _dit(kind)
    args = (jnp.zeros((4, rows, 128)), jnp.zeros(4), given, jnp.zeros((4, 128)))
    params = jax.eval_shape(model.init, jax.random.key(0), *args)
    formula = fl.dit(model, rows=rows, context=context)
    assert 4 * formula.total == pytest.approx(xla_flops(model.apply, params, *args), rel=0.1)
    assert 4 * formula.total == pytest.approx(traced_flops(model.apply, params, *args), rel=0.05)
    train = jax.grad(lambda p: (model.apply(p, *args) ** 2).sum())
    assert 4 * formula.train == pytest.approx(xla_flops(train, params), rel=0.1)
    assert 4 * formula.train == pytest.approx(traced_flops(train, params), rel=0.05)


def test_a_decoder_costs_what_xla_counts():
    from experiments.benchmark.language import SMOLLM2

    decoder, tokens = Decoder(SMOLLM2), jax.ShapeDtypeStruct((2, 16), jnp.int32)
    mask = jax.ShapeDtypeStruct((2, 16), bool)
    params = jax.eval_shape(decoder.init, jax.random.key(0), tokens, mask)
    formula = fl.decoder_pass(SMOLLM2, 32, 16) + fl.head(SMOLLM2, 32)
    assert formula == pytest.approx(xla_flops(decoder.apply, params, tokens, mask), rel=0.1)
    assert formula == pytest.approx(traced_flops(decoder.apply, params, tokens, mask), rel=0.05)


# ---- input


def test_an_unknown_line_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="train sft.*--peers"):
        benchmark.chosen("no such line", False)
    with pytest.raises(InputError, match="no regular expression"):
        benchmark.chosen("(", False)
    assert list(benchmark.chosen("exact", False)) == ["search exact"]


def test_the_command_says_what_is_wrong_in_one_line():
    command = [sys.executable, "-m", "experiments.benchmark", "--only=no such line"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: --only: 'no such line'")


def test_sizes_and_repeats_are_refused_before_anything_runs():
    for change in ({"size": "huge"}, {"repeats": 2}, {"vectors": "nowhere.npy"}):
        given = dict(output="", only="", size="test", vectors="", peers=False, repeats=3) | change
        with pytest.raises(InputError, match=f"--{next(iter(change))}"):
            benchmark.main(**given)


def test_missing_peers_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else object())
    with pytest.raises(InputError, match="faiss.*genret\\[peer\\]"):
        benchmark.chosen("", True)


def test_vectors_of_a_file(tmp_path):
    x = np.random.default_rng(0).normal(size=(300, 4))
    np.save(tmp_path / "x.npy", x)
    unit = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    np.testing.assert_allclose(read_vectors(str(tmp_path / "x.npy")), unit, atol=1e-6)
    world = World(SCALES["test"], str(tmp_path / "x.npy"))
    assert world.width == 4 and world.source == "x.npy" and len(world.fitted.data.train) == 300
    rows = pa.FixedSizeListArray.from_arrays(unit.ravel(), 4)
    columns = {"id": [str(i) for i in range(300)], "embedding": rows, "attribute/a": x[:, 0] > 0}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    np.testing.assert_allclose(read_vectors(str(tmp_path / "x.parquet")), unit, atol=1e-6)


def test_vectors_that_are_none(tmp_path):
    made = {"text": b"no array", "flat": np.ones(3), "whole": np.ones((3, 2), int), "zero": np.zeros((3, 2))}
    for name, value in made.items():
        path = tmp_path / f"{name}.npy"
        path.write_bytes(value) if isinstance(value, bytes) else np.save(path, value)
        with pytest.raises(InputError, match="--vectors"):
            read_vectors(str(path))
    with pytest.raises(InputError, match="neither"):
        read_vectors(str(tmp_path / "x.csv"))


def test_the_command_is_kept_without_folders(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["x", "--output=/a/b/c.json", "--only=score|search", "--vectors", "/d/e.npy", "--peers"]
    )
    assert benchmark._command() == (
        "python -m experiments.benchmark --output=c.json '--only=score|search' --vectors e.npy --peers"
    )


# ---- peers


@pytest.fixture(scope="module")
def world():
    return World(SCALES["test"])


@pytest.mark.peer
def test_torch_computes_our_network_and_our_sampler(world, optimized):
    from experiments.benchmark.peers_torch import TorchTrainer

    batch = world.examples("sft", 16)
    trainer = TorchTrainer(world, batch, peers.OPTIONS)
    apart = peers.check_sampling(world, trainer, jax.random.split(jax.random.key(0), 16))
    assert max(apart.values()) <= peers.TOLERANCE


@pytest.mark.peer
def test_torch_takes_our_optimiser_steps(world, optimized):
    apart = peers.check_training(world, world.examples("sft", 16))
    assert apart["loss_apart"] <= peers.TOLERANCE and apart["ema_apart"] < 0.01


@pytest.mark.peer
def test_a_peer_with_other_weights_is_not_timed(world, optimized, monkeypatch):
    from experiments.benchmark import peers_torch

    port = peers_torch.torch_dit

    def other(retriever, params):
        return port(retriever, jax.tree.map(lambda x: 1.01 * x, params))

    monkeypatch.setattr(peers_torch, "torch_dit", other)
    with pytest.raises(peers.PeerMismatch, match="loss"):
        peers.check_training(world, world.examples("sft", 16))


@pytest.mark.peer
def test_transformers_writes_our_tokens(world, optimized):
    row = measure("x", peers.decode(world), None, 3)
    assert row["same_tokens"] > 0.5 and row["peer_of"] in benchmark.LINES


@pytest.mark.peer
def test_searches_are_timed_at_the_first_setting_that_reaches_the_recall(world):
    for name, make in peers.LINES.items():
        if "at recall" in name:
            row = measure(name, make(world), None, 3)
            *before, last = row["ladder"]
            assert all(step["recall"] < row["target"] for step in before)
            assert row["recall"] == last["recall"] >= row["target"]
    flat = measure("faiss flat", peers.LINES["faiss flat"](world), None, 3)
    assert flat["recall"] == 1 and flat["flops_formula"] == 2 * 64 * 600 * 16
