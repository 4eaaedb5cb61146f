"""SIGTERM, a full disk and a second command, over the whole pipeline as users start it."""

import os
import random
import re
import signal
import subprocess
import time

import jax
import pytest

from genret.training import processes
from tests.commands import begin, parameters, together, write_warm_pairs
from tests.faults.conftest import modit

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("paper", ["modit", "r4t"])
def test_sigterm_at_random_moments_ends_well_and_changes_nothing(pipeline, measured, paper):
    """Twelve of them, over run and evaluate."""
    wanted, seconds = measured(paper)
    one, rng = pipeline(f"{paper}_terminated", paper=paper), random.Random(1)
    for name, times in (("run", 8), ("evaluate", 4)):
        for _ in range(times):
            process = one.start(name)
            one.live(process, rng.uniform(0.05, 0.35) * seconds, signal.SIGTERM)
            # Before Python runs there is no handler: what has not begun may end as the kernel has it.
            assert process.returncode in (0, -signal.SIGTERM), one.said(name)[-3000:]
        one.do(name)
    one.do("report")
    found = one.outcome()
    steps = found.pop("steps")
    for folder, rows in steps.items():  # a step that was saved off the schedule has a row of its own
        logged = [step for step, _ in rows]
        assert logged == sorted({*logged}) and {s for s, _ in wanted["steps"][folder]} <= {*logged}
    one.equals({part: wanted[part] for part in found})
    assert "Traceback" not in one.said("run") + one.said("evaluate")
    said = one.said("run") + one.said("evaluate")
    saved = re.findall(r"(\w+): SIGTERM, saved at step (\d+)", said)
    print(f"{said.count('SIGTERM: what is finished is saved')} times SIGTERM; within training: {saved}")


def test_sigterm_to_either_of_two_processes_ends_both_and_changes_nothing(tmp_path):
    """Ten times within a minute, over run and evaluate; at last the bits of one process of two devices."""
    one, two, rng = tmp_path / "one", tmp_path / "two", random.Random(2)
    _, config = modit(tmp_path, None)
    asked = {
        (folder, name): ["-m", f"experiments.{name}", *config, f"--workdir={folder}"]
        for folder in (one, two)
        for name in ("run", "evaluate")
    }
    seconds = {}
    for name in ("run", "evaluate"):
        began = time.monotonic()
        together(asked[one, name], count=1, devices=2)
        seconds[name] = time.monotonic() - began
    ended = []
    for name, times in (("run", 7), ("evaluate", 3)):
        for _ in range(times):
            started = begin(asked[two, name])
            assert all(process.stdout.readline().startswith("process") for process in started)
            time.sleep(rng.uniform(0, seconds[name]))
            told = rng.randrange(2)
            started[told].send_signal(signal.SIGTERM)
            said = [process.communicate(timeout=60) for process in started]
            status = [process.returncode for process in started]
            assert status[told] == 0 and status[1 - told] in (0, processes.AGAIN), (status, said)
            assert "Traceback" not in said[0][1] + said[1][1], said
            ended.append(status[1 - told])
            print(name, status, said[0][0].splitlines()[-2:], flush=True)
        together(asked[two, name])
    assert ended.count(processes.AGAIN) > 5
    rows = [(folder / "results.jsonl").read_text() for folder in (one, two)]
    assert rows[0] == rows[1]
    for stage in ("pretrain", "cpt", "sft", "hppo"):
        a, b = (jax.tree.leaves(parameters(folder / "seed_0" / stage)) for folder in (one, two))
        assert [x.tobytes() for x in a] == [x.tobytes() for x in b], stage


def test_a_second_run_or_evaluation_is_refused_and_disturbs_nothing(pipeline, undisturbed):
    one = pipeline("twice")
    for name, begun in (("run", "pretrain 1/6"), ("evaluate", "evaluate seed 0 1/")):
        first = one.until(name, begun)
        os.killpg(first.pid, signal.SIGSTOP)  # it might be over before the second has begun
        assert one.start(name).wait(120) == 1
        assert f"is in the hands of another {name}, process {first.pid}" in one.said(name)
        os.killpg(first.pid, signal.SIGCONT)
        assert first.wait() == 0
    one.do("report")
    one.equals(undisturbed[0])


@pytest.mark.parametrize("paper", ["modit", "r4t"])
def test_a_full_disk_ends_in_one_line_at_any_size_and_room_lets_it_go_on(pipeline, measured, paper):
    """The workdir is a file system of its own, made larger after every failure."""
    one, failures, size = pipeline(f"{paper}_full", paper=paper), 0, 100
    one.workdir.mkdir(exist_ok=True)

    def mount(size, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", one.workdir]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not mount(f"{size}k"):
        pytest.skip("mounting is not permitted here")
    try:
        if paper == "r4t":
            write_warm_pairs(one.workdir)
        for name in one.COMMANDS:
            while one.start(name).wait(600):
                failures += 1
                last = one.said(name).splitlines()[-1]
                assert last.startswith("error: ") and "what is finished is kept" in last, one.said(name)[
                    -3000:
                ]
                print(f"{name} in {size} KiB: {last[:150]}", flush=True)
                size = int(size * 1.7)
                assert mount(f"{size}k", "remount")
        assert failures > 3 and "Traceback" not in "".join(map(one.said, one.COMMANDS))
        one.equals(measured(paper)[0])
    finally:
        subprocess.run(["umount", one.workdir], check=True)
