"""``python -m pgoutput_source``: try it out, and look before a flow is started."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pgoutput_source import __version__, catalog, demo
from pgoutput_source.errors import PgOutputError
from pgoutput_source.settings import SourceSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for an error of ours (printed with its hint), 2 for wrong usage."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        status: int = arguments.run(arguments)
    except PgOutputError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgoutput-source",
        description="PostgreSQL change data capture for Python.",
        epilog="A dataflow is started with Bytewax: python -m bytewax.run flows.orders_cdc",
    )
    parser.add_argument("--version", action="version", version=f"pgoutput-source {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = commands.add_parser(
        "demo", help="a PostgreSQL, a shop that takes orders, a dataflow and a check of its files"
    )
    show.add_argument("--seconds", type=_seconds, default=15.0, help="how long the shop takes orders (default: 15)")
    show.add_argument("--folder", type=Path, default=Path("out/demo"), help="where the files go (default: out/demo)")
    show.set_defaults(run=lambda a: demo.run(a.seconds, a.folder))

    check = commands.add_parser(
        "check",
        help="compare server, slot and publication with what a flow needs",
        description="Reads PGOUTPUT_DSN, PGOUTPUT_SLOT and PGOUTPUT_PUBLICATION like a flow; options win over them. "
        "Changes nothing.",
    )
    check.add_argument("--dsn", help="libpq connection string or URL")
    check.add_argument("--slot", help="the replication slot's name")
    check.add_argument("--publication", help="one name, or several with commas between")
    check.set_defaults(run=_check)
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("between 1 and 3600")
    return seconds


def _check(arguments: argparse.Namespace) -> int:
    given = {k: v for k in ("dsn", "slot", "publication") if (v := getattr(arguments, k)) is not None}
    settings = SourceSettings.from_env(**given)
    with catalog.connect(catalog.connection_string(settings)) as conn:
        slot = catalog.check(conn, settings)
        now = catalog.current_lsn(conn)
    lag = now - (slot.confirmed_flush_lsn or now)
    print(f"slot {slot.name}: ready, acknowledged up to {slot.confirmed_flush_lsn}, {lag:,d} bytes of WAL to read")
    return 0
