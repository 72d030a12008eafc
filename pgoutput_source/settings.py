"""`SourceSettings`: all options of a reader or a source, checked before anything connects.

An unknown option, an invalid value and a DSN that libpq can't parse are each a `ConfigurationError`. It names the
option (or the environment variable) and says what would be right.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from pgoutput_source.config import CONFIG, source_options
from pgoutput_source.errors import ConfigurationError

logger = logging.getLogger(__name__)

ENV_PREFIX: Final = "PGOUTPUT_"
_DSN: Final = f"{ENV_PREFIX}DSN"

OTHER_VARIABLES: Final = {
    "PGOUTPUT_OUT": "the folder that the flows write into",
    CONFIG: "a TOML file with options, for what the environment does not say",
    "PGOUTPUT_TO": "where a replication writes",
    "PGOUTPUT_MODE": "mirror or history",
    "PGOUTPUT_INTO": "the name of a table where a replication writes",
    "PGOUTPUT_TABLES": "patterns of the tables to replicate, separated by commas",
    "PGOUTPUT_EXCLUDE": "patterns of the tables to leave out, separated by commas",
    "PGOUTPUT_MAX_AGE": "seconds that committed changes may wait to be applied together",
    "PGOUTPUT_SPOOL": "the folder for what waits for the destination of a replication",
}
"""Variables with our prefix that are read elsewhere: name and meaning."""

_LINKED: Final = (
    (r"SERVICE_HOST", r"\S+"),
    (r"SERVICE_PORT(_[A-Z0-9_]+)?", r"[0-9]+"),
    (r"PORT(_[0-9]+_(TCP|UDP|SCTP))?", r"(tcp|udp|sctp)://\S+"),
    (r"PORT_[0-9]+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)", r"\S+"),
    (r"NAME", r"/\S+"),
    (r"ENV_.+", r".*"),
)
"""Names and values of the variables that Kubernetes (for a service) and Docker (for a link) set in each container.

For a service called `pgoutput` or `pgoutput-…` they begin with our prefix.
https://kubernetes.io/docs/tutorials/services/connect-applications-service/#environment-variables
"""

LIBPQ_VARIABLES: Final = ("PGHOST", "PGHOSTADDR", "PGSERVICE", "PGPORT", "PGDATABASE", "PGUSER")
"""If one of them is set, libpq knows where to connect, and the embedded server is not used."""

EMBEDDED_NAME: Final = "pgoutput"
"""The slot and the publication of a source without any configuration, which runs on the embedded server."""


def describe(dsn: str) -> str:
    """Database, host and user of a connection string, without anything secret.

    >>> describe("host=db1,db2 port=5433 dbname=shop password=secret")
    'shop on db1,db2:5433'
    """
    try:
        parts = conninfo_to_dict(dsn)
    except psycopg.Error:
        return "a server"
    if not parts:
        return "libpq's defaults"
    place = parts.get("host") or parts.get("hostaddr") or "the default host"
    text = f"{parts.get('dbname') or 'the default database'} on {place}"
    if parts.get("port"):
        text += f":{parts['port']}"
    if parts.get("service"):
        text += f" of service {parts['service']}"
    if parts.get("user"):
        text += f" as {parts['user']}"
    return text


def parse_publications(text: str) -> tuple[str, ...]:
    """The publications that an environment variable or the command line names, separated by commas.

    A name that contains a comma, begins with a double quote, or begins or ends with a space must be in double quotes,
    as in SQL. Any other name may be. Upper case stays upper case, even without quotes.

    >>> parse_publications('shop, Orders, "We,Ird", "the ""old"" one"')
    ('shop', 'Orders', 'We,Ird', 'the "old" one')

    Raises:
        ConfigurationError: The quotes don't match.
    """
    names: list[str] = []
    at = 0
    while found := _NAMED.match(text, at):
        quoted, plain, more = found.groups()
        names.append(plain.strip() if quoted is None else quoted.replace('""', '"'))
        if not more:
            return tuple(names)
        at = found.end()
    raise ConfigurationError(
        f"{text!r} is not a list of publications",
        hint='separate names by commas, and put a name that contains a comma in double quotes: shop,"We,Ird"',
    )


_NAMED = re.compile(r'\s*(?:"((?:[^"]|"")*)"\s*|((?!\s*")[^,]*))(?:(,)|$)', re.DOTALL)


def _checked_dsn(dsn: str | None) -> str | None:
    # libpq's messages about a malformed string quote parts of it, perhaps of the password. So does the message about a
    # host that can't be resolved, if the password has an @ that is not encoded.
    if not dsn:
        return dsn
    encode = "write the special characters of user name and password as %40 for @, %2F for /, %3A for :, %23 for #"
    try:
        parts = conninfo_to_dict(dsn)
    except psycopg.Error:
        known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
        for word in re.findall(r"(?:^|[\s?&])([a-z_]+)\s*=", dsn):
            near = difflib.get_close_matches(word, known, 1)
            if word not in known and near:
                raise ValueError(f"libpq has no connection option {word!r}|did you mean {near[0]}?") from None
        raise ValueError(
            "not a connection string that libpq can read|write it as postgresql://user@host:5432/database "
            f"or as host=… dbname=… user=…; {encode}"
        ) from None
    is_url = dsn.startswith(("postgresql://", "postgres://"))
    port = str(parts.get("port") or "")
    if (is_url and dsn.partition("?")[0].count("@") > 1) or (port and not re.fullmatch(r"[0-9]*(,[0-9]*)*", port)):
        raise ValueError(f"user name, password, host and port of the URL can't be told apart|{encode}")
    return dsn


def _checked_slot(slot: str) -> str:
    # https://www.postgresql.org/docs/current/logicaldecoding-explanation.html
    if not re.fullmatch(r"[a-z0-9_]{1,63}", slot):
        raise ValueError(
            f"{slot!r} is not the name of a replication slot|use 1 to 63 lower-case letters, digits and underscores"
        )
    return slot


def _checked_prefix(prefix: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,31}", prefix):
        raise ValueError(
            f"{prefix!r} can't begin the names of columns|use 1 to 32 letters, digits and underscores, such as 'cdc_'"
        )
    return prefix


def _one_or_several(names: object) -> object:
    return (names,) if isinstance(names, str) else names


def _checked_publications(names: tuple[str, ...]) -> tuple[str, ...]:
    # PostgreSQL 17 and newer accept an empty list of publications, and then send nothing.
    for name in names:
        if not 0 < len(name.encode()) <= 63 or "\0" in name:
            raise ValueError(f"{name!r} is not the name of a publication|a name has 1 to 63 bytes")
    if not names:
        raise ValueError("no publication is named|name at least one: publication='shop'")
    if len(set(names)) < len(names):
        raise ValueError("a publication is named twice|name each once")
    return names


def _lsn_text(until: object) -> object:
    if isinstance(until, int) and not isinstance(until, bool):
        return f"{until >> 32:X}/{until & 0xFFFFFFFF:X}"
    return until


def _checked_until(until: str | None) -> str | None:
    if until is None or until == "current" or re.fullmatch(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}", until):
        return until
    raise ValueError(f"{until!r} is not a position to stop at|use 'current', or an LSN such as 0/16B3748")


def _checked_folder(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):
        raise ValueError(f"{str(folder)!r} is not on a local file system|give a path")
    return folder.expanduser()


def _consistent(settings: SourceSettings) -> SourceSettings:
    parks = settings.on_table_error == "park"
    if parks and settings.park_folder is None:
        raise ConfigurationError(
            'on_table_error="park" needs a park_folder', hint="name a folder that is as safe as the recovery folder"
        )
    if parks and settings.snapshot != "never":
        raise ConfigurationError(
            f'on_table_error="park" and snapshot="{settings.snapshot}" can\'t be combined',
            hint="park from the first run after the copy is complete",
        )
    return settings


class SourceSettings(BaseModel):
    """Where changes come from, where they start, and how much comes at a time. Frozen; the DSN is never shown.

    >>> SourceSettings(dsn="postgresql://alice:secret@db.internal/shop", slot="orders", publication="shop")
    SourceSettings(slot='orders', publication=('shop',), server='shop on db.internal as alice')
    >>> SourceSettings(dsn="", slot="orders", publicaton="shop")
    Traceback (most recent call last):
    pgoutput_source.errors.ConfigurationError: publicaton: there is no such option; publication: is missing
    hint: did you mean publication?

    Attributes:
        dsn: A libpq connection string or URL. "" leaves everything to libpq's own environment variables and service
            files. None stands for the embedded server.
        slot: Name of the replication slot.
        publication: Names of the publications; a str is one name.
        create: Whether to create publication and slot if they are missing.
        until: None runs for ever; "current" stops after everything committed before the start; an LSN stops there.
        snapshot: What to do with the rows that the tables already have. "never" only streams changes. "initial" copies
            every published row, as a change with `_op` R, while the changes of all tables are streamed: no row is
            missing and none comes twice. Tables that are published later are copied too. The resume state records the
            progress of the copy; without one the copy starts over at each start. A run that resumes a state without a
            copy continues without it. "only" makes the same copy and then ends. Its slot is temporary: the server drops
            it with the connection, whatever happens. A run that was cut off starts over, and empties the tables first.
        snapshot_rows_per_second: The most rows that the initial copy reads in a second, on average; None for no limit.
        status_interval: Seconds between two reports to the server, at most a quarter of its wal_sender_timeout.
        max_frames: The most messages that one poll returns.
        max_bytes: Bytes after which a poll returns. It bounds the memory, except for a single larger row.
        reconnect_seconds: How long to retry a lost connection before the run fails.
        slot_wait_seconds: How long to wait at the start for a slot that another process still holds.
        stall_seconds: If Bytewax does not call the source for this long although the server has more, the process ends
            with exit code 70, which frees the slot. Set it longer than any step or sink may take. None only warns.
        heartbeat_seconds: After this long without a change, write a few bytes to the server's WAL, so that the slot
            advances even on an idle server. None, the default, writes nothing, and is enough to release WAL.
        on_misfit: What to do with a value that its column's Arrow type can't hold: "raw" leaves the cell null and keeps
            the exact text in `_raw`; "error" raises an error in whatever takes the table.
        metadata_prefix: What the names of the metadata columns (`_op`, `_seq` and so on) begin with. Choose another
            prefix if a table has a column with such a name: 1 to 32 letters, digits and underscores, not beginning with
            a digit.
        on_schema_change: What to do when a table's name, columns or replica identity differ from when this run, or the
            one that it resumes, first saw them: "evolve" continues with batches of the new version; "fail" raises
            `SchemaChanged` in whatever takes the table, and stops the run if the name changed.
        origin: "any" brings all changes; "none" skips those that came to the server by replication (PostgreSQL 16).
        streaming: "on" makes PostgreSQL send large transactions while they are in progress, instead of keeping them on
            its own disk until they commit. They are kept here until then, and delivered as always. "parallel" is the
            same with PostgreSQL 16's protocol.
        binary: "on" makes PostgreSQL send values in the format of their types' send functions, instead of text ("off"):
            the same columns for less work. If a published column has a type that can't be read this way, the start is
            refused. "auto" is "on" unless a column can't be read this way, or only more slowly; it decides again for
            each connection.
        on_table_error: What happens when changes of a table can't be decoded. "stop" stops what takes the table, and
            nothing else. "park" keeps them, and all later changes of the table, in `park_folder` as PostgreSQL sent
            them, whether or not anything takes the table; the command `replay` has them delivered in order. It can't be
            combined with an initial copy.
        park_folder: A local folder for parked changes. Keep it as safe as the recovery folder.
        streaming_memory: Bytes of transactions in progress to hold in memory. More than that goes to unnamed files in
            the folder for temporary files (TMPDIR).

    Raises:
        ConfigurationError: An option is unknown or invalid. Nothing has connected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    dsn: Annotated[str | None, AfterValidator(_checked_dsn)] = Field(default=None, repr=False)
    slot: Annotated[str, AfterValidator(_checked_slot)]
    publication: Annotated[
        tuple[str, ...],
        BeforeValidator(_one_or_several),
        AfterValidator(_checked_publications),
    ]
    create: bool = False
    until: Annotated[
        str | None,
        BeforeValidator(_lsn_text),
        AfterValidator(_checked_until),
    ] = None
    snapshot: Literal["never", "initial", "only"] = "never"
    snapshot_rows_per_second: int | None = Field(default=None, ge=1)
    status_interval: float = Field(default=10.0, gt=0, le=3600, allow_inf_nan=False)
    max_frames: int = Field(default=65_536, ge=1)
    max_bytes: int = Field(default=16 << 20, ge=1)
    reconnect_seconds: float = Field(default=300.0, ge=0, allow_inf_nan=False)
    slot_wait_seconds: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    stall_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    heartbeat_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    on_misfit: Literal["raw", "error"] = "raw"
    metadata_prefix: Annotated[str, AfterValidator(_checked_prefix)] = "_"
    on_schema_change: Literal["evolve", "fail"] = "evolve"
    on_table_error: Literal["stop", "park"] = "stop"
    park_folder: Annotated[Path | None, AfterValidator(_checked_folder)] = None
    origin: Literal["any", "none"] = "any"
    streaming: Literal["off", "on", "parallel"] = "off"
    streaming_memory: int = Field(default=64 << 20, ge=0)
    binary: Literal["off", "on", "auto"] = "off"

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        # Show only what differs from the default, and the server without secrets.
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.repr and (field.is_required() or value != field.default):
                yield name, value
        yield "server", self.server

    def __str__(self) -> str:
        return repr(self)

    @property
    def server(self) -> str:
        """Where this connects to, for log lines and errors: database, host and user, never a password."""
        return "the embedded server" if self.dsn is None else describe(self.dsn)

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[SourceSettings]) -> SourceSettings:
        try:
            return _consistent(handler(data))
        except ValidationError as e:
            raise configuration_error(e, cls.model_fields) from None

    @classmethod
    def of(cls, **options: Any) -> SourceSettings:
        """The same as the constructor, for options from a dictionary."""
        return cls.model_validate(options)

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        defaults: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> SourceSettings:
        """The settings from the environment. `overrides` override it.

        Every field is read from the variable `PGOUTPUT_` plus its name in capitals: `PGOUTPUT_DSN`, `PGOUTPUT_SLOT`,
        `PGOUTPUT_PUBLICATION` (see `parse_publications`), `PGOUTPUT_CREATE` (true or false), `PGOUTPUT_UNTIL` …
        Without `PGOUTPUT_DSN` the DSN is "" if one of libpq's own variables (`PGHOST`, `PGSERVICE` …) says where to
        connect. Otherwise it is None, the embedded server, and slot and publication are both called "pgoutput" and are
        created if missing, unless configured otherwise. An empty `PGOUTPUT_DSN` is an error, because it may be a secret
        that was not filled in. Any other empty variable counts as not set. Variables that Kubernetes or Docker sets for
        a service called `pgoutput` are ignored with a warning in the log. What the environment does not say, the table
        ``[source]`` of the TOML file that `PGOUTPUT_CONFIG` names may say.

        Args:
            environ: The environment; None for that of the process.
            defaults: Fields of the settings, for what neither the environment nor the file says.
            overrides: Fields of the settings.

        >>> SourceSettings.from_env({"PGSERVICE": "shop", "PGOUTPUT_SLOT": "orders", "PGOUTPUT_PUBLICATION": "a,b"})
        SourceSettings(slot='orders', publication=('a', 'b'), server="libpq's defaults")
        >>> SourceSettings.from_env({"PGOUTPUT_SLOTT": "orders"})
        Traceback (most recent call last):
        pgoutput_source.errors.ConfigurationError: PGOUTPUT_SLOTT: there is no such environment variable
        hint: did you mean PGOUTPUT_SLOT?

        Raises:
            ConfigurationError: A variable or override is unknown or invalid.
        """
        environ = os.environ if environ is None else environ
        names = {ENV_PREFIX + name.upper(): name for name in cls.model_fields}
        _check_variables(environ, [*names, *OTHER_VARIABLES])
        in_file = source_options(environ)
        said = {name for variable, name in names.items() if environ.get(variable)} | set(overrides)
        options: dict[str, Any] = {**(defaults or {}), **in_file}
        options |= {name: environ[variable] for variable, name in names.items() if environ.get(variable)}
        if environ.get(f"{ENV_PREFIX}PUBLICATION") and "publication" not in overrides:
            try:
                options["publication"] = parse_publications(options["publication"])
            except ConfigurationError as e:
                raise ConfigurationError(f"{ENV_PREFIX}PUBLICATION: {e.message}", hint=e.hint) from None
        options |= overrides
        if "dsn" not in overrides and not environ.get(_DSN, "set").strip():
            raise ConfigurationError(
                f"{_DSN}: is empty",
                hint="give a connection string; or unset the variable, to use libpq's own variables or the embedded "
                "server",
            )
        if "dsn" not in options and any(environ.get(variable) for variable in LIBPQ_VARIABLES):
            options["dsn"] = ""
        if options.get("dsn") is None:
            options = {"slot": EMBEDDED_NAME, "publication": EMBEDDED_NAME, "create": True} | options
        variables = {name: variable for variable, name in names.items() if name not in overrides}
        inside = f"{environ.get(CONFIG)}: [source] "
        variables |= {name: f"{inside}{name}" for name in in_file if name not in said}
        try:
            return cls.model_validate(options)
        except ConfigurationError as e:
            raise named(e, variables) from None


def named(error: ConfigurationError, names: Mapping[str, str]) -> ConfigurationError:
    """The error of a model, with the names under which its fields were given."""
    message, hint = error.message, error.hint
    for field, name in names.items():
        text = name.replace("\\", r"\\")
        message = re.sub(rf"(^|; ){re.escape(field)}:", rf"\g<1>{text}:", message)
        hint = hint and re.sub(rf"\b{re.escape(field)}=", f"{text}=", hint)
    return ConfigurationError(message, hint=hint)


def _check_variables(environ: Mapping[str, str], known: Iterable[str]) -> None:
    """Check that each variable with our prefix is known. Those set by the platform are ignored with a log line."""
    ignored = []
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX) or variable in known:
            continue
        rest = variable.removeprefix(ENV_PREFIX)
        if any(
            re.fullmatch(f"([A-Z0-9_]+_)?{name}", rest) and re.fullmatch(value, environ[variable], re.DOTALL)
            for name, value in _LINKED
        ):
            ignored.append(variable)
            continue
        raise ConfigurationError(
            f"{variable}: there is no such environment variable", hint=nearest(variable, known, "variables")
        )
    if ignored:
        logger.warning(
            "ignoring what Kubernetes or Docker sets for a service whose name begins with pgoutput: %s",
            ", ".join(ignored),
        )


def configuration_error(error: ValidationError, fields: Iterable[str]) -> ConfigurationError:
    """One error for everything that pydantic found. Our own validators put their hints after a bar."""
    texts: list[str] = []
    hints: list[str] = []
    for problem in error.errors(include_url=False, include_input=False):
        name = ".".join(str(part) for part in problem["loc"][:1]) or "settings"
        kind = problem["type"]
        if kind == "extra_forbidden":
            texts.append(f"{name}: there is no such option")
            hints.append(nearest(name, fields, "options"))
            continue
        if kind == "missing":
            texts.append(f"{name}: is missing")
            hints.append(f"give {name}=…")
            continue
        text, _, hint = problem["msg"].removeprefix("Value error, ").partition("|")
        texts.append(f"{name}: {text[:1].lower()}{text[1:]}")
        if hint:
            hints.append(hint)
    # Unknown options come first: a missing option is often just misspelled.
    order = sorted(range(len(texts)), key=lambda i: "no such option" not in texts[i])
    near = [hint for hint in hints if hint.startswith("did you mean")]
    return ConfigurationError("; ".join(texts[i] for i in order), hint="; ".join(near or hints) or None)


def nearest(name: str, names: Iterable[str], what: str) -> str:
    """A hint that names the option that may be meant, or all."""
    # The common prefix would make any two variables look similar.
    valid = {each.removeprefix(ENV_PREFIX): each for each in names}
    near = difflib.get_close_matches(name.removeprefix(ENV_PREFIX), valid, 1, 0.7)
    return f"did you mean {valid[near[0]]}?" if near else f"the {what} are {', '.join(valid.values())}"
