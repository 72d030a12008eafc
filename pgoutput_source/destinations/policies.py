"""`SchemaPolicy`: what a destination does when a table of the source changes its shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from pgoutput_source.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaPolicy:
    """What follows from ALTER TABLE at the source. "fail" refuses the table's changes from there on.

    Attributes:
        on_add: A new column: "add" it.
        on_drop: A dropped column: "keep" it, without new values; or "drop" it.
        on_rename: A renamed column: "rename" it, with its values; or "add" the new name as another column, and treat
            the old one as dropped. Columns of the key are always renamed, and so is a table; "fail" is for both.
        on_retype: A column of another type: "cast" its values, and keep the old ones aside if that is impossible; or
            "add" a column of the new type, and keep the old one aside.
        on_recreate: A table that was dropped and created again: "empty" the mirror. A history keeps its rows.

    Example:
        >>> SchemaPolicy.of({"on_drop": "drop"}).on_drop
        'drop'
        >>> SchemaPolicy.of({"on_drop": "forget"})
        Traceback (most recent call last):
        pgoutput_source.errors.ConfigurationError: on_drop: 'forget' is no policy
        hint: keep, drop or fail

    Raises:
        ConfigurationError: There is no such policy.
    """

    on_add: Literal["add", "fail"] = "add"
    on_drop: Literal["keep", "drop", "fail"] = "keep"
    on_rename: Literal["rename", "add", "fail"] = "rename"
    on_retype: Literal["cast", "add", "fail"] = "cast"
    on_recreate: Literal["empty", "fail"] = "empty"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            known = get_args(kind)
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    f"{name}: {getattr(self, name)!r} is no policy",
                    hint=f"{', '.join(known[:-1])} or {known[-1]}",
                )

    @classmethod
    def of(cls, policy: SchemaPolicy | Mapping[str, Any] | None) -> SchemaPolicy:
        """A policy, also from names and values as a file has them."""
        if isinstance(policy, cls):
            return policy
        known = [field.name for field in fields(cls)]
        given = {} if policy is None or isinstance(policy, SchemaPolicy) else dict(policy)
        for name in given:
            if name not in known:
                raise ConfigurationError(f"there is no policy {name!r}", hint=f"the policies are {', '.join(known)}")
        return cls(**given)

    def only(self, destination: str, **can: tuple[str, ...]) -> SchemaPolicy:
        """This policy, if the destination can do it.

        >>> SchemaPolicy(on_drop="drop").only("Excel", on_drop=("keep", "fail"))
        Traceback (most recent call last):
        pgoutput_source.errors.ConfigurationError: on_drop='drop': Excel can't do that
        hint: keep or fail

        Raises:
            ConfigurationError: It can't.
        """
        for name, values in can.items():
            if getattr(self, name) not in values:
                raise ConfigurationError(
                    f"{name}={getattr(self, name)!r}: {destination} can't do that", hint=" or ".join(values)
                )
        return self
