"""Checkpoints of a real stage evaluated while it is trained and after, and methods by their names."""

from __future__ import annotations

import functools
import json
import shutil
import threading
import time

import jax
import pytest

from experiments import checkpoints, evaluate
from experiments.command import tell_overrides
from experiments.configs import modit
from experiments.modit import Run, open_run, options
from experiments.report_rows import read_about
from experiments.workdir import read_rows, same_run
from genret.modit import protocol
from genret.training.loop import fit
from genret.training.mesh import make_mesh
from genret.types import InputError


@pytest.fixture(scope="module", autouse=True)
def alone():
    """One of the simulated devices, as on a laptop: meshes are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        one = functools.partial(make_mesh, devices=jax.devices()[:1])
        patch.setattr("experiments.modit.make_mesh", one)
        yield


@pytest.fixture(scope="module")
def run(molecules, tmp_path_factory):
    """Pretraining alone, 6 steps, checkpoints at 4 and 6."""
    config = modit.get_config("size=test")
    config.evaluation.index = "exact"
    one = open_run(config, tmp_path_factory.mktemp("run"), 0, molecules)
    wanted = options(config.stages.pretrain, 0, save_every=2, keep=2)
    fit(one.stage("pretrain"), one.folder / "pretrain", wanted, mesh=one.mesh)
    return one


def test_every_kept_checkpoint_has_its_rows_once(run, tmp_path, capsys):
    results = tmp_path / "checkpoints.jsonl"
    assert checkpoints.kept_steps(run, "pretrain") == [4, 6]
    checkpoints.sweep([run], ["pretrain"], results)
    rows = read_rows(results)
    cells = [(s, d) for s in protocol.SPLITS for d in run.catalogue.attribute_names]
    assert [(r["step"], r["split"], r["domain"]) for r in rows] == [(t, *c) for t in (4, 6) for c in cells]
    assert {(r["folder"], r["seed"], r["k"]) for r in rows} == {("pretrain", 0, 20)}
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [f"seed 0, pretrain at step {t}" for t in (4, 6)]

    # The last step is the model that evaluation uses; its scores come another way, through the protocol.
    model, contexts = run.model("pretrain"), run.contexts("validation")
    method = protocol.Method("pretrain", lambda c, _: model.queries(c, null=True))
    joint, purity = protocol.validation_scores(method, run.searcher, contexts, None)
    for i, cell in enumerate((s, m) for s in range(2) for m in range(len(cells) // 2)):
        assert rows[8 + i]["joint"] == pytest.approx(joint[cell], abs=1e-6)
        assert rows[8 + i]["purity"] == pytest.approx(purity[cell], abs=1e-6)
        assert rows[8 + i]["contexts"] == ((contexts.split == cell[0]) & (contexts.domain == cell[1])).sum()
    assert rows[0]["joint"] > 0 and all(r["joint"] <= min(r["attribute"], r["purity"]) for r in rows)

    # Nothing twice; a file cut in the middle of a row, or that lost one, is made whole.
    whole = results.read_bytes()
    checkpoints.sweep([run], ["pretrain"], results)
    assert results.read_bytes() == whole and not capsys.readouterr().out
    lines = whole.splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:-1]) + lines[-1][:30])
    checkpoints.sweep([run], ["pretrain"], results)
    assert results.read_bytes() == whole


def copied(run, folder) -> Run:
    """The same run in another folder, which a test may change."""
    shutil.copytree(run.folder, folder)
    return open_run(run.config, folder.parent, 0, run.catalogue)


def test_a_checkpoint_that_is_deleted_meanwhile_is_passed_over(run, tmp_path, capsys):
    class Pruned(Run):
        def model(self, folder, step=None):
            if step == 4:  # as max_to_keep does it, between the listing and the reading
                shutil.rmtree(self.folder / folder / "checkpoints" / "4")
            return super().model(folder, step)

    one = copied(run, tmp_path / "seed_0")
    one = Pruned(one.config, one.catalogue, one.splits, one.folder, 0)
    checkpoints.sweep([one], ["pretrain"], tmp_path / "checkpoints.jsonl")
    assert {row["step"] for row in read_rows(tmp_path / "checkpoints.jsonl")} == {6}
    assert "pretrain at step 4: passed over, training has deleted it" in capsys.readouterr().out

    # One that stands there and cannot be read is an error, to a run that has not read it before.
    one = open_run(one.config, tmp_path, 0, one.catalogue)
    card = one.folder / "pretrain" / "checkpoints" / "6" / "card"
    shutil.rmtree(card)
    with pytest.raises(Exception, match="card|metadata|item"):
        checkpoints.sweep([one], ["pretrain"], tmp_path / "other.jsonl")


def test_following_waits_for_checkpoints_until_the_run_is_trained(run, tmp_path):
    one = copied(run, tmp_path / "seed_0")
    shutil.move(one.folder / "pretrain", tmp_path / "later")
    results, seen = tmp_path / "checkpoints.jsonl", []

    def train():
        """What a run does meanwhile: a stage begins, a checkpoint appears whole, the run is done."""
        kept, ready = one.folder / "pretrain" / "checkpoints", tmp_path / "later" / "checkpoints"
        shutil.copytree(ready / "4", kept / "4.orbax-checkpoint-tmp-1")
        (kept / "4.orbax-checkpoint-tmp-1").rename(kept / "4")
        while len(read_rows(results)) < 8:
            time.sleep(0.05)
        seen.append({row["step"] for row in read_rows(results)})
        shutil.copytree(ready / "6", kept / "6.orbax-checkpoint-tmp-1")
        (kept / "6.orbax-checkpoint-tmp-1").rename(kept / "6")
        (one.folder / "trained").touch()

    training = threading.Thread(target=train, daemon=True)
    training.start()
    checkpoints.sweep([one], ["pretrain", "cpt"], results, follow=0.05)
    training.join(timeout=60)
    assert seen == [{4}] and [row["step"] for row in read_rows(results)] == [4] * 8 + [6] * 8


def test_a_folder_that_is_not_there_is_said(run, tmp_path):
    with pytest.raises(InputError, match="seed 0 has no folder 'stf'. use some of .*pretrain"):
        checkpoints.sweep([run], ["stf"], tmp_path / "checkpoints.jsonl")
    with pytest.raises(InputError, match="no folder 'predictor'. use some of (?!.*predictor)"):
        checkpoints.sweep([run], ["predictor"], tmp_path / "checkpoints.jsonl")
    with pytest.raises(InputError, match="seed 0 has no folder 'stf'. use some of .*hppo"):
        checkpoints.sweep([run], ["stf"], tmp_path / "checkpoints.jsonl", follow=0.05)
    (tmp_path / "seed_0").mkdir()
    with pytest.raises(InputError, match="--workdir: seed 0 of .* is not trained to its end"):
        evaluate.main(run.config, tmp_path, "", "", False, 5.0)
    with pytest.raises(InputError, match="--follow"):
        evaluate.main(run.config, tmp_path, "", "", True, 5.0)
    with pytest.raises(InputError, match="--checkpoints: ',' names no folder"):
        evaluate.main(run.config, tmp_path, "", ",", False, 5.0)
    with pytest.raises(InputError, match="no regular expression"):
        evaluate.main(run.config, tmp_path, "(", "", False, 5.0)


def test_methods_are_chosen_by_table_and_name(run, tmp_path):
    class Untrained(Run):
        def methods(self):
            return list(self.baselines.methods())

    one = copied(run, tmp_path / "seed_0")
    one = Untrained(one.config, one.catalogue, one.splits, one.folder, 0)
    results = tmp_path / "results.jsonl"
    evaluate.evaluate_run(one, results, "^main: seed me")
    assert list(dict.fromkeys(r["method"] for r in read_rows(results))) == ["seed mean", "seed medoid"]
    assert len(read_rows(results)) == 16 and json.loads((one.folder / "predictor_report.json").read_text())
    whole = results.read_bytes()
    evaluate.evaluate_run(one, results, "mean$")  # there already
    with pytest.raises(InputError, match="--methods: '.order: ' is in no method's name"):
        evaluate.evaluate_run(one, results, "^order: ")
    assert results.read_bytes() == whole and not (one.folder / "evaluated.json").exists()


def test_tables_that_join_an_evaluated_seed_are_evaluated_too(run, tmp_path):
    class Few(Run):
        def methods(self):
            return list(self.baselines.methods())[: 2 if "order" in self.config.ablations else 1]

    config = run.config.copy_and_resolve_references()
    folder, results = copied(run, tmp_path / "seed_0").folder, tmp_path / "results.jsonl"
    for tables, names in (((), ["seed mean"]), (("order",), ["seed mean", "seed medoid"])):
        config.ablations = tables
        evaluate.evaluate_run(Few(config, run.catalogue, run.splits, folder, 0), results)
        assert list(dict.fromkeys(r["method"] for r in read_rows(results))) == names
    assert json.loads((folder / "evaluated.json").read_text()) == [["order"], names]


def test_the_command_and_the_machine_are_kept_beside_the_config(molecules, tmp_path):
    config = modit.get_config("size=test")
    same_run(config, molecules.arrays, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["environment"]["device"] and stored["environment"].keys() >= {"jax", "flax", "devices"}
    said = "python -m experiments.run --config=experiments/configs/modit.py:size=test,data=moses"
    where = f" --workdir=runs/{tmp_path.name}"
    assert config.command == said and stored["command"] == f"{said},seeds=0{where}"
    stored |= {"environment": {"jax": "0"}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    # Seeds and ablations may join; neither they, the command nor the machine make it another run.
    same_run(modit.get_config("size=test,seeds=2,ablations=order"), molecules.arrays, tmp_path)
    about = read_about(tmp_path)
    assert about.command == f"{said},seeds=0+2,ablations=order{where}" and about.environment["jax"] != "0"
    assert not {"command", "environment"} & about.config.keys()
    # Overrides do, but for a folder and a mesh; they follow the config's file and what has joined.
    other = modit.get_config("size=test")
    given = {
        "seeds": (2,),
        "latent.sizes": (4, 8),
        "catalogue.folder": "/mine",
        "mesh.fsdp": 2,
        "model.size": "B",
    }
    tell_overrides(other, given)
    other.seeds = (2,)
    same_run(other, molecules.arrays, tmp_path / "other")
    told = " '--config.latent.sizes=(4, 8)' --config.model.size=B --workdir=runs/other"
    assert read_about(tmp_path / "other").command == f"{said},seeds=2{told}"
    silent = modit.get_config("size=test")
    del silent.command
    tell_overrides(silent, given)
    same_run(silent, molecules.arrays, tmp_path)
    assert "command" not in json.loads((tmp_path / "config.json").read_text())
