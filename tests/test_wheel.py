"""What is published holds everything, and works installed, far from the sources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from iwae_cli import __version__

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def sources(folder: str, pattern: str) -> dict[str, bytes]:
    return {
        file.relative_to(ROOT).as_posix(): file.read_bytes()
        for file in (ROOT / folder).rglob(pattern)
        if file.is_file() and "__pycache__" not in file.parts
    }


@dataclass
class Built:
    path: Path
    files: dict[str, bytes]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Built, Built]:
    """The sdist, and the wheel that is made from it: what the one lacks, the other lacks."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(sdist) as archive:
        members = [m for m in archive if m.isfile()]
        from_sdist = {m.name.split("/", 1)[1]: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    with zipfile.ZipFile(wheel) as archive:
        from_wheel = {name: archive.read(name) for name in archive.namelist()}
    return Built(sdist, from_sdist), Built(wheel, from_wheel)


@pytest.fixture(scope="module")
def installed(built: tuple[Built, Built], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of another environment, where the wheel is installed and torch and the rest are borrowed.

    A folder named in a .pth file is searched, but its own .pth files are not read: an editable install of the
    sources in the environment of the tests stays unseen.
    """
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    program = venv / "bin" / "python"
    purelib = Path(run(program, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv).strip())
    borrowed = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (purelib / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", program, "install", "--no-deps", "--no-index", "--no-cache-dir"]
    run(*pip, built[1].path, cwd=venv)
    return venv / "bin"


def test_sdist_and_wheel_carry_every_source_and_config(built: tuple[Built, Built]) -> None:
    sdist, wheel = (b.files for b in built)
    code = sources("iwae_cli", "*.py") | sources("iwae_cli/report/html", "*")
    conf, tests = sources("conf", "*"), sources("tests", "*.py")
    assert {f"iwae_cli/report/html/page.{end}" for end in ("css", "js", "html.jinja")} <= code.keys()
    assert len(code) > 10 and len(conf) > 5 and len(tests) > 2
    for part in (code, conf, tests):
        assert part.items() <= sdist.items()
    assert code.items() <= wheel.items()
    assert {f"iwae_cli/{name}": text for name, text in conf.items()}.items() <= wheel.items()
    assert {"Makefile", "README.md", "LICENSE", "outputs/README.md", "pyproject.toml"} <= sdist.keys()


def test_sdist_and_wheel_carry_nothing_else(built: tuple[Built, Built]) -> None:
    sdist, wheel = (b.files for b in built)
    assert {name for name in sdist if name.startswith("outputs")} == {"outputs/README.md"}
    assert not {
        name for name in sdist.keys() | wheel.keys() if name.endswith((".pyc", ".pt", ".npz", ".ubyte", ".mat"))
    }
    assert {name.split("/")[0] for name in wheel} == {"iwae_cli", f"iwae_cli-{__version__}.dist-info"}


def test_the_installed_program_is_the_wheel(installed: Path, tmp_path: Path) -> None:
    place = run(installed / "python", "-c", "import iwae_cli; print(iwae_cli.__file__)", cwd=tmp_path).strip()
    assert installed.parent in Path(place).parents
    for program in (["iwae-train"], ["iwae-eval"], ["iwae-report"], ["python", "-m", "iwae_cli"]):
        assert __version__ in run(installed / program[0], *program[1:], "--version", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_installed_program_trains(installed: Path, tmp_path: Path) -> None:
    here = tmp_path / "elsewhere"
    here.mkdir()
    run(installed / "iwae-train", "experiment=smoke", f"output_dir={tmp_path / 'runs'}", cwd=here)
    (result,) = (tmp_path / "runs").glob("*/result.json")
    assert json.loads(result.read_text())["status"] == "finished"
    assert not list(here.iterdir())
