"""Short runs on the digits give the recorded numbers; after an intended change see support/regenerate_golden.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from regenerate_golden import FILE, RUNS, numbers

GOLDEN = json.loads(FILE.read_text())

# Nats. Processors round differently: torch's kernels without vectors, with AVX2 and with AVX-512 differ by at most 2e-6
# here. A hundred times that covers processors that were not tried, and is a hundredth of the gap between two runs.
TOLERANCE = 2e-4


def test_the_file_has_the_runs_and_they_differ() -> None:
    assert set(GOLDEN) == set(RUNS)
    values = [run["nll"] for run in GOLDEN.values()]
    assert min(abs(a - b) for a in values for b in values if a != b) > 100 * TOLERANCE


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_recorded_numbers(name: str, tmp_path: Path) -> None:
    assert numbers(name, tmp_path) == pytest.approx(GOLDEN[name], abs=TOLERANCE, rel=0)
