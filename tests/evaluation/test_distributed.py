"""Several processes that share a run give the numbers of one, and rank 0 alone is seen.

An evaluation is the same bit for bit, a training but for rounding.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import TINY, bits, finished, last_of_each, read_json, run, run_folders

from iwae_cli.cli import train as cli
from iwae_cli.core.errors import RunFailed
from iwae_cli.evaluation import distributed as ranks
from iwae_cli.evaluation import workers
from iwae_cli.evaluation.distributed import Ranks

LINE = last_of_each(*TINY, "schedule.passes=1", "evaluation.rows=64", "evaluation.splits=[validation,test]")
COUNTING = """
import os, sys
from iwae_cli.evaluation import workers
from iwae_cli.cli import train as cli
before = workers.map_here
def counted(work, batches, workers, on_progress=None):
    with open(f"rank-{os.environ['RANK']}", "a") as file:
        print(len(batches), file=file)
    return before(work, batches, workers, on_progress)
workers.map_here = counted
sys.exit(cli.train())
"""
STOPPING = """
import os, signal, sys
from iwae_cli.cli import train as cli
from iwae_cli.runs import runner
before = runner.Runner.on_step
def on_step(self, step):
    before(self, step)
    if step == 20:
        os.kill(os.getpid(), signal.SIGTERM)
runner.Runner.on_step = on_step
sys.exit(cli.train())
"""
DYING = """
import os, signal, sys
from iwae_cli.cli import train as cli
from iwae_cli.evaluation.distributed import Ranks
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


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("alone"), *SHARED)


def nll(folder: Path) -> float:
    return float(read_json(folder / "result.json")["test"]["nll"])


def processes(folder: Path) -> int | str:
    value: int | str = read_json(folder / "result.json")["device"]["train_processes"]
    return value


def curve(folder: Path) -> list[float]:
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("train/bound", "validation/bound")]


# Adam makes steps of full length from gradients that are all rounding, so numbers are compared and not weights: the
# gradients themselves are held to those of one process in training/test_crew.py.
ROUNDING = 1e-3
"""Nats; the differences are some 1e-5."""


def test_two_ranks_train_as_one_also_after_a_stop(alone: Path, tmp_path: Path) -> None:
    """The last minibatch of a pass has an odd number of images."""
    assert processes(alone) == 1
    Path("stopping.py").write_text(STOPPING)
    done = torchrun("stopping.py", *SHARED, f"output_dir={tmp_path / 'two'}")
    assert done.returncode == 1 and "interrupted" in done.stderr, done.stderr
    assert done.stderr.count("Traceback") == 1, "torchrun's own"
    (stopped,) = run_folders(tmp_path / "two")
    assert read_json(stopped / "status.json")["status"] == "interrupted"
    shutil.copytree(tmp_path / "two", tmp_path / "one")

    done = torchrun("-m", "iwae_cli", *SHARED, f"output_dir={tmp_path / 'two'}")
    assert done.returncode == 0 and "goes on from step 20 of 26" in done.stderr and "not exact" not in done.stderr
    assert stopped.name == alone.name and processes(stopped) == 2
    assert nll(stopped) == pytest.approx(nll(alone), abs=ROUNDING) and nll(stopped) != nll(alone)
    assert curve(stopped) == pytest.approx(curve(alone), abs=ROUNDING)
    # Whoever looks at it later has not trained it.
    code, _, err = run(*SHARED, "evaluation.k=51", f"output_dir={tmp_path / 'two'}")
    assert code == 0 and "not exact" not in err and processes(stopped) == 2

    code, _, err = run(*SHARED, f"output_dir={tmp_path / 'one'}")
    assert code == 0 and "resuming is not exact: processes were 2 and are 1" in err
    (ended,) = run_folders(tmp_path / "one")
    assert processes(ended) == "2 until step 20, then 1" and nll(ended) == pytest.approx(nll(alone), abs=ROUNDING)


def test_a_rank_that_is_killed_ends_the_run_in_words(alone: Path, tmp_path: Path) -> None:
    Path("dying.py").write_text(DYING)
    done = torchrun("dying.py", *SHARED, f"output_dir={tmp_path}")
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1, done.stderr
    (folder,) = run_folders(tmp_path)
    status = read_json(folder / "status.json")
    # Whichever comes first: that the other is gone, or the signal that torchrun then sends to all.
    assert status["status"] in ("failed", "interrupted")
    if status["status"] == "failed":
        assert "another process of torchrun has ended" in done.stderr
    code, _, err = run(*SHARED, f"output_dir={tmp_path}")
    assert code == 0 and nll(folder) == pytest.approx(nll(alone), abs=ROUNDING), err


def test_a_helping_rank_without_memory_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Short:
        rank = 1

        def __init__(self, serial: object) -> None: ...

        def help(self) -> None:
            raise MemoryError

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "Ranks", Short)
    monkeypatch.setattr(ranks, "leave", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        cli.train([])
    err = capsys.readouterr().err
    assert err.startswith("iwae-train: memory ran out: ") and err.count("\n") == 1


@pytest.mark.parametrize(("loss", "shared"), [("iwae_cli.objectives.iwae.IWAE", True), ("own_loss.Mine", False)])
def test_a_loss_of_ones_own_is_not_shared(
    loss: str, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may couple the images of a minibatch."""
    asked: list[str] = []

    def ask(self: Ranks, task: object) -> None:
        asked.append("to train" if "follow" in repr(task) else "to evaluate")
        raise RunFailed("enough")

    monkeypatch.setattr(Ranks, "size", 2, raising=False)
    monkeypatch.setattr(Ranks, "ask", ask)
    monkeypatch.setattr(workers, "_ranks", Ranks.__new__(Ranks))
    Path("own_loss.py").write_text("from iwae_cli.objectives.iwae import IWAE\nclass Mine(IWAE):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("IWAE_ALLOW_TARGETS", "own_loss")
    assert run(*SHARED, f"objective._target_={loss}", f"output_dir={tmp_path}")[0] == 1
    assert asked == ["to train" if shared else "to evaluate"]
