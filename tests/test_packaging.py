"""What `pip install` brings: the wheel holds the package alone, and the lock pins all of it for every Python."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BYTEWAX_BEFORE_3_13 = re.compile(r"python(?:_full)?_version < ['\"]3\.13['\"]")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    assert {name.split("/")[0] for name in names} == {
        "pgoutput_source",
        f"pgoutput_source-{PROJECT['version']}.dist-info",
    }
    assert {n for n in names if n.endswith(".py")} == {
        str(file.relative_to(ROOT)) for file in (ROOT / "pgoutput_source").rglob("*.py")
    }
    assert "pgoutput_source/py.typed" in names


def test_any_python_may_install_it_and_bytewax_comes_where_it_exists(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    bytewax = [r for r in metadata.get_all("Requires-Dist", []) if r.startswith("bytewax")]

    assert metadata["Requires-Python"] == ">=3.11"
    assert len(bytewax) == 1
    assert BYTEWAX_BEFORE_3_13.search(bytewax[0])


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-demo.lock"])
def test_a_lock_names_no_place_and_has_bytewax_only_where_it_exists(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    pins = [line for line in lines if not line.startswith(" ")]

    assert all(re.match(r"[a-z0-9.-]+==\S+( ; [^@]+)? \\$", pin) for pin in pins)
    assert all(re.match(r"    --hash=sha256:[0-9a-f]{64}( \\)?$", line) for line in lines if line.startswith(" "))
    assert [bool(BYTEWAX_BEFORE_3_13.search(pin)) for pin in pins if pin.startswith("bytewax==")] == [True]


def test_the_installed_package_runs_beside_a_flows_package_of_the_users_own(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", system_site_packages=False, with_pip=False)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)  # a pure wheel; its dependencies come from where these tests have them
    (site / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text("mine = True")
    program = "import flows, pgoutput_source.cli.demo as demo; print(flows.mine, demo.__file__)"
    python = str(tmp_path / "venv" / "bin" / "python")
    done = subprocess.run([python, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stdout.startswith("True")
    assert str(site) in done.stdout
