"""Several processes, one program: who writes, who waits, and how long.

All processes run the same commands in the same order. What lies in files is written by process 0 alone while
the others wait, so it must be on a file system that all of them see (Orbax's checkpoints ask the same), and
what they decide from files is decided alike. With one process everything here is a plain call.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from genret.types import InputError

# Seconds. A day, as process 0 may build a catalogue of millions; one that dies is missed in HEARTBEAT.
PATIENCE = 86_400.0
HEARTBEAT = 30
JOIN = 1800  # until all have joined: images are pulled and pools of nodes made meanwhile
ENDING = 30  # for one that ends to let go of what this one needs
# The status of a process that ends because of another, EX_TEMPFAIL of sysexits.h: its script shall not go on,
# and the same command continues.
AGAIN = 75
# How collectives and jax's coordination service say that another process is gone.
_GONE = re.compile(
    "gloo|nccl|coordination service|heartbeat|connection (reset|closed|refused)|socket closed", re.I
)
T = TypeVar("T")
_met: collections.Counter[str] = collections.Counter()  # a barrier of jax cannot be used twice


class BarrierError(RuntimeError):
    """A barrier that not all processes reached in time; the message names it."""


class LostProcess(RuntimeError):
    """Another process is gone; the message says what this one met."""

    @classmethod
    def of(cls, met: str) -> LostProcess:
        fix = "start all of them again, in any number: the run goes on from its last checkpoint"
        return cls(f"--multihost: another process is gone ({met}). {fix}")


def start(coordinator: str | None = None, process_id: int | None = None, count: int | None = None) -> str:
    """Join the other processes, before any other use of JAX; returns 'process i of n, k devices'.

    coordinator: HOST:PORT of process 0. Without all three JAX asks the cluster (SLURM, TPU pods, GKE).
    Raises InputError where only some are given, the port is taken, or there is no cluster to ask. Where not
    all join in JOIN seconds the process ends, with a line and status AGAIN.
    """
    _join(coordinator, process_id, count)
    return f"process {jax.process_index()} of {jax.process_count()}, {jax.device_count()} devices"


def alone(*place: Any) -> tuple[bool, str]:
    """(whether this is process 0, a line for people): for what one process does as if there were no others.

    place: as given to `start`, and the same errors. All must call it; no device is touched. (One host of a
    TPU slice cannot use its chips without the others: there, give it JAX_PLATFORMS=cpu.)
    """
    _join(*place)
    index, count = _known().process_id, _known().num_processes
    jax.distributed.shutdown()  # waits for all
    return index == 0, f"process {index} of {count}: process 0 does this by itself"


def _join(coordinator: str | None, process_id: int | None, count: int | None) -> None:
    given = {"--coordinator": coordinator, "--process_id": process_id, "--num_processes": count}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        problem = "is not given, and others of the three are"
        raise InputError(missing[0], problem, "give all three, or none where JAX can ask the cluster")
    if not missing and not 0 <= process_id < count:
        raise InputError("--process_id", f"{process_id} of {count}", f"use 0 to {count - 1}")
    if coordinator is not None:
        port = coordinator.rpartition(":")[2]
        if not port.isdecimal() or not 0 < int(port) < 65_536:
            raise InputError("--coordinator", f"{coordinator!r} names no port", "write HOST:PORT")
        if process_id == 0:
            _free(int(port))
    # `preemption` agrees on where to stop; this service would take SIGTERM away from it.
    jax.config.update("jax_enable_preemption_service", False)
    late = threading.Timer(JOIN, _give_up, [coordinator])  # before jax does, by an abort
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator, count, process_id, initialization_timeout=JOIN + 60,
            heartbeat_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except ValueError as error:  # what jax says where it finds no cluster
        fix = "give --coordinator, --process_id and --num_processes"
        raise InputError("--multihost", f"JAX found no cluster to ask ({error})", fix) from None
    finally:
        late.cancel()


def _free(port: int) -> None:
    """Raises InputError unless process 0 can listen there: jax's service would end the program."""
    wide, end = socket.has_dualstack_ipv6(), time.monotonic() + ENDING
    family = socket.AF_INET6 if wide else socket.AF_INET
    while True:
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=wide).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                problem = f"port {port} of this host cannot be opened ({error.strerror})"
                fix = "give a port of its own to each command that is at work"
                raise InputError("--coordinator", problem, fix) from None
        time.sleep(0.2)


def _give_up(coordinator: str | None) -> None:
    where = "" if coordinator is None else f" at {coordinator}"
    said = f"not all processes joined{where} within {JOIN} s"
    fix = "look whether each runs, reaches that host and port, and was given the same --num_processes"
    print(f"error: --multihost: {said}. {fix}", file=sys.stderr, flush=True)
    os._exit(AGAIN)


def meeting_place() -> str:
    """HOST:PORT of process 0, as the others reach it."""
    return _known().coordinator_address


def coordinator() -> str:
    """The host of process 0, as the others reach it."""
    return meeting_place().rpartition(":")[0].strip("[]")


def several() -> bool:
    """Whether this program runs in more than one process. Touches no device: a handler of signals may ask
    while they are opened, under a lock."""
    return jax.distributed.is_initialized() and _known().num_processes > 1


def is_writer() -> bool:
    """Whether this process is the one that writes."""
    return not several() or jax.process_index() == 0


def barrier(name: str, patience: float = PATIENCE) -> None:
    """Wait until all processes are here; raises BarrierError after `patience` seconds, or if one has died."""
    if several():
        with _meeting(name, patience) as (client, key, milliseconds):
            client.wait_at_barrier(key, milliseconds)


def once(name: str, write: Callable[[], Any]) -> None:
    """Process 0 writes: the others have read what they want before, and go on when it is done."""
    barrier(f"{name}, to be written")
    if is_writer():
        write()
    barrier(f"{name}, written")


def first(name: str, make: Callable[[], T]) -> T:
    """make() by process 0, and then by the others, who find in the cache what it left there; where process 0
    fails they raise InputError."""
    if not several():
        return make()
    made, failed = None, None
    if is_writer():
        try:
            made = make()
        except BaseException as error:
            failed = error
    done = agreed(name, failed is None)
    barrier(name)
    if failed is not None:
        raise failed
    if not done:
        raise InputError(name, "process 0 could not make it", "its own line says why")
    return made if is_writer() else make()


def agreed(name: str, value: T) -> T:
    """What process 0 holds for `value`, which is JSON; raises BarrierError as `barrier` does."""
    if not several():
        return value
    with _meeting(name, PATIENCE) as (client, key, milliseconds):
        if is_writer():
            client.key_value_set(key, json.dumps(value))
        return json.loads(client.blocking_key_value_get(key, milliseconds))


def same(name: str, value: str) -> None:
    """Raises InputError in a process whose `value` is not that of process 0."""
    if (first := agreed(name, value)) != value:
        problem = f"is {value} here and {first} in process 0"
        raise InputError(name, problem, "start the same in all processes")


def any_of(name: str, value: bool) -> bool:
    """Whether `value` is true in any process; raises BarrierError as `barrier` does."""
    if not several():
        return value
    with _meeting(name, PATIENCE) as (client, key, milliseconds):
        if value:
            client.key_value_set(f"{key}/{jax.process_index()}", "true")
        client.wait_at_barrier(key, milliseconds)
        return bool(client.key_value_dir_get(key))


def lost(error: BaseException) -> LostProcess | None:
    """`error` as a LostProcess, if it is how a collective or a barrier meets the end of another process."""
    said = " ".join(str(error).split())[:200]
    if not several() or isinstance(error, InputError) or not _GONE.search(said):
        return None
    return LostProcess.of(said)


def _known() -> Any:
    """What jax knows of the processes: the one place that looks there, since no public barrier has a
    time-out and nothing public names the coordinator."""
    from jax._src import distributed

    return distributed.global_state


@contextlib.contextmanager
def _meeting(name: str, patience: float) -> Iterator[tuple]:
    """(client, key, milliseconds)."""
    _met[name] += 1
    try:
        yield _known().client, f"genret: {name} ({_met[name]})", round(1000 * patience)
    except AttributeError as error:
        raise BarrierError(f"this jax ({jax.__version__}) has no such client; genret knows 0.10's") from error
    except jax.errors.JaxRuntimeError as error:
        raise BarrierError(
            f"barrier {name!r}: process {jax.process_index()} of {jax.process_count()} waited up to "
            f"{patience:.0f} s and not all came ({str(error).splitlines()[0]})"
        ) from error
