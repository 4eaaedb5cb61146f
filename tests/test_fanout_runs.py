"""Runs of R4T: what is refused before it is opened, data of one's own, and a whole one on the real model."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import fanout_report, fanout_rows, fanouts, r4t, r4t_checks
from experiments.configs import r4t as configs
from experiments.workdir import read_rows, same_run
from genret.catalogue import words
from genret.catalogue.fanout import SPLITS
from genret.r4t.rewards import COMPONENTS
from genret.types import InputError
from tests import quick
from tests.commands import ENVIRONMENT, tiny_r4t, together, write_warm_pairs
from tests.test_fanouts import data_of

ROOT = Path(__file__).resolve().parent.parent


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
    folders = ("warm", "folm", "diffusion", "regressor")
    swept = ["evaluate", f"--checkpoints={','.join(folders)}"]
    for name, *more in (["run"], swept, ["evaluate"]):
        together(["-m", f"experiments.{name}", *asked, *more], count=1)
    rows = {row["method"]: row for row in read_rows(tmp_path / "run" / "results.jsonl")}
    assert rows["no fan-out"]["recall"] == rows["random pool"]["recall"] == 1  # 3 x 40 of 90 contents
    assert 0 < rows["R4T-Diffusion"]["recall"] <= 1 and len(rows) > 12
    # Every checkpoint that is kept has its row, once; the report shows them.
    steps = {
        f: [int(p.name) for p in (tmp_path / "run" / "seed_0" / f / "checkpoints").glob("[0-9]*")]
        for f in folders
    }
    whole = (path := tmp_path / "run" / "checkpoints.jsonl").read_text()
    found = [(row["folder"], row["step"]) for row in read_rows(path)]
    assert found == [(f, step) for f in folders for step in sorted(steps[f])] and min(
        map(len, steps.values())
    )
    (said,) = together(["-m", f"experiments.{swept[0]}", *asked, *swept[1:]], count=1)
    assert path.read_text() == whole and "step" not in said
    read = fanout_rows.read_fanouts(tmp_path / "run")
    last = {row["folder"]: row for row in read.checkpoints}
    assert all(0 < last[f]["recall"] <= 1 for f in folders if last[f]["valid"])
    assert "validation queries:" in fanout_report.text_report(read)


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
    fanouts.evaluate_run(one, folder / "results.jsonl")
    fanouts.time_run(one, folder / "latency.jsonl")
    assert before == {p: p.stat().st_mtime_ns for p in before}
