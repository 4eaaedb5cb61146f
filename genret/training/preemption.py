"""SIGTERM, which schedulers send before they take a machine away: what was done is saved, and all ends well.

Training saves at the step it is at. Elsewhere one process ends at once, as whatever it keeps is written whole
or not at all. Several processes end together: at a step, at a method, or after a stage, where all ask `due`;
or, where they do not come to that soon, by the watch, which asks `overdue`.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

from genret.training import processes

SOON = 5.0  # seconds in which several processes may come to where all ask
# The status of one that was not told to end, where another was: its script shall not go on.
UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h
_patient = False
_asked: float | None = None  # when SIGTERM came, or when what it had to wait for was over
_calls = 0


class Preempted(BaseException):
    """The run ends because of SIGTERM; no Exception, as nothing failed and nothing should catch it."""

    def __str__(self) -> str:
        return "SIGTERM: what is finished is saved, and the same command continues"


def listen() -> None:
    """From here on SIGTERM raises Preempted: now, or under `patience` at its end. For the main thread."""
    forget()
    signal.signal(signal.SIGTERM, _note)
    signal.signal(signal.SIGALRM, _note)


def forget() -> None:
    """What came is dealt with."""
    global _asked
    _asked = None
    signal.alarm(0)


def over() -> None:
    """All is done: SIGTERM is ignored from here on. (Python's exit would give it back to the kernel.)"""
    forget()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def note() -> None:
    """SIGTERM has come: for who hears of it while the main thread is in a call that no handler interrupts."""
    global _asked
    _asked = time.monotonic() if _asked is None else _asked


def _note(*_) -> None:
    note()
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


def overdue() -> bool:
    """Whether it came SOON seconds ago, and nothing is under `patience` that had to be finished first."""
    return _asked is not None and not _patient and time.monotonic() - _asked > SOON


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
