"""The configuration file that `PGOUTPUT_CONFIG` names: TOML.

Its table ``[source]`` has options of `SourceSettings`; the rest is for a replication of all tables.
https://toml.io/en/v1.0.0
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pgoutput_source.errors import ConfigurationError

CONFIG: Final = "PGOUTPUT_CONFIG"
"""The variable that names the file."""


def read_config(environ: Mapping[str, str]) -> dict[str, Any]:
    """What the file says; empty if the environment names none.

    >>> read_config({})
    {}

    Raises:
        ConfigurationError: It can't be read.
    """
    name = environ.get(CONFIG)
    if not name:
        return {}
    try:
        return tomllib.loads(Path(name).expanduser().read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigurationError(
            f"{name} can't be read: {e.strerror}", hint=f"{CONFIG} and --config name a TOML file"
        ) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigurationError(f"{name} is no TOML: {e}", hint="see https://toml.io; texts stand in quotes") from e


def source_options(environ: Mapping[str, str]) -> dict[str, Any]:
    """The table ``[source]`` of the file.

    Raises:
        ConfigurationError: The file can't be read, or `source` is no table.
    """
    source = read_config(environ).get("source", {})
    if not isinstance(source, dict):
        raise ConfigurationError(
            f"{environ[CONFIG]}: source: is no table", hint='write [source] and below it, for example, slot = "orders"'
        )
    return source
