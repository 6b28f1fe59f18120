from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import TINY, finished


@pytest.fixture(scope="session")
def real_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two real runs that differ by their seed, in one folder; not to be changed."""
    place = tmp_path_factory.mktemp("outputs")
    return [finished(place, *TINY, f"seed={seed}") for seed in range(2)]
