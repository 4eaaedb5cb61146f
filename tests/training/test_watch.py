"""A process that is gone ends the others at once, in one line, whatever they are doing."""

import signal
import socket
import time

import pytest

from genret.training import processes
from genret.training.watch import Watch
from tests.commands import begin, command

ASLEEP = """
(workdir / f"at_{index}").write_text("here")
time.sleep(60)
"""


def gone(started, patience=15):
    """stderr of all, which end in less than 15 seconds (JAX's heartbeats would take 30)."""
    said = [process.communicate(timeout=patience)[1] for process in started]
    noise = ("[Gloo]", "I0", "W0")
    return [[line for line in text.splitlines() if not line.startswith(noise)] for text in said]


def all_at(folder, started):
    """Returns when all are."""
    while not all((folder / f"at_{i}").exists() for i in range(len(started))):
        assert all(process.poll() is None for process in started), started[0].communicate()
        time.sleep(0.05)


@pytest.mark.parametrize("dead", [2, 0])
def test_one_that_dies_outside_a_collective_ends_the_others_with_its_number(tmp_path, dead):
    started = begin(command(ASLEEP, tmp_path), count=3)
    all_at(tmp_path, started)
    started[dead].kill()
    said = gone(started)
    codes = [process.returncode for process in started]
    line = f"error: --multihost: another process is gone (process {dead} of 3: its connection ended). start"
    for i in {0, 1, 2} - {dead}:
        if dead or codes[i] == processes.AGAIN:
            assert codes[i] == processes.AGAIN and any(each.startswith(line) for each in said[i]), said
            assert dead == 0 or len(said[i]) == 1, said
        else:  # JAX's service died with process 0, and JAX can see that first
            assert codes[i] == -signal.SIGABRT, said
    assert codes[dead] == -signal.SIGKILL


@pytest.mark.parametrize("asked", [[2], [0, 1, 2]])
def test_sigterm_ends_all_where_none_of_them_asks_for_it(tmp_path, asked):
    """One computes by itself, as process 0 does that builds a catalogue, and two wait in a barrier for it: a
    call that no signal handler of Python interrupts. Who was not told to end has another status."""
    body = ASLEEP.replace("time.sleep(60)", "time.sleep(60) if index == 0 else processes.barrier('never')")
    started = begin(command(body, tmp_path), count=3)
    all_at(tmp_path, started)
    for i in asked:
        started[i].send_signal(signal.SIGTERM)
    out, said = zip(*(process.communicate(timeout=20) for process in started), strict=True)
    wanted = [0 if i in asked else processes.AGAIN for i in range(3)]
    assert [process.returncode for process in started] == wanted, said
    line = "SIGTERM: what is finished is saved, and the same command continues"
    assert [each.count(line) for each in out] == [1, 0, 0] and "error" not in "".join(said), (out, said)


def test_sigterm_waits_for_what_has_to_be_finished(tmp_path):
    """Process 1 saves for longer than the watch would wait, and then all agree to end."""
    body = """
from genret.training import preemption
with preemption.patience():
    (workdir / f"at_{index}").write_text("here")
    time.sleep(2 * preemption.SOON if index else 1)
    (workdir / f"saved_{index}").write_text("whole")
"""
    started = begin(command(body, tmp_path), count=2)
    all_at(tmp_path, started)
    started[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=30) for process in started]
    assert [process.returncode for process in started] == [processes.AGAIN, 0], said
    assert all((tmp_path / f"saved_{i}").exists() for i in (0, 1))


def test_sigterm_is_heard_while_devices_are_opened(tmp_path):
    """JAX holds a lock then, for which a handler that asks for devices would wait for ever."""
    body = """
import signal
from jax._src import xla_bridge
from genret.training import preemption
with xla_bridge._backend_lock:
    if index: signal.raise_signal(signal.SIGTERM)
preemption.leave_if_due()
"""
    started = begin(command(body, tmp_path), count=2)
    said = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [processes.AGAIN, 0], said


def test_one_process_in_a_call_that_no_handler_interrupts_ends_well_too(tmp_path, monkeypatch):
    """A compiler's, say; under a script with the status that the script has asked for."""
    body = """
import hashlib
(workdir / f"at_{index}").write_text("here")
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    for wanted in (0, 75):
        if wanted:
            monkeypatch.setenv("GENRET_PREEMPTED", str(wanted))
        (folder := tmp_path / str(wanted)).mkdir()
        started = begin(command(body, folder), count=1)
        all_at(folder, started)
        started[0].terminate()
        out, said = started[0].communicate(timeout=20)
        assert (started[0].returncode, out.count("SIGTERM: what is finished is saved")) == (wanted, 1), said


@pytest.mark.parametrize("wrong", [0, 2])
def test_one_that_fails_is_named_by_those_who_wait_for_it(tmp_path, wrong):
    """Process 0 too, without which JAX's service would abort the others: it goes last."""
    body = f"""
from genret.types import InputError
if index == {wrong}:
    raise InputError("field", "is wrong", "mend it")
sum(range(2 * 10**7)) if index == 1 else processes.barrier("never")  # one has no time to hear of it
time.sleep(60)
"""
    started = begin(command(body, tmp_path), count=3)
    said = gone(started, 60)
    wanted = [1 if i == wrong else processes.AGAIN for i in range(3)]
    assert [process.returncode for process in started] == wanted, said
    assert said.pop(wrong) == ["error: field: is wrong. mend it"]
    line = f"error: --multihost: another process is gone (process {wrong} of 3: ended by an error of its own)"
    assert all(len(lines) == 1 and lines[0].startswith(line) for lines in said), said


def test_one_that_cannot_reach_another_ends_those_who_had_not_noticed(tmp_path):
    """All are alive, and one says that a collective has lost its peer: nobody waits for it for ever."""
    body = """
if index == 1:
    raise jax.errors.JaxRuntimeError("Gloo context initialization failed: timed out connecting")
time.sleep(60)
"""
    started = begin(command(body, tmp_path), count=3)
    said = gone(started, 60)
    assert [process.returncode for process in started] == 3 * [processes.AGAIN], said
    assert "is gone (Gloo context initialization failed" in said.pop(1)[-1]
    line = "error: --multihost: another process is gone (process 1 of 3: it could not reach another). start"
    assert all(len(lines) == 1 and lines[0].startswith(line) for lines in said), said


def test_processes_that_run_two_commands_end(tmp_path):
    """A pod that is made again starts with `run`, while the others have gone on to `evaluate`."""
    flags = [f"--workdir={tmp_path}", "--config=experiments/configs/modit.py:size=test"]
    started = begin(None, each=[["-m", f"experiments.{name}", *flags] for name in ("run", "evaluate")])
    zero, one = (lines[-1] for lines in gone(started, 60))
    assert one.startswith("error: command: is evaluate here and run in process 0. start the same")
    assert "is gone (process 1 of 2: ended by an error of its own)" in zero


def test_strangers_at_the_door_are_nobody():
    """Port scanners connect, say anything, and leave; a process without the token is not waited for."""
    watch = Watch()
    ours = watch._token.encode() + b"         1"
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 16 + b"         1", ours):
        with socket.create_server(("localhost", 0)) as server:
            with socket.create_connection(server.getsockname()) as there:
                there.sendall(said)
                there.shutdown(socket.SHUT_WR)
                watch._meet(server.accept()[0])
    assert list(watch._peers.values()) == [1]
