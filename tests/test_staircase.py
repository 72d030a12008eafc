"""The shape of the package: who may import whom, what is documented, and that examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import pgoutput_source

PACKAGE = "pgoutput_source"
ROOT = Path(__file__).parents[1] / PACKAGE

# A module imports only rooms that stand before its own. A folder is one room; its files are free among themselves.
ARCHITECTURE = (ROOT.parent / "ARCHITECTURE.md").read_text()
STAIRCASE = re.findall(r"^\| \[`(\w+)`\]\([^)]+\) \|", ARCHITECTURE, re.MULTILINE)
WITHOUT_BYTEWAX = STAIRCASE[: STAIRCASE.index("destinations") + 1]

FILES = sorted(ROOT.rglob("*.py"))
NAMES = [".".join((PACKAGE, *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for file in FILES]
WITH_BYTEWAX = {"sinks", "operators", "dataflow.source", "dataflow.run", "dataflow.taken", "cli.demo_flow"}
THERE = find_spec("bytewax") is not None
IMPORTABLE = [
    name
    for name in NAMES
    if not name.endswith(("__main__", "needs_bytewax"))
    and (THERE or not any(f"{name}.".startswith(f"{PACKAGE}.{part}.") for part in WITH_BYTEWAX))
]
BY_NAME = pytest.mark.parametrize("name", NAMES)


def file_of(name: str) -> Path:
    return FILES[NAMES.index(name)]


def step_of(name: str) -> str:
    """The step of the staircase that a module is part of."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def imports_of(name: str) -> Iterator[str]:
    """Every module of ours that the file imports, wherever in it, for types only or for use."""
    for node in ast.walk(ast.parse(file_of(name).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: write the import with its full name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in NAMES else str(node.module)


@pytest.mark.skipif(not THERE, reason="needs Bytewax")
def test_every_public_name_has_an_example() -> None:
    from pgoutput_source import operators

    public = {name: getattr(pgoutput_source, name) for name in pgoutput_source.__all__ if name[0] != "_"}
    public |= {f"cdc.{name}": getattr(operators, name) for name in operators.__all__}

    assert [name for name, each in public.items() if ">>>" not in (each.__doc__ or "")] == []


def test_each_step_is_there_once() -> None:
    there = {step_of(name) for name in NAMES}

    assert sorted(STAIRCASE) == sorted(there)


def test_the_arrows_of_the_diagram_are_imports() -> None:
    (diagram,) = re.findall(r"```text\n(.*?)```", ARCHITECTURE, re.DOTALL)
    rooms = set(re.findall(r"(\w+)/", diagram))
    imported = {(step_of(name), step_of(i)) for name in NAMES for i in imports_of(name) if i.startswith(PACKAGE)}

    assert rooms <= set(STAIRCASE)
    # Who is drawn to the right builds on who is drawn to the left; operators and sinks meet in the user's flow.
    for upper, lower in (
        ("stream", "decode"),
        ("decode", "protocol"),
        ("decode", "types"),
        ("dataflow", "stream"),
        ("operators", "compute"),
        ("sinks", "dataflow"),
        ("sinks", "parquet"),
    ):
        assert {upper, lower} <= rooms
        assert (upper, lower) in imported


@BY_NAME
def test_a_module_imports_only_what_stands_above_it(name: str) -> None:
    step = step_of(name)
    assert step in STAIRCASE, f"{name} has no place on the staircase yet: give it a row in ARCHITECTURE.md"
    if name == PACKAGE:
        return
    for imported in imports_of(name):
        if imported.split(".")[0] == PACKAGE and step_of(imported) != step:
            assert STAIRCASE.index(step_of(imported)) < STAIRCASE.index(step), f"{name} imports {imported}"


def test_everything_up_to_the_reader_and_the_commands_work_without_bytewax() -> None:
    names = [name for name in IMPORTABLE if step_of(name) in WITHOUT_BYTEWAX]
    program = "import sys; sys.modules['bytewax'] = None\n" + "\n".join(f"import {name}" for name in names)
    program += f"\nimport {PACKAGE}, {PACKAGE}.cli\nassert {{'peek', 'read'}} <= set(dir({PACKAGE}))"
    program += f"\nassert all(hasattr({PACKAGE}, name) for name in dir({PACKAGE}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "from pgoutput_source import PgOutputSource",
        "from pgoutput_source import run",
        "from pgoutput_source import ParquetSink",
        "import pgoutput_source.dataflow.source",
        "import pgoutput_source.operators as cdc",
        "from pgoutput_source.sinks.jsonl import JsonLinesSink",
    ],
)
def test_a_dataflow_part_without_bytewax_is_one_clear_error(statement: str) -> None:
    program = f"import sys; sys.modules['bytewax'] = None\n{statement}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT.parent, capture_output=True, text=True)

    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert "pgoutput_source.errors.BytewaxMissing: " in done.stderr
    assert f"not installed for Python {sys.version_info.major}.{sys.version_info.minor}\nhint: " in done.stderr
    assert "Without Bytewax you can use PgOutputReader, peek, " in done.stderr


@BY_NAME
def test_public_names_say_what_they_are(name: str) -> None:
    tree = ast.parse(file_of(name).read_text())
    assert ast.get_docstring(tree), f"{name} has no docstring"
    if name not in IMPORTABLE:
        return
    module = importlib.import_module(name)
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    silent = []
    for node in tree.body:
        if not isinstance(node, definitions) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):  # read from the file: dataclasses invent one
            silent.append(node.name)
        if isinstance(node, ast.ClassDef):
            owner = getattr(module, node.name)
            for inner in node.body:
                if not isinstance(inner, definitions) or inner.name.startswith("_"):
                    continue
                # A method that keeps the promise of its base class inherits the words, too.
                if not ast.get_docstring(inner) and not inspect.getdoc(getattr(owner, inner.name)):
                    silent.append(f"{node.name}.{inner.name}")
    assert not silent


@pytest.mark.parametrize("name", IMPORTABLE)
def test_examples_in_docstrings_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_a_test_never_imports_from_another_test() -> None:
    tests = Path(__file__).parent
    for file in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith(("test_", "conftest"))], file


def test_the_tests_mirror_the_package() -> None:
    rooms = {folder.name for folder in Path(__file__).parent.iterdir() if any(folder.glob("test_*.py"))}

    assert rooms <= {name for name in STAIRCASE if (ROOT / name).is_dir()}
