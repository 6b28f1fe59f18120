"""The silhouettes in the file of their authors: column-major images, inversion, and the messages about other files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat

from iwae_cli.core.errors import UserError
from iwae_cli.data import caltech101
from iwae_cli.data.caltech101 import Caltech101Silhouettes

KEYS = {"train_data": 6, "val_data": 3, "test_data": 4}


def pictures(n: int) -> np.ndarray:
    """Images as one sees them, (n, row, column)."""
    return np.random.default_rng(n).integers(0, 2, (n, 28, 28), dtype=np.uint8)


def written(path: Path, **others: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    column_major = {key: np.stack([image.ravel(order="F") for image in pictures(n)]) for key, n in KEYS.items()}
    savemat(path, column_major | others)
    return path


def test_images_are_upright_and_inverted_on_request(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mat")
    data = Caltech101Silhouettes("unused", path=str(path)).load()
    for split, n in zip((data.train, data.validation, data.test), KEYS.values(), strict=True):
        assert np.array_equal(split.view(-1, 28, 28), pictures(n))
    assert (data.name, data.levels, data.binarization) == ("caltech101_silhouettes", 2, "fixed")
    assert "not the published split" in data.protocol and "inverted" not in data.protocol
    inverted = Caltech101Silhouettes("unused", path=str(path), invert=True).load()
    assert torch.equal(inverted.train, 1 - data.train)
    assert inverted.name == "caltech101_silhouettes_inverted" and "inverted" in inverted.protocol


def test_the_file_in_data_dir_is_known_by_its_content(tmp_path: Path) -> None:
    path = written(tmp_path / "Caltech101Silhouettes" / "caltech101_silhouettes_28_split1.mat")
    made = Caltech101Silhouettes(str(tmp_path))
    before = made.fingerprint()
    assert before == made.load().facts["sha256"]
    written(path, val_data=np.zeros((5, 784), dtype=np.uint8))
    assert made.fingerprint() != before and len(made.load().validation) == 5


def test_only_the_file_in_the_authors_place_may_be_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another split of the same images has the same sizes, and no hash of the authors' file is published."""
    monkeypatch.setattr(caltech101, "SIZES", tuple(KEYS.values()))
    path = written(tmp_path / "Caltech101Silhouettes" / "caltech101_silhouettes_28_split1.mat")
    theirs, named = Caltech101Silhouettes(str(tmp_path)).load(), Caltech101Silhouettes("unused", path=str(path)).load()
    assert "which need not be split 1 of Marlin et al. 2010" in named.protocol
    assert "need not be" not in theirs.protocol and "split 1 of Marlin et al. 2010" in theirs.protocol
    for data in (theirs, named):
        assert f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}" in data.protocol


ONES = np.ones((2, 784), dtype=np.uint8)
WRONG = {
    "grey": {"train_data": ONES * 7},
    "lying": {"val_data": ONES.T},
    "none": {"test_data": np.zeros((0, 784))},
    "nan": {"test_data": np.where(ONES, np.nan, 0)},
}


@pytest.mark.parametrize("case", [*WRONG, "cut short", "no file"])
def test_a_wrong_file_is_named(tmp_path: Path, case: str) -> None:
    path = written(tmp_path / "wrong.mat", **WRONG.get(case, {}))
    if case == "cut short":
        path.write_bytes(path.read_bytes()[:500])
    if case == "no file":
        path.unlink()
    with pytest.raises(UserError, match=str(path)) as caught:
        Caltech101Silhouettes("unused", path=str(path)).load()
    assert "\n" not in str(caught.value)


def test_real_silhouettes(data_dir: Path) -> None:
    path = data_dir / "Caltech101Silhouettes-resplit" / "caltech101_silhouettes_28_split1.mat"
    if not path.exists():
        pytest.skip(f"no {path}")
    data = Caltech101Silhouettes("unused", path=str(path)).load()
    assert (len(data.train), len(data.validation), len(data.test)) == (4100, 2264, 2307)
    raw = loadmat(path)["test_data"].reshape(-1, 28, 28).transpose(0, 2, 1)
    assert np.array_equal(data.test.view(-1, 28, 28), raw)
    assert "which need not be split 1 of Marlin et al. 2010" in data.protocol
