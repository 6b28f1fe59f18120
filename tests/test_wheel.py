"""The sdist and the wheel contain every source and configuration, and the installed program works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from small_runs import TINY

from iwae_cli import __version__

ROOT = Path(__file__).resolve().parents[1]

Archives = tuple[dict[str, bytes], dict[str, bytes]]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support" / "processes")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def sources(folder: str) -> dict[str, bytes]:
    return {
        file.relative_to(ROOT).as_posix(): file.read_bytes()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


@pytest.fixture(scope="module")
def archives(dist: Path) -> Archives:
    """Name and content of every file of the sdist and of the wheel."""
    with tarfile.open(*dist.glob("*.tar.gz")) as sdist:
        members = [m for m in sdist if m.isfile()]
        from_sdist = {m.name.split("/", 1)[1]: sdist.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    with zipfile.ZipFile(*dist.glob("*.whl")) as wheel:
        return from_sdist, {name: wheel.read(name) for name in wheel.namelist()}


@pytest.fixture(scope="module")
def programs(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of another environment that has the wheel installed and borrows its dependencies.

    A folder named in a .pth file is searched, but its own .pth files are not read: an editable install in the
    environment of the tests stays invisible.
    """
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    program = venv / "bin" / "python"
    (purelib,) = venv.glob("lib/*/site-packages")
    borrowed = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (purelib / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", program, "install", "--no-deps", "--no-index", "--no-cache-dir"]
    run(*pip, *dist.glob("*.whl"), cwd=venv)
    return venv / "bin"


def test_sdist_and_wheel_contain_every_source_and_config(archives: Archives) -> None:
    sdist, wheel = archives
    code, conf, tests = sources("iwae_cli"), sources("conf"), sources("tests")
    assert {Path(name).suffix for name in code} > {".py"}, "the styles and scripts of the page too"
    assert len(code) > 10 and len(conf) > 5 and len(tests) > 2
    for part in (code, conf, tests):
        assert part.items() <= sdist.items()
    assert code.items() <= wheel.items()
    assert {f"iwae_cli/{name}": text for name, text in conf.items()}.items() <= wheel.items()
    assert {"Makefile", "README.md", "LICENSE", "outputs/README.md", "pyproject.toml"} <= sdist.keys()


def test_sdist_and_wheel_contain_nothing_else(archives: Archives) -> None:
    sdist, wheel = archives
    assert {name for name in sdist if name.startswith("outputs")} == {"outputs/README.md"}
    files = {name for name in sdist.keys() | wheel.keys() if not name.startswith("tests/")}
    assert not {name for name in files if name.endswith((".pyc", ".pt", ".npz", ".ubyte", ".mat"))}
    assert {name.split("/")[0] for name in wheel} == {"iwae_cli", f"iwae_cli-{__version__}.dist-info"}


def test_the_installed_programs_run(programs: Path, tmp_path: Path) -> None:
    here = tmp_path / "elsewhere"
    here.mkdir()
    place = run(programs / "python", "-c", "import iwae_cli; print(iwae_cli.__file__)", cwd=here).strip()
    assert programs.parent in Path(place).parents
    for program in (["iwae-eval"], ["iwae-report"], ["python", "-m", "iwae_cli"]):
        assert __version__ in run(programs / program[0], *program[1:], "--version", cwd=here)
    run(programs / "iwae-train", *TINY, f"output_dir={tmp_path / 'runs'}", cwd=here)
    (result,) = (tmp_path / "runs").glob("*/result.json")
    assert json.loads(result.read_text())["status"] == "finished"
    assert not list(here.iterdir())
