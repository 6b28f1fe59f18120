"""A training with a longer schedule starts from a finished one that is its beginning, and ends in the same bits."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from faults import Forks
from small_runs import TINY, bits, finished, last_of_each, run, run_folders, snapshot

from iwae_cli.training import trainer

BASE = last_of_each(
    *TINY, "device=cpu", "batch_size=400", "validation.every=2", "evaluation.weights=best", "optimizer.lr=0.01"
)


@pytest.fixture(autouse=True)
def often_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 2 of the 4 of every pass, and step 3 of a validated one."""
    monkeypatch.setattr(trainer, "EVERY", 2)


def command(choice: list[str]) -> tuple[str, ...]:
    schedule = [] if choice[0].startswith("schedule=") else ["schedule=constant"]
    return last_of_each(*(item for item in BASE if not item.startswith("schedule")), *schedule, *choice)


@pytest.mark.parametrize(
    ("shorter", "longer", "passes"),
    [
        (["schedule.passes=3"], ["schedule.passes=5"], 3),  # its last pass is validated, and here it is not
        (["schedule=burda", "schedule.stages=2"], ["schedule=burda", "schedule.stages=3"], 4),
        (["schedule.passes=1"], ["schedule=burda", "schedule.stages=2"], 1),
    ],
)
def test_it_ends_in_the_bits_of_an_uninterrupted_run(
    tmp_path: Path, shorter: list[str], longer: list[str], passes: int
) -> None:
    uninterrupted = bits(finished(tmp_path / "there", *command(longer)))
    old = finished(tmp_path / "here", *command(shorter))
    if passes == 4:  # another version may have named the parts otherwise, and a user the whole
        old = old.rename(old.with_name(f"mine-{old.name.rpartition('-')[2]}"))
    before = snapshot(old)
    code, _, err = run(*command(longer), f"output_dir={tmp_path / 'here'}")
    assert code == 0, err
    said = [line for line in err.splitlines() if line.startswith("starts from pass")]
    assert [line.split(",")[0] for line in said] == [f"starts from pass {passes} of {old.name}"]
    (new,) = set(run_folders(tmp_path / "here")) - {old}
    assert bits(new) == uninterrupted and snapshot(old) == before
    if passes == 1:
        code, _, err = run(*command(longer), f"output_dir={tmp_path / 'here'}", "restart=true", "evaluation.k=2")
        assert code == 0 and "starts from" not in err and "resumes" not in err, err


def test_another_schedule_or_seed_is_no_beginning(tmp_path: Path) -> None:
    for shorter in (["schedule=cosine", "schedule.passes=2"], ["schedule.passes=2", "seed=1"]):
        finished(tmp_path, *command(shorter))
    for longer in (["schedule=cosine", "schedule.passes=4"], ["schedule.passes=3"]):
        code, _, err = run(*command(longer), f"output_dir={tmp_path}")
        assert code == 0 and "starts from" not in err, err


def test_a_kill_while_it_is_copied_and_one_that_is_not_whole(tmp_path: Path, forks: Forks) -> None:
    longer = last_of_each(*BASE, "schedule.passes=4")
    uninterrupted = bits(finished(tmp_path / "there", *longer))
    output_dir = tmp_path / "here"
    three = finished(output_dir, *last_of_each(*BASE, "schedule.passes=3"))
    forks.start(longer, "kill", ["checkpoint.pt"], output_dir)
    code, printed = forks.end()
    assert (code, "starts from" in printed) == (-signal.SIGKILL, False), printed
    code, _, err = run(*longer, f"output_dir={output_dir}")
    assert code == 0 and f"starts from pass 3 of {three.name}" in err, err
    (longest,) = set(run_folders(output_dir)) - {three}
    assert bits(longest) == uninterrupted

    shutil.rmtree(longest)
    two = finished(output_dir, *last_of_each(*BASE, "schedule.passes=2"))
    (three / "previous-best.pt").unlink()  # the weights that were the best before the last pass
    code, _, err = run(*longer, f"output_dir={output_dir}")
    assert code == 0 and f"starts from pass 2 of {two.name}" in err, err
    (longest,) = set(run_folders(output_dir)) - {two, three}
    assert bits(longest) == uninterrupted


def test_runs_of_a_sweep_that_train_at_once_start_from_those_of_a_shorter_one(tmp_path: Path) -> None:
    def sweep(where: str, passes: int) -> str:
        line = ("-m", *BASE, f"schedule.passes={passes}", "seed=0,1", "hydra/launcher=batched")
        code, _, err = run(*line, f"output_dir={tmp_path / where}")
        assert code == 0, err
        return err

    sweep("there", 4)
    sweep("here", 2)
    assert sweep("here", 4).count("starts from pass 2 of ") == 2
    for folder in run_folders(tmp_path / "there"):
        assert bits(folder)["checkpoint"] == bits(tmp_path / "here" / folder.name)["checkpoint"]
