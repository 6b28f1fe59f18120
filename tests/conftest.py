"""What every test stands on: shapes are checked, randomness is seeded, nothing is written or read outside."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook
from matplotlib.figure import Figure

# Before anything imports the package: its annotations, shapes included, are then checked at every call.
install_import_hook("iwae_cli", "shape_checks.checked")

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("IWAE_DATA_DIR") or ROOT / "data").resolve()

torch.set_num_threads(1)

_savefig = Figure.savefig


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for the session, so that matplotlib builds its list of fonts once and not once a test."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def isolation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path) -> None:
    """Neither the user's settings nor the user's folders: also in the processes that a test starts."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "IWAE_", "XDG_", "HYDRA_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MPLCONFIGDIR", str(home / "matplotlib"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", autouse=True)
def blank_pictures() -> Iterator[None]:
    """Every picture is the same small one: to draw them is a third of a small run, and few tests look at them."""
    blank = io.BytesIO()
    Figure(figsize=(0.1, 0.1)).savefig(blank, format="png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, file, **_: Path(file).write_bytes(blank.getvalue()))
        yield


@pytest.fixture
def drawn_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures as they are, for a test that looks at them."""
    monkeypatch.setattr(Figure, "savefig", _savefig)


@pytest.fixture(autouse=True)
def seed() -> None:
    """torch's own generator, for tests that do not ask for one."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator; torch's default dtype stays float32, as in production: tests ask for float64 by name."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, read-only; a test skips where it, or the set that it asks for, is missing."""
    if not DATA.is_dir():
        pytest.skip(f"no real data: {DATA} is not a folder (IWAE_DATA_DIR names another)")
    return DATA
