"""Images in idx files: written here byte by byte, read back, and every way in which they can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from iwae_cli.core.errors import UserError
from iwae_cli.data import mnist
from iwae_cli.data.files import import_torchvision
from iwae_cli.data.mnist import KMNIST, MNIST, FashionMNIST, IdxImages

SIZES = (460, 20)
NAMES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")


def idx(images: np.ndarray) -> bytes:
    """The format in its author's words: a magic number, the sizes big-endian, then the bytes."""
    return struct.pack(">BBBB", 0, 0, 8, 3) + struct.pack(">III", *images.shape) + images.tobytes()


def pictures(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)


@pytest.fixture
def dataset(monkeypatch: pytest.MonkeyPatch) -> type[IdxImages]:
    """MNIST, its files small and without a network."""
    monkeypatch.setattr(MNIST, "sizes", SIZES)
    monkeypatch.setattr(MNIST, "md5", {})
    monkeypatch.setattr(mnist, "import_torchvision", lambda module: pytest.fail("torchvision was asked for"))
    return MNIST


def written(dataset: type[IdxImages], root: Path, packed: bool = False) -> Path:
    raw = root / dataset.folder / "raw"
    raw.mkdir(parents=True)
    for name, n in zip(NAMES, SIZES, strict=True):
        content = idx(pictures(n))
        (raw / f"{name}.gz").write_bytes(gzip.compress(content)) if packed else (raw / name).write_bytes(content)
    return raw


@pytest.mark.parametrize("packed", [False, True])
def test_files_are_read_as_they_were_written(dataset: type[IdxImages], tmp_path: Path, packed: bool) -> None:
    raw = written(dataset, tmp_path, packed)
    if not packed:
        (raw / f"{NAMES[0]}.gz").write_bytes(b"rubbish, which the unpacked file hides")
    raw.chmod(0o555)
    data = dataset(str(tmp_path)).load()
    raw.chmod(0o755)
    train, test = (pictures(n).reshape(n, 784) for n in SIZES)
    assert np.array_equal(data.train, train[:60])
    assert np.array_equal(data.validation, train[60:])
    assert np.array_equal(data.test, test)
    assert {x.dtype for x in (data.train, data.validation, data.test)} == {torch.uint8}
    assert (data.name, data.levels, data.binarization, data.image_shape) == (dataset.name, 256, "dynamic", (28, 28))
    assert all(size in data.protocol for size in ("60 training", "400 validation", "20 test"))
    other = dataset(str(tmp_path), validation=7).load()
    assert np.array_equal(other.validation, train[453:]) and len(other.train) == 453
    assert (other.name, dataset.name) == ("mnist_validation7", "mnist")
    with pytest.raises(ValueError, match=r"^validation must be <= 459, got 460$"):
        dataset(str(tmp_path), validation=460)


@pytest.mark.parametrize("packed", [False, True])
def test_labels_are_read_where_they_are_whole(dataset: type[IdxImages], tmp_path: Path, packed: bool) -> None:
    raw = written(dataset, tmp_path)
    assert dataset(str(tmp_path)).load().evaluation_split("test", 0).labels is None
    labels = [np.random.default_rng(n).integers(0, 10, n, dtype=np.uint8) for n in SIZES]
    for name, values in zip(NAMES, labels, strict=True):
        content = struct.pack(">BBBBI", 0, 0, 8, 1, len(values)) + values.tobytes()
        path = raw / (name.replace("images-idx3", "labels-idx1") + ".gz" * packed)
        path.write_bytes(gzip.compress(content) if packed else content)
    data = dataset(str(tmp_path), limit=9).load()
    for split, expected in (("train", labels[0][:9]), ("validation", labels[0][60:]), ("test", labels[1])):
        found = data.evaluation_split(split, 0).labels
        assert found is not None and np.array_equal(found, expected)
    path.write_bytes(path.read_bytes()[:-1])
    assert not dataset(str(tmp_path)).load().labels


def test_a_relative_folder_is_that_of_the_moment_of_construction(
    dataset: type[IdxImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(dataset, tmp_path / "data")
    made = dataset("data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(made.load().test) == 20


GOOD = idx(pictures(20))
WRONG = {
    "empty": b"",
    "cut short in the header": GOOD[:9],
    "cut short in the pixels": GOOD[:-1],
    "longer": GOOD + b"\0",
    "labels": struct.pack(">II", 0x801, 20) + GOOD[8:],
    "more images": idx(pictures(21)),
    "other images": idx(pictures(80).reshape(-1, 56, 56)),
    "little endian": struct.pack("<IIII", 0x803, 20, 28, 28) + GOOD[16:],
    "altered": GOOD[:4000] + bytes([GOOD[4000] ^ 1]) + GOOD[4001:],
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_named(
    dataset: type[IdxImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, packed: bool
) -> None:
    if case == "altered":
        hashes = {name: hashlib.md5(idx(pictures(n))).hexdigest() for name, n in zip(NAMES, SIZES, strict=True)}
        monkeypatch.setattr(dataset, "md5", hashes)
    path = written(dataset, tmp_path, packed) / f"{NAMES[1]}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(WRONG[case]) if packed else WRONG[case])
    with pytest.raises(UserError, match=f"^{path} ") as caught:
        dataset(str(tmp_path)).load()
    assert "\n" not in str(caught.value)


def test_the_published_sizes_and_hashes_are_those_of_torchvision() -> None:
    """Packed hashes are torchvision's own; unpacked ones are checked on real files below."""
    datasets = import_torchvision("torchvision.datasets")
    for kind in (MNIST, FashionMNIST, KMNIST):
        assert kind.sizes == (60_000, 10_000)
        theirs = dict(getattr(datasets, kind.folder).resources)
        assert {f"{name}.gz" for name in NAMES} <= set(theirs)
    assert dict(KMNIST.md5).items() <= dict(datasets.KMNIST.resources).items()
    assert set(KMNIST.md5) == {f"{name}.gz" for name in NAMES}
    assert set(MNIST.md5) == set(FashionMNIST.md5) == set(NAMES)


def test_real_mnist(data_dir: Path) -> None:
    raw = data_dir / "MNIST" / "raw"
    if not (raw / NAMES[0]).exists():
        pytest.skip(f"no {raw / NAMES[0]}")
    data = MNIST(str(data_dir)).load()
    train = np.fromfile(raw / NAMES[0], dtype=np.uint8)[16:].reshape(60_000, 784)
    assert np.array_equal(data.train, train[:59_600])
    assert np.array_equal(data.validation, train[59_600:])
    assert len(data.test) == 10_000
    assert data.mean().mean() == pytest.approx(0.1307, abs=2e-4)
    split = data.evaluation_split("test", 0)
    if split.labels is not None:
        assert split.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    p = data.test.double() / 255
    sd = (p * (1 - p)).sum().sqrt().item()
    assert abs(split.x.sum().item() - p.sum().item()) < 5 * sd
    assert split.sha256 == "fd1ef0207d8e0497185ee64715a2a846d14d9883b23f3259daded2ea6c0e13ee"
