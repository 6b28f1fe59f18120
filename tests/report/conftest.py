from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from report_runs import Command
from small_runs import TINY, finished

from iwae_cli.cli.report import report


@pytest.fixture(scope="session")
def real_runs(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two real runs that differ by their seed, in one folder; not to be changed."""
    place = tmp_path_factory.mktemp("outputs")
    shutil.copytree(tiny_run, place / tiny_run.name)
    return [place / tiny_run.name, finished(place, *TINY, "seed=1")]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run iwae-report; return its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = report([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run
