"""For every test: shapes are checked, randomness is seeded, nothing outside a temporary folder is read or written."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook
from matplotlib.figure import Figure

# Before the package is imported: annotations, shapes included, are then checked at every call.
install_import_hook("iwae_cli", "shape_checks.checked")

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("IWAE_DATA_DIR") or ROOT / "data").resolve()

torch.set_num_threads(1)

_savefig = Figure.savefig


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for the session, so that matplotlib lists its fonts once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def isolation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path) -> None:
    """Hide the user's settings and folders, also from processes that a test starts."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "IWAE_", "XDG_", "HYDRA_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MPLCONFIGDIR", str(home / "matplotlib"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support" / "processes"))))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", autouse=True)
def shortcuts() -> Iterator[None]:
    """Save one small blank picture for every figure, which few tests look at, and never wait for the disk."""
    blank = io.BytesIO()
    Figure(figsize=(0.1, 0.1)).savefig(blank, format="png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, file, **_: Path(file).write_bytes(blank.getvalue()))
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def drawn_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real pictures."""
    monkeypatch.setattr(Figure, "savefig", _savefig)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch's global generator, for tests without ``generator``."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator; the default dtype stays float32, as in production: tests name float64."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of ``TINY``, alone in its parent; read it or copy it."""
    from small_runs import TINY, finished

    return finished(tmp_path_factory.mktemp("tiny"), *TINY)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, read-only; tests skip where it, or their data set, is missing."""
    if not DATA.is_dir():
        pytest.skip(f"no real data: {DATA} is not a folder (IWAE_DATA_DIR names another)")
    return DATA
