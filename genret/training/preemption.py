"""SIGTERM, which schedulers send before they take a machine away: what was done is saved, and all ends well.

Training saves at the step it is at. Elsewhere one process ends at once, as whatever it keeps is written whole
or not at all. Several processes end together: at a step, at a method, or after a stage, where all ask `due`.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from genret.training import processes

_asked = _patient = False
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
    _asked = False
    signal.alarm(0)


def _note(*_) -> None:
    global _asked
    _asked = True
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
    return processes.any_of("SIGTERM", _asked)


def leave_if_due() -> None:
    """Raises Preempted if SIGTERM has come to any process; all of them ask."""
    if due():
        raise Preempted


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Within, SIGTERM waits for `due`, and raises Preempted at the end."""
    global _patient
    _patient = True
    try:
        yield
    finally:
        _patient = False
    leave_if_due()
