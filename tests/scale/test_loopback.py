"""More processes over loopback than the ordinary suite can afford: training, evaluation, search, and R4T."""

import json
import shutil
import time

import jax
import numpy as np
import pytest

from experiments.workdir import read_rows
from genret.retrieval.index import ExactIndex
from tests.commands import command, parameters, states, tiny_r4t, together, write_catalogue, write_warm_pairs

pytestmark = pytest.mark.scale

MODIT = ("predictor", "pretrain", "cpt", "sft", "hppo", "sft_mse", "sft_retrieval", "contrastive_labels_4")
R4T = ("warm", "folm", "diffusion", "regressor")
R4T_METHODS = "^(MMR re-ranking|warm-started LM|R4T-FOLM|MSE set regressor|R4T-Diffusion, Heun 2)$"


def difference(a, b):
    """The largest of a parameter."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max()) for x, y in pairs)


def apart(one, two, stages):
    """The largest difference of a parameter, by stage."""
    return {s: difference(*(parameters(run / "seed_0" / s) for run in (one, two))) for s in stages}


def compared(config, one, two, count, stages, methods):
    """Trains and evaluates in one process of `count` devices and in `count` of one; the rows of both."""
    asked = f"--methods={methods}"
    for folder, processes, devices in ((one, 1, count), (two, count, 1)):
        began = time.monotonic()
        where = dict(count=processes, devices=devices, patience=3000)
        together(["-m", "experiments.run", *config, f"--workdir={folder}"], **where)
        trained = time.monotonic()
        together(["-m", "experiments.evaluate", *config, asked, f"--workdir={folder}"], **where)
        print(f"{processes} x {devices}: {trained - began:.0f} s, {time.monotonic() - trained:.0f} s")
    differences = apart(one, two, stages)
    print(differences)
    assert max(differences.values()) <= 1e-5, differences
    return [read_rows(run / "results.jsonl") for run in (one, two)]


def test_four_processes_are_one(tmp_path):
    """Every stage and every rival, two batch shards by two of the tensor axis, a ScaNN in each process."""
    write_catalogue(catalogue := tmp_path / "small.parquet")
    config = [
        f"--config=experiments/configs/modit.py:size=test,data={catalogue}",
        "--config.evaluation.index=scann", "--config.hppo.contexts=48",
        "--config.labels.predictor.steps=10", "--config.mesh.data=1", "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
    ]  # fmt: skip
    methods = "^main: (seed mean|ridge regressor|MO-DiT after (SFT|HPPO)|contrastive encoder.*)$"
    one, four = tmp_path / "one", tmp_path / "four"
    rows = compared(config, one, four, 4, MODIT, methods)
    assert rows[0] == rows[1] and len(rows[0]) >= 6 * 4
    for folder, processes, devices in ((one, 1, 4), (four, 4, 1)):
        asked = ["--checkpoints=sft,hppo", f"--workdir={folder}"]
        together(["-m", "experiments.evaluate", *config, *asked], processes, devices, patience=3000)
    rows = [read_rows(folder / "checkpoints.jsonl") for folder in (one, four)]
    assert rows[0] == rows[1] and {row["folder"] for row in rows[0]} == {"sft", "hppo"}


def test_four_processes_search_as_one(tmp_path):
    """Each holds a quarter of the corpus, with ties across the borders."""
    rng = np.random.default_rng(0)
    x, queries = (np.float32(rng.normal(size=(n, 32))) for n in (3001, 70))
    x[2500:2600] = x[:100]
    np.savez(tmp_path / "given.npz", x=x, queries=queries)
    body = """
import numpy as np
from genret.retrieval.index import ExactIndex
given = np.load(workdir / "given.npz")
index = ExactIndex(given["x"], mesh=make_mesh(), corpus_block=512)
assert len(index.rows.addressable_shards) == 1 and index.rows.addressable_shards[0].data.shape[0] < 1001
ids, scores = index.search(given["queries"], 50)
np.savez(workdir / f"found_{index_of_process}.npz", ids=ids, scores=scores)
""".replace("index_of_process", "jax.process_index()")
    together(command(body, tmp_path), 4)
    ids, scores = ExactIndex(x).search(queries, 50)
    for process in range(4):
        with np.load(tmp_path / f"found_{process}.npz") as found:
            np.testing.assert_array_equal(found["ids"], ids)
            np.testing.assert_allclose(found["scores"], scores, rtol=1e-6)


def test_two_processes_run_r4t_as_one(tmp_path):
    """A tiny language model of random weights: warm start, rollouts, synthesis, sets, and every line."""
    config = [*tiny_r4t(tmp_path), "--config.evaluation.latency=(2,)", "--config.mesh.fsdp=2"]
    for run in ("one", "two"):
        write_warm_pairs(tmp_path / run)
    rows = compared(config, tmp_path / "one", tmp_path / "two", 2, R4T, R4T_METHODS)
    assert rows[0] == rows[1] and len(rows[0]) == 5
    log = (tmp_path / "two" / "seed_0" / "folm" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["grad_norm"] > 0 for line in log)  # some answers were better than others
    by_name = {row["method"]: row for row in rows[0]}
    assert by_name["R4T-FOLM"]["valid"] > 0.3 and by_name["R4T-FOLM"]["groundedness"] > 0.1
    sets = [sorted((tmp_path / run / "seed_0" / "synthesis").rglob("*.npy")) for run in ("one", "two")]
    assert len(sets[0]) >= 5
    for a, b in zip(*sets, strict=True):
        np.testing.assert_array_equal(np.load(a), np.load(b), err_msg=a.name)


def test_four_processes_train_each_stage_of_r4t_as_one(tmp_path):
    """Two shards of the batch by two of the parameters, every stage from the same start.

    120 steps of Adam at rate .01 enlarge rounding beyond any bound worth asserting, so the warm start is
    compared after its first steps, and what follows it goes on from one process's.
    """
    config = [
        *tiny_r4t(tmp_path), "--config.evaluation.latency=(2,)", "--config.mesh.data=2",
        "--config.mesh.fsdp=2", "--config.warm.fit.save_every=6", "--config.warm.fit.keep=99",
    ]  # fmt: skip
    one, four, again = (tmp_path / name for name in ("one", "four", "again"))

    for run, processes in ((one, 1), (four, 4), (again, 4)):
        write_warm_pairs(run)
        where = dict(count=processes, devices=4 // processes, patience=3000)
        if run == again:
            shutil.copytree(one / "seed_0" / "warm", run / "seed_0" / "warm")
        together(["-m", "experiments.run", *config, f"--workdir={run}"], **where)
        if run != four:
            asked = [f"--methods={R4T_METHODS}", f"--workdir={run}"]
            together(["-m", "experiments.evaluate", *config, *asked], **where)
    warm = [states(run / "seed_0" / "warm") for run in (one, four)]
    grown = {step: difference(*(found[step]["params"] for found in warm)) for step in warm[0]}
    print("warm start, by step", grown)
    assert grown[6] <= 1e-5
    found = apart(one, again, R4T)
    print(found)
    assert max(found.values()) <= 1e-5, found
    rows = [read_rows(run / "results.jsonl") for run in (one, again)]
    assert rows[0] == rows[1] and len(rows[0]) == 5
