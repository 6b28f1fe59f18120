from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_runs import TINY, finished


@pytest.fixture(scope="session")
def real_runs(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two real runs that differ by their seed, in one folder; not to be changed."""
    place = tmp_path_factory.mktemp("outputs")
    shutil.copytree(tiny_run, place / tiny_run.name)
    return [place / tiny_run.name, finished(place, *TINY, "seed=1")]
