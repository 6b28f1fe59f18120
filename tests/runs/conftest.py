"""Finished runs that several files need."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    server = Forks()
    yield server
    server.close()


@pytest.fixture
def folder(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy, for each test, of a finished run of ``TINY``."""
    return Path(shutil.copytree(tiny_run, tmp_path / "outputs" / tiny_run.name))
