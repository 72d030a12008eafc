"""Instructions that two versions of the package execute for the same work: a comparison that no load can spoil.

    python -m benchmarks.instructions BEFORE [NOW] [--only TEXT]

BEFORE and NOW are folders that contain `pgoutput_source`: a checkout, or an unpacked wheel. NOW is this checkout by
default. Each version runs in its own process under Valgrind's callgrind, which must be installed. The cases are frames
of 7-column inserts through the `Assembler`, in large, small and single-row transactions, and the operators of
`benchmarks.operators`. It takes some minutes.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CHANGES = 50_000
COLUMNS = {
    "id": 20,
    "customer_id": 23,
    "status": 25,
    "amount": 1700,
    "created_at": 1184,
    "updated_at": 1184,
    "note": 25,
}
"""By name: the type's OID."""
PER_TRANSACTION = {"large transaction": CHANGES, "transactions of 100": 100, "single rows": 1}
POLLED = 10_000  # frames in one feed


def main() -> None:
    """Count both versions, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("now", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        frames = Path(folder) / "frames"
        frames.write_bytes(pickle.dumps({name: list(stream(size)) for name, size in PER_TRANSACTION.items()}))
        before, now = (counts(p.absolute(), frames, arguments.only) for p in (arguments.before, arguments.now))
    print(f"{'millions of instructions':30} {'before':>10} {'now':>10}")
    for name, count in now.items():
        if name in before:
            print(f"{name:30} {before[name] / 1e6:10.1f} {count / 1e6:10.1f} {count / before[name] - 1:+8.2%}")


def counts(version: Path, frames: Path, only: str) -> dict[str, int]:
    """Instructions by case."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"--callgrind-out-file={folder}/out"
        command = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", out, sys.executable, __file__]
        environment = {**os.environ, "PYTHONPATH": f"{version}:{ROOT}", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        environment["PYTHONSAFEPATH"] = "1"
        subprocess.run([*command, "--count", str(frames), only], env=environment, check=True, cwd=folder)
        found: dict[str, int] = {}
        for dump in Path(folder).glob("out.*"):
            text = dump.read_text(errors="replace")
            if name := re.search(r"^desc: Trigger: dump (.+)$", text, re.MULTILINE):
                found[name[1].replace("_", " ")] = int(re.findall(r"^totals: (\d+)", text, re.MULTILINE)[-1])
    overhead = found.pop("nothing")
    return {name: count - overhead for name, count in sorted(found.items())}


def stream(size: int) -> Iterator[bytes]:
    """The frames of so many inserts, `size` in each transaction."""
    wire = importlib.import_module("pgoutput_source.protocol.wire")

    def frame(lsn: int, message: bytes) -> bytes:
        return wire.XLogData(wire.Lsn(lsn), wire.Lsn(lsn), 0, message).encode()  # type: ignore[no-any-return]

    columns = b"".join(
        struct.pack(">B", name == "id") + name.encode() + b"\0" + struct.pack(">Ii", oid, 786438 if oid == 1700 else -1)
        for name, oid in COLUMNS.items()
    )
    relation = b"R" + struct.pack(">I", 16400) + b"public\0orders\0d" + struct.pack(">H", len(COLUMNS)) + columns
    for start in range(0, CHANGES, size):
        commit = (start + size) * 16
        yield frame(commit, b"B" + struct.pack(">QqI", commit, 0, 1000 + start))
        if not start:
            yield frame(commit, relation)
        for n in range(start, min(start + size, CHANGES)):
            yield frame(n * 16, b"I" + struct.pack(">I", 16400) + b"N" + row(n))
        yield frame(commit, b"C" + struct.pack(">BQQq", 0, commit, commit + 8, 0))


def row(n: int) -> bytes:
    """A tuple of seven texts."""
    at = f"2026-01-02 {n % 24:02}:04:05.678901+00"
    texts = (f"{n}", f"{n % 1000}", ("new", "paid", "shipped")[n % 3], f"{n % 100000 / 100:.2f}", at, at, f"order {n}")
    return struct.pack(">H", len(texts)) + b"".join(b"t" + struct.pack(">i", len(t)) + t.encode() for t in texts)


def cases(frames: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The work, by name."""
    assembler = importlib.import_module("pgoutput_source.decode.assembler").Assembler

    def decode(polls: list[list[bytes]]) -> None:
        assembled = assembler()
        for poll in polls:
            assembled.feed(poll)

    yield "nothing", lambda: None
    for name, every in pickle.loads(frames.read_bytes()).items():
        polls = [every[at : at + POLLED] for at in range(0, len(every), POLLED)]
        yield name, partial(decode, polls)
    operators = importlib.import_module("benchmarks.operators")
    made = {identity: list(operators.batches(CHANGES, 10_000, identity)) for identity in "df"}
    for name, identity, step in operators.CASES:
        yield name, partial(operators.measure, step, made[identity])


def count(frames: Path, only: str) -> None:
    """In a process under callgrind: run each case, and have its second run counted."""
    for name, work in cases(frames):
        if name == "nothing" or only in name:
            work()
            control("--instr=on")
            control("--zero")
            work()
            control(f"--dump={name.replace(' ', '_')}")
            control("--instr=off")


def control(command: str) -> None:
    """Tell the callgrind that this process runs under."""
    subprocess.run(["callgrind_control", command, str(os.getpid())], check=True, capture_output=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--count"]:
        count(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
