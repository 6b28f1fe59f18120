"""For every test: shapes are checked, randomness is seeded, nothing outside a temporary folder is read or written."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import shape_checks
import torch
from hydra.core.global_hydra import GlobalHydra
from matplotlib.figure import Figure
from omegaconf import DictConfig

# Before the package is imported.
shape_checks.install("iwae_cli")

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("IWAE_DATA_DIR") or ROOT / "data").resolve()

torch.set_num_threads(1)

# Keep the memory of large tensors: to return it and get it again took a third of the time of some tests.
with suppress(AttributeError):  # glibc alone has it
    ctypes.CDLL(None).mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    ctypes.CDLL(None).mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD

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
    """Save a small blank picture for every figure, which few tests look at, and never wait for the disk.

    Hydra, which takes a tenth of a second, composes each choice of groups once.
    A chunk before the last of the PNG file has a hash of what the figure would show.
    """
    blank = io.BytesIO()
    Figure(figsize=(0.1, 0.1)).savefig(blank, format="png")

    def save(figure: Figure, file: Path, **_: object) -> None:
        shown = hashlib.sha256()
        for axes in figure.axes:
            for array in (*(line.get_xydata() for line in axes.lines), *(image.get_array() for image in axes.images)):
                shown.update(np.asarray(array).tobytes())
        chunk = b"tEXtshown\0" + shown.hexdigest().encode()
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        Path(file).write_bytes(blank.getvalue()[:-12] + chunk + blank.getvalue()[-12:])

    compose = hydra.compose
    composed: dict[tuple[str, ...], DictConfig] = {}

    @functools.wraps(compose)
    def compose_once(name: str, overrides: list[str], **how: Any) -> DictConfig:
        if any(override.startswith("hydra.searchpath=") for override in overrides):
            return compose(name, overrides, **how)
        key = (str(GlobalHydra.instance().config_loader().get_search_path()), name, *overrides)
        if key not in composed:
            composed[key] = compose(name, overrides, **how)
        return composed[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hydra, "compose", compose_once)
        patch.setattr(Figure, "savefig", save)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def drawn_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real pictures."""
    monkeypatch.setattr(Figure, "savefig", _savefig)


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refined proposals and grids of a fraction of the work, where a test does not ask how good they are."""
    monkeypatch.setattr("iwae_cli.evaluation.proposals.STEPS", 30)
    for name, fewer in {"OVERVIEW": 101, "WINDOW": 41, "REPEATS": 50}.items():
        monkeypatch.setattr(f"iwae_cli.evaluation.grid.picture.{name}", fewer)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch's global generator, for tests without ``generator``; check the first calls of each function."""
    torch.manual_seed(0)
    shape_checks.calls.clear()


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
