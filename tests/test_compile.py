"""Compiling for machines that are not here: what `fit` compiles, on shapes alone."""

import json
from pathlib import Path

import jax
import pytest

from experiments import compile as command
from experiments.abstract import Sizes, abstract_run, sizes_of
from experiments.configs import modit, r4t
from experiments.modit import open_run
from genret.modit.softmax import most_positives
from genret.training import loop
from genret.training import mesh as meshes
from genret.types import InputError
from tests.language.conftest import write_gguf


@pytest.mark.parametrize(
    "only", ["^pretrain$", pytest.param("", marks=pytest.mark.scale)], ids=["pretrain", "all"]
)
def test_stages_of_a_config_are_compiled_and_their_sizes_said(tmp_path, capsys, only):
    config = modit.get_config("size=test")
    config.mesh = dict(data=2, fsdp=2, tensor=2)
    config.retrieval.weight = 0.0
    command.main(config, "cpu:8", only, str(tmp_path / "made" / "table.json"))
    found = json.loads((tmp_path / "made" / "table.json").read_text())
    assert found["mesh"] == config.mesh.to_dict() and found["topology"] == "cpu:8"
    rows = {row["stage"]: row for row in found["rows"]}
    assert list(rows) == (["pretrain"] if only else ["pretrain", "cpt", "sft", "hppo", "sft_mse"])
    said = capsys.readouterr().out
    assert all(f"| {name} | 0.13 M |" in said for name in rows)
    for name, row in rows.items():
        # Parameters, their average and Adam's two moments are shared by fsdp x tensor, all but a few.
        assert 0.9 < (row["argument_bytes"] * 4 / 16) / row["parameters"] < 2.5, name
        assert min(row["flops"], row["temporary_bytes"], row["collectives"]) > 0
        assert row["batch"] == (8 if name == "hppo" else 32)
    if not only:  # the reference is there too
        assert rows["hppo"]["argument_bytes"] > rows["sft"]["argument_bytes"]


@pytest.mark.parametrize("only", ["^folm$", pytest.param("", marks=pytest.mark.scale)], ids=["folm", "all"])
def test_r4t_is_compiled_for_a_mesh_of_three_axes(tmp_path, only):
    """The policy with all its weights, on a rollout; the rest on pairs and sets."""
    config = r4t.get_config("size=test")
    config.language.model, config.language.lora_rank = str(write_gguf(tmp_path / "tiny.gguf", "llama")), 0
    config.mesh = dict(data=2, fsdp=2, tensor=2)
    command.main(config, "cpu:8", only, str(tmp_path / "table.json"))
    rows = {row["stage"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert list(rows) == (["folm"] if only else ["warm", "folm", "diffusion", "regressor"])
    for name, row in rows.items():
        assert 0.5 < (row["argument_bytes"] * 4 / 16) / row["parameters"] < 2.5, name
        assert min(row["flops"], row["temporary_bytes"], row["collectives"]) > 0
        assert row["batch"] == {"warm": 4, "folm": 8}.get(name, 16)  # 2 queries, 4 answers each


def test_hppo_moves_parameters_between_devices_and_no_activations(tmp_path):
    """A gather for each leaf of model and reference, and a few sums: 37 (of two blocks 42, and once 470)."""
    config = modit.get_config("size=test")
    config.mesh = dict(data=2, fsdp=4, tensor=1)
    command.main(config, "cpu:8", "^hppo$", str(tmp_path / "table.json"))
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert 0 < row["collectives"] < 43


def test_what_fit_would_refuse_is_refused():
    config = modit.get_config("size=test")
    config.batch = 12
    with pytest.raises(InputError, match="^batch_size: .* has 12 rows for 8 batch shards"):
        command.main(config, "cpu:8", "", "")
    config.mesh = dict(data=3, fsdp=1, tensor=1)
    for shape in ((-1, 0, 1), (-1, -1, 1), (0, 8, 1)):
        with pytest.raises(InputError, match="^mesh: data .* does not cover 8 devices"):
            meshes.make_mesh(*shape)
    with pytest.raises(InputError, match="^mesh: data 3 x fsdp 1 x tensor 1 does not cover 8 devices"):
        command.main(config, "cpu:8", "", "")


def test_a_topology_that_is_none_or_has_no_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for bad in ("v5e", "cpu:0", "h100:x", "cpu:8x", ":8", "cpu:8x8x8x8"):
        with pytest.raises(InputError, match="^--topology: cannot read"):
            command.devices_of(bad)
    with pytest.raises(InputError, match="^--topology: cpu:9 where 8 run. use cpu:8"):
        command.devices_of("cpu:9")
    with pytest.raises(InputError, match="^--topology: no compiler for abacus:2x2 .* or use cpu:4"):
        command.devices_of("abacus:2x2")


def test_sizes_are_those_of_the_catalogue_or_of_moses(molecules, tmp_path):
    config = modit.get_config(f"size=test,data={molecules.path}")
    assert sizes_of(config) == Sizes(2000, 128, 4, 1280, 400)
    config = modit.get_config("size=B")
    config.catalogue.folder, config.catalogue.num_items = str(tmp_path), 0
    assert sizes_of(config)[:4] == (1_936_962, 128, 4, 1_239_656)
    config.catalogue.data = "streaming"
    with pytest.raises(InputError, match="^data: .* is not built yet. train on it first"):
        sizes_of(config)


@pytest.mark.scale
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_fit_compiles_the_very_same(molecules, tmp_path, monkeypatch, shape):
    """FLOPs and bytes of arguments per device, of every stage of a run that is trained."""
    config = modit.get_config(f"size=test,data={molecules.path}")
    config.mesh = dict(zip(meshes.AXES, shape, strict=True))
    config.evaluation.index = "exact"
    fitted, compiled = {}, loop.compiled_step

    def recorded(stage, options, mesh, placed, batch):
        step, *rest = compiled(stage, options, mesh, placed, batch)
        state = jax.eval_shape(lambda: loop.begin(options, stage.init(jax.random.key(0))))
        lowered = step.lower(*command.shapes_of((state, stage.frozen, batch)))
        fitted[stage.name] = command.costs(lowered)
        return step, *rest

    monkeypatch.setattr(loop, "compiled_step", recorded)
    run = open_run(config, Path(tmp_path), 0, molecules)
    run.train()
    cells, has = run.fitted.data.cells, run.fitted.data.has
    sizes = sizes_of(config)._replace(
        train=int(run.splits.train.sum()), cell=most_positives(cells.members, has)
    )
    assert sizes.cell <= sizes_of(config).cell
    abstract = abstract_run(config, sizes)
    for stage in abstract.stages():
        row = command.compile_stage(stage, abstract.options(stage.name), abstract.mesh)
        for name, value in fitted[stage.name].items():
            assert row[name] == value, (stage.name, name)
