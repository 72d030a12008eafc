"""The legal order of messages, as tables: for each state, what may come, and in which state it leaves the stream."""

from __future__ import annotations

from typing import Final

import numpy as np

from pgoutput_source.decode.frames import Bools, Frames
from pgoutput_source.errors import ProtocolError

BETWEEN, INSIDE, CHUNK = "between transactions", "inside a transaction", "inside a chunk of a streamed transaction"

TRANSITIONS: Final[dict[str, dict[str, str]]] = {
    BETWEEN: {"B": INSIDE, "M": BETWEEN, "A": BETWEEN},
    INSIDE: {"C": BETWEEN} | dict.fromkeys("IUDTRYOM", INSIDE),
}
"""TRANSITIONS[state][tag]: the state after a message of protocol 1. What is not in the table is a `ProtocolError`.

A StreamAbort takes back what was streamed. Servers send it also to readers that asked for no streaming, when a large
transaction rolls back after it released a savepoint: nothing of it was sent, so there is nothing to take back.
"""

STREAMED: Final[dict[str, dict[str, str]]] = {
    BETWEEN: {"S": CHUNK, "c": BETWEEN, "A": BETWEEN},
    INSIDE: {},
    CHUNK: {"E": BETWEEN} | dict.fromkeys("IUDTRYOM", CHUNK),
}
"""STREAMED[state][tag]: the same for the messages that concern streamed transactions, and for those in their chunks."""

UNTRUSTED: Final = "this stream can't be trusted any further; please report it with the server's version"
"""The hint of an error after which a server's stream makes no sense."""

_STATES = (BETWEEN, INSIDE)
_LEGAL = np.zeros((len(_STATES), 256), np.bool_)
for _state, _after in TRANSITIONS.items():
    _LEGAL[_STATES.index(_state), [ord(tag) for tag in _after]] = True
_BEGIN, _COMMIT = b"BC"


def check_order(f: Frames, *, inside: bool) -> Bools:
    """Which frames of protocol 1 come inside a transaction; `inside` says whether the first one does.

    Raises:
        ProtocolError: The first message that is not legal where it comes.
    """
    # The last Begin or Commit before a frame says in which state it comes: found as a number one higher, 0 for none.
    bounds = (f.tag == _BEGIN) | (f.tag == _COMMIT)
    last = np.maximum.accumulate(np.where(bounds, np.arange(1, len(f) + 1), 0))
    before = np.concatenate([[0], last[:-1]])
    within: Bools = np.where(before > 0, f.tag[before - 1] == _BEGIN, inside)
    legal = _LEGAL[within.view(np.int8), f.tag]
    if not legal.all():
        bad = int(np.argmin(legal))
        state = _STATES[int(within[bad])]
        raise ProtocolError(f"a message {chr(f.tag[bad])!r} {state}", lsn=f.lsn_of(bad), hint=UNTRUSTED)
    return within
