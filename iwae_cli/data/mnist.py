"""MNIST and the data sets that share its files: 28x28 grey images in idx format."""

from __future__ import annotations

import gzip
import zlib
from abc import ABC
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from iwae_cli.core.errors import check_range
from iwae_cli.data.base import Data, GreyBinarization, GreyDataset
from iwae_cli.data.files import Damaged, check_hash, directory, import_torchvision, obtain, read_bytes

SIDE = 28
VALIDATION = 400
"""Images of the validation split in the protocol of Burda et al. 2016."""

HEADER = 16
"""Bytes before the pixels: the magic number and three sizes, each big-endian and four bytes long."""
LABEL_HEADER = 8
"""Bytes before the labels: the magic number and one size."""


class IdxImages(GreyDataset, ABC):
    """Files as torchvision lays them out, ``<data_dir>/<folder>/raw/*-images-idx3-ubyte``, also with ``.gz``.

    They are read directly; torchvision is imported only for a download. The last ``validation`` images of the training
    file are the validation split, in the order of the file; with another number than the 400 of Burda et al. the data
    set has another name, such as ``mnist_validation10000``.
    """

    folder: ClassVar[str]
    """Name of the class in torchvision, and of its folder."""
    md5: ClassVar[Mapping[str, str]]
    """Published hashes by file name; a packed file is also checked against the hash of its unpacked content."""
    source: ClassVar[str]
    sizes: ClassVar[tuple[int, int]] = (60_000, 10_000)
    levels = 256

    def __init__(
        self,
        data_dir: str,
        binarization: GreyBinarization = "dynamic",
        limit: int | None = None,
        validation: int = VALIDATION,
    ) -> None:
        super().__init__(binarization, limit)
        check_range("validation", validation, 1, self.sizes[0] - 1)
        self._validation = validation
        if validation != VALIDATION:
            self.name = f"{self.name}_validation{validation}"
        self._root = directory(data_dir)
        self._raw = self._root / self.folder / "raw"

    def load(self) -> Data:
        """Return the data, see the base class."""
        files = [self._raw / f"{part}-images-idx3-ubyte" for part in ("train", "t10k")]
        # Packed files count as present: torchvision downloads only the others.
        missing = [path for path in files if not self._found(path).exists()]
        what = f"{' and '.join(path.name for path in files)} (or .gz)"
        obtain(type(self).name, self._root, missing, what, self._fetch)
        train, test = (self._read(self._found(path), n) for path, n in zip(files, self.sizes, strict=True))
        sizes = [len(train) - self._validation, self._validation]
        splits = (*train.split(sizes), test)
        of_train, of_test = self._labels("train", train), self._labels("t10k", test)
        labels = () if of_train is None or of_test is None else (*of_train.split(sizes), of_test)
        which = " (the last of the training file)"
        return self.data(splits, (SIDE, SIDE), self.source, which=which, labels=labels)

    def _labels(self, part: str, images: UInt8[Tensor, "n pixels"]) -> UInt8[Tensor, " n"] | None:
        """Return the classes of one file; None where they are missing or damaged, since no training needs them."""
        path = self._found(self._raw / f"{part}-labels-idx1-ubyte")
        with suppress(OSError, EOFError, zlib.error):
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            if len(content) == LABEL_HEADER + len(images):
                return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=LABEL_HEADER)
        return None

    @staticmethod
    def _found(path: Path) -> Path:
        packed = path.with_name(f"{path.name}.gz")
        return packed if packed.exists() and not path.exists() else path

    def _fetch(self, folder: Path) -> Sequence[Path]:
        datasets: Any = import_torchvision("torchvision.datasets")
        getattr(datasets, self.folder)(folder, download=True)
        raw = folder / self.folder / "raw"
        for part, n in zip(("train", "t10k"), self.sizes, strict=True):
            self._read(raw / f"{part}-images-idx3-ubyte", n)
        return sorted(path for path in raw.iterdir() if path.suffix != ".gz")

    def _read(self, path: Path, n: int) -> UInt8[Tensor, "n pixels"]:
        """Return the ``n`` images of one file, checked."""
        content = stored = read_bytes(path)
        if path.suffix == ".gz":
            try:
                content = bytearray(gzip.decompress(stored))
            except (OSError, EOFError, zlib.error) as error:
                raise Damaged(path, f"is truncated or damaged ({error})") from error
        expected = HEADER + n * SIDE * SIDE
        if len(content) < expected:
            raise Damaged(path, f"is truncated: {len(content):,} of {expected:,} bytes")
        header = np.frombuffer(content, dtype=">i4", count=4).tolist()
        if header != [0x803, n, SIDE, SIDE] or len(content) != expected:
            raise Damaged(path, f"is not the idx file of {n:,} images of {SIDE}x{SIDE} of data={type(self).name}")
        for name, hashed in ((path.name, stored), (path.name.removesuffix(".gz"), content)):
            if name in self.md5:
                check_hash(path, hashed, "md5", self.md5[name])
        return torch.frombuffer(content, dtype=torch.uint8, offset=HEADER).view(n, SIDE * SIDE)


@final
class MNIST(IdxImages):
    """Handwritten digits. LeCun, Bottou, Bengio, Haffner 1998; the protocol of Burda et al. 2016 (1509.00519)."""

    name = "mnist"
    folder = "MNIST"
    source = "LeCun et al. 1998, files of torchvision"
    md5: ClassVar[Mapping[str, str]] = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    }


@final
class FashionMNIST(IdxImages):
    """Articles of clothing. Xiao, Rasul, Vollgraf 2017 (1708.07747)."""

    name = "fashion_mnist"
    folder = "FashionMNIST"
    source = "Xiao et al. 2017, files of torchvision"
    md5: ClassVar[Mapping[str, str]] = {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    }


@final
class KMNIST(IdxImages):
    """Cursive Japanese characters, Kuzushiji-MNIST. Clanuwat et al. 2018 (1812.01718)."""

    name = "kmnist"
    folder = "KMNIST"
    source = "Clanuwat et al. 2018, files of torchvision"
    # Only the packed files have published hashes.
    md5: ClassVar[Mapping[str, str]] = {
        "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
        "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
    }
