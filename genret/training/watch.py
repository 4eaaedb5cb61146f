"""Noticing that another process is gone while this one meets no collective: at once, and in one line.

JAX misses the heartbeats of a dead process after half a minute, and then aborts the others with a C++ stack.
Here every process keeps one connection to process 0, whose end its kernel reports however it died; of a
host that lost its power or its network, keepalive probes do. Where no connection can be had JAX's heartbeats
are what is left.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import NoReturn

import jax

from genret.training import preemption, processes

CONNECT = 20.0  # seconds in which a process must reach process 0
# Of one that has said its own error: seconds in which the others say theirs, if they meet one.
GRACE = 5.0
# Process 0 goes last, as JAX's service goes with it and aborts who is still there: seconds it waits for them.
LAST = 20.0
# Probes of a silent connection: the first after, then every, and how many; together less than HEARTBEAT.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 4, "TCP_KEEPCNT": 3}


class Watch:
    """This process's connections: to all others in process 0, to process 0 in the others.

    All must `begin` one, after `processes.start`, and leave it by `ended` or `fail`; a process that does
    neither is gone, and the others end with status `processes.AGAIN` and a line that names it. A SIGTERM that
    no `due` meets in time ends all of them here.
    """

    def __init__(self) -> None:
        self._own, self._count = jax.process_index(), jax.process_count()
        self._peers: dict[socket.socket, int] = {}
        self._first = processes.is_writer()
        self._over = False
        self._missed: tuple[int, float] | None = None  # who lost another, and when that is all to say
        self._speaking = threading.Lock()
        self._token = secrets.token_hex(8)

    def begin(self) -> None:
        """Connects, and watches in a thread of its own. Raises BarrierError where the others do not come."""
        server = _listen(self._count) if self._first else None
        port = server.getsockname()[1] if server is not None else 0
        self._token, port = processes.agreed("watch", (self._token, port))
        if server is None:
            try:
                peer = socket.create_connection((processes.coordinator(), port), CONNECT)
                peer.sendall(f"{self._token} {self._own:>9}".encode())
                self._add(peer, 0)
            except OSError as error:
                print(f"cannot reach process 0's watch ({error}): JAX's heartbeats are left", file=sys.stderr)
        processes.barrier("watch, connected")
        if server is not None:
            with server, contextlib.suppress(TimeoutError):  # who could not connect
                while len(self._peers) < self._count - 1:
                    self._meet(server.accept()[0])
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        preemption.by(lambda: self._over or self._stop(self._own))

    def ended(self) -> None:
        """This process is about to end, as all do."""
        self._over = True
        self._tell("ended", self._own)

    def fail(self, said: str, lost: bool = False) -> NoReturn:
        """Ends this process with its error on stderr and status 1; lost: what it met is the loss of another,
        and the status is `processes.AGAIN`.

        An orderly exit would wait for the others, who may wait for this one.
        """
        if lost and self._first:
            time.sleep(1.0)  # the watch may know which, and speak first
        self._over = True
        self._end(said, *(("missed", self._own, processes.AGAIN) if lost else ("failed", self._own, 1)))

    def _stop(self, index: int) -> NoReturn:
        """SIGTERM came to process `index`."""
        told = index == self._own or preemption.came()
        self._end(str(preemption.Preempted()), "stopped", index, preemption.status(told))

    def _end(self, said: str, how: str, index: int, status: int) -> NoReturn:
        self._speaking.acquire()  # for good: of several threads the first speaks alone
        try:
            with contextlib.suppress(OSError, ValueError):  # nobody reads it
                sys.stdout.flush()
                print(said, file=sys.stdout if how == "stopped" else sys.stderr, flush=True)
            self._tell(how, index)
            until = time.monotonic() + LAST
            for peer in tuple(self._peers) if self._first else ():
                with contextlib.suppress(OSError):
                    peer.settimeout(max(0.01, until - time.monotonic()))
                    while peer.recv(64):
                        pass
        finally:
            os._exit(status)

    def _add(self, peer: socket.socket, index: int) -> None:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # Linux's names
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._peers[peer] = index

    def _tell(self, how: str, index: int) -> None:
        for peer in tuple(self._peers):
            with contextlib.suppress(OSError):  # gone too
                peer.sendall(_message(how, index))

    def _watch(self) -> None:
        """Runs in its thread until the end."""
        waiting = selectors.DefaultSelector()
        for peer in self._peers:
            waiting.register(peer, selectors.EVENT_READ)
        while not self._over:
            for key, _ in waiting.select(timeout=1.0):
                if self._heard(key.fileobj):
                    waiting.unregister(key.fileobj)
            if self._missed is not None and time.monotonic() > self._missed[1]:
                self._lost("missed", self._missed[0])

    def _meet(self, peer: socket.socket) -> None:
        """Adds what has connected, if it is a process of this run."""
        with contextlib.suppress(OSError, ValueError):
            peer.settimeout(1.0)
            given, _, index = _read(peer, len(self._token) + 10).partition(" ")
            if given == self._token:
                return self._add(peer, int(index))
        peer.close()

    def _heard(self, peer: socket.socket) -> bool:
        """Takes in one message, or the end, of a peer; True where there is no more to come."""
        try:
            how, _, index = _read(peer, len(_message("", 0))).strip().partition(" ")
        except OSError:  # reset, or no answer to any probe
            how = index = ""
        if how == "ended" or self._over:
            return True
        index = int(index or self._peers[peer])
        if how == "stopped":
            self._stop(index)
        if how == "missed" and self._first:  # its own connection will soon say which
            self._missed = self._missed or (index, time.monotonic() + GRACE)
            return True
        if how == "failed":
            if self._first:
                self._tell(how, index)
            time.sleep(GRACE)
        self._lost(how or "lost", index)
        return True

    def _lost(self, how: str, index: int) -> None:
        """Ends this process for want of process `index`."""
        met = {"failed": "ended by an error of its own", "missed": "it could not reach another"}
        if not self._over:
            said = processes.LostProcess.of(
                f"process {index} of {self._count}: {met.get(how, 'its connection ended')}"
            )
            self._end(f"error: {said}", how, index, processes.AGAIN)


def _listen(count: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        found = socket.create_server(
            ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=count
        )  # fmt: skip
    else:
        found = socket.create_server(("", 0), backlog=count)
    found.settimeout(1.0)
    return found


def _message(how: str, index: int) -> bytes:
    return f"{how:<7} {index:>9}".encode()  # of one length


def _read(peer: socket.socket, size: int) -> str:
    """`size` bytes, or nothing where the connection ends before."""
    found = b""
    while len(found) < size:
        if not (part := peer.recv(size - len(found))):
            return ""
        found += part
    return found.decode("ascii", "replace")
