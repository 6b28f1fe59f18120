"""MNIST with one fixed binarization, the files of Larochelle and Murray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, final

import torch
from jaxtyping import UInt8
from torch import Tensor

from iwae_cli.data.base import Data, GreyDataset
from iwae_cli.data.files import Damaged, check_hash, directory, download, obtain, read_bytes

SIDE = 28


class Amat(NamedTuple):
    """One file."""

    name: str
    images: int
    sha256: str


@final
class FixedMNIST(GreyDataset):
    """Three text files in ``<data_dir>/BinaryMNIST``, one image a line, each pixel 0 or 1.

    Larochelle, Murray 2011, The Neural Autoregressive Distribution Estimator; the binarization is that of
    Salakhutdinov, Murray 2008, On the Quantitative Analysis of Deep Belief Networks.
    """

    name = "mnist_fixed"
    levels = 2
    fixed = "binarized once by their authors (fixed)"
    url: ClassVar[str] = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
    files: ClassVar[Mapping[str, Amat]] = {
        "train": Amat(
            "binarized_mnist_train.amat", 50_000, "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"
        ),
        "validation": Amat(
            "binarized_mnist_valid.amat", 10_000, "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"
        ),
        "test": Amat(
            "binarized_mnist_test.amat", 10_000, "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"
        ),
    }

    def __init__(self, data_dir: str, limit: int | None = None) -> None:
        super().__init__(limit=limit)
        self._root = directory(data_dir)

    def load(self) -> Data:
        """Return the data, see the base class."""
        folder = self._root / "BinaryMNIST"
        paths = [folder / file.name for file in self.files.values()]
        obtain(self.name, self._root, paths, ", ".join(path.name for path in paths), self._fetch)
        splits = [_read(folder / file.name, file) for file in self.files.values()]
        return self.data(splits, (SIDE, SIDE), "the files of Larochelle and Murray")

    def _fetch(self, folder: Path) -> Sequence[Path]:
        fetched = []
        for file in self.files.values():
            fetched.append(download(self.url + file.name, folder))
            _read(fetched[-1], file)
        return fetched


def _read(path: Path, file: Amat) -> UInt8[Tensor, "n pixels"]:
    content = read_bytes(path)
    expected = file.images * SIDE * SIDE * 2
    if len(content) < expected:
        raise Damaged(path, f"is truncated: {len(content):,} of {expected:,} bytes")
    check_hash(path, content, "sha256", file.sha256)
    # Every pixel is one digit and one separator: no text needs to be parsed.
    digits = torch.frombuffer(content, dtype=torch.uint8).view(file.images, SIDE * SIDE, 2)[:, :, 0]
    return digits - ord("0")
