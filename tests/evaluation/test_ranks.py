"""Several processes that share an evaluation give the numbers of one, bit for bit, and rank 0 alone is seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from small_runs import TINY, bits, finished, last_of_each, run_folders

LINE = last_of_each(*TINY, "schedule.passes=1", "evaluation.rows=64", "evaluation.splits=[validation,test]")
COUNTING = """
import os, sys
from iwae_cli.evaluation import pool
from iwae_cli import cli
before = pool.map_here
def counted(work, batches, workers, on_progress=None):
    with open(f"rank-{os.environ['RANK']}", "a") as file:
        print(len(batches), file=file)
    return before(work, batches, workers, on_progress)
pool.map_here = counted
sys.exit(cli.train())
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


def test_two_ranks_are_one(tmp_path: Path) -> None:
    alone = finished(tmp_path / "one", *LINE)
    Path("counting.py").write_text(COUNTING)
    done = torchrun("counting.py", *LINE, f"output_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    (together,) = run_folders(tmp_path / "two")
    assert bits(together) == bits(alone)
    assert done.stdout.count(alone.name) == 2, "its table, once: name and folder"
    shares = [[int(line) for line in Path(f"rank-{rank}").read_text().split()] for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) >= 4, "validation twice, test, active units twice"
    assert all(0 <= first - second <= 1 for first, second in zip(*shares, strict=True))


def test_what_is_wrong_is_said_once() -> None:
    done = torchrun("-m", "iwae_cli", "objective.k=0")
    assert done.returncode == 1 and done.stderr.count("objective.k must be >= 1, got 0") == 1
    assert "Gloo" not in done.stderr
    done = torchrun("-m", "iwae_cli", "-m", "seed=0,1")
    assert "torchrun is for one run" in done.stderr
