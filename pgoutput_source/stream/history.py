"""`History`: checks that the server's history still contains what was delivered.

After a start the server sends again what was not acknowledged. If that begins before the last delivered transaction, it
must contain this transaction. A server that was restored from a backup, or a promoted standby that never had the
transaction, sends other transactions at the same positions, and these would be skipped as repeats.
"""

from __future__ import annotations

from collections.abc import Iterable

from pgoutput_source.changes.batches import ChangeSet
from pgoutput_source.errors import StateError
from pgoutput_source.protocol import messages
from pgoutput_source.protocol.wire import PG_EPOCH_US, XLOG_DATA_HEADER, Lsn
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.start import START_AFRESH, State


class History:
    """Remembers the last delivered transaction, and looks for it when the server sends it again.

    Args:
        settings: What is streamed. Other publications need not have the same transactions.
        state: The resume state; None if there is none.
    """

    def __init__(self, settings: SourceSettings, state: State | None = None) -> None:
        self._streamed = [*sorted(settings.publication), settings.origin]
        self._last: tuple[int, int, int] | None = None
        self._wanted: tuple[int, int, int] | None = None
        if state is not None and state["commit_lsn"] is not None and state.get("streamed") == self._streamed:
            self._last = state["commit_lsn"], state["xid"], state["commit_ts"]

    @property
    def pending(self) -> bool:
        """Whether the transaction has yet to come."""
        return self._wanted is not None

    @property
    def commit_ts(self) -> int | None:
        """When the last transaction was committed, in microseconds of Unix time."""
        return self._last and self._last[2]

    def state(self) -> State:
        """The entries for the resume state, besides the position."""
        if self._last is None:
            return {}
        return {"xid": self._last[1], "commit_ts": self._last[2], "streamed": self._streamed}

    def delivered(self, changes: ChangeSet) -> None:
        """Note the last transaction of these delivered changes."""
        if changes.batches:
            last = max(changes.batches, key=lambda batch: batch.last)
            lsn, xid, moment = (last.metadata(name)[-1] for name in ("commit_lsn", "xid", "commit_ts"))
            self._last = lsn.as_py(), xid.as_py(), moment.value

    def connected(self, confirmed: Lsn) -> None:
        """A connection begins to stream from a slot whose position is `confirmed`."""
        # The server sends a transaction if its commit record begins at or after the slot's position.
        self._wanted = self._last if self._last is not None and confirmed <= self._last[0] else None

    def look(self, frames: Iterable[bytes | memoryview], sent: Lsn) -> None:
        """Look for the transaction in new frames. The server has sent everything up to `sent` on this connection.

        Raises:
            StateError: The transaction did not come.
        """
        wanted = self._wanted
        if wanted is None:
            return
        for frame in frames:
            if frame[XLOG_DATA_HEADER] not in b"Bc":
                continue
            match messages.decode(bytes(frame[XLOG_DATA_HEADER:])):
                case messages.Begin(lsn, commit_ts, xid) | messages.StreamCommit(xid, lsn, _, commit_ts):
                    if (lsn, xid, commit_ts + PG_EPOCH_US) == wanted:
                        self._wanted = None
                        return
                    if lsn >= wanted[0]:
                        sent = max(sent, Lsn(wanted[0] + 1))
                        break
        if sent > wanted[0]:
            raise StateError(
                f"transaction {wanted[1]} at {Lsn(wanted[0])} was delivered, but this server does not have it: it was "
                "restored from a backup, or is a standby or another copy that never received it",
                hint=START_AFRESH,
            )
