"""One run at a time in a workdir, files that are whole or not there, and errors of the disk in one line."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import command
from experiments.command import one_line
from experiments.workdir import alone, append_rows, building, read_rows, write_text
from genret.catalogue import format
from genret.training import preemption
from genret.types import InputError, reading

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys, time
from pathlib import Path
from experiments.workdir import alone
with alone(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_ends_even_by_kill_9(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        wanted = f"^--workdir: {tmp_path} is in the hands of another run, process {other.pid} on "
        with pytest.raises(InputError, match=wanted), alone(tmp_path, "run"):
            pass
        with alone(tmp_path, "evaluate"):  # beside a run, as --follow does
            with pytest.raises(InputError, match="another evaluate"), alone(tmp_path, "evaluate"):
                pass
        other.kill()
    with alone(tmp_path, "run"):
        pass


def test_a_file_system_without_locks_lets_everybody_in(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with alone(tmp_path, "run"), alone(tmp_path, "run"):
        pass


def test_who_makes_the_same_file_waits_for_the_other(tmp_path, capsys):
    path, made = tmp_path / "data" / "x.parquet", []

    def other():
        with building(path):
            made.append("second")

    with building(path):
        (thread := threading.Thread(target=other)).start()
        while "another command is making it" not in capsys.readouterr().out:
            time.sleep(0.01)
        made.append("first")
    thread.join(60)
    assert made == ["first", "second"]


def test_a_file_of_ours_that_is_cut_short_is_named(tmp_path):
    read = {"npz": lambda p: dict(np.load(p)), "npy": np.load, "json": lambda p: json.loads(p.read_text())}
    for kind, reader in read.items():
        path = tmp_path / f"x.{kind}"
        with open(path, "wb") as file:
            if kind == "json":
                file.write(json.dumps([1, 2, 3]).encode())
            else:
                (np.savez if kind == "npz" else np.save)(file, np.arange(100))
        whole = path.read_bytes()
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(InputError, match=f"^{path}: is cut short or damaged .*delete it"):
                with reading(path):
                    reader(path)


@contextlib.contextmanager
def files_of_4_kib():
    """No file grows past 4 KiB, not even the log of pytest: a quota. The kernel's signal is ignored, as
    Python does."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_does_not_fit_leaves_the_old_file_and_says_so(tmp_path):
    write_text(tmp_path / "a.json", json.dumps("old"))
    append_rows(tmp_path / "rows.jsonl", [{"row": 1}])
    for write in (
        lambda: write_text(tmp_path / "a.json", "x" * 5000),
        lambda: append_rows(tmp_path / "rows.jsonl", [{"row": "x" * 5000}]),
    ):
        with pytest.raises(OSError) as caught, files_of_4_kib():
            write()
        assert one_line(caught.value).endswith("make room, and start again: what is finished is kept")
    assert json.loads((tmp_path / "a.json").read_text()) == "old"
    assert read_rows(tmp_path / "rows.jsonl") == [{"row": 1}]


def test_a_catalogue_that_does_not_fit_leaves_nothing(molecules, tmp_path):
    """Its cache, in a process whose files stay below 64 KiB."""
    build = (
        "import resource, sys; from pathlib import Path; from genret.catalogue.format import load;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536));"
        "load(Path(sys.argv[1]), cache=sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", build, molecules.path, tmp_path], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1 and "File too large" in done.stderr, done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert format.load(molecules.path, cache=tmp_path).num_items == molecules.num_items


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError) as caught, alone(tmp_path / "file", "run"):
        pass
    assert one_line(caught.value).startswith(f"{tmp_path / 'file'}: File exists. use a folder that can be")
    read_only = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path]
    if subprocess.run(read_only, capture_output=True).returncode:
        return  # mounting is not permitted here
    try:
        with pytest.raises(OSError) as caught, alone(tmp_path, "run"):
            pass
        assert "Read-only file system. use a folder that can be written" in one_line(caught.value)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left"), False), (RuntimeError("Event loop is closed"), False),
        (preemption.Preempted(), False), (RuntimeError("a bug"), True), (OSError(errno.EIO, "broken"), True),
    ],
)  # fmt: skip
def test_of_errors_that_reach_no_caller_those_that_are_dealt_with_are_not_told(error, told):
    """SIGTERM inside a finaliser comes again a second later, and a full disk is told to the main thread."""
    said = []
    command._unless_abandoned(said.append)(SimpleNamespace(exc_value=error))
    assert bool(said) == told
