"""Which tables are taken, and where each goes: patterns and templates over a table's schema and name."""

from __future__ import annotations

import fnmatch
import unicodedata
from collections.abc import Iterable, Mapping
from string import Formatter
from typing import NamedTuple

from pgoutput_source.changes.schema import TableName
from pgoutput_source.errors import ConfigurationError, SinkError
from pgoutput_source.files import folder_name


class Target(NamedTuple):
    """A table's place at a destination: a schema (or folder, or namespace) and a name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return str(TableName(self.namespace, self.name)) if self.namespace else self.name


class Patterns:
    """Tables, by patterns over their schema and name: `*`, `?` and ``[seq]`` as in a shell.

    A name is compared as it is written: with quotes around a part in which a dot would be ambiguous.

    Example:
        >>> patterns = Patterns("public.*", exclude=["*.audit*"])
        >>> [patterns.take(TableName("public", name)) for name in ("orders", "audit_2024")]
        [True, False]
    """

    def __init__(self, tables: str | Iterable[str] = ("*",), exclude: str | Iterable[str] = ()) -> None:
        self.tables = (tables,) if isinstance(tables, str) else tuple(tables)
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self._known: dict[TableName, bool] = {}

    def take(self, table: TableName) -> bool:
        """Whether a table is one of them."""
        if table not in self._known:
            name = str(table)
            matched = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.tables)
            self._known[table] = matched and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)
        return self._known[table]


def is_pattern(text: str) -> bool:
    """Whether a text names no single table."""
    return any(character in text for character in "*?[")


class Targets:
    """The tables that a sink takes and where they go.

    Args:
        template: The place of a table: text with ``{schema}`` and ``{table}`` in it, schema and name at the destination
            with a dot between.
        tables: Patterns of the tables to take, all by default; see `Patterns`.
        exclude: Patterns of tables to leave out.
        folded: Whether the destination takes names that differ only in upper and lower case for the same.

    Example:
        >>> targets = Targets("reporting.{schema}_{table}", exclude=["*.audit*"])
        >>> str(targets.of(TableName("public", "orders"))), targets.of(TableName("public", "audit_2024"))
        ('reporting.public_orders', None)

    Raises:
        ConfigurationError: The template can't be read.
    """

    def __init__(
        self,
        template: str = "{schema}.{table}",
        *,
        tables: str | Iterable[str] = ("*",),
        exclude: str | Iterable[str] = (),
        folded: bool = False,
    ) -> None:
        self.template, self.folded = template, folded
        self.patterns = Patterns(tables, exclude)
        try:
            fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
        except ValueError as e:
            raise ConfigurationError(f"{template!r} is no template: {e}", hint="write '{schema}.{table}'") from e
        if unknown := fields - {"schema", "table"}:
            raise ConfigurationError(
                f"{template!r} has {{{min(unknown)}}} in it", hint="a template knows {schema} and {table}"
            )
        self._found: dict[TableName, Target | None] = {}
        self._taken: dict[Target, TableName] = {}

    def of(self, table: TableName) -> Target | None:
        """Where a table goes; None if it is not taken.

        Raises:
            SinkError: Another table goes there, too.
        """
        if table not in self._found:
            self._found[table] = self._place(table) if self.patterns.take(table) else None
        return self._found[table]

    def _place(self, table: TableName) -> Target:
        target = self._target(table)
        same = Target(*map(_folded, target)) if self.folded else target
        other = self._taken.setdefault(same, table)
        if other != table:
            raise SinkError(
                f"tables {other} and {table} have the same target {target}",
                hint="put {schema} and {table} into the template, or leave one of them out with exclude=",
            )
        return target

    def _target(self, table: TableName) -> Target:
        values: Mapping[str, str] = {"schema": table.namespace, "table": table.name}
        schema, dot, name = self.template.partition(".")
        return Target(schema.format(**values) if dot else "", (name if dot else schema).format(**values))


class FolderTargets(Targets):
    """Targets that are folders: a template is a path or URL, and the name of a target is what it becomes.

    What a folder's name can't hold everywhere is percent-encoded. So are characters of glob patterns, an equals sign,
    which names a partition, and a leading underscore or dot, which tells readers to skip a folder.

    Example:
        >>> FolderTargets("out/{schema}/{table}").of(TableName("public", "_in/out=50%")).name
        'out/public/%5Fin%2Fout%3D50%25'
    """

    def _target(self, table: TableName) -> Target:
        return Target("", self.template.format(schema=folder_name(table.namespace), table=folder_name(table.name)))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()
