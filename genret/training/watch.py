"""Noticing that another process is gone while this one meets no collective: at once, and in one line.

JAX misses the heartbeats of a dead process after half a minute, and then aborts the others with a C++ stack.
Here every process keeps one connection to process 0, whose end its kernel reports however it died; of a
host that lost its power or its network, keepalive probes do. Where no connection can be had JAX's heartbeats
are what is left.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import NoReturn

import jax

from genret.training import processes

CONNECT = 20.0  # seconds in which a process must reach process 0
# Of one that has said its own error: seconds in which the others say theirs, if they meet one.
GRACE = 5.0
# Probes of a silent connection: the first after, then every, and how many; together less than HEARTBEAT.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 4, "TCP_KEEPCNT": 3}
_speaking = threading.Lock()


def leave(said: str) -> NoReturn:
    """Ends this process with status 1 and what is said on stderr; of two threads the first speaks alone.

    An orderly exit would wait for the others, who may wait for this one.
    """
    _speaking.acquire()  # for good
    print(said, file=sys.stderr, flush=True)
    os._exit(1)


class Watch:
    """This process's connections: to all others in process 0, to process 0 in the others.

    All must make one, after `processes.start`, and end it by `ended` or `failed`; a process that does neither
    is gone, and the others `leave`.
    """

    def __init__(self) -> None:
        self._peers: dict[socket.socket, int] = {}
        self._server: socket.socket | None = None
        self._over, self._count = False, jax.process_count()
        token, port = secrets.token_hex(8), 0
        if processes.is_writer():
            self._server = _listen()
            self._server.settimeout(1.0)
            port = self._server.getsockname()[1]
        token, port = processes.agreed("watch", (token, port))
        if self._server is None:
            try:
                peer = socket.create_connection((processes.coordinator(), port), CONNECT)
                peer.sendall(f"{token} {jax.process_index():>9}".encode())
            except OSError as error:
                print(f"cannot reach process 0's watch ({error}): JAX's heartbeats are left", file=sys.stderr)
                return
            self._add(peer, 0)
        threading.Thread(target=self._watch, args=(token,), name="watch", daemon=True).start()

    def ended(self) -> None:
        """This process is about to end as all do."""
        self._over = True
        self._tell("ended", jax.process_index())

    def failed(self) -> None:
        """This process is about to end by an error of its own, which it says itself."""
        self._over = True
        self._tell("failed", jax.process_index())

    def _add(self, peer: socket.socket, index: int) -> None:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # Linux's names
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._peers[peer] = index

    def _tell(self, how: str, index: int) -> None:
        for peer in tuple(self._peers):
            try:
                peer.sendall(_message(how, index))
            except OSError:
                pass  # gone too

    def _watch(self, token: str) -> None:
        """Runs in a thread of its own until the end."""
        waiting = selectors.DefaultSelector()
        for known in (self._server, *self._peers):
            if known is not None:
                waiting.register(known, selectors.EVENT_READ)
        while not self._over:
            for key, _ in waiting.select(timeout=1.0):
                if key.fileobj is not self._server:
                    if self._heard(key.fileobj):
                        waiting.unregister(key.fileobj)
                elif (peer := self._accept(token)) is not None:
                    waiting.register(peer, selectors.EVENT_READ)

    def _accept(self, token: str) -> socket.socket | None:
        try:
            peer, _ = self._server.accept()
            peer.settimeout(1.0)
            given, _, index = _read(peer, len(token) + 10).partition(" ")
            if given == token:
                self._add(peer, int(index))
                return peer
            peer.close()  # nobody of ours
        except (OSError, ValueError):
            pass
        return None

    def _heard(self, peer: socket.socket) -> bool:
        """Takes in one message, or the end, of a connection; True where there is no more to come."""
        try:
            how, _, index = _read(peer, len(_message("", 0))).strip().partition(" ")
        except OSError:  # reset, or no answer to any probe
            how = index = ""
        if how == "ended" or self._over:
            return True
        if how == "failed":
            if self._server is not None:
                self._tell(how, int(index))
            time.sleep(GRACE)
            self._leave(int(index), "ended by an error of its own")
        lost = int(index or self._peers[peer])
        if self._server is not None:
            self._tell("lost", lost)
        self._leave(lost, "its connection ended")

    def _leave(self, index: int, how: str) -> None:
        if not self._over:
            leave(f"error: {processes.LostProcess.of(f'process {index} of {self._count}: {how}')}")


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _message(how: str, index: int) -> bytes:
    return f"{how:<6} {index:>9}".encode()  # of one length


def _read(peer: socket.socket, size: int) -> str:
    """`size` bytes, or nothing where the connection ends before."""
    found = b""
    while len(found) < size:
        if not (part := peer.recv(size - len(found))):
            return ""
        found += part
    return found.decode("ascii", "replace")
