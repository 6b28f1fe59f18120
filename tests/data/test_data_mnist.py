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

SIZES = (60, 20)
NAMES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")


def idx(images: np.ndarray) -> bytes:
    """The format in its author's words: a magic number, the sizes big-endian, then the bytes."""
    return struct.pack(">BBBB", 0, 0, 8, 3) + struct.pack(">III", *images.shape) + images.tobytes()


def pictures(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)


@pytest.fixture(params=[MNIST, KMNIST])
def dataset(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[IdxImages]:
    """One of the classes, its files small and without a network."""
    kind: type[IdxImages] = request.param
    monkeypatch.setattr(kind, "sizes", SIZES)
    monkeypatch.setattr(kind, "validation", 7)
    monkeypatch.setattr(kind, "md5", {})
    monkeypatch.setattr(mnist, "import_torchvision", lambda module: pytest.fail("torchvision was asked for"))
    return kind


def written(dataset: type[IdxImages], root: Path, packed: bool = False) -> Path:
    raw = root / dataset.folder / "raw"
    raw.mkdir(parents=True)
    for name, n in zip(NAMES, SIZES, strict=True):
        content = idx(pictures(n))
        (raw / f"{name}.gz").write_bytes(gzip.compress(content)) if packed else (raw / name).write_bytes(content)
    return raw


@pytest.mark.parametrize("packed", [False, True])
def test_files_are_read_as_they_were_written(dataset: type[IdxImages], tmp_path: Path, packed: bool) -> None:
    written(dataset, tmp_path, packed)
    data = dataset(str(tmp_path)).load()
    train, test = (pictures(n).reshape(n, 784) for n in SIZES)
    assert np.array_equal(data.train, train[:53])
    assert np.array_equal(data.validation, train[53:])
    assert np.array_equal(data.test, test)
    assert {x.dtype for x in (data.train, data.validation, data.test)} == {torch.uint8}
    assert (data.name, data.levels, data.binarization, data.image_shape) == (dataset.name, 256, "dynamic", (28, 28))
    assert "53 training, 7 validation (the last of the training file) and 20 test" in data.protocol


def test_the_folder_may_be_read_only_and_is_left_as_it_is(dataset: type[IdxImages], tmp_path: Path) -> None:
    raw = written(dataset, tmp_path)
    folders = (raw, raw.parent, tmp_path)
    for folder in folders:
        folder.chmod(0o555)
    before = [folder.stat().st_mtime_ns for folder in folders]
    try:
        dataset(str(tmp_path)).load()
        assert [folder.stat().st_mtime_ns for folder in folders] == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_relative_folder_is_that_of_the_moment_of_construction(
    dataset: type[IdxImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(dataset, tmp_path / "data")
    made = dataset("data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(made.load().test) == 20


def test_an_unpacked_file_is_preferred(dataset: type[IdxImages], tmp_path: Path) -> None:
    raw = written(dataset, tmp_path)
    (raw / f"{NAMES[0]}.gz").write_bytes(b"rubbish")
    assert len(dataset(str(tmp_path)).load().train) == 53


GOOD = idx(pictures(20))
WRONG = {
    "empty": (b"", "is truncated: 0 of 15,696 bytes"),
    "in the header": (GOOD[:9], "is truncated: 9 of 15,696 bytes"),
    "in the pixels": (GOOD[:-1], "is truncated: 15,695 of 15,696 bytes"),
    "longer": (GOOD + b"\0", "is not the idx file of 20 images of 28x28"),
    "labels": (struct.pack(">II", 0x801, 20) + GOOD[8:], "is not the idx file of 20 images"),
    "more images": (idx(pictures(21)), "is not the idx file of 20 images"),
    "other images": (idx(pictures(80).reshape(-1, 56, 56)), "is not the idx file of 20 images"),
    "little endian": (struct.pack("<IIII", 0x803, 20, 28, 28) + GOOD[16:], "is not the idx file of 20 images"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_named(dataset: type[IdxImages], tmp_path: Path, case: str) -> None:
    content, what = WRONG[case]
    path = written(dataset, tmp_path) / NAMES[1]
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        dataset(str(tmp_path)).load()
    assert str(caught.value).startswith(f"{path} {what}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(GOOD)[:-20], gzip.compress(GOOD[:-5])])
def test_a_wrong_packed_file_is_named(dataset: type[IdxImages], tmp_path: Path, content: bytes) -> None:
    path = written(dataset, tmp_path, packed=True) / f"{NAMES[1]}.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path} is truncated"):
        dataset(str(tmp_path)).load()


def test_a_file_that_cannot_be_read_is_named(dataset: type[IdxImages], tmp_path: Path) -> None:
    path = written(dataset, tmp_path) / NAMES[1]
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=rf"^{path} cannot be read: Is a directory"):
        dataset(str(tmp_path)).load()


@pytest.mark.parametrize("packed", [False, True])
def test_an_altered_file_is_named_where_its_hash_is_known(
    dataset: type[IdxImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    raw = written(dataset, tmp_path, packed)
    hashes = {name: hashlib.md5(idx(pictures(n))).hexdigest() for name, n in zip(NAMES, SIZES, strict=True)}
    monkeypatch.setattr(dataset, "md5", hashes)
    dataset(str(tmp_path)).load()
    altered = bytearray(GOOD)
    altered[4000] ^= 1
    path = raw / (f"{NAMES[1]}.gz" if packed else NAMES[1])
    path.write_bytes(gzip.compress(altered) if packed else altered)
    with pytest.raises(UserError, match=rf"^{path} is altered or damaged: its md5 is .*{hashes[NAMES[1]]}"):
        dataset(str(tmp_path)).load()


def test_a_packed_file_with_a_known_hash_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KMNIST, "sizes", SIZES)
    monkeypatch.setattr(KMNIST, "validation", 7)
    raw = written(KMNIST, tmp_path, packed=True)
    with pytest.raises(UserError, match=rf"^{raw / NAMES[0]}.gz is altered or damaged"):
        KMNIST(str(tmp_path)).load()


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST, KMNIST])
def test_an_empty_data_dir_is_refused(kind: type[IdxImages]) -> None:
    with pytest.raises(ValueError, match=r"^data_dir must not be empty$"):
        kind("")


def test_the_published_sizes_and_hashes_are_those_of_torchvision() -> None:
    """Packed hashes are torchvision's own; unpacked ones are checked on real files below."""
    datasets = import_torchvision("torchvision.datasets")
    for kind in (MNIST, FashionMNIST, KMNIST):
        assert (kind.sizes, kind.validation) == ((60_000, 10_000), 400)
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
    p = data.test.double() / 255
    sd = (p * (1 - p)).sum().sqrt().item()
    assert abs(split.x.sum().item() - p.sum().item()) < 5 * sd
    assert split.sha256 == "fd1ef0207d8e0497185ee64715a2a846d14d9883b23f3259daded2ea6c0e13ee"
