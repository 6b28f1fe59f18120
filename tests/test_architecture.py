"""Who may import whom. A new module gets its floor here; a broken floor fails with file and line."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from iwae_cli.numerics import log_mean_exp
from iwae_cli.particles import Particles

PACKAGE = Path(__file__).resolve().parents[1] / "iwae_cli"

# A module imports lower floors and its own room. On the ground floor neighbours are free too.
FLOORS = {
    "errors": 0,
    "files": 0,
    "identity": 0,
    "signals": 0,
    "noise": 0,
    "numerics": 0,
    "particles": 0,
    "run_folder": 0,
    "console": 0,
    "streams": 0,
    "sweep": 0,
    "sinks": 0,
    "report": 0,
    "objectives": 1,
    "models": 1,
    "data": 1,
    "device": 1,
    "evaluation": 2,
    "training": 2,
    "construct": 2,  # it names classes of every room by their dotted names
    "experiment": 3,
    "cli": 4,
    "cli_report": 4,
    "__init__": 5,
    "__main__": 5,
}
LIGHT = {"cli", "cli_report", "__init__", "__main__"}
# Files that share a room without sharing a folder.
PART_OF = {
    "cli_compose": "cli",
    "cli_help": "cli",
    "cli_search": "cli",
    "result": "experiment",
    "session": "experiment",
    "together": "experiment",
}
NO_TORCH = {"sinks", "report", "cli_report", "files", "identity", "run_folder", "console", "streams", "sweep"}
TORCH = {"torch", "torchvision"}
HEAVY = {"torch", "torchvision", "wandb", "numpy", "scipy", "sklearn", "matplotlib"}


class Import:
    """One imported name: where it stands, what it is, and whether it is carried out when the module is imported."""

    def __init__(self, line: int, target: str, eager: bool) -> None:
        self.line, self.target, self.eager = line, target, eager
        self.top, *rest = target.split(".")
        self.room = room(rest[0]) if self.top == "iwae_cli" and rest else None


def imports(file: Path, package: Path) -> Iterator[Import]:
    def visit(node: ast.AST, eager: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(node.lineno, name.name, eager)
        elif isinstance(node, ast.ImportFrom):
            inside = ["iwae_cli", *file.relative_to(package).parts[:-1]]
            base = ".".join(inside[: len(inside) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for name in node.names:
                yield Import(node.lineno, f"{source}.{name.name}", eager)
        else:
            late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            )
            for child in ast.iter_child_nodes(node):
                yield from visit(child, eager and not late)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), True)


def room(name: str) -> str:
    name = name.removesuffix(".py")
    return PART_OF.get(name, name)


def room_of(file: Path, package: Path) -> str:
    return room(file.relative_to(package).parts[0])


def needs(heavy: set[str], package: Path, *, eager: bool) -> set[str]:
    """Rooms that import something of ``heavy``, themselves or through another one; ``eager``: as soon as imported."""
    uses: dict[str, set[str]] = {}
    for file in package.rglob("*.py"):
        found = {i.room or i.top for i in imports(file, package) if i.eager or not eager}
        uses.setdefault(room_of(file, package), set()).update(found)
    rooms = {room for room, found in uses.items() if found & heavy}
    while more := {room for room, found in uses.items() if found & rooms} - rooms:
        rooms |= more
    return rooms


def broken(package: Path) -> list[str]:
    """Every rule of the house that a file breaks, as ``file:line: why``."""
    faults = []
    with_torch, slow = needs(TORCH, package, eager=False), needs(HEAVY, package, eager=True)
    for file in sorted(package.rglob("*.py")):
        relative, own = file.relative_to(package).as_posix(), room_of(file, package)
        if own not in FLOORS:
            faults.append(f"{relative}:1: {own} has no floor")
            continue
        floor = FLOORS[own]
        for i in imports(file, package):
            fault = None
            if i.room is not None and i.room not in FLOORS:
                # A name of the package itself: __version__ is free, load is a door to the third floor.
                if i.room == "load" and floor <= FLOORS["experiment"]:
                    fault = "may not import iwae_cli.load"
                elif i.room not in ("__version__", "load"):
                    fault = f"{i.room} has no floor"
            elif i.room is not None and i.room != own and FLOORS[i.room] >= floor and (FLOORS[i.room] or floor):
                fault = f"{own} (floor {floor}) may not import {i.room} (floor {FLOORS[i.room]})"
            elif own in NO_TORCH and (i.top in TORCH or i.room in with_torch - {own}):
                fault = f"{own} must do without torch"
            elif i.top in ("hydra", "omegaconf") and relative not in ("cli.py", "cli_compose.py"):
                fault = "only cli.py and cli_compose.py import hydra and omegaconf"
            elif i.top == "wandb" and (relative != "sinks/wandb.py" or i.eager):
                fault = "only sinks/wandb.py imports wandb, inside functions"
            elif own in LIGHT and i.eager and (i.top in HEAVY or i.room in slow - {own}):
                fault = f"{i.target} is heavy: import it where it is used"
            if fault:
                faults.append(f"{relative}:{i.line}: {fault}")
    return list(dict.fromkeys(faults))


def test_no_floor_is_broken() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) > 10
    assert not broken(PACKAGE), "\n".join(["", *broken(PACKAGE)])


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("objectives/elbo.py", "from iwae_cli.models.base import LatentVariableModel"),
        ("models/mlp.py", "from iwae_cli import objectives"),
        ("models/mlp.py", "from ..objectives import base"),
        ("models/mlp.py", "def f():\n    import iwae_cli.training.trainer"),
        ("data/digits.py", "from iwae_cli import load"),
        ("evaluation/likelihood.py", "from iwae_cli.training import step"),
        ("experiment.py", "from omegaconf import DictConfig"),
        ("training/trainer.py", "import hydra.utils"),
        ("training/trainer.py", "def f():\n    import wandb"),
        ("sinks/wandb.py", "import wandb"),
        ("sinks/jsonl.py", "import torch"),
        ("sinks/jsonl.py", "from iwae_cli.noise import derive"),
        ("report/table.py", "from iwae_cli.numerics import log_mean_exp"),
        ("cli.py", "import torch.nn"),
        ("cli.py", "try:\n    import wandb\nexcept ImportError:\n    pass"),
        ("cli.py", "from iwae_cli import experiment"),
        ("cli_report.py", "import torch"),
        ("cli_report.py", "def f():\n    from iwae_cli import experiment"),
        ("cli_help.py", "import omegaconf"),
        ("cli_help.py", "import numpy"),
        ("console.py", "def f():\n    import torch"),
        ("__init__.py", "from iwae_cli.experiment import load"),
        ("extra.py", "import os"),
        ("cli.py", "from iwae_cli.extra import something"),
    ],
)
def test_a_broken_floor_is_seen(tmp_path: Path, file: str, code: str) -> None:
    good = {
        "__init__.py": "def __getattr__(name):\n    from iwae_cli.experiment import load",
        "noise.py": "import torch",
        "numerics.py": "import math\nfrom torch import Tensor",
        "particles.py": "from iwae_cli.noise import Noise",
        "sinks/wandb.py": "from iwae_cli.errors import UserError\nfrom . import base\ndef f():\n    import wandb",
        "objectives/base.py": "from iwae_cli.particles import Particles",
        "experiment.py": "from iwae_cli import __version__, particles\nfrom iwae_cli.training import step",
        "construct.py": "def f():\n    import torch",
        "cli_help.py": "from iwae_cli import construct, __version__",
        "cli.py": "import hydra\nfrom iwae_cli.cli_help import text\ndef f():\n    from iwae_cli import experiment",
    }
    for name, text in good.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert broken(tmp_path) == []
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(code)
    assert [fault.split(":")[0] for fault in broken(tmp_path)] == [file]


def test_no_two_classes_share_a_name() -> None:
    files: dict[str, list[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files.setdefault(node.name, []).append(file.relative_to(PACKAGE).as_posix())
    assert len(files) > 50
    assert {name: found for name, found in files.items() if len(found) > 1} == {}


@pytest.mark.parametrize("module", ["iwae_cli", "iwae_cli.cli", "iwae_cli.cli_report"])
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(m for m in sys.modules if m in {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_shapes_are_checked() -> None:
    with pytest.raises(TypeCheckError):
        log_mean_exp([0.0])  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        log_mean_exp(torch.zeros(3, dtype=torch.int64))
    two, three = torch.zeros(2, 2), torch.zeros(2, 3)
    Particles(latents=(torch.zeros(2, 3, 5),), log_p=three, log_q=three, reparameterized=True, rescore=lambda: three)
    with pytest.raises(TypeCheckError):
        Particles(latents=(), log_p=two, log_q=three, reparameterized=True, rescore=lambda: three)
