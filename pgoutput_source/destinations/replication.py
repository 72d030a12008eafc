"""`Replication`: what to replicate, where to, and how; from the environment, a TOML file, or a command."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from pgoutput_source.changes.schema import TableName
from pgoutput_source.config import CONFIG, read_config
from pgoutput_source.destinations.base import Mode
from pgoutput_source.destinations.targets import Targets
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.settings import configuration_error, describe, named

_VARIABLES: Final = ("to", "mode", "into", "tables", "exclude", "max_age", "spool")
"""The fields that the environment may give, as `PGOUTPUT_` and their name in capitals."""


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


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Columns = Annotated[dict[str, tuple[str, ...]], BeforeValidator(_by_table), AfterValidator(_checked_tables)]


class Replication(BaseModel):
    """All tables of a publication into one destination. Frozen; passwords are never shown.

    Attributes:
        to: The address of the destination: ``postgresql://localhost/reporting``, for example.
        mode: "mirror" keeps each table as it is at the source, "history" keeps every change.
        into: The name of a table at the destination, with ``{schema}`` and ``{table}`` in it; None for the same name.
        tables: Patterns of the tables to take, as ``public.*``.
        exclude: Patterns of the tables to leave out.
        key: In mode "mirror", by table, the columns that identify a row, where that is not the replica identity.
        mask: By table, the columns whose values become NULL.
        leave_out: By table, the columns that the destination does not get.
        max_age: Seconds that committed changes may wait, to be applied together.
        spool: A local folder for what waits; None for one beside the recovery folder.
        options: Other arguments of the destination's sink.
        source: Options of the source, which `SourceSettings.from_env` reads.

    Example:
        >>> Replication.from_env({"PGOUTPUT_TO": "postgresql://ann:secret@db1/shop", "PGOUTPUT_EXCLUDE": "*.log_*"})
        Replication(to='postgresql: shop on db1 as ann', exclude=('*.log_*',))
        >>> Replication(to="postgresql://db1/shop", modes="mirror")
        Traceback (most recent call last):
        pgoutput_source.errors.ConfigurationError: modes: there is no such option
        hint: did you mean mode?

    Raises:
        ConfigurationError: An option is unknown or invalid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    to: Annotated[str, Field(min_length=1)]
    mode: Mode = "mirror"
    into: str | None = None
    tables: Texts = ("*",)
    exclude: Texts = ()
    key: Columns = Field(default_factory=dict)
    mask: Columns = Field(default_factory=dict)
    leave_out: Columns = Field(default_factory=dict)
    max_age: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    spool: Path | None = None
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
    def scheme(self) -> str:
        """What the address begins with, before its colon; empty if it has none. libpq's ``host=…`` is PostgreSQL's."""
        if match := re.match(r"([a-z][a-z0-9]*):", self.to):
            return match[1]
        return "postgresql" if re.match(r"\s*[a-z_]+\s*=", self.to) else ""

    @property
    def place(self) -> str:
        """The address for log lines and errors, without a password."""
        return f"{self.scheme}: {describe(self.to)}" if self.scheme in ("postgresql", "postgres") else self.to

    @property
    def targets(self) -> Targets:
        """Which tables are taken, and the names that they get."""
        return Targets(self.into or "{schema}.{table}", tables=self.tables, exclude=self.exclude)

    @property
    def hidden(self) -> dict[TableName, tuple[tuple[str, ...], tuple[str, ...]]]:
        """By table, the columns to mask and those to leave out."""
        tables = dict.fromkeys([*self.mask, *self.leave_out])
        return {TableName.parse(t): (self.mask.get(t, ()), self.leave_out.get(t, ())) for t in tables}

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Replication]) -> Replication:
        try:
            return handler(data)
        except ValidationError as e:
            raise configuration_error(e, cls.model_fields) from None

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
