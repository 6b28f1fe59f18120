"""The authors' file of OMNIGLOT: its column-major images, its order, and the messages about other files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat

from iwae_cli.core.errors import UserError
from iwae_cli.data.omniglot import Omniglot


def pictures(n: int) -> np.ndarray:
    """Images as one sees them, (n, row, column), grey values 0 to 255."""
    return np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)


def column_major(images: np.ndarray) -> np.ndarray:
    """(784, n) as MATLAB writes it: one image a column, its columns below each other."""
    return np.stack([image.ravel(order="F") for image in images], axis=1) / 255.0


def written(path: Path, n: int = 50, m: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    target, testtarget = np.zeros((8, n)), np.zeros((8, m))
    data, testdata = (column_major(pictures(size)).astype("float32") for size in (n, m))
    savemat(path, {"data": data, "testdata": testdata, "target": target, "testtarget": testtarget}, do_compression=True)
    return path


def test_images_are_turned_upright_and_put_in_the_authors_order(tmp_path: Path) -> None:
    path = written(tmp_path / "other.mat")
    data = Omniglot(str(tmp_path), path=str(path)).load()
    order = np.random.RandomState(seed=123).permutation(50)
    expected = pictures(50)[order]
    assert np.array_equal(data.train.view(-1, 28, 28), expected[:45])
    assert np.array_equal(data.validation.view(-1, 28, 28), expected[45:])
    assert np.array_equal(data.test.view(-1, 28, 28), pictures(20))
    assert data.train.dtype == torch.uint8
    assert (data.name, data.levels, data.binarization, data.image_shape) == ("omniglot", 256, "dynamic", (28, 28))
    assert all(words in data.protocol for words in ("45 training", "5 validation", "20 test", "other.mat"))


@pytest.mark.parametrize(("n", "validation"), [(99, 9), (13_600, 1_345)])
def test_validation_is_the_smaller_of_1345_and_a_tenth(tmp_path: Path, n: int, validation: int) -> None:
    savemat(tmp_path / "zeros.mat", {"data": np.zeros((784, n), dtype=np.uint8), "testdata": np.ones((784, 3))})
    data = Omniglot(str(tmp_path), path=str(tmp_path / "zeros.mat")).load()
    assert (len(data.train), len(data.validation), len(data.test)) == (n - validation, validation, 3)


def test_the_authors_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "OMNIGLOT" / "chardata.mat")
    with pytest.raises(UserError, match=f"^{path} .*data.path"):
        Omniglot(str(tmp_path)).load()
    monkeypatch.setattr(Omniglot, "md5", hashlib.md5(path.read_bytes()).hexdigest())
    made = Omniglot(str(tmp_path))
    assert made.fingerprint() is None
    assert "chardata.mat" in made.load().protocol


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mat")
    made = Omniglot("unused", path=str(path))
    assert made.fingerprint() == hashlib.sha256(path.read_bytes()).hexdigest() == made.load().facts["sha256"]
    before = made.fingerprint()
    assert Omniglot("unused", path=str(path.rename(tmp_path / "b"))).fingerprint() == before
    written(tmp_path / "a.mat", n=51)
    assert made.fingerprint() != before


GREY = column_major(pictures(12))
WRONG = {
    "no test images": {"data": GREY},
    "another name": {"images": GREY, "testdata": GREY},
    "lying": {"data": GREY.T, "testdata": GREY},
    "too few": {"data": GREY[:, :9], "testdata": GREY},
    "letters": {"data": "abc", "testdata": GREY},
    "bytes": {"data": GREY, "testdata": GREY * 255},
    "nan": {"data": np.where(GREY > 0.9, np.nan, GREY), "testdata": GREY},
    "rubbish": bytes(range(256)) * 20,
    "empty": b"",
    "cut short": 5000,
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_named(tmp_path: Path, case: str) -> None:
    path = tmp_path / "wrong.mat"
    match WRONG[case]:
        case bytes() as content:
            path.write_bytes(content)
        case int() as size:
            path.write_bytes(written(path).read_bytes()[:size])
        case content:
            savemat(path, content)
    with pytest.raises(UserError, match=f"^{path} ") as caught:
        Omniglot(str(tmp_path), path=str(path)).load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["load", "fingerprint"])
def test_a_path_to_nothing_is_named(tmp_path: Path, method: str) -> None:
    path = tmp_path / "none.mat"
    with pytest.raises(UserError, match=f"^data.path .*{path}"):
        getattr(Omniglot(str(tmp_path), path=str(path)), method)()


def test_real_characters(data_dir: Path) -> None:
    path = data_dir / "OMNIGLOT-small" / "chardata.mat"
    if not path.exists():
        pytest.skip(f"no {path}")
    data = Omniglot("unused", path=str(path)).load()
    assert (len(data.train), len(data.validation), len(data.test)) == (3267, 363, 1210)
    raw = loadmat(path)["testdata"].T.reshape(-1, 28, 28).transpose(0, 2, 1)
    assert np.array_equal(data.test.view(-1, 28, 28).numpy(), np.rint(raw * 255))
    # Nothing is lost: these grey values were bytes.
    assert np.allclose(data.test.view(-1, 28, 28).numpy() / 255, raw, rtol=0, atol=1e-7)
