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
    assert "30 training, 11 validation and 12 test" in data.protocol


def test_a_truncated_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "BinaryMNIST", monkeypatch) / NAMES["validation"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"^{path} is truncated: 17,247 of 17,248 bytes; "):
        FixedMNIST(str(tmp_path)).load()


def test_an_altered_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "BinaryMNIST", monkeypatch) / NAMES["test"]
    content = bytearray(path.read_bytes())
    content[100] ^= 1  # one pixel the other way round
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path} is altered or damaged: its sha256 is "):
        FixedMNIST(str(tmp_path)).load()


def test_sizes_of_the_protocol() -> None:
    assert {split: (file.name, file.images) for split, file in FixedMNIST.files.items()} == {
        "train": (NAMES["train"], 50_000),
        "validation": (NAMES["validation"], 10_000),
        "test": (NAMES["test"], 10_000),
    }


def test_an_empty_data_dir_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^data_dir must not be empty$"):
        FixedMNIST("")
