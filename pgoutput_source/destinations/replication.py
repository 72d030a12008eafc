"""`Replication`: what to replicate, where to, and how; from the environment, a TOML file, or a command."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from pgoutput_source.changes.schema import TableName
from pgoutput_source.config import CONFIG, read_config
from pgoutput_source.destinations.base import Mode
from pgoutput_source.destinations.policies import SchemaPolicy
from pgoutput_source.destinations.targets import Targets
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.settings import configuration_error, describe, named

_VARIABLES: Final = ("to", "mode", "into", "tables", "exclude", "max_age", "spool")
"""The fields that the environment may give, as `PGOUTPUT_` and their name in capitals."""


class Scheme(NamedTuple):
    """A kind of destination that an address can name.

    Attributes:
        module: The module of its sink, in `sinks`.
        sink: The sink's class. Its first argument is the address.
        example: An address.
        modes: What it can do; the first is the default.
        whole: Whether the scheme is part of the address that the sink takes.
        template: Whether the address says where each table goes, and so has ``{table}`` in it.
    """

    module: str
    sink: str
    example: str
    modes: tuple[Mode, ...] = ("mirror", "history")
    whole: bool = False
    template: bool = False


SCHEMES: Final[dict[str, Scheme]] = {
    "postgresql": Scheme("postgres", "PostgresSink", "postgresql://localhost/reporting", whole=True),
    "postgres": Scheme("postgres", "PostgresSink", "postgres://localhost/reporting", whole=True),
    "delta": Scheme("delta", "DeltaSink", "delta:lake/{schema}/{table}", template=True),
    "parquet": Scheme("parquet", "ParquetSink", "parquet:out/{schema}/{table}", modes=("history",), template=True),
    "duckdb": Scheme("duckdb", "DuckDBSink", "duckdb:shop.duckdb"),
}
"""The destinations, by what their address begins with."""


def _texts(values: object) -> object:
    if isinstance(values, str):
        return tuple(text.strip() for text in values.split(",") if text.strip())
    return values


def _by_table(columns: object) -> object:
    if isinstance(columns, Mapping):
        return {table: _texts(names) for table, names in columns.items()}
    return columns


def _checked_tables(columns: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    for table, names in columns.items():
        try:
            TableName.parse(table)
        except ConfigurationError as e:
            raise ValueError(f"{e.message}|{e.hint}") from None
        if not names:
            raise ValueError(f"{table!r} has no column|name at least one: {table!r} = ['id']")
    return columns


def _scheme(address: object) -> str:
    if match := re.match(r"([a-z][a-z0-9]*):", str(address)):
        return match[1]
    return "postgresql" if re.match(r"\s*[a-z_]+\s*=", str(address)) else ""


def _checked_address(address: str) -> str:
    scheme = SCHEMES.get(_scheme(address))
    if scheme is None:
        # The rest of it may be a secret.
        what = (
            f"there is no destination {_scheme(address)!r}" if _scheme(address) else "no kind of destination is named"
        )
        raise ValueError(f"{what}|write an address such as {', '.join(each.example for each in SCHEMES.values())}")
    if not scheme.whole and not address.partition(":")[2]:
        raise ValueError(f"{address!r} names no place|for example {scheme.example}")
    if scheme.template and "{table}" not in address:
        raise ValueError(f"{address!r} puts all tables into one place|write {{table}} into it: {scheme.example}")
    return address


def _checked_policy(policy: dict[str, str]) -> dict[str, str]:
    try:
        SchemaPolicy.of(policy)
    except ConfigurationError as e:
        raise ValueError(f"{e.message}|{e.hint}") from None
    return policy


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Columns = Annotated[dict[str, tuple[str, ...]], BeforeValidator(_by_table), AfterValidator(_checked_tables)]


class Replication(BaseModel):
    """All tables of a publication into one destination. Frozen; passwords are never shown.

    Attributes:
        to: The address of the destination: ``postgresql://localhost/reporting``, for example.
        mode: "mirror" keeps each table as it is at the source, "history" keeps every change. By default "mirror", where
            the destination can do it.
        into: The name of a table at the destination, with ``{schema}`` and ``{table}`` in it; None for the same name.
        tables: Patterns of the tables to take, as ``public.*``.
        exclude: Patterns of the tables to leave out.
        key: In mode "mirror", by table, the columns that identify a row, where that is not the replica identity.
        mask: By table, the columns whose values become NULL.
        leave_out: By table, the columns that the destination does not get.
        max_age: Seconds that committed changes may wait, to be applied together; None for the destination's default.
        spool: A local folder for what waits; None for one beside the recovery folder.
        schema_policy: What follows from ALTER TABLE at the source: names and values of a `SchemaPolicy`.
        options: Other arguments of the destination's sink.
        source: Options of the source, which `SourceSettings.from_env` reads.

    Example:
        >>> Replication.from_env({"PGOUTPUT_TO": "postgresql://ann:secret@db1/shop", "PGOUTPUT_EXCLUDE": "*.log_*"})
        Replication(to='PostgreSQL, shop on db1 as ann', exclude=('*.log_*',))
        >>> Replication(to="postgresql://db1/shop", modes="mirror")
        Traceback (most recent call last):
        pgoutput_source.errors.ConfigurationError: modes: there is no such option
        hint: did you mean mode?

    Raises:
        ConfigurationError: An option is unknown or invalid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    to: Annotated[str, AfterValidator(_checked_address)]
    mode: Mode = "mirror"
    into: str | None = None
    tables: Texts = ("*",)
    exclude: Texts = ()
    key: Columns = Field(default_factory=dict)
    mask: Columns = Field(default_factory=dict)
    leave_out: Columns = Field(default_factory=dict)
    max_age: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    spool: Path | None = None
    schema_policy: Annotated[dict[str, str], AfterValidator(_checked_policy)] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict, repr=False)
    source: dict[str, Any] = Field(default_factory=dict, repr=False)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        yield "to", self.place
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name != "to" and field.repr and value != field.get_default(call_default_factory=True):
                yield name, value

    def __str__(self) -> str:
        return repr(self)

    @property
    def kind(self) -> Scheme:
        """The kind of destination."""
        return SCHEMES[_scheme(self.to)]

    @property
    def address(self) -> str:
        """The address as the sink takes it."""
        return self.to if self.kind.whole else self.to.partition(":")[2]

    @property
    def place(self) -> str:
        """The address for log lines and errors, without a password."""
        return f"PostgreSQL, {describe(self.to)}" if self.kind.whole else self.to

    @property
    def targets(self) -> Targets:
        """Which tables are taken, and the names that they get."""
        return Targets(self.into or "{schema}.{table}", tables=self.tables, exclude=self.exclude)

    def target_of(self, table: TableName) -> str | None:
        """Where a table goes, for people; None if it is not taken."""
        target = self.targets.of(table)
        if target is None or not self.kind.template:
            return None if target is None else str(target)
        return self.address.format(schema=table.namespace, table=table.name)

    @property
    def hidden(self) -> dict[TableName, tuple[tuple[str, ...], tuple[str, ...]]]:
        """By table, the columns to mask and those to leave out."""
        tables = dict.fromkeys([*self.mask, *self.leave_out])
        return {TableName.parse(t): (self.mask.get(t, ()), self.leave_out.get(t, ())) for t in tables}

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Replication]) -> Replication:
        scheme = SCHEMES.get(_scheme(data.get("to"))) if isinstance(data, dict) else None
        if scheme is not None:
            data = {"mode": scheme.modes[0]} | data
        try:
            made = handler(data)
        except ValidationError as e:
            raise configuration_error(e, cls.model_fields) from None
        if made.mode not in made.kind.modes:
            raise ConfigurationError(
                f"mode: {made.kind.sink} has no mode {made.mode!r}", hint=f"use {' or '.join(made.kind.modes)}"
            )
        return made

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Replication:
        """The replication that the environment and the TOML file in `PGOUTPUT_CONFIG` describe.

        `PGOUTPUT_TO`, `PGOUTPUT_MODE`, `PGOUTPUT_INTO`, `PGOUTPUT_TABLES`, `PGOUTPUT_EXCLUDE`, `PGOUTPUT_MAX_AGE` and
        `PGOUTPUT_SPOOL` win over the file, and `overrides` over both. Lists are separated by commas.

        Raises:
            ConfigurationError: An option is missing, unknown or invalid, or the file can't be read.
        """
        environ = os.environ if environ is None else environ
        given = read_config(environ)
        names = {name: f"{environ.get(CONFIG)}: {name}" for name in given}
        for name in _VARIABLES:
            variable = f"PGOUTPUT_{name.upper()}"
            if environ.get(variable):
                given[name], names[name] = environ[variable], variable
        for name, value in overrides.items():
            given[name] = value
            names.pop(name, None)
        if "to" not in given:
            raise ConfigurationError(
                "it is not said where to replicate to",
                hint="set PGOUTPUT_TO, or to = … in the file that PGOUTPUT_CONFIG names, or use --to; for example "
                "postgresql://localhost/reporting",
            )
        try:
            return cls.model_validate(given)
        except ConfigurationError as e:
            raise named(e, names) from None
