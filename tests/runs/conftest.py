"""Finished runs that several files need."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Forks
from small_runs import TINY, finished, run_folders


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    server = Forks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A copy, for each test, of a finished run of ``TINY``."""
    if not run_folders(template):
        finished(template, *TINY)
    shutil.copytree(template, tmp_path / "outputs")
    (found,) = run_folders(tmp_path / "outputs")
    return found
