"""Rules that the import contracts in pyproject.toml cannot express."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from shape_checks import checked
from torch import Tensor

from iwae_cli.core.interfaces import Particles
from iwae_cli.core.numerics import log_mean_exp

PACKAGE = Path(__file__).resolve().parents[1] / "iwae_cli"
HEAVY = {"torch", "torchvision", "wandb", "numpy", "scipy", "sklearn", "matplotlib"}


def test_private_parts_of_torch_are_imported_by_the_steps_alone() -> None:
    private = re.compile(r"^\s*(?:from|import) torch\.(?:fx|_\w+)", re.MULTILINE)
    found = {f.relative_to(PACKAGE).as_posix() for f in PACKAGE.rglob("*.py") if private.search(f.read_text("utf-8"))}
    assert found and all(file.startswith("training/steps/") for file in found), found


@pytest.mark.parametrize("module", ["iwae_cli", "iwae_cli.cli.train", "iwae_cli.cli.report"])
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(m for m in sys.modules if m in {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@checked
def first_row(x: Float[Tensor, "rows columns"]) -> Float[Tensor, " columns"]:
    """Wrong: it is a column."""
    return x.T[0]


def test_shapes_are_checked() -> None:
    first_row(torch.zeros(2, 2))
    with pytest.raises(TypeCheckError, match="return value"):
        first_row(torch.zeros(2, 3))
    with pytest.raises(TypeCheckError):
        log_mean_exp([0.0])  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        log_mean_exp(torch.zeros(3, dtype=torch.int64))
    two, three = torch.zeros(2, 2), torch.zeros(2, 3)
    Particles(latents=(torch.zeros(2, 3, 5),), log_p=three, log_q=three, reparameterized=True, rescore=lambda: three)
    with pytest.raises(TypeCheckError):
        Particles(latents=(), log_p=two, log_q=three, reparameterized=True, rescore=lambda: three)
