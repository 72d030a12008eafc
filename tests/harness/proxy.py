"""TCP on loopback to a server on loopback, as networks are: it can be cut, fall silent, and alter what it forwards."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Callable

Alter = Callable[[bool, bytes], bytes]
"""What goes on in place of what came, and whether that came from the client. It may raise a `Cut`."""


class Cut(Exception):
    """Ends a connection.

    Args:
        forwarded: What the other side still gets.
        answered: What the side that sent still gets.
        reset: Whether the end is a reset, as of a process that died, and not an orderly one.
    """

    def __init__(self, forwarded: bytes = b"", *, answered: bytes = b"", reset: bool = False) -> None:
        self.forwarded, self.answered, self.reset = forwarded, answered, reset


class Proxy:
    """Forwards what comes to `port` to the server, whose port may change when it is started again.

    Args:
        target: The server's port, asked for at each new connection.
        alter: Called for each new connection; gives the function through which its bytes go.
    """

    def __init__(self, target: Callable[[], int], alter: Callable[[], Alter] = lambda: lambda _, data: data) -> None:
        self._target, self._alter = target, alter
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: list[_Pair] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target()))
            except OSError:
                near.close()
                continue
            pair = _Pair(near, far, self._alter())
            self._pairs = [each for each in self._pairs if each.is_alive()] + [pair]
            pair.start()

    def cut(self) -> None:
        """End all connections at once."""
        for pair in self._pairs:
            pair.cut()

    def freeze(self) -> None:
        """Forward nothing more on any connection there is, and tell nobody: half-open TCP. New ones work."""
        for pair in self._pairs:
            pair.frozen.set()

    def close(self) -> None:
        """Take no more, and end what there is."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # close() alone does not wake accept()
        self._listener.close()
        self.cut()


class _Pair(threading.Thread):
    """One connection, as its two ends."""

    def __init__(self, near: socket.socket, far: socket.socket, alter: Alter) -> None:
        super().__init__(daemon=True)
        self.ends = (near, far)
        self.alter = alter
        self.frozen = threading.Event()
        self.ended = threading.Event()

    def run(self) -> None:
        near, far = self.ends
        others = {near: far, far: near}
        with near, far, contextlib.suppress(OSError, ValueError):
            while not self.frozen.is_set():
                for ready in select.select(self.ends, [], [], 0.05)[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    try:
                        others[ready].sendall(self.alter(ready is near, data))
                    except Cut as cut:
                        others[ready].sendall(cut.forwarded)
                        ready.sendall(cut.answered)
                        if cut.reset:
                            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return
            # Open, and nobody reads: not even the end of the other side comes through.
            self.ended.wait()

    def cut(self) -> None:
        self.ended.set()
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
