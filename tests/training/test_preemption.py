"""SIGTERM: training saves the step it is at and goes on from there, anything else ends at once."""

import json
import signal
import subprocess
import sys
import time

import jax
import pytest

from genret.training import preemption
from genret.training.preemption import Preempted


@pytest.fixture(autouse=True)
def listening():
    old = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGALRM)}
    preemption.listen()
    yield
    preemption.forget()
    for name, handler in old.items():
        signal.signal(name, handler)


def terminate(*steps):
    return lambda step: signal.raise_signal(signal.SIGTERM) if step in steps else None


def kept(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def bits(state):
    return [leaf.tobytes() for leaf in jax.tree.leaves(state)]


def test_the_step_is_saved_and_the_next_start_goes_on_to_the_same_bits(toy, undisturbed, tmp_path):
    whole, folder = undisturbed
    for at, steps in ((3, [3, 4]), (6, [3, 6, 7][1:])):
        with pytest.raises(Preempted, match="the same command continues"):
            toy.fit(tmp_path, terminate(at))
        assert kept(tmp_path) == steps  # what was saved off the schedule goes, and pushes nothing out
        preemption.forget()
    assert bits(toy.fit(tmp_path)) == bits(whole)
    assert kept(tmp_path) == kept(folder) == [6, 8]
    found = [row["step"] for row in rows(tmp_path)]
    assert found == sorted({*found}) and {4, 7} <= {*found} and found[-1] == 8


def test_on_the_last_step_and_while_a_checkpoint_is_written(toy, undisturbed, tmp_path):
    for at in (7, 2):
        with pytest.raises(Preempted):
            toy.fit(tmp_path / str(at), terminate(at))
        assert kept(tmp_path / str(at))[-1] == at + 1
        preemption.forget()
        assert bits(toy.fit(tmp_path / str(at))) == bits(undisturbed[0])


def test_several_processes_ask_as_often_as_a_line_is_logged(toy, tmp_path, monkeypatch):
    """A rollout is a step, and minutes; of quick steps every eighth is soon enough."""
    asked = []
    monkeypatch.setattr(preemption, "due", lambda every=0: asked.append(every))
    toy.fit(tmp_path / "two")
    toy.fit(tmp_path / "one", log_every=1)
    toy.fit(tmp_path / "many", log_every=50)
    assert [every for every in asked if every] == [2] * 8 + [1] * 8 + [8] * 8


def test_elsewhere_it_ends_at_once_and_no_handler_of_errors_stops_it(tmp_path):
    with pytest.raises(Preempted):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("caught on the way")
    assert preemption.due()
    preemption.forget()
    assert not preemption.due()
    with pytest.raises(Preempted):
        with preemption.patience():
            signal.raise_signal(signal.SIGTERM)
            (tmp_path / "finished").touch()
    assert (tmp_path / "finished").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_comes_inside_a_finaliser_is_raised_after_it():
    """Python drops what is raised there; it came so between a round's pairs and the first step on them."""

    class Closing:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    Closing()
    with pytest.raises(Preempted):
        time.sleep(10)


def test_signals_that_were_met_and_forgotten_end_nothing_later():
    """Two at once, whose bytes are read when both have been dealt with, and one that another handler met."""
    code = """
import random, signal, time
from genret.training import preemption
preemption.SOON = 0.5
preemption.listen()
for _ in range(3000):
    for _ in range(2):
        try:
            signal.raise_signal(signal.SIGTERM)
        except preemption.Preempted:
            preemption.forget()
    time.sleep(random.random() * 1e-3)
signal.signal(signal.SIGTERM, lambda *_: None)
signal.raise_signal(signal.SIGTERM)
time.sleep(1.5)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
