"""OMNIGLOT and the silhouettes in the files of their authors: column-major images, order, inversion, other files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat

from iwae_cli.core.errors import UserError
from iwae_cli.data import caltech101
from iwae_cli.data.base import Dataset
from iwae_cli.data.caltech101 import Caltech101Silhouettes
from iwae_cli.data.omniglot import Omniglot

SILHOUETTES = {"train_data": 6, "val_data": 3, "test_data": 4}
SPLIT_1 = Path("Caltech101Silhouettes") / "caltech101_silhouettes_28_split1.mat"


def pictures(n: int, white: int = 255) -> np.ndarray:
    """Images as one sees them, (n, row, column), values 0 to ``white``."""
    return np.random.default_rng(n).integers(0, white + 1, (n, 28, 28), dtype=np.uint8)


def column_major(images: np.ndarray) -> np.ndarray:
    """(n, 784): the columns of an image after each other."""
    return np.stack([image.ravel(order="F") for image in images])


def characters(path: Path, n: int = 50) -> Path:
    """As MATLAB writes them: one image a column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data, testdata = ((column_major(pictures(size)).T / 255.0).astype("float32") for size in (n, 20))
    others = {"target": np.zeros((8, n)), "testtarget": np.zeros((8, 20))}
    savemat(path, {"data": data, "testdata": testdata} | others, do_compression=True)
    return path


def silhouettes(path: Path, **others: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {key: column_major(pictures(n, 1)) for key, n in SILHOUETTES.items()} | others)
    return path


def omniglot(path: Path) -> Omniglot:
    return Omniglot("unused", path=str(path))


def caltech(path: Path) -> Caltech101Silhouettes:
    return Caltech101Silhouettes("unused", path=str(path))


def test_characters_are_turned_upright_and_put_in_the_authors_order(tmp_path: Path) -> None:
    data = omniglot(characters(tmp_path / "other.mat")).load()
    expected = pictures(50)[np.random.RandomState(seed=123).permutation(50)]
    assert np.array_equal(data.train.view(-1, 28, 28), expected[:45])
    assert np.array_equal(data.validation.view(-1, 28, 28), expected[45:])
    assert np.array_equal(data.test.view(-1, 28, 28), pictures(20))
    assert data.train.dtype == torch.uint8
    assert (data.name, data.levels, data.binarization, data.image_shape) == ("omniglot", 256, "dynamic", (28, 28))
    assert all(words in data.protocol for words in ("45 training", "5 validation", "20 test", "other.mat"))


@pytest.mark.parametrize(("n", "validation"), [(99, 9), (13_600, 1_345)])
def test_validation_is_the_smaller_of_1345_and_a_tenth(tmp_path: Path, n: int, validation: int) -> None:
    savemat(tmp_path / "zeros.mat", {"data": np.zeros((784, n), dtype=np.uint8), "testdata": np.ones((784, 3))})
    data = omniglot(tmp_path / "zeros.mat").load()
    assert (len(data.train), len(data.validation), len(data.test)) == (n - validation, validation, 3)


def test_silhouettes_are_upright_and_inverted_on_request(tmp_path: Path) -> None:
    path = silhouettes(tmp_path / "a.mat")
    data = caltech(path).load()
    for split, n in zip((data.train, data.validation, data.test), SILHOUETTES.values(), strict=True):
        assert np.array_equal(split.view(-1, 28, 28), pictures(n, 1))
    assert (data.name, data.levels, data.binarization) == ("caltech101_silhouettes", 2, "fixed")
    assert "not the published split" in data.protocol and "inverted" not in data.protocol
    inverted = Caltech101Silhouettes("unused", path=str(path), invert=True).load()
    assert torch.equal(inverted.train, 1 - data.train)
    assert inverted.name == "caltech101_silhouettes_inverted" and "inverted" in inverted.protocol


def test_the_authors_own_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = characters(tmp_path / "OMNIGLOT" / "chardata.mat")
    with pytest.raises(UserError, match=f"^{path} .*data.path"):
        Omniglot(str(tmp_path)).load()
    monkeypatch.setattr(Omniglot, "md5", hashlib.md5(path.read_bytes()).hexdigest())
    made = Omniglot(str(tmp_path))
    assert made.fingerprint() is None
    assert "chardata.mat" in made.load().protocol


def test_only_the_silhouettes_in_the_authors_place_may_be_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another split of the same images has the same sizes, and no hash of the authors' file is published."""
    monkeypatch.setattr(caltech101, "SIZES", tuple(SILHOUETTES.values()))
    path = silhouettes(tmp_path / SPLIT_1)
    theirs, named = Caltech101Silhouettes(str(tmp_path)).load(), caltech(path).load()
    assert "which need not be split 1 of Marlin et al. 2010" in named.protocol
    assert "need not be" not in theirs.protocol and "split 1 of Marlin et al. 2010" in theirs.protocol
    for data in (theirs, named):
        assert f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}" in data.protocol


@pytest.mark.parametrize(("kind", "written"), [(omniglot, characters), (caltech, silhouettes)])
def test_the_fingerprint_follows_the_content(
    tmp_path: Path, kind: Callable[[Path], Dataset], written: Callable[[Path], Path]
) -> None:
    path = written(tmp_path / "a.mat")
    before = kind(path).fingerprint()
    assert before == hashlib.sha256(path.read_bytes()).hexdigest() == kind(path).load().facts["sha256"]
    assert kind(path.rename(tmp_path / "b.mat")).fingerprint() == before
    if kind is omniglot:
        characters(path, n=51)
    else:
        silhouettes(path, val_data=np.zeros((5, 784), dtype=np.uint8))
        assert len(kind(path).load().validation) == 5
    assert kind(path).fingerprint() != before


def test_the_silhouettes_in_data_dir_are_known_by_their_content(tmp_path: Path) -> None:
    silhouettes(tmp_path / SPLIT_1)
    made = Caltech101Silhouettes(str(tmp_path))
    assert made.fingerprint() == made.load().facts["sha256"]


GREY, ONES = column_major(pictures(12)).T / 255.0, np.ones((2, 784), dtype=np.uint8)
WRONG: dict[str, tuple[Callable[[Path], Dataset], Any]] = {
    "no test images": (omniglot, {"data": GREY}),
    "another name": (omniglot, {"images": GREY, "testdata": GREY}),
    "lying": (omniglot, {"data": GREY.T, "testdata": GREY}),
    "too few": (omniglot, {"data": GREY[:, :9], "testdata": GREY}),
    "letters": (omniglot, {"data": "abc", "testdata": GREY}),
    "bytes": (omniglot, {"data": GREY, "testdata": GREY * 255}),
    "nan": (omniglot, {"data": np.where(GREY > 0.9, np.nan, GREY), "testdata": GREY}),
    "rubbish": (omniglot, bytes(range(256)) * 20),
    "empty": (omniglot, b""),
    "cut short": (omniglot, characters),
    "silhouettes of grey": (caltech, {"train_data": ONES * 7}),
    "silhouettes lying": (caltech, {"val_data": ONES.T}),
    "no silhouettes": (caltech, {"test_data": np.zeros((0, 784))}),
    "silhouettes of nan": (caltech, {"test_data": np.where(ONES, np.nan, 0)}),
    "silhouettes cut short": (caltech, silhouettes),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_named(tmp_path: Path, case: str) -> None:
    path, (kind, content) = tmp_path / "wrong.mat", WRONG[case]
    match content:
        case bytes():
            path.write_bytes(content)
        case dict():
            silhouettes(path, **content) if kind is caltech else savemat(path, content)
        case written:
            path.write_bytes(written(path).read_bytes()[: 5000 if kind is omniglot else 500])
    with pytest.raises(UserError, match=f"^{path} ") as caught:
        kind(path).load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [omniglot, caltech])
@pytest.mark.parametrize("method", ["load", "fingerprint"])
def test_a_path_to_nothing_is_named(tmp_path: Path, kind: Callable[[Path], Dataset], method: str) -> None:
    path = tmp_path / "none.mat"
    with pytest.raises(UserError, match=f"^data.path .*{path}"):
        getattr(kind(path), method)()


@pytest.mark.parametrize(
    ("kind", "file", "sizes"),
    [
        (omniglot, Path("OMNIGLOT-small") / "chardata.mat", (3267, 363, 1210)),
        (caltech, Path("Caltech101Silhouettes-resplit") / SPLIT_1.name, (4100, 2264, 2307)),
    ],
)
def test_real_files(data_dir: Path, kind: Callable[[Path], Dataset], file: Path, sizes: tuple[int, ...]) -> None:
    """Nothing is lost: the grey values were bytes."""
    if not (data_dir / file).exists():
        pytest.skip(f"no {data_dir / file}")
    data = kind(data_dir / file).load()
    assert (len(data.train), len(data.validation), len(data.test)) == sizes
    raw = loadmat(data_dir / file)
    test = raw["testdata"].T * 255 if kind is omniglot else raw["test_data"]
    upright = test.reshape(-1, 28, 28).transpose(0, 2, 1)
    assert np.array_equal(data.test.view(-1, 28, 28).numpy(), np.rint(upright))
    np.testing.assert_allclose(upright, np.rint(upright), rtol=0, atol=255e-7)
