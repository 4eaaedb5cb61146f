"""SIGTERM, which schedulers send before they take a machine away: what was done is saved, and all ends well.

Training saves at the step it is at. Elsewhere one process ends at once, as whatever it keeps is written whole
or not at all. Several processes end together: at a step, at a method, or after a stage, where all ask `due`.
Who does not come to that soon, in a compiler or in a barrier say, is ended by a thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

from genret.training import processes

SOON = 5.0  # seconds in which a process may come to its own end
_signals: socket.socket | None = None
_patient = False
_asked: float | None = None  # when SIGTERM came, or when what it had to wait for was over
_calls = 0


class Preempted(BaseException):
    """The run ends because of SIGTERM; no Exception, as nothing failed and nothing should catch it."""

    def __str__(self) -> str:
        return "SIGTERM: what is finished is saved, and the same command continues"


def listen() -> None:
    """From here on SIGTERM raises Preempted: now, or under `patience` at its end. For the main thread."""
    global _signals
    forget()
    signal.signal(signal.SIGTERM, _note)
    signal.signal(signal.SIGALRM, _note)
    if _signals is None:
        _signals, written = socket.socketpair()
        for end in (_signals, written):
            end.setblocking(False)
        signal.set_wakeup_fd(written.detach(), warn_on_full_buffer=False)
        threading.Thread(target=_hear, name="SIGTERM", daemon=True).start()


def _hear() -> None:
    """Python's handlers wait for the main thread, which may be in a call for minutes; their bytes do not."""
    while True:
        select.select([_signals], [], [])
        began = time.monotonic()
        while _unread() or came():
            since = began if _asked is None else _asked
            if not _patient and time.monotonic() - since > SOON:
                _end()
            time.sleep(0.2)


def _unread() -> bool:
    """Whether SIGTERM came and our handler, which reads these bytes, has not run yet."""
    with contextlib.suppress(BlockingIOError):
        found = _signals.recv(64, socket.MSG_PEEK)
        if signal.SIGTERM in found and signal.getsignal(signal.SIGTERM) is _note:
            return True
        _signals.recv(len(found))
    return False


def _alone() -> None:
    """Ends this process as the main thread would."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        print(Preempted(), flush=True)
    os._exit(status(told=True))


_end = _alone


def by(end: Callable[[], None]) -> None:
    """From here on `end` is called, again and again, where SIGTERM has met no `due` in time: it ends all."""
    global _end
    _end = end


def status(told: bool) -> int:
    """The exit status. told: whether SIGTERM came to this very process, which ends well, or as the variable
    GENRET_PREEMPTED says: a script sets it so that nothing comes after."""
    return int(os.environ.get("GENRET_PREEMPTED") or 0) if told else processes.AGAIN


def forget() -> None:
    """What came is dealt with."""
    global _asked
    _asked = None
    signal.alarm(0)


def over() -> None:
    """All is done: SIGTERM is ignored from here on. (Python's exit would give it back to the kernel.)"""
    forget()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _note(*_) -> None:
    global _asked
    _asked = time.monotonic() if _asked is None else _asked
    with contextlib.suppress(BlockingIOError):
        while _signals.recv(64):
            pass
    if not _patient and not processes.several():
        signal.alarm(1)  # once more in a second: what is raised inside a __del__ is lost
        raise Preempted


def due(every: int = 1) -> bool:
    """Whether SIGTERM has come, the same answer for all processes, who all ask; several of them talk at every
    so-many-th question alone (a millisecond on one machine)."""
    global _calls
    _calls += 1
    if processes.several() and _calls % every:
        return False
    return processes.any_of("SIGTERM", came())


def came() -> bool:
    """Whether SIGTERM has come to this very process."""
    return _asked is not None


def leave_if_due() -> None:
    """Raises Preempted if SIGTERM has come to any process; all of them ask."""
    if due():
        raise Preempted


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Within, SIGTERM waits for `due`, and raises Preempted at the end."""
    global _asked, _patient
    _patient = True
    try:
        yield
        ending = due()  # several are patient until all have finished
    finally:
        _asked = None if _asked is None else time.monotonic()
        _patient = False
    if ending or (came() and not processes.several()):
        raise Preempted
