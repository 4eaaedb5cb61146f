"""Configs: every leaf is read, none is invented, and each size is what it says."""

import contextlib
import dataclasses
import functools
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import checkpoints, evaluate
from experiments.catalogues import open_catalogue
from experiments.configs import modit
from experiments.modit import open_run
from experiments.report_rows import read_about
from experiments.workdir import read_rows, same_run
from genret.training.mesh import make_mesh
from genret.types import InputError

ROOT = Path(__file__).resolve().parent.parent


class Reads(ConfigDict):
    """A ConfigDict that notes which leaves were read, by attribute, key or conversion."""

    seen: set = set()

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if not isinstance(value, ConfigDict):
            Reads.seen.add((id(self), key))
        return value

    def items(self, *args, **kw):
        for key in self:
            self[key]
        return super().items(*args, **kw)

    def to_dict(self, *args, **kw):
        for key in self:
            self[key]
        return super().to_dict(*args, **kw)


def tracked(config):
    out = Reads()
    for key, value in config.items():
        out[key] = tracked(value) if isinstance(value, ConfigDict) else value
    return out


def leaves(config, prefix=""):
    for key in config:
        value = dict.__getitem__(config, key) if isinstance(config, dict) else config._fields[key]
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield (id(config), key), prefix + key


@pytest.mark.long
def test_every_leaf_is_read_by_a_whole_run(tmp_path, monkeypatch):
    config = modit.get_config("size=test,ablations=kinds+curves")
    config.catalogue.folder = str(tmp_path / "data")
    config = tracked(config)
    # One of the simulated devices, as on a laptop: meshes are tested elsewhere.
    monkeypatch.setattr(
        "experiments.modit.make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1])
    )
    Reads.seen.clear()
    catalogue = open_catalogue(config.catalogue)
    same_run(config, catalogue.arrays, tmp_path / "run")
    one = open_run(config, tmp_path / "run", config.seeds[0], catalogue)
    with contextlib.redirect_stdout(io.StringIO()):
        one.train()
        evaluate.evaluate_run(one, tmp_path / "run" / "results.jsonl")
    unread = {name for leaf, name in leaves(config) if leaf not in Reads.seen}
    # Only the Kaggle builders read the first two, and only a report the third, as `same_run` stored it.
    assert unread == {"catalogue.raw", "catalogue.embeddings", "command"}
    assert read_about(tmp_path / "run").command.startswith(config.command)
    rows = read_rows(tmp_path / "run" / "results.jsonl")
    methods = {row["method"] for row in rows}
    assert len(rows) == 8 * len(methods) and {"MO-DiT+HPPO", "MO-DiT", "seed mean"} <= methods
    # Each round of HPPO left its pairs, and a checkpoint for validation to choose from.
    assert checkpoints.kept_steps(one, "hppo") == list(one.rounds) == [4, 8]
    kept = sorted(p.name for p in (one.folder / "hppo" / "rounds").iterdir())
    assert kept == ["pairs_0.npz", "pairs_1.npz"]
    # A finished run is not opened again.
    monkeypatch.setattr("experiments.modit.fit", lambda *_, **__: pytest.fail("trained again"))
    one.train()

    # A second evaluation adds nothing; one that was killed in the middle of a row ends the same.
    results = tmp_path / "run" / "results.jsonl"
    whole = results.read_bytes()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate.evaluate_run(one, results)
        assert results.read_bytes() == whole
        lines = whole.splitlines(keepends=True)
        results.write_bytes(b"".join(lines[:-8]) + lines[-8][:40])
        evaluate.evaluate_run(one, results)
    assert results.read_bytes() == whole


def test_your_own_parquet_is_opened_by_its_path(molecules):
    config = modit.get_config(f"size=test,data={molecules.path}").catalogue
    catalogue = open_catalogue(config)
    assert catalogue.num_items == molecules.num_items
    config.data = "nowhere.parquet"
    with pytest.raises(InputError, match="nowhere"):
        open_catalogue(config)
    with pytest.raises(InputError, match="raw"):
        open_catalogue(modit.get_config("size=test,data=streaming").catalogue)


def test_unknown_leaves_and_arguments_are_refused():
    config = modit.get_config("size=demo").lock()
    with pytest.raises(AttributeError):
        config.model.colour = 1
    with pytest.raises(InputError, match="data"):
        modit.get_config("size=demo,date=moses")
    with pytest.raises(InputError, match="demo"):
        modit.get_config("size=huge")


@pytest.mark.parametrize("size", list(modit.BUDGET))
def test_every_size_makes_its_config_and_model(size):
    from genret.diffusion.dit import SIZES

    config = modit.get_config(f"size={size},seeds=0+1+2")
    assert config.model.size in SIZES and config.seeds == (0, 1, 2)
    assert all(np.isfinite(config.stages[s].learning_rate) for s in config.stages)


def test_a_workdir_keeps_to_its_run_but_seeds_may_join(molecules, tmp_path):
    same_run(modit.get_config("size=test"), molecules.arrays, tmp_path)
    config = modit.get_config("size=test,seeds=1")
    config.mesh.fsdp = 2
    same_run(config, molecules.arrays, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["seeds"] == [0, 1]
    with pytest.raises(InputError, match="another batch"):
        same_run(modit.get_config("size=demo"), molecules.arrays, tmp_path)
    labels = molecules.labels.copy()
    labels[0, 7] = 1 - labels[0, 7]
    with pytest.raises(InputError, match="catalogue digest"):
        same_run(config, dataclasses.replace(molecules, labels=labels).arrays, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        same_run(config, molecules.arrays, tmp_path)


def test_a_config_error_is_one_line():
    command = [sys.executable, "-m", "experiments.run", "--workdir=nowhere"]
    found = subprocess.run(
        [*command, "--config=experiments/configs/modit.py:size=huge"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    # absl shows where in the config it happened; the last word is ours.
    last = found.stderr.split("Pass --help")[0].strip().splitlines()[-1]
    assert found.returncode and "size: unknown size 'huge'. use one of test, demo" in last, found.stderr


def test_the_label_budget_is_an_argument():
    config = modit.get_config("size=test,budget=0.2")
    assert config.labels.budget == 0.2 and "budget=0.2" in config.command
    assert modit.get_config("size=test").labels.budget == 0.05
    with pytest.raises(InputError, match="^budget: cannot read 'much'.*write budget=0.05"):
        modit.get_config("budget=much")
