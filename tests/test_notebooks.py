"""The notebooks run from top to bottom on a fresh clone, with nothing configured.

    python tests/test_notebooks.py

runs them and writes their outputs into `notebooks/`, without what differs each time for no reason.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 60_000  # bytes, with outputs
PATIENCE = 60  # seconds for a cell


@contextmanager
def elsewhere() -> Iterator[str]:
    """A folder in which a notebook may leave its server, also if PostgreSQL runs under another account than this."""
    with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
        os.chmod(folder, 0o755)
        yield folder


def executed(path: Path, folder: str) -> Any:
    """The notebook after *Run all* in a fresh kernel without any configuration."""
    book = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "BYTEWAX"))}
    clean |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    client = NotebookClient(book, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.execute(env=clean)
    return book


def texts(book: Any) -> list[str]:
    """What the outputs say, image data left out."""
    found = []
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            found.append(output.get("text", ""))
            found += [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_run_all_works_on_a_fresh_clone(path: Path) -> None:
    if sys.version_info >= (3, 13) and "bytewax" in path.read_text():
        pytest.importorskip("bytewax")
    began = time.monotonic()
    with elsewhere() as folder:
        book = executed(path, folder)
        assert {file.name for file in Path(folder).iterdir()} <= {".pgoutput"}, "it leaves files behind"
    assert time.monotonic() - began < PATIENCE
    # Whatever a notebook claims in a cell of its own is true.
    assert "False" not in texts(book)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_outputs_are_there_small_and_of_no_particular_machine(path: Path) -> None:
    book = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    text = "\n".join(texts(book))
    assert path.stat().st_size < LARGEST
    assert sum(bool(cell.get("outputs")) for cell in book.cells) >= 3
    assert all(output.output_type not in ("error",) for c in book.cells for output in c.get("outputs", ()))
    assert not re.search(r"/tmp/|/home/|/root/|/work/|/var/|password|host=|127\.0\.0\.1|site-packages", text)


def refresh() -> None:
    """Run all notebooks and keep their outputs."""
    for path in NOTEBOOKS:
        with elsewhere() as folder:
            book = executed(path, folder)
        for cell in book.cells:
            cell.metadata = {}
            if cell.cell_type == "code":
                # The log has times and positions.
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
                for output in cell.outputs:
                    output.get("metadata", {}).clear()
        book.metadata = {"kernelspec": book.metadata.kernelspec, "language_info": {"name": "python"}}
        nbformat.write(book, path)  # type: ignore[no-untyped-call]
        print(path.stem, path.stat().st_size, "bytes")


if __name__ == "__main__":
    refresh()
