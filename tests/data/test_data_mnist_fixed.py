"""Larochelle and Murray's text files, written here in their layout and read back."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from iwae_cli.core.errors import UserError
from iwae_cli.data.mnist_fixed import Amat, FixedMNIST

SIZES = {"train": 30, "validation": 11, "test": 12}
NAMES = {
    "train": "binarized_mnist_train.amat",
    "validation": "binarized_mnist_valid.amat",
    "test": "binarized_mnist_test.amat",
}


def pictures(split: str) -> np.ndarray:
    return np.random.default_rng(SIZES[split]).integers(0, 2, (SIZES[split], 784))


def written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the three files into ``folder`` and their hashes into the class."""
    folder.mkdir(parents=True)
    files = {}
    for split, name in NAMES.items():
        np.savetxt(folder / name, pictures(split), fmt="%d")
        files[split] = Amat(name, SIZES[split], hashlib.sha256((folder / name).read_bytes()).hexdigest())
    monkeypatch.setattr(FixedMNIST, "files", files)
    return folder


def test_files_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "BinaryMNIST", monkeypatch)
    data = FixedMNIST(str(tmp_path)).load()
    for split in SIZES:
        assert np.array_equal(getattr(data, split), pictures(split))
        assert np.array_equal(data.evaluation_split(split, 0).x, pictures(split))
    assert data.train.dtype == torch.uint8
    assert (data.name, data.levels, data.binarization, data.image_shape) == ("mnist_fixed", 2, "fixed", (28, 28))


def test_a_truncated_or_altered_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "BinaryMNIST", monkeypatch) / NAMES["test"]
    content = path.read_bytes()
    for wrong in (content[:-1], content[:100] + bytes([content[100] ^ 1]) + content[101:]):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=f"^{path} "):
            FixedMNIST(str(tmp_path)).load()
