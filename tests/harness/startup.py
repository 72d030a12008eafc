"""What a connection begins with: its startup packet, as a connection pooler sees it, and a refusal in answer.

https://www.postgresql.org/docs/current/protocol-message-formats.html
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection

from harness.proxy import Alter, Cut


def refusal(code: str, text: str) -> bytes:
    """An ErrorResponse that ends the connection."""
    fields = {"S": "FATAL", "V": "FATAL", "C": code, "M": text}
    body = b"".join(f"{kind}{value}\0".encode() for kind, value in fields.items()) + b"\0"
    return b"E" + struct.pack("!I", 4 + len(body)) + body


def pooler(*, ignores: Collection[str] = (), refuses: Collection[str] = ()) -> Callable[[], Alter]:
    """As PgBouncer treats parameters: some are dropped, some refused. It speaks no TLS."""

    def begin() -> Alter:
        begun = False

        def alter(from_client: bool, data: bytes) -> bytes:
            nonlocal begun
            if begun or not from_client:
                return data
            begun = True
            names = data[8:-1].split(b"\0")
            given = dict(zip(names[0::2], names[1::2], strict=False))
            for name in refuses:
                if name.encode() in given:
                    raise Cut(answered=refusal("08P01", f"unsupported startup parameter: {name}"))
            kept = {name: value for name, value in given.items() if name and name.decode() not in ignores}
            body = data[4:8] + b"".join(name + b"\0" + value + b"\0" for name, value in kept.items()) + b"\0"
            return struct.pack("!I", 4 + len(body)) + body

        return alter

    return begin
