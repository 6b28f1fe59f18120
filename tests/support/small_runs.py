"""Runs of about a second, for tests that need a run and not a good one; and what of a run must be equal bit for bit."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iwae_cli.cli import train as cli
from iwae_cli.cli.evaluate import evaluate as iwae_eval

TINY = (
    "model.latent_sizes=[3]",
    "model.hidden_sizes=[[8]]",
    "schedule=constant",
    "schedule.passes=2",
    "batch_size=100",
    "validation=smoke",
    "evaluation=smoke",
    "evaluation.k=50",
    "evaluation.splits=[test]",
    "evaluation.refine=0",
    "logger=disabled",
)
"""13 steps a pass on the digits."""
TINY_TWO_LAYERS = ("model=two_layer", "model.latent_sizes=[4,3]", "model.hidden_sizes=[[12],[8]]", *TINY[2:])

VARYING = ("seconds", "versions", "device", "git", "code")
"""Fields of result.json that two equal runs need not share."""


def last_of_each(*overrides: str) -> tuple[str, ...]:
    """Of several overrides of one key the last one: the command line refuses to choose."""
    return tuple({override.lstrip("+").partition("=")[0]: override for override in overrides}.values())


def run(*overrides: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``iwae-train`` in this process."""
    return _called(cli.train, last_of_each(*overrides))


def evaluate(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``iwae-eval`` in this process."""
    return _called(iwae_eval, map(str, arguments))


def _called(command: Callable[[list[str]], int], arguments: Iterable[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = command([*arguments])
    return code, out.getvalue(), err.getvalue()


def finished(output_dir: Path, *overrides: str) -> Path:
    """The folder of a run that ended well."""
    before = set(run_folders(output_dir))
    code, _, err = run(*overrides, f"output_dir={output_dir}")
    assert code == 0, err
    (folder,) = set(run_folders(output_dir)) - before
    return folder


def run_folders(output_dir: Path) -> list[Path]:
    return sorted(path.parent for path in output_dir.glob("*/config.yaml"))


def saved_step(folder: Path) -> int:
    """The step of a run's checkpoint; 0 where there is none."""
    path = folder / "checkpoint.pt"
    return int(torch.load(path, weights_only=True)["step"]) if path.exists() else 0


def read_json(path: Path) -> Any:
    """What a file holds; NaN and Infinity, which Python alone would read, are errors."""

    def refused(token: str) -> None:
        raise AssertionError(f"{path} holds {token}")

    return json.loads(path.read_text(), parse_constant=refused)


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


@cache
def wandb_records(offline_run: Path) -> list[dict[str, Any]]:
    """Return the records of a closed W&B run, read by wandb itself."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline_run)]
    read = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in read.stdout.splitlines()]


def _bits(value: Any) -> Any:
    """``value`` with every tensor as its bytes, so that == compares bits (and NaN equals NaN)."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _bits(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_bits(child) for child in value]
    return value


def bits(folder: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on interruptions, on the time of day or on other runs."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint.pop("seconds")
    result = read_json(folder / "result.json")
    return {
        "result": {key: value for key, value in result.items() if key not in VARYING},
        "status": read_json(folder / "status.json")["status"],
        "metrics.jsonl": (folder / "metrics.jsonl").read_bytes(),
        "metrics.csv": (folder / "metrics.csv").read_bytes(),
        "log_likelihood": {key: a.tobytes() for key, a in arrays(folder / "log_likelihood.npz").items()},
        "checkpoint": _bits(checkpoint),
        "best": _bits(torch.load(folder / "best.pt", weights_only=True)),
    }


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return modification time and content of every file but the lock, whose content changes with every command."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
