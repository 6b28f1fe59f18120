"""Several processes that share an evaluation give the numbers of one, bit for bit, and rank 0 alone prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import TINY, bits, finished, last_of_each, read_json, run, run_folders

from iwae_cli.cli import train as cli
from iwae_cli.evaluation import distributed as ranks

LINE = last_of_each(
    *TINY, "schedule.passes=1", "evaluation.rows=64", "evaluation.splits=[validation,test]", "evaluation.refine=30"
)
COUNTING = """
import os, signal, sys
from iwae_cli.evaluation import proposals, workers
from iwae_cli.cli import train as cli
proposals.STEPS = 30
before = workers.map_here
def counted(work, batches, workers, on_progress=None):
    if os.environ["RANK"] == "1" and "dies" in sys.argv[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    with open(f"rank-{os.environ['RANK']}", "a") as file:
        print(len(batches), file=file)
    return before(work, batches, workers, on_progress)
workers.map_here = counted
sys.exit(cli.train())
"""


REFUSING = """
import os, sys
from iwae_cli.evaluation import likelihood
from iwae_cli.cli import train as cli
class Odd(ValueError):
    def __init__(self, what, wanted):  # cannot be unpickled
        super().__init__(f"{what} must be {wanted}")
def refused(*arguments):
    if os.environ["RANK"] == failing:
        raise Odd("scale", "positive")
    return fitted(*arguments)
failing, fitted, likelihood.refine = sys.argv[1], likelihood.refine, refused
sys.exit(cli.train(sys.argv[2:]))
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iwae_cli.evaluation.proposals.STEPS", 30)
        return finished(tmp_path_factory.mktemp("alone"), *LINE)


def test_two_ranks_give_the_bits_of_one(alone: Path, tmp_path: Path) -> None:
    Path("counting.py").write_text(COUNTING)
    done = torchrun("counting.py", *LINE, f"output_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    (together,) = run_folders(tmp_path / "two")
    assert bits(together) == bits(alone)
    assert done.stdout.count(alone.name) == 2, "its table, once: name and folder"
    shares = [[int(line) for line in Path(f"rank-{rank}").read_text().split()] for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) >= 4, "validation twice, test, active units twice"
    assert all(0 <= first - second <= 1 for first, second in zip(*shares, strict=True))


@pytest.mark.usefixtures("coarse")
def test_a_killed_rank_ends_the_run_with_a_message_and_the_run_resumes(alone: Path, tmp_path: Path) -> None:
    Path("dies.py").write_text(COUNTING)
    done = torchrun("dies.py", *LINE, f"output_dir={tmp_path / 'two'}")
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1, done.stderr
    (folder,) = run_folders(tmp_path / "two")
    status = read_json(folder / "status.json")
    # Either that the other rank is gone, or the signal that torchrun then sends to all.
    assert status["status"] in ("failed", "interrupted")
    code, _, err = run(*LINE, f"output_dir={tmp_path / 'two'}")
    assert code == 0 and bits(folder) == bits(alone), err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_on_one_rank_is_that_of_all(rank: str, tmp_path: Path) -> None:
    """Refined proposals that do not serve are left out: no rank may then wait for another for ever."""
    Path("refusing.py").write_text(REFUSING)
    done = torchrun("refusing.py", rank, *LINE, "evaluation.refine=30", f"output_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    (folder,) = run_folders(tmp_path / "two")
    result = read_json(folder / "result.json")
    assert result["test"]["nll"] > 0 and result["test"]["gap_q"] is None
    assert "Odd: scale must be positive" in result["reasons"]["test.gap_q"]


def test_a_sweep_is_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of one process")
    code, _, err = run("-m", "seed=0,1")
    assert code == 2 and "torchrun" in err


def test_a_serving_rank_without_memory_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Short:
        rank = 1

        def __init__(self, serial: object) -> None: ...

        def serve(self) -> None:
            raise MemoryError

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "Ranks", Short)
    monkeypatch.setattr(ranks, "leave", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        cli.train([])
    err = capsys.readouterr().err
    assert err.startswith("iwae-train: ") and err.count("\n") == 1
