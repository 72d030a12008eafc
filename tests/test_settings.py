"""Settings: what they accept, and that each refusal names the option, says what to do and keeps the password."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgoutput_source.errors import ConfigurationError
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.settings import LIBPQ_VARIABLES, OTHER_VARIABLES, SourceSettings, describe, parse_publications

SECRET = "hunter2"
GOOD: dict[str, Any] = {
    "dsn": f"postgresql://alice:{SECRET}@db.internal:5433/shop",
    "slot": "orders",
    "publication": "shop",
}


def test_what_is_given_is_what_is_there() -> None:
    settings = SourceSettings(**GOOD, until=Lsn("1/16B3748"), on_misfit="error")  # type: ignore[arg-type]

    assert settings.publication == ("shop",)
    assert settings.until == "1/16B3748"
    assert settings.on_misfit == "error"
    assert settings.create is False
    assert SourceSettings.of(**GOOD | {"publication": ["a", "b"]}).publication == ("a", "b")
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_the_password_is_in_no_text() -> None:
    settings = SourceSettings(**GOOD)

    for text in (repr(settings), str(settings), settings.server, repr(pickle.loads(pickle.dumps(settings)))):
        assert SECRET not in text
    assert settings.server == "shop on db.internal:5433 as alice"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"slott": "x"}, ["slott: there is no such option", "did you mean slot?"]),
        ({"status_intervall": 5}, ["status_intervall", "did you mean status_interval?"]),
        ({"zzz": 5}, ["zzz", "the options are dsn, slot, publication"]),
        ({"slot": "Orders"}, ["slot: 'Orders'", "lower-case"]),
        ({"slot": "a" * 64}, ["slot:", "63"]),
        ({"slot": ""}, ["slot:"]),
        ({"publication": ()}, ["publication: no publication", "at least one"]),
        ({"publication": ""}, ["publication: ''"]),
        ({"publication": ["a", "a"]}, ["publication", "twice"]),
        ({"publication": "ö" * 32}, ["publication", "63 bytes"]),
        ({"create": "perhaps"}, ["create:"]),
        ({"until": "now"}, ["until: 'now'", "current"]),
        ({"until": "16B3748"}, ["until", "0/16B3748"]),
        ({"until": True}, ["until"]),
        ({"status_interval": 0}, ["status_interval"]),
        ({"status_interval": float("nan")}, ["status_interval"]),
        ({"max_frames": 0}, ["max_frames"]),
        ({"max_bytes": -1}, ["max_bytes"]),
        ({"reconnect_seconds": float("inf")}, ["reconnect_seconds"]),
        ({"on_misfit": "ignore"}, ["on_misfit", "'raw' or 'error'"]),
        ({"dsn": f"host=x password={SECRET} {SECRET}"}, ["dsn: not a connection string", "postgresql://"]),
        ({"dsn": f"hots=x password={SECRET}"}, ["dsn", "'hots'", "did you mean host"]),
        ({"dsn": f"postgresql://u:{SECRET}@{SECRET}@host/db"}, ["dsn", "%40"]),
        ({"dsn": f"postgresql://u:{SECRET}/x@host/db"}, ["dsn", "%2F"]),
        ({"dsn": f"postgresql://u:pass%zz{SECRET}@host/db"}, ["dsn", "%40"]),
        ({"dsn": f"host=h port={SECRET}"}, ["dsn"]),
    ],
)
def test_a_wrong_option_is_one_clear_error(change: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        SourceSettings(**GOOD | change)

    shown = "".join(traceback.format_exception(caught.value))
    assert [part for part in says if part not in str(caught.value)] == []
    assert caught.value.hint or "input should" in str(caught.value)
    assert SECRET not in shown.replace(str(change), "")


def test_a_missing_option_is_named() -> None:
    with pytest.raises(ConfigurationError, match="slot: is missing"):
        SourceSettings.of(dsn="", publication="p")


def test_settings_are_frozen() -> None:
    settings = SourceSettings(**GOOD)

    with pytest.raises(Exception, match="frozen"):
        settings.slot = "other"


def test_the_environment_names_every_field() -> None:
    environ = {
        "PGOUTPUT_DSN": "dbname=shop",
        "PGOUTPUT_SLOT": "orders",
        "PGOUTPUT_PUBLICATION": "a, b",
        "PGOUTPUT_CREATE": "true",
        "PGOUTPUT_UNTIL": "current",
        "PGOUTPUT_STATUS_INTERVAL": "2.5",
        "PGOUTPUT_MAX_FRAMES": "1000",
        "PGOUTPUT_MAX_BYTES": "2000",
        "PGOUTPUT_RECONNECT_SECONDS": "7",
        "PGOUTPUT_SLOT_WAIT_SECONDS": "3",
        "PGOUTPUT_STALL_SECONDS": "600",
        "PGOUTPUT_HEARTBEAT_SECONDS": "30",
        "PGOUTPUT_SNAPSHOT": "initial",
        "PGOUTPUT_SNAPSHOT_ROWS_PER_SECOND": "1000",
        "PGOUTPUT_ON_MISFIT": "error",
        "PGOUTPUT_ON_SCHEMA_CHANGE": "fail",
        "PGOUTPUT_ON_TABLE_ERROR": "stop",
        "PGOUTPUT_PARK_FOLDER": "/parked",
        "PGOUTPUT_ORIGIN": "none",
        "PGOUTPUT_STREAMING": "parallel",
        "PGOUTPUT_STREAMING_MEMORY": "5000",
        "PGOUTPUT_BINARY": "auto",
        "PGOUTPUT_METADATA_PREFIX": "cdc_",
        "PGOUTPUT_OUT": "out",
        "HOME": "/",
    }
    settings = SourceSettings.from_env(environ)

    assert {f"PGOUTPUT_{name.upper()}" for name in SourceSettings.model_fields} == {
        name for name in environ if name.startswith("PGOUTPUT_") and name not in OTHER_VARIABLES
    }
    assert settings.model_dump() == {
        "dsn": "dbname=shop",
        "slot": "orders",
        "publication": ("a", "b"),
        "create": True,
        "until": "current",
        "snapshot": "initial",
        "snapshot_rows_per_second": 1000,
        "status_interval": 2.5,
        "max_frames": 1000,
        "max_bytes": 2000,
        "reconnect_seconds": 7.0,
        "slot_wait_seconds": 3.0,
        "stall_seconds": 600.0,
        "heartbeat_seconds": 30.0,
        "on_misfit": "error",
        "metadata_prefix": "cdc_",
        "on_schema_change": "fail",
        "on_table_error": "stop",
        "park_folder": Path("/parked"),
        "origin": "none",
        "streaming": "parallel",
        "streaming_memory": 5000,
        "binary": "auto",
    }
    assert SourceSettings.from_env(environ, slot="other", until=None).slot == "other"


@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=3))
@example(["We,Ird"])
@example([" lead", "trail ", '"'])
@example(['"a","b"', "\\", "ÄÖ", "\n"])
def test_every_name_can_be_written_in_quotes_and_most_without(names: list[str]) -> None:
    quoted = ['"' + name.replace('"', '""') + '"' for name in names]
    plain = [
        name if "," not in name and name[0] != '"' and name.strip() == name else q
        for name, q in zip(names, quoted, strict=True)
    ]

    for written in (quoted, plain):
        assert parse_publications(",".join(written)) == parse_publications(" , ".join(written)) == tuple(names)


def test_what_a_platform_sets_for_a_service_of_our_name_is_ignored_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mine = {"PGOUTPUT_DSN": "dbname=shop", "PGOUTPUT_SLOT": "orders", "PGOUTPUT_PUBLICATION": "shop"}
    links: dict[str, str] = {}
    for service in ("PGOUTPUT", "PGOUTPUT_SOURCE"):
        links |= {
            f"{service}_SERVICE_HOST": "10.96.0.7",
            f"{service}_SERVICE_PORT": "9090",
            f"{service}_SERVICE_PORT_HTTP_METRICS": "9090",
            f"{service}_PORT": "tcp://10.96.0.7:9090",
            f"{service}_PORT_53_UDP": "udp://[fd00::7]:53",
            f"{service}_PORT_9090_TCP_PROTO": "tcp",
            f"{service}_PORT_9090_TCP_PORT": "9090",
            f"{service}_PORT_9090_TCP_ADDR": "10.96.0.7",
            f"{service}_NAME": "/flow/pgoutput",
            f"{service}_ENV_PG_VERSION": "18",
        }

    assert SourceSettings.from_env(mine | links) == SourceSettings.from_env(mine)
    assert len(caplog.records) == 1
    assert [name for name in links if name not in caplog.text] == []


def test_no_help_shows_the_environment() -> None:
    """A default value that is read from the environment would be evaluated at import, and stand in every help."""
    program = (
        "import contextlib, importlib, pkgutil, pydoc, sys, pgoutput_source\n"
        "without_bytewax = [ImportError] if sys.version_info >= (3, 13) else []\n"
        "for _, name, _ in pkgutil.walk_packages(pgoutput_source.__path__, 'pgoutput_source.'):\n"
        "    if not name.endswith('__main__'):\n"
        "        with contextlib.suppress(*without_bytewax):\n"
        "            print(pydoc.plaintext.document(importlib.import_module(name), name))\n"
    )
    environ = os.environ | {"PGPASSWORD": SECRET, "PGOUTPUT_DSN": f"password={SECRET}", "WHATEVER": SECRET}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "class SourceSettings" in done.stdout
    assert SECRET not in done.stdout


@pytest.mark.parametrize("variable", LIBPQ_VARIABLES)
def test_a_variable_of_libpq_keeps_the_embedded_server_away(variable: str) -> None:
    settings = SourceSettings.from_env({variable: "x"}, slot="s", publication="p")

    assert settings.dsn == ""
    assert settings.create is False


def test_with_nothing_configured_the_embedded_server_is_meant() -> None:
    settings = SourceSettings.from_env({"PGPASSWORD": SECRET, "PGOUTPUT_SLOT": ""})

    assert settings.dsn is None
    assert (settings.slot, settings.publication, settings.create) == ("pgoutput", ("pgoutput",), True)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"PGOUTPUT_SLOTS": "x"}, ["PGOUTPUT_SLOTS", "did you mean PGOUTPUT_SLOT?"]),
        ({"PGOUTPUT_BUCKET": "x"}, ["PGOUTPUT_BUCKET", "PGOUTPUT_DSN, PGOUTPUT_SLOT"]),
        ({"PGOUTPUT_CREATE": "perhaps"}, ["PGOUTPUT_CREATE:"]),
        ({"PGOUTPUT_SLOT": "A"}, ["PGOUTPUT_SLOT: 'A'"]),
        ({"PGOUTPUT_DSN": f"password={SECRET} {SECRET}"}, ["PGOUTPUT_DSN:"]),
        ({"PGOUTPUT_DSN": "host=x"}, ["PGOUTPUT_SLOT: is missing", "PGOUTPUT_PUBLICATION=…"]),
        ({"PGOUTPUT_PUBLICATION": "a,,b"}, ["PGOUTPUT_PUBLICATION: ''"]),
        ({"PGOUTPUT_PUBLICATION": '"a'}, ["PGOUTPUT_PUBLICATION: '\"a'", "double quotes"]),
        ({"PGOUTPUT_PUBLICATION": '"a" b'}, ["PGOUTPUT_PUBLICATION", "double quotes"]),
        ({"PGOUTPUT_DSN": ""}, ["PGOUTPUT_DSN: is empty", "unset"]),
        ({"PGOUTPUT_DSN": " \n", "PGHOST": "x"}, ["PGOUTPUT_DSN: is empty"]),
        ({"PGOUTPUT_PORT": "5432"}, ["PGOUTPUT_PORT: there is no such"]),
        ({"PGOUTPUT_SERVICE_PORT": "tcp"}, ["PGOUTPUT_SERVICE_PORT: there is no such"]),
        ({"PGOUTPUT_SLOT_NAME": "orders"}, ["PGOUTPUT_SLOT_NAME: there is no such"]),
    ],
)
def test_a_wrong_variable_is_one_clear_error(environ: dict[str, str], says: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        SourceSettings.from_env(environ)

    assert [part for part in says if part not in str(caught.value)] == []
    assert SECRET not in "".join(traceback.format_exception(caught.value)).replace(str(environ), "")


def test_an_override_is_named_as_it_was_written() -> None:
    with pytest.raises(ConfigurationError, match=r"^slot: 'A'"):
        SourceSettings.from_env({}, slot="A")


@pytest.mark.parametrize(
    ("dsn", "text"),
    [
        ("", "libpq's defaults"),
        ("service=shop", "the default database on the default host of service shop"),
        (f"postgresql://u:{SECRET}@/db?host=/tmp&sslpassword={SECRET}", "db on /tmp as u"),
        ("nonsense", "a server"),
    ],
)
def test_a_description_holds_what_helps_and_no_secret(dsn: str, text: str) -> None:
    assert describe(dsn) == text
