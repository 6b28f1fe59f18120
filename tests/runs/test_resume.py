"""T11: a run that is killed or interrupted, wherever that was, ends as if nothing had happened, bit for bit.

The first part of a run is another process, which is really killed; the same command then goes on in this one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TINY_TWO_LAYERS, bits, finished, last_of_each, read_json, run, run_folders, snapshot

from iwae_cli.runs.runner import Runner

STEPS_PER_PASS = 13
COMMAND = last_of_each(*TINY_TWO_LAYERS, "objective.gradient=dreg", "schedule.passes=3", "optimizer.lr=0.01")

SLOW = """
import os, signal, sys, time
from iwae_cli.cli import train as cli
from iwae_cli.runs import runner
from iwae_cli.training import trainer

save_every, pause, point = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
trainer.SAVE_EVERY_SECONDS = save_every

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

original_on_step = runner.Runner.on_step
def on_step(self, step):
    original_on_step(self, step)
    time.sleep(pause)
runner.Runner.on_step = on_step

if point == "after pass 2 was recorded":
    original_on_pass = runner.Runner.on_pass
    def on_pass(self, step, metrics):
        original_on_pass(self, step, metrics)
        if step == 26:
            die()
    runner.Runner.on_pass = on_pass
elif point == "while a checkpoint is written":
    from pathlib import Path
    original_write, written = Path.write_bytes, []
    def write_bytes(path, data):
        if path.name.endswith("-checkpoint.pt"):
            written.append(path)
            if len(written) == 20:
                original_write(path, data[:1000])
                die()
        original_write(path, data)
    Path.write_bytes = write_bytes
elif point == "while it is evaluated":
    from iwae_cli.runs import evaluate as result
    result.summarize = die
elif point != "from outside":
    raise SystemExit(f"no point {point!r}")
sys.exit(cli.train(sys.argv[4:]))
"""


class Started:
    """The command in another process, with ``pause`` seconds more a step."""

    def __init__(self, output_dir: Path, *, point: str = "from outside", save_every: float = 1e9, pause: float = 0.0):
        arguments = [str(save_every), str(pause), point, *COMMAND, f"output_dir={output_dir}"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.output_dir = output_dir

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Until ``condition`` holds of status.json."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.communicate()[1]
            for folder in run_folders(self.output_dir):
                if (folder / "status.json").exists() and condition(status := read_json(folder / "status.json")):
                    return dict(status)
            time.sleep(0.005)
        raise AssertionError("nothing happened for two minutes")

    def end(self) -> tuple[int, str]:
        """Exit code and standard error."""
        _, err = self.process.communicate(timeout=120)
        return self.process.returncode, err

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Any:
    started: list[Started] = []

    def begin(**arguments: Any) -> Started:
        started.append(Started(tmp_path / "interrupted", **arguments))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


_reference: dict[str, Any] = {}


@pytest.fixture
def reference(tmp_path: Path) -> dict[str, Any]:
    """The run that nobody disturbed."""
    if not _reference:
        _reference.update(bits(finished(tmp_path / "undisturbed", *COMMAND)))
    return _reference


def only_folder(tmp_path: Path) -> Path:
    (folder,) = run_folders(tmp_path / "interrupted")
    return folder


def saved_step(folder: Path) -> int:
    return int(torch.load(folder / "checkpoint.pt", weights_only=True)["step"])


def go_on(tmp_path: Path) -> Path:
    checkpoints = list((tmp_path / "interrupted").glob("*/checkpoint.pt"))
    step = saved_step(checkpoints[0].parent) if checkpoints else 0
    code, _, err = run(*COMMAND, f"output_dir={tmp_path / 'interrupted'}")
    assert code == 0, err
    assert (f"goes on from step {step} of 39" in err) == (0 < step < 39)
    return only_folder(tmp_path)


def test_the_reference_has_something_to_lose(reference: dict[str, Any]) -> None:
    assert reference["result"]["steps"] == 3 * STEPS_PER_PASS
    assert len(reference["metrics.jsonl"].splitlines()) == 3
    assert reference["checkpoint"]["best"]["step"] in (26, 39)


def test_killed_in_the_middle_of_a_pass_again_and_again(tmp_path: Path, start: Any, reference: dict[str, Any]) -> None:
    """SIGKILL from outside, once in the first pass and once in the second, at whatever the process is doing then."""
    steps = []
    for first in (3, 16):
        process = start(save_every=0.05, pause=0.02)
        process.wait_for(lambda status, first=first: status["step"] >= first)
        process.kill()
        steps.append(saved_step(only_folder(tmp_path)))
        assert read_json(only_folder(tmp_path) / "status.json")["status"] == "running"
        assert not (only_folder(tmp_path) / "result.json").exists()
    assert 3 <= steps[0] < steps[1] < 39
    assert any(step % STEPS_PER_PASS for step in steps), steps
    assert bits(go_on(tmp_path)) == reference


@pytest.mark.parametrize(
    ("point", "step", "rows"),
    [
        ("after pass 2 was recorded", 25, 2),
        ("while a checkpoint is written", 19, 1),
        ("while it is evaluated", 39, 3),
    ],
)
def test_killed_where_it_hurts(
    point: str, step: int, rows: int, tmp_path: Path, start: Any, reference: dict[str, Any]
) -> None:
    """Between two files that belong together: the newer one must not count."""
    assert start(point=point, save_every=-1.0).end()[0] == -signal.SIGKILL
    folder = only_folder(tmp_path)
    assert saved_step(folder) == step
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == rows
    if point == "after pass 2 was recorded":
        assert torch.load(folder / "best.pt", weights_only=True)["step"] == 26
    assert bits(go_on(tmp_path)) == reference
    assert not list(folder.glob(".tmp-*"))


def check_interrupted(folder: Path) -> None:
    status = read_json(folder / "status.json")
    assert (status["status"], status["step"]) == ("interrupted", saved_step(folder))
    assert status["step"] % STEPS_PER_PASS and not (folder / "result.json").exists()


def test_sigterm_ends_it_and_a_second_process_is_told_who_has_the_run(
    tmp_path: Path, start: Any, reference: dict[str, Any]
) -> None:
    # Half a second a step: longer in all than the second process takes to begin, whatever else the machine does.
    process = start(pause=0.5)
    status = process.wait_for(lambda status: status["status"] == "running")
    assert status["pid"] == process.process.pid

    second, _, err = run(*COMMAND, f"output_dir={tmp_path / 'interrupted'}")
    assert second == 3
    assert f"process {process.process.pid}" in err and len(err.strip().splitlines()) == 1

    process.process.send_signal(signal.SIGTERM)
    ended, err = process.end()
    assert ended == 143, err
    assert "Traceback" not in err
    check_interrupted(only_folder(tmp_path))
    assert bits(go_on(tmp_path)) == reference
    assert read_json(only_folder(tmp_path) / "status.json")["error"] is None


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interrupted")


@pytest.fixture
def interrupted(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run stopped by Ctrl-C at step 20, in this process: for what needs a checkpoint and not a death."""
    if not run_folders(template):
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "on_step", lambda self, step: step == 20 and signal.raise_signal(signal.SIGINT))
            code, _, err = run(*COMMAND, f"output_dir={template}")
        assert code == 130, err
    shutil.copytree(template, tmp_path / "interrupted")
    return only_folder(tmp_path)


def test_ctrl_c_ends_it_after_the_step(interrupted: Path, tmp_path: Path, reference: dict[str, Any]) -> None:
    check_interrupted(interrupted)
    assert saved_step(interrupted) == 20
    assert bits(go_on(tmp_path)) == reference


def test_a_damaged_checkpoint_is_one_line_and_nothing_is_lost(interrupted: Path, tmp_path: Path) -> None:
    path = interrupted / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    before = snapshot(interrupted)
    code, _, err = run(*COMMAND, f"output_dir={tmp_path / 'interrupted'}")
    assert code == 2
    (line,) = err.strip().splitlines()
    assert str(path) in line and "restart=true" in line
    assert snapshot(interrupted) == before


def test_what_a_damaged_checkpoint_advises_works(
    interrupted: Path, tmp_path: Path, reference: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (interrupted / "checkpoint.pt").write_bytes(b"rubbish")
    before = snapshot(interrupted)
    code, _, err = run(*COMMAND, f"output_dir={tmp_path / 'interrupted'}", "restart=true")
    assert code == 0, err
    aside = interrupted.with_name(f"{interrupted.name}.old-1")
    assert snapshot(aside) == before
    assert aside.name in caplog.text
    assert bits(interrupted) == reference


def test_a_checkpoint_of_another_run_is_refused(interrupted: Path, tmp_path: Path) -> None:
    state = torch.load(interrupted / "checkpoint.pt", weights_only=True)
    torch.save(state | {"identity": "digits-4567"}, interrupted / "checkpoint.pt")
    code, _, err = run(*COMMAND, f"output_dir={tmp_path / 'interrupted'}")
    assert code == 2
    assert f"is a checkpoint of digits-4567, not of {interrupted.name}" in err


def test_a_folder_that_was_moved_goes_on_there(interrupted: Path, tmp_path: Path, reference: dict[str, Any]) -> None:
    """output_dir is no part of the identity."""
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    os.rename(interrupted, moved / interrupted.name)
    code, _, err = run(*COMMAND, f"output_dir={moved}")
    assert code == 0, err
    assert bits(moved / interrupted.name) == reference


def test_other_threads_do_not_make_it_another_number(
    interrupted: Path, tmp_path: Path, reference: dict[str, Any]
) -> None:
    """The number of threads is decided when a run begins, because it may change bits."""
    code, _, err = run(*COMMAND, f"output_dir={tmp_path / 'interrupted'}", "device.threads=2")
    assert code == 0, err
    assert bits(interrupted) == reference


def test_going_on_with_another_version_says_that_it_is_not_exact(
    interrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = torch.load(interrupted / "checkpoint.pt", weights_only=True)
    state["plan"]["torch"] = "2.0.0"
    torch.save(state, interrupted / "checkpoint.pt")
    code, _, err = run(*COMMAND, f"output_dir={tmp_path / 'interrupted'}")
    assert code == 0, err
    assert f"resuming is not exact: torch was 2.0.0 and is {torch.__version__}" in caplog.text


@pytest.mark.parametrize("left", [None, b"", b'{"step": 13, "pa'])
def test_rows_that_are_lost_are_told(interrupted: Path, left: bytes | None, tmp_path: Path) -> None:
    """Deleted by hand, or the tail that a crash took; the weights do not come from them."""
    rows = interrupted / "metrics.jsonl"
    rows.unlink() if left is None else rows.write_bytes(left)
    code, _, err = run(*COMMAND, f"output_dir={tmp_path / 'interrupted'}")
    assert code == 0, err
    said = "metrics.jsonl has no row of 1 of the 1 passes that are done, the first of them pass 1"
    assert said in err and said in (interrupted / "train.log").read_text()
    assert [json.loads(line)["step"] for line in rows.read_text().splitlines()] == [26, 39]
    assert read_json(interrupted / "result.json")["status"] == "finished"
