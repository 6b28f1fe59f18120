"""Several processes that share a run give the numbers of one, and rank 0 alone is seen.

An evaluation is the same bit for bit, a training but for rounding.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import TINY, bits, finished, last_of_each, read_json, run, run_folders

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
STOPPING = """
import os, signal, sys
from iwae_cli import cli, session
before = session.Session.on_step
def on_step(self, step):
    before(self, step)
    if step == 20:
        os.kill(os.getpid(), signal.SIGTERM)
session.Session.on_step = on_step
sys.exit(cli.train())
"""
DYING = """
import os, signal, sys
from iwae_cli import cli
from iwae_cli.evaluation.ranks import Ranks
before, times = Ranks.sum, []
def sum(self, tensor):
    times.append(1)
    if self.rank == 1 and len(times) == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    before(self, tensor)
Ranks.sum = sum
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


def test_what_is_wrong_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    done = torchrun("-m", "iwae_cli", "objective.k=0")
    assert done.returncode == 1 and done.stderr.count("objective.k must be >= 1, got 0") == 1
    assert "Gloo" not in done.stderr
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of one process")
    code, _, err = run("-m", "seed=0,1")
    assert code == 2 and "torchrun is for one run" in err


SHARED = last_of_each(
    *TINY, "model.latent_sizes=[50]", "model.hidden_sizes=[[200,200]]", "objective.k=50", "objective.gradient=dreg",
    "schedule.passes=2", "evaluation.splits=[test]",
)  # fmt: skip


def test_two_ranks_train_as_one_where_it_pays(tmp_path: Path) -> None:
    """Its minibatches are large enough; the last of a pass has one image less than can be halved."""
    alone = finished(tmp_path / "one", *SHARED)
    done = torchrun("-m", "iwae_cli", *SHARED, f"output_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    (together,) = run_folders(tmp_path / "two")
    assert together.name == alone.name
    records = [read_json(folder / "result.json") for folder in (alone, together)]
    assert [record["device"]["train_processes"] for record in records] == [1, 2]
    weights = [torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in (alone, together)]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(weights[1][name], value) for name, value in weights[0].items()), "sums in another order"
    assert records[1]["test"]["nll"] == pytest.approx(records[0]["test"]["nll"], abs=1e-3)
    curves = [[json.loads(row) for row in (f / "metrics.jsonl").read_text().splitlines()] for f in (alone, together)]
    for one, two in zip(*curves, strict=True):
        assert two["train/bound"] == pytest.approx(one["train/bound"], abs=1e-3)
        assert two["validation/bound"] == pytest.approx(one["validation/bound"], abs=1e-3)


def test_what_two_began_one_can_end_and_says_so(tmp_path: Path) -> None:
    line = last_of_each(*SHARED, "schedule.passes=6")
    Path("stopping.py").write_text(STOPPING)
    done = torchrun("stopping.py", *line, f"output_dir={tmp_path}")
    assert done.returncode == 1 and "interrupted" in done.stderr, done.stderr
    assert done.stderr.count("Traceback") == 1, "torchrun's own"
    (folder,) = run_folders(tmp_path)
    assert read_json(folder / "status.json")["status"] == "interrupted"
    code, _, err = run(*line, f"output_dir={tmp_path}")
    assert code == 0 and "goes on from step 20 of 78" in err
    assert "resuming is not exact: ranks was 2 and is 1" in err
    assert read_json(folder / "result.json")["device"]["train_processes"] == 1


def test_a_rank_that_is_killed_ends_the_run_in_words(tmp_path: Path) -> None:
    line = last_of_each(*SHARED, "schedule.passes=6")
    Path("dying.py").write_text(DYING)
    done = torchrun("dying.py", *line, f"output_dir={tmp_path}")
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1, done.stderr
    (folder,) = run_folders(tmp_path)
    status = read_json(folder / "status.json")
    # Whichever comes first: that the other is gone, or the signal that torchrun then sends to all.
    assert status["status"] in ("failed", "interrupted")
    if status["status"] == "failed":
        assert "another process of torchrun has ended" in done.stderr
    code, _, err = run(*line, f"output_dir={tmp_path}")
    assert code == 0, err
