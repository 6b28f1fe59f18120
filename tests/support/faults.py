"""Faults at chosen moments of a run, in this process or in a forked one.

A moment is a sequence of events; the fault comes with the last of them. An event is ``"check"`` (validation or
evaluation asks whether a signal has arrived) or the path, relative to the run folder and with wildcards, of a file that
is about to be renamed into place.

Run as a program this file is the server of ``Forks``: it imports torch once and forks for every run.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

RELEASE = "release"
"""File in the output folder that ends ``hang``."""


def kill(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(folder: Path) -> None:
    signal.raise_signal(signal.SIGINT)


def terminate(folder: Path) -> None:
    signal.raise_signal(signal.SIGTERM)


def fill_disk(folder: Path) -> None:
    """From here on nothing reaches the disk."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = full
    full()


def rename(folder: Path) -> None:
    folder.rename(folder.with_name("renamed"))


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def hang(folder: Path) -> None:
    """Wait, longer than any test, for the file ``RELEASE``."""
    (folder.parent / "hanging").touch()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (folder.parent / RELEASE).exists():
        time.sleep(0.01)


FAULTS = {fault.__name__: fault for fault in (kill, interrupt, terminate, fill_disk, rename, remove, hang)}


class Fault:
    """While entered, ``fault(run folder)`` is called when the last of ``events`` happens under ``output_dir``.

    Attributes:
        left: events that have not happened yet.
    """

    def __init__(self, fault: Callable[[Path], None], events: Sequence[str], output_dir: Path) -> None:
        self.left = list(events)
        self._fault = fault
        self._output_dir = output_dir

    def _happens(self, event: str) -> None:
        if self.left and fnmatch(event, self.left[0]):
            self.left.pop(0)
            if not self.left:
                (folder,) = (path.parent for path in self._output_dir.glob("*/config.yaml"))
                self._fault(folder)

    def __enter__(self) -> Fault:
        from iwae_cli.core.signals import Signals

        self._before = os.replace, os.fsync, Signals.check

        def replace(source: Any, target: Any) -> None:
            path = Path(target)
            if path.is_relative_to(self._output_dir):
                self._happens("/".join(path.relative_to(self._output_dir).parts[1:]))
            self._before[0](source, target)

        def check(signals: Signals, *arguments: object) -> None:
            self._happens("check")
            self._before[2](signals, *arguments)

        os.replace, Signals.check = replace, check
        return self

    def __exit__(self, *_: object) -> None:
        from iwae_cli.core.signals import Signals

        os.replace, os.fsync, Signals.check = self._before


DYING = """
import os, signal, sys
from iwae_cli.cli import train as cli
from iwae_cli.runs import runner
from iwae_cli.training import trainer

step, seed, *command = sys.argv[1:]
def on_step(self, done):
    if done == int(step) and self.experiment.seed == int(seed):
        os.kill(os.getpid(), signal.SIGKILL)
runner.Runner.on_step = on_step
trainer.SAVE_EVERY_SECONDS = -1.0
sys.exit(cli.train(command))
"""


def killed_at(step: int, command: Sequence[str], seed: int = 0) -> None:
    """Run ``iwae-train`` in a new process, which saves every step; kill it when the run of a seed has taken a step."""
    arguments = [sys.executable, "-c", DYING, str(step), str(seed), *command]
    process = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert process.returncode == -signal.SIGKILL, process.stderr


class Forks:
    """Runs of ``iwae-train`` in forked processes, one at a time."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def start(self, command: Sequence[str], fault: str, events: Sequence[str], output_dir: Path) -> int:
        """Start a run that meets ``fault``; return its process id."""
        if self._server is None:
            # Neither autograd nor CUDA may be forked once it has started threads for a GPU.
            env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
            self._server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
            )
        self._log = output_dir.with_name("forked.log")
        request = {"command": [*command, f"output_dir={output_dir}"], "fault": fault, "events": list(events)}
        assert self._server.stdin is not None
        print(json.dumps(request | {"output_dir": str(output_dir), "log": str(self._log)}), file=self._server.stdin)
        self._server.stdin.flush()
        return self._answer()

    def end(self) -> tuple[int, str]:
        """Wait for the run; return its exit code and what it printed."""
        return self._answer(), self._log.read_text()

    def _answer(self) -> int:
        assert self._server is not None and self._server.stdout is not None
        return int(self._server.stdout.readline())

    def close(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.communicate()


def _serve() -> None:
    from small_runs import TINY, finished

    # Import everything that a run imports before the forks.
    with tempfile.TemporaryDirectory() as folder:
        finished(Path(folder), *TINY)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(**request)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(command: list[str], fault: str, events: list[str], output_dir: str, log: str) -> None:
    from iwae_cli.cli import train as cli
    from iwae_cli.core import signals
    from iwae_cli.training import trainer

    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        trainer.SAVE_EVERY_SECONDS = -1.0
        signals.REPEATED_SECONDS = 0.5
        with Fault(FAULTS[fault], events, Path(output_dir)):
            code = cli.train(command)
        sys.stdout.flush()
        os._exit(code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)


if __name__ == "__main__":
    _serve()
