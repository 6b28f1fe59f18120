"""Caltech 101 Silhouettes as 28x28 binary images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from iwae_cli.core.errors import UserError
from iwae_cli.data.base import Data, GreyDataset
from iwae_cli.data.files import AFRESH, Damaged, directory, download, load_mat, obtain, read_bytes

SIDE = 28
SPLITS = ("train_data", "val_data", "test_data")
SIZES = (4_100, 2_264, 2_307)
"""Images of the split that its authors published."""


@final
class Caltech101Silhouettes(GreyDataset):
    """``caltech101_silhouettes_28_split1.mat``: keys train_data, val_data, test_data, (n, 784), column by column.

    Marlin, Swersky, Chen, de Freitas 2010, Inductive Principles for Restricted Boltzmann Machine Learning. In the file
    an object is 0 and what surrounds it 1; the papers on VampPrior and Sylvester flows take 1 - x.

    Args:
        data_dir: ``<data_dir>/Caltech101Silhouettes/<file>`` is read, and downloaded if it is not there.
        path: another file of the same layout and any size.
        invert: take 1 - x; then the data set is called ``caltech101_silhouettes_inverted``.
        limit: training images that are used, from the first; None is all.
    """

    name = "caltech101_silhouettes"
    levels = 2
    url: ClassVar[str] = "https://people.cs.umass.edu/~marlin/data/caltech101_silhouettes_28_split1.mat"

    def __init__(self, data_dir: str, path: str | None = None, invert: bool = False, limit: int | None = None) -> None:
        super().__init__(limit=limit)
        if path == "":
            raise ValueError("path must be a file or null, got an empty string")
        self._root = directory(data_dir)
        self._path = None if path is None else Path(path).expanduser().absolute()
        self._invert = invert
        if invert:
            self.name = f"{self.name}_inverted"

    def fingerprint(self) -> str | None:
        """Return the sha256 of the file: no hash of it is published, so that another one may lie in its place."""
        return hashlib.sha256(self._file()[1]).hexdigest()

    def load(self) -> Data:
        """Return the data, see the base class."""
        path, content = self._file()
        splits = _read(path, content)
        canonical = tuple(map(len, splits)) == SIZES
        of = "split 1 of Marlin et al. 2010" if canonical else "not the published split"
        if self._invert:
            splits = [1 - x for x in splits]
        return self.data(
            splits,
            (SIDE, SIDE),
            f"the file {path.name}, {of}",
            how=", inverted (1 - x): objects are 1" if self._invert else ", as in the file: objects are 0",
            sha256=hashlib.sha256(content).hexdigest(),
        )

    def _file(self) -> tuple[Path, bytearray]:
        if self._path is not None:
            if not self._path.exists():
                raise UserError(
                    f"data.path names {self._path}, which does not exist; give a file in the layout of "
                    "caltech101_silhouettes_28_split1.mat, or data.path=null for the authors' own"
                )
            return self._path, read_bytes(self._path)
        path = self._root / "Caltech101Silhouettes" / self.url.rpartition("/")[2]
        obtain("caltech101_silhouettes", self._root, [path], path.name, self._fetch)
        return path, read_bytes(path)

    def _fetch(self, folder: Path) -> Sequence[Path]:
        path = download(self.url, folder)
        _read(path, read_bytes(path))
        return [path]


def _read(path: Path, content: bytearray) -> list[UInt8[Tensor, "n pixels"]]:
    """Return the three splits, row by row."""
    found = load_mat(path, content, AFRESH)
    images = []
    for key in SPLITS:
        values = found.get(key, np.zeros(()))
        if values.ndim != 2 or values.shape[1] != SIDE**2 or not len(values) or not np.isin(values, (0, 1)).all():
            raise Damaged(path, f"has no {key!r} of shape (n, {SIDE**2}) with values 0 and 1")
        upright = values.astype(np.uint8).reshape(-1, SIDE, SIDE).transpose(0, 2, 1)
        images.append(torch.from_numpy(np.ascontiguousarray(upright).reshape(-1, SIDE**2)))
    return images
