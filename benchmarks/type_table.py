"""Nanoseconds per value for the decoders of each type: from text, and from what its send function writes, to Arrow.

python -m benchmarks.type_table [rows]
"""

from __future__ import annotations

import datetime
import random
import sys
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
import pyarrow as pa

from pgoutput_source.embedded import Server
from pgoutput_source.types import type_of
from pgoutput_source.types.base import Sent


def columns(rng: random.Random) -> dict[str, tuple[int, int, Callable[[], str]]]:
    """By name: OID, typmod, and a maker of values in PostgreSQL's text."""
    start = datetime.datetime(2020, 1, 1)

    def moment() -> datetime.datetime:
        return start + datetime.timedelta(microseconds=rng.randrange(200_000_000_000_000))

    def decimals(digits: int, scale: int) -> Callable[[], str]:
        return lambda: f"{rng.randrange(10 ** (digits - scale))}.{rng.randrange(10**scale):0{scale}}"

    return {
        "boolean": (16, -1, lambda: rng.choice("tf")),
        "smallint": (21, -1, lambda: str(rng.randint(-(2**15), 2**15 - 1))),
        "integer": (23, -1, lambda: str(rng.randrange(10**6))),
        "bigint": (20, -1, lambda: str(rng.randrange(10**12))),
        "real": (700, -1, lambda: f"{rng.random() * 1000:.6g}"),
        "double precision": (701, -1, lambda: repr(rng.random() * 1000)),
        "numeric(12,2)": (1700, (12 << 16 | 2) + 4, decimals(8, 2)),
        "numeric(38,10)": (1700, (38 << 16 | 10) + 4, decimals(30, 10)),
        "numeric": (1700, -1, decimals(8, 2)),
        "text, 20 bytes": (25, -1, lambda: rng.randbytes(10).hex()),
        "jsonb, 40 bytes": (3802, -1, lambda: f'{{"id": {rng.randrange(10**9)}, "name": "{rng.randbytes(6).hex()}"}}'),
        "bytea, 16 bytes": (17, -1, lambda: "\\x" + rng.randbytes(16).hex()),
        "date": (1082, -1, lambda: str(moment().date())),
        "date, 1 in 100 infinite": (1082, -1, lambda: str(moment().date()) if rng.random() > 0.01 else "infinity"),
        "time": (1083, -1, lambda: str(moment().time())),
        "timestamp": (1114, -1, lambda: str(moment())),
        "timestamptz": (1184, -1, lambda: f"{moment()}+00"),
        "timestamptz, half infinite": (1184, -1, lambda: rng.choice((f"{moment()}+00", "infinity"))),
        "timestamptz, 1 in 100 BC": (
            1184,
            -1,
            lambda: "0044-03-15 12:00:00+00 BC" if rng.random() < 0.01 else f"{moment()}+00",
        ),
        "interval": (1186, -1, lambda: f"{rng.randrange(30)} days 0{rng.randrange(9)}:30:00"),
        "integer[], 4 elements": (1007, -1, lambda: "{" + ",".join(str(rng.randrange(10**6)) for _ in range(4)) + "}"),
        "text[], 2 elements": (1009, -1, lambda: f'{{"{rng.random()} x",{rng.randbytes(5).hex()}}}'),
        "text[], 2 elements, escapes": (
            1009,
            -1,
            lambda: f'{{"a \\"{rng.randbytes(4).hex()}\\"",{rng.randbytes(5).hex()}}}',
        ),
        "int2vector, 3 elements": (22, -1, lambda: f"1 2 {rng.randrange(100)}"),
        "int4multirange, 2 ranges": (
            4451,
            -1,
            lambda: f"{{[1,{rng.randrange(2, 100)}),[200,{rng.randrange(300, 999)})}}",
        ),
        "money": (790, -1, lambda: f"${rng.randrange(1, 1000)},{rng.randrange(1000):03}.{rng.randrange(100):02}"),
        "int4range": (3904, -1, lambda: f"[{rng.randrange(100)},{rng.randrange(100, 1000)})"),
        "point": (600, -1, lambda: f"({rng.random():.6g},{rng.random():.6g})"),
        "pg_lsn": (3220, -1, lambda: f"{rng.randrange(2**16):X}/{rng.randrange(2**32):X}"),
        "inet": (869, -1, lambda: ".".join(str(rng.randrange(256)) for _ in range(4))),
        "macaddr": (829, -1, lambda: rng.randbytes(6).hex(":")),
        "tstzrange": (3910, -1, lambda: f'["{moment()}+00","{start + datetime.timedelta(days=9999)}+00")'),
        "uuid[], 3 elements": (
            2951,
            -1,
            lambda: f"{{{','.join(str(uuid.UUID(bytes=rng.randbytes(16))) for _ in 'abc')}}}",
        ),
        "double precision[], 8 elements": (1022, -1, lambda: f"{{{','.join(repr(rng.random()) for _ in range(8))}}}"),
        "uuid": (2950, -1, lambda: str(uuid.UUID(bytes=rng.randbytes(16)))),
    }


def best(run: Callable[[], object], seconds: float = 0.3) -> float:
    """The fastest of several runs, in seconds of CPU."""
    fastest, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.process_time()
        run()
        fastest = min(fastest, time.process_time() - began)
    return fastest


def sent(connection: psycopg.Connection[Any], oid: int, typmod: int, texts: list[str]) -> Sent:
    """The same values in binary, from a server."""
    (name,) = connection.execute("SELECT format_type(%s, %s)", [oid, typmod]).fetchone() or ("",)
    query = f"SELECT t::{name} FROM unnest(%s::text[]) WITH ORDINALITY AS u(t, n) ORDER BY n"
    result = connection.execute(query, [texts], binary=True).pgresult
    assert result is not None
    return Sent.of([bytes(result.get_value(i, 0) or b"") for i in range(result.ntuples)])


def main(rows: int = 100_000) -> None:
    """Print the table."""
    print(f"{'type':<32}{'text, ns a value':>18}{'with NULLs':>12}{'binary':>10}")
    with Server() as server, psycopg.connect(server.dsn()) as connection:
        for name, (oid, typmod, make) in columns(random.Random(1)).items():
            row = type_of(oid)
            texts = [make() for _ in range(rows)]
            kind = row.arrow(typmod)
            assert row.binary is not None
            measured: list[tuple[Callable[[Any, pa.DataType], pa.Array], Any]] = [
                (row.decode, pa.array(texts, pa.utf8()).cast(pa.binary())),
                (
                    row.decode,
                    pa.array([None if i % 3 == 0 else t for i, t in enumerate(texts)], pa.utf8()).cast(pa.binary()),
                ),
                (row.binary.decode, sent(connection, oid, typmod, texts)),
            ]
            times = [best(partial(decode, column, kind)) / rows * 1e9 for decode, column in measured]
            print(f"{name:<32}{times[0]:>18.0f}{times[1]:>12.0f}{times[2]:>10.0f}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
