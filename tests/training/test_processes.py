"""Several processes over loopback: barriers with a time-out, one writer, and a run like one process's."""

import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.workdir import read_rows
from genret.training import processes
from genret.types import InputError
from tests.commands import ENVIRONMENT, ROOT, begin, command, parameters, together, write_catalogue


def test_one_process_needs_nobody():
    done = []
    processes.barrier("alone")
    processes.once("alone", lambda: done.append(1))
    assert done == [1] and processes.is_writer() and not processes.several()
    assert processes.first("alone", lambda: 2) == 2 and processes.agreed("alone", (3,)) == (3,)


def test_process_0_writes_and_speaks_and_the_others_read(tmp_path):
    body = """
import numpy as np
from genret.retrieval.index import ExactIndex
from genret.training.mesh import batch_shardings, place
from genret.training.rows import ByRow
path = workdir / "made"
processes.once("file", lambda: time.sleep(.3) or path.write_text(str(index)))
assert path.read_text() == "0"
assert processes.agreed("list", [index, "x"]) == [0, "x"]
(workdir / f"first_{index}").write_text(processes.first("cache", lambda: str(path.exists()) + str(index)))
try:
    processes.first("nothing", lambda: [][0])
except Exception as error:
    (workdir / f"error_{index}").write_text(repr(error))
rows = jax.make_array_from_callback(
    (2, 3), NamedSharding(make_mesh(), P("data")), lambda at: jnp.full((1, 3), 1.0 + index)
)
whole = local({"rows": rows, "own": jnp.ones(1)})
assert whole["rows"].is_fully_addressable and whole["rows"].tolist() == [[1.0] * 3, [2.0] * 3]
read = []
def look_up(at):
    read.extend(at.tolist())
    return np.full((len(at), 3), at[:, None])
mesh = make_mesh()
batch = place({"rows": ByRow((6, 3), look_up)}, batch_shardings({"rows": np.zeros((6, 3))}, mesh))
assert read == [3 * index, 3 * index + 1, 3 * index + 2], read
assert local(batch)["rows"].tolist() == [[float(i)] * 3 for i in range(6)]
half = np.ones((300, 2), np.float32)
half[299 * (1 - index)] = np.nan  # where the other process looks
ExactIndex(half, mesh=mesh)
print("a line for people")
"""
    out = together(command(body, tmp_path))
    lines = [
        [line for line in text.splitlines() if not line.startswith(("[Gloo]", "I0", "W0"))] for text in out
    ]
    assert lines == [["process 0 of 2, 2 devices", "a line for people"], ["process 1 of 2, 2 devices"]]
    assert [(tmp_path / f"first_{i}").read_text() for i in (0, 1)] == ["True0", "True1"]
    errors = [(tmp_path / f"error_{i}").read_text() for i in (0, 1)]
    assert errors[0].startswith("IndexError") and "process 0 could not make it" in errors[1]


def test_a_barrier_that_is_not_reached_in_time_names_itself(tmp_path):
    body = """
if index == 0:
    processes.barrier("meeting point", patience=1.0)
time.sleep(60)
"""
    found = together(command(body, tmp_path), fails=True)
    line = next(line for line in found[0][1].splitlines() if line.startswith("error: "))
    assert line.startswith("error: barrier 'meeting point': process 0 of 2 waited up to 1 s and not all came")


def test_flags_that_do_not_belong_together_are_refused():
    with pytest.raises(InputError, match="^--process_id: is not given, and others of the three are"):
        processes.start("localhost:1234", None, 2)
    with pytest.raises(InputError, match="^--process_id: 2 of 2. use 0 to 1"):
        processes.start("localhost:1234", 2, 2)
    for place in ("localhost", "localhost:0", "localhost:99999", "localhost:²"):
        with pytest.raises(InputError, match=f"^--coordinator: '{place}' names no port"):
            processes.start(place, 0, 2)
    for flags, problem in (
        (["--process_id=0"], "error: --process_id: is given for one process alone. give --multihost too"),
        (["--multihost"], "error: --multihost: JAX found no cluster to ask"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "experiments.run", "--workdir=nowhere", *flags,
             "--config=experiments/configs/modit.py:size=test"],
            cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1 and problem in done.stderr, done.stderr
    assert not (ROOT / "nowhere").exists()


SOON = "processes.JOIN, processes.ENDING = 3, 1\nlaunch(main"


def test_who_does_not_join_and_a_port_that_is_taken_are_said_in_one_line(tmp_path):
    flag, body = "-c", command("pass", tmp_path)[1].replace("launch(main", SOON)
    with socket.create_server(("localhost", 0)) as other:
        place = f"--coordinator=localhost:{other.getsockname()[1]}"
        given = [
            sys.executable,
            flag,
            body,
            f"--workdir={tmp_path}",
            "--multihost",
            place,
            "--num_processes=2",
        ]
        ran = functools.partial(subprocess.run, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
        taken = ran([*given, "--process_id=0"])
    assert taken.returncode == 1 and "Address already in use" in taken.stderr, taken
    assert taken.stderr.splitlines()[-1].startswith("error: --coordinator: port ")
    for i in (0, 1):  # the other one is not there
        late = ran([*given, f"--process_id={i}"])
        assert late.returncode == processes.AGAIN, late
        assert "error: --multihost: not all processes joined at localhost:" in late.stderr


def test_a_second_command_of_several_is_refused_and_the_first_lives(tmp_path):
    """Of the same name, and of another one at the same port: to join would end both."""
    body = """
from experiments.workdir import alone
with alone(workdir, "-c"), alone(workdir, "run"):
    processes.once("held", lambda: (workdir / "held").write_text(""))
    while not (workdir / "end").exists():
        time.sleep(.05)
"""
    first = begin(command(body, tmp_path))
    try:
        while not (tmp_path / "held").exists():
            assert all(process.poll() is None for process in first)
            time.sleep(0.05)
        flag, second, where = command("pass", tmp_path)
        second = second.replace("launch(main", SOON)
        for process in begin([flag, second, where]):
            said = process.communicate(timeout=60)[1].splitlines()[-1]
            assert process.returncode == 1
            assert said.startswith(f"error: --workdir: {tmp_path} is in the hands of another -c, process ")
        place = (tmp_path / ".run.lock").read_text().split()[-1]
        (tmp_path / "other.py").write_text(second)
        done = subprocess.run(
            [sys.executable, tmp_path / "other.py", where, "--multihost", f"--coordinator={place}",
             "--num_processes=2", "--process_id=1"],
            capture_output=True, text=True, env=os.environ | ENVIRONMENT,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(
            f"error: --coordinator: {place} is where the -c at work"
        )
        (tmp_path / "end").write_text("")
        assert [process.wait(60) for process in first] == [0, 0]
    finally:
        for process in first:
            process.kill()


def test_what_one_process_does_is_done_by_the_first_as_if_it_were_alone(tmp_path):
    asked = ["--size=test", "--only=^search exact", "--repeats=3", f"--output={tmp_path / 'bench.json'}"]
    first, second = together(["-m", "experiments.benchmark", *asked])
    assert [out.splitlines()[0] for out in (first, second)] == [
        f"process {i} of 2: process 0 does this by itself" for i in (0, 1)
    ]
    assert "search exact" in first and len(second.splitlines()) == 1
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["line"] for row in rows] == ["matmul", "search exact"]


FIT = """
import numpy as np
from genret.training.loop import FitOptions, fit
from genret.training.stage import Stage
from genret.types import Terms
def batch(step, params):
    (workdir / f"at_{index}").write_text(str(step))
    time.sleep(.02)
    return {"x": np.random.default_rng(step).normal(size=(4, 8)).astype(np.float32)}
stage = Stage(
    "toy", init=lambda key: {"kernel": jax.random.normal(key, (8, 8))},
    loss=lambda p, _, b, d: Terms(jnp.sum((b["x"] @ p["kernel"] - 1) ** 2, -1), jnp.ones(4)),
    batch=batch, rules=(("", P()),),
)
state = fit(stage, workdir / "toy", FitOptions(steps=int((workdir / "steps").read_text()), save_every=1000))
(workdir / f"sum_{index}").write_text(repr(float(jnp.sum(local(state.params)["kernel"]))))
"""


def at_step(folder, step, started):
    """Returns when all processes are past a step."""
    for i, process in enumerate(started):
        at = folder / f"at_{i}"
        while not at.exists() or int(at.read_text() or 0) < step:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)


def test_kills_at_random_moments_leave_the_same_bits(tmp_path):
    """Two of them while 60 steps are trained; `pytest -m faults` kills the whole pipeline fifty times."""
    fit = FIT.replace("save_every=1000", "save_every=4")
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "steps").write_text("60")
    (whole,) = begin(command(fit, tmp_path / "whole"), 1)
    rng = random.Random(0)
    for low in (5, 30):
        started = begin(command(fit, tmp_path / "killed"), 1)
        at_step(tmp_path / "killed", rng.randrange(low, low + 20), started)
        time.sleep(rng.uniform(0, 0.02))
        started[0].kill()
        started[0].communicate()
    together(command(fit, tmp_path / "killed"), 1)
    assert not whole.wait(60), whole.communicate()
    found = [parameters(tmp_path / folder / "toy")["kernel"].tobytes() for folder in ("whole", "killed")]
    assert found[0] == found[1]
    logs = [
        (tmp_path / folder / "toy" / "metrics.jsonl").read_text().splitlines()
        for folder in ("whole", "killed")
    ]
    losses = [[(json.loads(line)["step"], json.loads(line)["loss"]) for line in log] for log in logs]
    assert losses[0] == losses[1]


def test_sigterm_to_one_stops_all_at_one_step_a_lost_one_ends_all_and_fewer_go_on(tmp_path):
    (tmp_path / "steps").write_text("100000")
    fit = command(FIT, tmp_path)
    started = begin(fit)
    at_step(tmp_path, 5, started)
    started[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60) for process in started]
    # Who got it ends well; a script that started another shall not take what it began for finished.
    assert [process.returncode for process in started] == [processes.AGAIN, 0], said
    (saved,) = [int(path.name) for path in (tmp_path / "toy" / "checkpoints").glob("[0-9]*")]
    assert f"toy: SIGTERM, saved at step {saved}\nSIGTERM: what is finished is saved" in said[0][0]
    assert {int((tmp_path / f"at_{i}").read_text()) for i in (0, 1)} == {saved - 1}

    started = begin(fit)
    at_step(tmp_path, saved + 5, started)
    began = time.monotonic()
    started[1].kill()
    said = [process.communicate(timeout=60)[1] for process in started]
    assert started[0].returncode == processes.AGAIN and time.monotonic() - began < 60
    assert "error: --multihost: another process is gone (" in said[0] and "Traceback" not in said[0]

    (tmp_path / "steps").write_text(str(saved + 3))
    for count, devices, folder in ((1, 1, "one"), (1, 2, "two")):
        shutil.copytree(tmp_path / "toy", tmp_path / folder / "toy")
        shutil.copy(tmp_path / "steps", tmp_path / folder)
        (out,) = together(command(FIT, tmp_path / folder), count, devices)
        assert f"toy: resumed at step {saved}" in out
    sums = [float((tmp_path / folder / "sum_0").read_text()) for folder in ("one", "two")]
    assert sums[0] == pytest.approx(sums[1], abs=1e-4)


@pytest.mark.long
def test_two_processes_train_and_evaluate_what_one_does(tmp_path):
    """On the same mesh of two devices, parameters sharded over it; what one process pretrained is read."""
    write_catalogue(catalogue := tmp_path / "small.parquet")
    config = [
        f"--config=experiments/configs/modit.py:size=test,data={catalogue}",
        "--config.evaluation.index=exact", "--config.retrieval.weight=0.0", "--config.hppo.rounds=1",
        "--config.hppo.contexts=48", "--config.hppo.policy=deterministic",
        "--config.labels.predictor.steps=10", "--config.mesh.fsdp=2", "--config.contrastive.steps=()",
    ]  # fmt: skip
    methods = "--methods=^main: (seed mean|ridge regressor|MO-DiT after SFT|MO-DiT after HPPO)$"
    one, two = tmp_path / "one", tmp_path / "two"
    trained = ["-m", "experiments.run", *config]
    evaluated = ["-m", "experiments.evaluate", *config, methods]
    together([*trained, f"--workdir={one}"], count=1, devices=2)
    for stage in ("pretrain", "cpt", "sft_mse"):
        shutil.copytree(one / "seed_0" / stage, two / "seed_0" / stage)
    out = together([*trained, f"--workdir={two}"])
    assert "cpt: resumed at step 6" in out[0] and "sft: resumed" not in out[0] and "hppo 4/4" in out[0]
    assert out[1].startswith("process 1 of 2, 2 devices\n") and "hppo" not in out[1]
    for stage in ("predictor", "sft", "hppo"):
        found = [parameters(run / "seed_0" / stage) for run in (one, two)]
        for a, b in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        logs = [(run / "seed_0" / stage / "metrics.jsonl").read_text().splitlines() for run in (one, two)]
        losses = [[json.loads(line)["loss"] for line in log] for log in logs]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)

    # Checkpoints of two processes are read by one, and the other way round.
    together([*evaluated, f"--workdir={one}"], count=1, devices=2)
    together([*evaluated, f"--workdir={two}"])
    rows = [read_rows(run / "results.jsonl") for run in (one, two)]
    assert rows[0] == rows[1] and len(rows[0]) == 4 * 4
    reports = [json.loads((run / "seed_0" / "predictor_report.json").read_text()) for run in (one, two)]
    assert len(reports[0]) == len(reports[1]) > 0
    assert json.loads((two / "config.json").read_text())["environment"]["devices"] == 2
    # Whatever two processes write, one of them does: the same files, none of them left half written.
    files = [
        {
            str(p.relative_to(run))
            for p in run.rglob("*")
            if p.is_file() and not {"checkpoints", "tensorboard"} & {*p.parts}
        }
        for run in (one, two)
    ]
    assert files[0] == files[1]
