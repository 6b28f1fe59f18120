"""A run that is killed, interrupted or out of disk space ends with the same bits after the same command."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import RELEASE, Fault, Forks, fill_disk, interrupt, remove, rename, terminate
from small_runs import TINY_TWO_LAYERS, bits, finished, last_of_each, read_json, run, run_folders, saved_step, snapshot

from iwae_cli.training import checkpoint, trainer

STEPS_PER_PASS = 13
COMMAND = last_of_each(
    *TINY_TWO_LAYERS, "objective.gradient=dreg", "schedule.passes=3", "optimizer.lr=0.01", "device=cpu"
)


@pytest.fixture(scope="session")
def once() -> dict[str, Any]:
    return {}


@pytest.fixture
def reference(once: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The bits of the undisturbed run."""
    if not once:
        once.update(bits(finished(tmp_path / "undisturbed", *COMMAND)))
    return once


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    return tmp_path / "disturbed"


def command(output_dir: Path, *overrides: str) -> tuple[int, str, str]:
    return run(*COMMAND, f"output_dir={output_dir}", *overrides)


def only_folder(output_dir: Path) -> Path:
    (folder,) = run_folders(output_dir)
    return folder


def finish(output_dir: Path, *overrides: str) -> Path:
    """The run folder after the same command has run to its end."""
    step = saved_step(only_folder(output_dir)) if run_folders(output_dir) else 0
    for leftover in output_dir.glob("*/evaluations/*/.tmp-*"):
        os.utime(leftover, (0, 0))  # a recent one may belong to a living iwae-eval
    code, _, err = command(output_dir, *overrides)
    assert code == 0, err
    assert (f"from step {step}" in err) == (0 < step < 39)
    folder = only_folder(output_dir)
    assert not list(folder.rglob(".tmp-*"))
    status = read_json(folder / "status.json")
    assert (status["status"], status["error"]) == ("finished", None)
    return folder


def check_whole(folder: Path) -> None:
    """Every file of the run is absent or whole, except temporary ones."""
    for path in folder.rglob("*"):
        if path.name.startswith(".tmp-"):
            continue
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".npz":
            with np.load(path) as file:
                assert all(np.isfinite(file[key]).any() for key in file.files)
        elif path.suffix == ".jsonl":
            assert [json.loads(line)["pass"] for line in path.read_text().splitlines()] in ([], [1], [1, 2], [1, 2, 3])


# A row is a moment, its events (see ``faults``), and the step that is saved after the fault. The rows of a table follow
# each other in one folder: the same command meets one fault after another, gets further each time, and then finishes.

KILLS = [
    ("in the first pass", ["checkpoint.pt"] * 5, 4),
    ("between the best weights and the checkpoint", ["best.pt", "checkpoint.pt"], 12),
    ("after pass 2 was recorded", ["best.pt", "best.pt", "checkpoint.pt"], 25),
    ("in the evaluation", ["evaluations/*/log_likelihood.npz"], 39),
    ("between the arrays and the numbers of the evaluation", ["evaluations/*/result.json"], 39),
    ("in the publication", ["log_likelihood.npz"], 39),
    ("between the arrays and the result", ["result.json"], 39),
    ("while figures are drawn", ["figures/samples.png"], 39),
    ("before the status", ["metrics.csv", "status.json"], 39),
]


def test_kill_9_at_every_moment(output_dir: Path, forks: Forks, reference: dict[str, Any]) -> None:
    """The first one comes from outside, while ``iwae-train`` is in any pass."""
    process = subprocess.Popen(
        [sys.executable, "-m", "iwae_cli", *COMMAND, f"output_dir={output_dir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        wait_for(lambda: list(output_dir.glob("*/best.pt")))
    finally:
        process.kill()
        process.communicate()
    folder = only_folder(output_dir)
    check_whole(folder)
    assert (process.returncode, read_json(folder / "status.json")["status"]) == (-signal.SIGKILL, "running")
    assert not (folder / "result.json").exists()
    (folder / "checkpoint.pt").unlink(missing_ok=True)  # there is one if the kill came late

    for name, events, step in KILLS:
        forks.start(COMMAND, "kill", events, output_dir)
        code, printed = forks.end()
        assert code == -signal.SIGKILL, (name, printed)
        check_whole(folder)
        assert (saved_step(folder), read_json(folder / "status.json")["status"]) == (step, "running"), name
    assert bits(finish(output_dir)) == reference


SIGNALS = [
    ("in the first pass", interrupt, ["checkpoint.pt"] * 5, 6),
    ("while pass 1 is validated", terminate, ["check"], 13),
    ("after the last step, while it is validated", terminate, ["best.pt", "best.pt", "check"], 39),
    ("in the evaluation", interrupt, ["checkpoint.pt", "check", "check"], 39),
]


def test_a_signal_at_every_moment(output_dir: Path, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fault, events, step in SIGNALS:
        with monkeypatch.context() as patch, Fault(fault, events, output_dir):
            if step < STEPS_PER_PASS:
                patch.setattr(trainer, "SAVE_EVERY_SECONDS", -1.0)
            code, out, err = command(output_dir, *(["restart=true"] if step == 6 else []))
        same = "the same command without restart=true" if step == 6 else "the same command"
        assert f"{same} resumes from there" in err
        assert (code, out) == (130 if fault is interrupt else 143, ""), (name, err)
        folder = only_folder(output_dir)
        check_whole(folder)
        status = read_json(folder / "status.json")
        assert (status["status"], status["step"], saved_step(folder)) == ("interrupted", step, step), name
        assert not (folder / "result.json").exists()
    code, _, err = command(output_dir)
    assert code == 0 and "metrics.jsonl" not in err, err
    assert bits(only_folder(output_dir)) == reference


FULL_DISK = [
    ("in training", ["best.pt"]),
    ("in the evaluation", ["evaluations/*/log_likelihood.npz"]),
    ("in the publication", ["log_likelihood.npz"]),
    ("while figures are drawn", ["figures/samples.png"]),
    ("in the table of metrics", ["metrics.csv"]),
]


def test_a_full_disk_at_every_moment(output_dir: Path, reference: dict[str, Any]) -> None:
    for name, events in FULL_DISK:
        with Fault(fill_disk, events, output_dir):
            code, out, err = command(output_dir)
        folder = only_folder(output_dir)
        line = err.splitlines()[-1]
        assert (code, out) == (1, ""), (name, err)
        assert all(part in line for part in (folder.name[-8:], "No space left on device", "output_dir=")), line
        check_whole(folder)
        assert not list(folder.rglob(".tmp-*"))
        assert read_json(folder / "status.json")["status"] == "running", name
    assert bits(finish(output_dir)) == reference


@pytest.mark.parametrize(("fault", "left"), [(rename, ["renamed"]), (remove, [])])
def test_a_folder_that_is_gone_is_not_created_again(output_dir: Path, fault: Any, left: list[str]) -> None:
    with Fault(fault, ["best.pt"], output_dir):
        code, _, err = command(output_dir)
    assert code == 1
    assert str(output_dir) in err.splitlines()[-1] and "Traceback" not in err
    assert [path.name for path in output_dir.iterdir()] == left


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_second_process_is_refused_and_sigterm_saves(output_dir: Path, forks: Forks) -> None:
    process = forks.start(COMMAND, "hang", ["checkpoint.pt"] * 20, output_dir)
    wait_for((output_dir / "hanging").exists)
    status = read_json(only_folder(output_dir) / "status.json")
    assert (status["status"], status["pid"]) == ("running", process)
    code, _, err = command(output_dir)
    assert code == 3 and f"process {process}" in err and len(err.splitlines()) == 1

    os.kill(process, signal.SIGTERM)
    (output_dir / RELEASE).touch()
    code, printed = forks.end()
    assert code == 143 and "Traceback" not in printed, printed
    assert saved_step(only_folder(output_dir)) == 21
    assert read_json(only_folder(output_dir) / "status.json")["status"] == "interrupted"


def test_a_second_ctrl_c_terminates_immediately(output_dir: Path, forks: Forks) -> None:
    """Two within ``REPEATED_SECONDS`` count as one; later the second one is like a kill."""
    process = forks.start(COMMAND, "hang", ["checkpoint.pt"] * 5, output_dir)
    wait_for((output_dir / "hanging").exists)
    for _ in range(2):
        os.kill(process, signal.SIGINT)
        time.sleep(0.1)
    os.kill(process, 0)
    time.sleep(1)
    os.kill(process, signal.SIGINT)
    code, printed = forks.end()
    assert (code, "Traceback" in printed) == (-signal.SIGINT, False)
    assert saved_step(only_folder(output_dir)) == 4


# A checkpoint in other circumstances.


@pytest.fixture(scope="session")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("partial")


@pytest.fixture
def interrupted(output_dir: Path, partial: Path) -> Path:
    """A copy of a run interrupted at step 20."""
    if not run_folders(partial):
        with pytest.MonkeyPatch.context() as patch, Fault(interrupt, ["checkpoint.pt"] * 20, partial):
            patch.setattr(trainer, "SAVE_EVERY_SECONDS", -1.0)
            assert command(partial)[0] == 130
    shutil.copytree(partial, output_dir)
    return only_folder(output_dir)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def fill_with_nan(path: Path) -> None:
    """As versions before 0.5 could save it."""
    state = torch.load(path, weights_only=True)
    for value in state["model"].values():
        value.fill_(math.nan)
    torch.save(state, path)


@pytest.mark.parametrize("damage", [cut, Path.unlink, fill_with_nan])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(
    interrupted: Path, output_dir: Path, reference: dict[str, Any], damage: Callable[[Path], None]
) -> None:
    path = interrupted / "checkpoint.pt"
    damage(path)
    code, _, err = command(output_dir)
    assert code == 0 and "from step 20 " in err, err
    (line,) = (line for line in (interrupted / "train.log").read_text().splitlines() if str(path) in line)
    assert "step 21" in line and "step 20" in line
    assert bits(interrupted) == reference
    assert [file.name for file in interrupted.glob("*checkpoint*")] == ["checkpoint.pt"]


def test_a_run_that_diverges_keeps_its_last_good_state(
    output_dir: Path, forks: Forks, reference: dict[str, Any]
) -> None:
    """A checkpoint is due after every step; the second step diverges, in another process and in this one."""
    diverging = last_of_each(*COMMAND, "optimizer.lr=3")
    for already in (0, 1):
        forks.start(diverging, "kill", ["never"], output_dir)
        code, printed = forks.end()
        assert code == 1 and ("resumes from step 1 of 39" in printed) == already, printed
        line = printed.splitlines()[-1]
        assert len(line) <= 300 and "diverged in pass 1 at step 2: non-finite gradient of p" in line, line
        assert "the same command resumes from step 1" in line and "smaller optimizer.lr" in line
        folder = only_folder(output_dir)
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert saved["step"] == 1 and all(value.isfinite().all() for value in saved["model"].values())
        assert read_json(folder / "status.json")["status"] == "failed"
    code, _, err = command(output_dir)
    assert code == 0, err
    (other,) = set(run_folders(output_dir)) - {folder}
    assert bits(other) == reference


def test_a_damaged_checkpoint_is_one_line_and_its_advice_works(
    interrupted: Path, output_dir: Path, reference: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = interrupted / "checkpoint.pt"
    for damaged in (path, checkpoint.previous(path)):
        damaged.write_bytes(damaged.read_bytes()[:1000])
    before = snapshot(interrupted)
    code, _, err = command(output_dir)
    assert code == 2
    (line,) = err.splitlines()
    # The middle of a path gives way where a line would have more than 300 characters.
    assert str(path)[:20] in line and str(path)[-20:] in line and "it is damaged" in line and "restart=true" in line
    assert snapshot(interrupted) == before

    code, _, err = command(output_dir, "restart=true")
    assert code == 0, err
    aside = interrupted.with_name(f"{interrupted.name}.old-1")
    assert snapshot(aside) == before
    assert aside.name in caplog.text
    assert bits(interrupted) == reference


def test_another_place_and_other_threads_give_the_same_bits(
    interrupted: Path, tmp_path: Path, reference: dict[str, Any]
) -> None:
    """The number of threads, which may change bits, is decided when a run begins."""
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    os.rename(interrupted, moved / interrupted.name)
    assert bits(finish(moved, "device.threads=2")) == reference


def test_another_version_and_lost_rows_are_reported(
    interrupted: Path, output_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights do not depend on the rows."""
    state = torch.load(interrupted / "checkpoint.pt", weights_only=True)
    state["plan"]["torch"] = "2.0.0"
    torch.save(state, interrupted / "checkpoint.pt")
    rows = interrupted / "metrics.jsonl"
    rows.write_bytes(b'{"step": 13, "pa')
    code, _, err = command(output_dir)
    assert code == 0, err
    assert any("2.0.0" in line and torch.__version__ in line for line in caplog.messages)
    for text in (err, (interrupted / "train.log").read_text()):
        assert any("metrics.jsonl" in line and "pass 1" in line for line in text.splitlines())
    assert [json.loads(line)["step"] for line in rows.read_text().splitlines()] == [26, 39]
