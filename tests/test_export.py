"""Exports: the queries of the main line, asked where neither genret nor flax can be imported."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import export
from experiments.configs import modit
from experiments.configs import r4t as r4t_configs
from experiments.fanouts import DIFFUSION
from experiments.modit import Run, open_run
from experiments.r4t import FanoutRun
from experiments.workdir import append_rows, same_run
from genret.catalogue.fanout import FanoutData
from genret.modit.baselines import reach
from genret.modit.protocol import SPLITS
from genret.retrieval.index import ExactIndex
from genret.training.mesh import make_mesh
from genret.types import InputError

ROOT = Path(__file__).resolve().parent.parent
# (round, guidance, reach) of each attribute: two rounds, one of them with guidance.
SETTINGS = [(8, 0.0, 0.8), (4, 2.0, 1.0), (8, 0.0, 1.25), (4, 0.0, 1.0)]
ONE = make_mesh(devices=jax.devices()[:1])  # one of the eight simulated devices
ALONE = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in "genret experiments flax optax orbax ml_collections absl".split():
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Blocked())
"""


def alone(code, *arguments):
    """The output of a Python that has jax and numpy but not us, on one device."""
    command = [sys.executable, "-c", ALONE + code, *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})
    assert not said.returncode, said.stderr
    return said.stdout


class Short(Run):
    """The four stages and nothing else."""

    @property
    def recipes(self):
        return {name: super(Short, self).recipes[name] for name in ("pretrain", "cpt", "sft", "hppo")}


@pytest.fixture(scope="module")
def trained(molecules, tmp_path_factory):
    """A trained run of size=test, and rows of its settings as evaluation writes them."""
    workdir = tmp_path_factory.mktemp("run")
    config = modit.get_config(f"size=test,data={molecules.path}")
    config.evaluation.index, config.contrastive.steps = "exact", ()
    same_run(config, molecules.arrays, workdir)
    run = open_run(config, workdir, 0, molecules)
    run = Short(run.config, run.catalogue, run.splits, run.folder, 0)
    run.__dict__["mesh"] = ONE
    run.train()
    rows = [
        {"method": export.HEADLINE, "seed": 0, "split": split, "domain": name, "joint": 0.25, "k": 20,
         "setting": setting if split == "pattern_holdout" else (8, 0.0, 1.0)}
        for split in SPLITS
        for name, setting in zip(molecules.attribute_names, SETTINGS, strict=True)
    ]  # fmt: skip
    append_rows(workdir / "results.jsonl", rows)
    return run


def asked(trained, output, split="pattern_holdout"):
    export.main(trained.config, trained.folder.parent, 0, str(output), split)
    return output


@pytest.fixture(scope="module")
def artifact(trained, tmp_path_factory):
    return asked(trained, tmp_path_factory.mktemp("exports") / "artifact")


def expected(trained, contexts):
    """The main line's queries with the settings of each context's attribute."""
    out = np.empty((len(contexts), trained.catalogue.width), np.float32)
    for m, (step, w, r) in enumerate(SETTINGS):
        own = np.flatnonzero(contexts.domain == m)
        made = trained.model("hppo", step).queries(contexts.take(own), w)
        out[own] = reach(trained.catalogue.embeddings, contexts.take(own), made, r)[:, 0]
    return out


def test_queries_are_the_main_lines_where_we_cannot_be_imported(trained, artifact, tmp_path):
    contexts = trained.contexts("test")
    contexts = contexts.take(np.random.default_rng(0).permutation(len(contexts))[:13])
    assert set(contexts.domain) == {0, 1, 2, 3} and (contexts.seeds < 0).any()
    mask = contexts.seeds >= 0
    seeds = np.float32(trained.catalogue.embeddings[contexts.seeds])  # rows under no mask are never read
    np.savez(tmp_path / "in.npz", seeds=seeds, mask=mask, domain=contexts.domain)
    code = """
import numpy as np
serve = runpy.run_path(sys.argv[1] + "/serve.py")
served, given = serve["Retriever"](sys.argv[1]), np.load(sys.argv[2])
parts = [served.queries(*(given[n][at] for n in ("seeds", "mask", "domain")))
         for at in (slice(1), slice(1, 4), slice(4, 13))]
np.save(sys.argv[3], np.concatenate(parts))
"""
    alone(code, artifact, tmp_path / "in.npz", tmp_path / "out.npy")
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected(trained, contexts), atol=1e-5)


def test_a_seed_set_is_answered_with_items(trained, artifact, tmp_path):
    x = trained.catalogue.embeddings
    np.save(tmp_path / "items.npy", 3 * np.asarray(x))
    contexts = trained.contexts("test").take(np.array([0]))
    seeds = contexts.seeds[0][contexts.seeds[0] >= 0]
    name = trained.catalogue.attribute_names[contexts.domain[0]]
    code = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    said = alone(code, artifact / "serve.py", tmp_path / "items.npy", name, *seeds[::-1])
    rows, cosines = zip(*(line.split("\t") for line in said.splitlines()), strict=True)
    score = x @ expected(trained, contexts)[0]
    score[seeds] = -1
    assert len(rows) == 20 and not {*map(int, rows)} & {*seeds.tolist()}
    np.testing.assert_allclose(np.float64(cosines), np.sort(score)[::-1][:20], atol=1e-5)
    np.testing.assert_allclose(score[list(map(int, rows))], np.float64(cosines), atol=1e-5)


def test_the_readmes_server_answers_as_the_script_does(trained, artifact, tmp_path):
    """In twenty lines."""
    (code,) = re.findall(r"```python\n(import json, jax.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(code.splitlines()) <= 20
    (tmp_path / "artifact").symlink_to(artifact)
    np.save(tmp_path / "items.npy", trained.catalogue.embeddings)
    said = alone(f"import os; os.chdir({str(tmp_path)!r})\n{code}")
    script = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    rows = alone(script, artifact / "serve.py", tmp_path / "items.npy", "logp_low", 3, 17, 204)
    assert said.split() == [line.split("\t")[0] for line in rows.splitlines()]


def test_the_card_and_the_files(trained, artifact):
    card, names = json.loads((artifact / "card.json").read_text()), trained.catalogue.attribute_names
    assert {p.name for p in artifact.iterdir()} == {
        "query.bin", "parameters_4.npz", "parameters_8.npz", "card.json", "card.md", "serve.py",
    }  # fmt: skip
    assert card["attributes"] == list(names) and card["platforms"] == ["cpu", "cuda", "tpu"]
    assert list(card["parameters"].values()) == [f"parameters_{s[0]}.npz" for s in SETTINGS]
    assert card["inputs"]["seeds"] == {"shape": ["batch", 8, trained.catalogue.width], "dtype": "float32"}
    assert card["settings"]["pattern_holdout"][names[1]] == {"round": 4, "guidance": 2.0, "reach": 1.0}
    assert card["protocol"]["lookups"] == trained.fitted.labels.lookups and card["protocol"]["seed"] == 0
    assert len(card["figures"]) == 8 and card["network_calls"] == 2
    # The program holds no parameters, and nothing a path of this machine.
    program = (artifact / "query.bin").read_bytes()
    assert len(program) < 100_000 < (artifact / "parameters_4.npz").stat().st_size
    said = (artifact / "card.md").read_text()
    assert f"| pattern_holdout | {names[1]} | 4 | 2.0 | 1.0 | parameters_4.npz |" in said
    for text in (program.decode("latin-1"), said, json.dumps(card)):
        assert str(Path(__file__).parent.parent) not in text and str(trained.folder.parent) not in text


def test_the_other_split_needs_one_round_and_one_call(trained, tmp_path):
    card = json.loads((asked(trained, tmp_path / "items", "item_holdout") / "card.json").read_text())
    assert card["network_calls"] == 1 and set(card["parameters"].values()) == {"parameters_8.npz"}


def test_the_same_export_is_left_and_anything_else_refused(trained, artifact, tmp_path, capsys, monkeypatch):
    before = {p.name: p.stat().st_mtime_ns for p in artifact.iterdir()}
    asked(trained, artifact)
    assert "there already" in capsys.readouterr().out
    with pytest.raises(InputError, match="--output: .*another export"):
        asked(trained, artifact, "item_holdout")
    assert before == {p.name: p.stat().st_mtime_ns for p in artifact.iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    for taken in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(InputError, match="--output: .*is no export"):
            asked(trained, taken)
    # A failure in the middle leaves nothing, and an empty folder may be there.
    (tmp_path / "out").mkdir()

    def full(*_):
        raise OSError(28, "No space left")

    monkeypatch.setattr(export.shutil, "copyfile", full)
    with pytest.raises(InputError, match="--output: .*No space left"):
        asked(trained, tmp_path / "out", "item_holdout")
    assert not list((tmp_path / "out").iterdir()) and {p.name for p in tmp_path.iterdir()} == {"mine", "out"}
    monkeypatch.undo()
    assert (asked(trained, tmp_path / "out", "item_holdout") / "serve.py").exists()


def test_what_cannot_be_exported_is_said(trained, tmp_path, monkeypatch):
    config, results = trained.config, tmp_path / "results.jsonl"

    def refused(match, output="out", seed=0, split="pattern_holdout"):
        with pytest.raises(InputError, match=match):
            export.main(config, tmp_path, seed, output and str(tmp_path / output), split)
        assert not (tmp_path / "out").exists()

    refused("--output: is not given", output="")
    refused("--split: unknown split 'test'", split="test")
    refused("--workdir: seed 0 of .* is not trained")
    shutil.copytree(trained.folder, tmp_path / "seed_0")
    refused("--workdir: seed 0 of .* is not evaluated")
    append_rows(results, [{"method": "seed mean", "seed": 0}])
    refused("--workdir: seed 0 has no row of MO-DiT")
    refused("--workdir: seed 3 of .* is not trained", seed=3)
    name = trained.catalogue.attribute_names[0]
    row = {"method": export.HEADLINE, "seed": 0, "split": "item_holdout", "domain": name}
    append_rows(results, [row | {"setting": [8, 0.0]}])
    refused(f"item_holdout/{name} has no round, guidance and reach")
    results.unlink()
    append_rows(results, [row | {"setting": [8, 0.0, 1.0]}])
    refused(f"no row of MO-DiT.HPPO on item_holdout/{trained.catalogue.attribute_names[1]}")
    shutil.copy(trained.folder.parent / "results.jsonl", results)
    shutil.rmtree(tmp_path / "seed_0" / "hppo" / "checkpoints" / "4")
    refused("checkpoint: no step 4")
    shutil.rmtree(tmp_path / "seed_0")
    shutil.copytree(trained.folder, tmp_path / "seed_0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("flatbuffers: is not installed")


class Handmade(FanoutRun):
    """A run whose synthetic sets are written by hand."""

    @functools.cached_property
    def sets(self):
        return self.__dict__["given"]


def units(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape)
    return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


def test_sets_are_the_main_lines(tmp_path):
    from genret.r4t.synthesis import SyntheticSets

    config, width = r4t_configs.get_config("size=test"), 12
    config.synthesis.keep_top = 1.0  # nobody has said which are better
    targets = units(0, 16, config.k, width)
    present = np.ones(targets.shape[:2], bool)
    given = SyntheticSets(
        (targets[:8], targets[8:]), present, np.int32(np.arange(16) % 4), np.full(16, np.nan, np.float32),
        np.full(present.shape, -1), {}, {},
    )  # fmt: skip
    names = [f"text {i}" for i in range(30)]
    data = FanoutData(
        "hand", names, units(1, 30, width), names[:6], units(2, 6, width), np.int8([0, 0, 0, 0, 1, 2])
    )
    run = Handmade(config, data, None, tmp_path / "seed_0", 0)
    run.__dict__.update(given=given, mesh=ONE)
    run.train_sets()
    row = {"method": f"{DIFFUSION}, DPM-Solver++ 4", "seed": 0, "composite": 0.5, "queries": 1}
    with pytest.raises(InputError, match="no row of R4T-Diffusion, DPM-Solver\\+\\+ 4"):
        export.set_artifact(run, [row | {"method": DIFFUSION}])
    config.evaluation.few = ()
    with pytest.raises(InputError, match="evaluation.few: names no sampler"):
        export.set_artifact(run, [row])
    config.evaluation.few = ("exponential 4",)
    export.set_artifact(run, [row]).write(tmp_path / "artifact")
    queries = units(3, 4, width)
    np.save(tmp_path / "queries.npy", queries)
    np.save(tmp_path / "items.npy", data.embeddings)
    code = """
import numpy as np
served = runpy.run_path(sys.argv[1] + "/serve.py")["Retriever"](sys.argv[1])
queries = np.load(sys.argv[2])
np.savez(sys.argv[3], one=served.sets(queries[:1], 5), three=served.sets(queries[1:], 6))
sys.argv = [sys.argv[1] + "/serve.py", sys.argv[4], sys.argv[2], "5"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    said = alone(code, *(tmp_path / n for n in ("artifact", "queries.npy", "out.npz", "items.npy")))
    out, model = np.load(tmp_path / "out.npz"), run.model("diffusion")
    for name, asked_, seed in (("one", queries[:1], 5), ("three", queries[1:], 6)):
        how = dict(method="exponential", steps=4, guidance=0.0, levels=tuple(config.evaluation.levels))
        np.testing.assert_allclose(out[name], model.sets(asked_, **how, seed=seed), atol=1e-5)
    asked_of = (queries, config.k, ExactIndex(data.embeddings), data.embeddings)
    wanted = model.grounded(*asked_of, weight=config.evaluation.grounded, **how, seed=5)[1]
    assert [[int(n) for n in line.split("\t")] for line in said.splitlines()] == wanted.tolist()
    card = json.loads((tmp_path / "artifact" / "card.json").read_text())
    assert card["network_calls"] == 4 and card["figures"][0]["composite"] == 0.5
    assert "| exponential | 4 | " in (tmp_path / "artifact" / "card.md").read_text()

    # Where recall counts, the program itself leaves out rows: those it emits are searched with as they are.
    found = dataclasses.replace(data, references=[np.arange(3)] * 6)
    other = Handmade(config, found, None, tmp_path / "seed_0", 0)
    other.__dict__.update(given=given, mesh=ONE)
    export.set_artifact(other, [row]).write(tmp_path / "referenced")
    said = alone(code, *(tmp_path / n for n in ("referenced", "queries.npy", "out.npz", "items.npy")))
    kept = model.sets(queries, config.k, **how, seed=5)
    wanted = (kept @ data.embeddings.T).argmax(-1)
    assert [[int(n) for n in line.split("\t")] for line in said.splitlines()] == wanted.tolist()
