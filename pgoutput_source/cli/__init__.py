"""``python -m pgoutput_source``: try it out, check a setup, and repair a lost slot."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgoutput_source import __version__
from pgoutput_source.cli import check, demo, replay, replicate, resync, snapshot
from pgoutput_source.config import CONFIG
from pgoutput_source.destinations.replication import Replication
from pgoutput_source.errors import PgOutputError
from pgoutput_source.settings import SourceSettings, parse_publications


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. The exit status is 0, 1 for a `PgOutputError` (printed with its hint), 2 for wrong usage."""
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
        epilog="Start a dataflow with Bytewax: python -m bytewax.run your_flow",
    )
    parser.add_argument("--version", action="version", version=f"pgoutput-source {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = commands.add_parser(
        "demo", help="run a PostgreSQL, a shop that takes orders and a dataflow, and check the dataflow's files"
    )
    show.add_argument("--seconds", type=_seconds, default=15.0, help="how long the shop takes orders (default: 15)")
    show.add_argument("--folder", type=Path, default=Path("out/demo"), help="the folder for files (default: out/demo)")
    show.set_defaults(run=lambda a: demo.run(a.seconds, a.folder))

    look = commands.add_parser(
        "check",
        help="compare server, slot and publication with what a flow needs",
        description="Reads PGOUTPUT_DSN, PGOUTPUT_SLOT and PGOUTPUT_PUBLICATION like a flow; options override them. "
        "Changes nothing.",
    )
    look.set_defaults(run=lambda a: check.run(_settings(a)))

    into = commands.add_parser(
        "replicate",
        help="keep all tables of a publication in another store",
        description="Copies the rows that are there and then follows the changes, exactly once, until SIGTERM or "
        "Ctrl-C. Checks first what is missing, and says which table goes where. It goes on where an earlier run with "
        "the same recovery folder stopped. Reads PGOUTPUT_… like a flow; options override the environment, which "
        "overrides the file.",
        epilog="Example: pgoutput-source replicate --dsn postgresql://localhost/shop --create "
        "--to postgresql://localhost/reporting --mode mirror --exclude '*.log_*'",
    )
    into.add_argument("--to", metavar="ADDRESS", help="the destination, such as postgresql://localhost/reporting")
    into.add_argument(
        "--mode",
        choices=["mirror", "history"],
        help="the tables as they are at the source, or every change (default: mirror)",
    )
    into.add_argument(
        "--into", metavar="TEMPLATE", help="the name of a table at the destination (default: {schema}.{table})"
    )
    into.add_argument("--tables", metavar="PATTERNS", help="the tables to take, separated by commas (default: all)")
    into.add_argument("--exclude", metavar="PATTERNS", help="the tables to leave out, separated by commas")
    into.add_argument(
        "--key",
        metavar="TABLE=COLUMNS",
        action="append",
        default=[],
        type=_columns,
        help="the columns that identify a row, where it is not the primary key; several times",
    )
    into.add_argument(
        "--max-age", metavar="SECONDS", help="how long changes may wait, to be applied together (default: 0)"
    )
    into.add_argument("--config", metavar="FILE", help="a TOML file with more options, as PGOUTPUT_CONFIG names it")
    into.add_argument(
        "--recovery",
        metavar="FOLDER",
        type=Path,
        default=Path("recovery"),
        help="the folder for the state; what waits is kept beside it (default: recovery)",
    )
    into.add_argument("--spool", metavar="FOLDER", help="the folder for what waits")
    into.add_argument(
        "--create", action="store_true", help="create the publication, for the tables to take, and the slot"
    )
    into.add_argument("--snapshot", choices=["initial", "never"], help="whether to copy the rows that are there first")
    into.add_argument("--until", help="'current' or an LSN: stop there")
    into.add_argument("--dry-run", action="store_true", help="check, say what would happen, and change nothing")
    into.set_defaults(run=_replicate)

    again = commands.add_parser(
        "resync",
        help="show what a flow missed when its slot was lost, and make it resume after the gap",
        description="For a flow that refuses to start because its slot was dropped, invalidated, recreated or moved. "
        "Shows what is missing between the flow's state and the slot, and how to repair it. Changes nothing without "
        "--yes. The exit code is 0 if nothing is missing or the flow can resume, 1 if there is a gap or an error.",
    )
    again.add_argument(
        "--recovery",
        metavar="FOLDER",
        type=Path,
        action="append",
        default=[],
        help="the flow's recovery folder (-r); repeat it if each process of a cluster has its own",
    )
    again.add_argument("--yes", action="store_true", help="recreate the slot if necessary, and move the flow's state")
    again.add_argument(
        "--copy",
        action="store_true",
        help="with --yes: have the flow copy all published tables again",
    )
    again.set_defaults(run=lambda a: resync.run(_settings(a), a.recovery, yes=a.yes, copy=a.copy))

    copy = commands.add_parser(
        "snapshot",
        help="ask a running flow to copy tables again",
        description="The flow of the slot sends a T for each table, then all of its rows as R, while the changes of "
        "all tables stream. The request is a logical message in the database: a flow that does not run obeys it when "
        "it starts. The exit code is 0 if the request was written, 1 for an error.",
    )
    copy.add_argument(
        "--table", metavar="SCHEMA.TABLE", action="append", required=True, help="a published table; several times"
    )
    copy.set_defaults(run=lambda a: snapshot.run(_settings(a), a.table))

    parked = commands.add_parser(
        "replay",
        help="have a flow deliver the changes of parked tables",
        description='For a flow with on_table_error="park". Shows what is parked, and asks for a replay: at its next '
        "start the flow delivers the parked changes in order, each once, and then resumes. Mend the cause first: a "
        "table whose changes still can't be decoded stays parked.",
    )
    parked.add_argument("--folder", metavar="FOLDER", type=Path, required=True, help="the flow's park_folder")
    parked.add_argument(
        "--table",
        action="append",
        default=[],
        help="schema and table, such as public.orders; repeat it for several (default: all that are parked)",
    )
    parked.add_argument("--list", action="store_true", help="show what is parked, and ask for nothing")
    parked.set_defaults(run=lambda a: replay.run(a.folder, a.table, only_list=a.list))

    for command in (look, into, again, copy):
        command.add_argument("--dsn", help="libpq connection string or URL")
        command.add_argument("--slot", help="the replication slot's name")
        command.add_argument(
            "--publication", help="one name, or several separated by commas; a name with a comma goes in double quotes"
        )
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("between 1 and 3600")
    return seconds


def _columns(text: str) -> tuple[str, str]:
    table, equals, columns = text.rpartition("=")
    if not (table and equals and columns):
        raise argparse.ArgumentTypeError(f"{text!r} is not like public.orders=id")
    return table, columns


def _replicate(arguments: argparse.Namespace) -> int:
    environ = {**os.environ, **({} if arguments.config is None else {CONFIG: arguments.config})}
    given = {k: v for k in ("to", "mode", "into", "tables", "exclude", "max_age", "spool") if (v := vars(arguments)[k])}
    if arguments.key:
        given["key"] = dict(arguments.key)
    replication = Replication.from_env(environ, **given)
    overrides: dict[str, Any] = {
        k: v for k in ("dsn", "slot", "create", "until", "snapshot") if (v := vars(arguments)[k])
    }
    if arguments.publication is not None:
        overrides["publication"] = parse_publications(arguments.publication)
    name = replicate.NAME
    defaults = {"slot": name, "publication": name, "snapshot": "initial"}
    settings = SourceSettings.from_env(environ, defaults=defaults, **overrides)
    return replicate.run(settings, replication, recovery=arguments.recovery, dry=arguments.dry_run)


def _settings(arguments: argparse.Namespace) -> SourceSettings:
    given: dict[str, Any] = {k: v for k in ("dsn", "slot") if (v := getattr(arguments, k)) is not None}
    if arguments.publication is not None:
        given["publication"] = parse_publications(arguments.publication)
    return SourceSettings.from_env(**given)
