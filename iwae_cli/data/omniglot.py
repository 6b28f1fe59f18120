"""OMNIGLOT characters as 28x28 grey images, in the file of the paper's authors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from iwae_cli.core.errors import UserError
from iwae_cli.data.base import Data, GreyBinarization, GreyDataset
from iwae_cli.data.files import AFRESH, Damaged, check_hash, directory, download, load_mat, obtain, read_bytes

SIDE = 28
VALIDATION = 1_345
ADVICE = "give a whole file in the layout of the authors' chardata.mat"


@final
class Omniglot(GreyDataset):
    """``chardata.mat``: keys ``data`` and ``testdata``, (784, n), grey values in [0, 1], images column by column.

    Lake, Salakhutdinov, Tenenbaum 2015; resized and split by Burda, Grosse, Salakhutdinov 2016 (1509.00519).
    The training images are in the authors' order, numpy's ``RandomState(123).permutation``; the last of them are the
    validation split. Grey values become the bytes 0 to 255 from which they were made.

    Args:
        data_dir: ``<data_dir>/OMNIGLOT/chardata.mat`` is read, and downloaded if it is not there.
        path: another file of the same layout and any size.
        binarization: ``dynamic`` or ``none``.
        limit: training images that are used, from the first; None is all.
    """

    name = "omniglot"
    levels = 256
    url: ClassVar[str] = "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat"
    md5: ClassVar[str] = "21ecaf34373511aa7691cf2e0802aa3d"

    def __init__(
        self,
        data_dir: str,
        path: str | None = None,
        binarization: GreyBinarization = "dynamic",
        limit: int | None = None,
    ) -> None:
        super().__init__(binarization, limit)
        if path == "":
            raise ValueError("path must be a file or null, got an empty string")
        self._root = directory(data_dir)
        self._path = None if path is None else Path(path).expanduser().absolute()

    def fingerprint(self) -> str | None:
        """Return the sha256 of the file that ``path`` names; None for the authors' file, which never changes."""
        return None if self._path is None else hashlib.sha256(self._content(self._path)).hexdigest()

    def load(self) -> Data:
        """Return the data, see the base class."""
        facts: dict[str, Any] = {}
        if self._path is None:
            path = self._root / "OMNIGLOT" / "chardata.mat"
            obtain(self.name, self._root, [path], path.name, self._fetch)
            train, test = self._read_authors(path)
            source = "the file chardata.mat of Burda et al. 2016"
        else:
            content = self._content(self._path)
            facts = {"sha256": hashlib.sha256(content).hexdigest()}
            train, test = _read(self._path, content)
            source = f"the file {self._path.name}, which has the layout of that of Burda et al. 2016 but is another"
        train = train[np.random.RandomState(123).permutation(len(train))]
        validation = min(VALIDATION, len(train) // 10)
        splits = (*train.split([len(train) - validation, validation]), test)
        return self.data(splits, (SIDE, SIDE), source, which=" (the last after one fixed permutation)", **facts)

    @staticmethod
    def _content(path: Path) -> bytearray:
        if not path.exists():
            raise UserError(
                f"data.path names {path}, which does not exist; give a file in the layout of chardata.mat, "
                "or data.path=null for the authors' own"
            )
        return read_bytes(path)

    def _fetch(self, folder: Path) -> Sequence[Path]:
        path = download(self.url, folder)
        self._read_authors(path)
        return [path]

    def _read_authors(self, path: Path) -> tuple[UInt8[Tensor, "n pixels"], UInt8[Tensor, "m pixels"]]:
        content = read_bytes(path)
        check_hash(path, content, "md5", self.md5, f"{AFRESH}, or read it as it is with data.path=FILE")
        return _read(path, content)


def _read(path: Path, content: bytearray) -> tuple[UInt8[Tensor, "n pixels"], UInt8[Tensor, "m pixels"]]:
    """Return training and test images, row by row, 0 to 255."""
    found = load_mat(path, content, ADVICE)
    images = []
    for key, least in (("data", 10), ("testdata", 1)):
        values = found.get(key, np.zeros(()))
        fits = values.ndim == 2 and values.shape[0] == SIDE**2 and values.shape[1] >= least
        numbers = fits and values.dtype.kind in "uif" and values.min() >= 0 and values.max() <= 1  # false for NaN too
        if not numbers:
            what = f"has no {key!r} of shape ({SIDE**2}, {least} or more) with numbers in [0, 1]"
            raise Damaged(path, what, ADVICE)
        grey = np.rint(values.T * 255.0).astype(np.uint8).reshape(-1, SIDE, SIDE)
        images.append(torch.from_numpy(np.ascontiguousarray(grey.transpose(0, 2, 1)).reshape(-1, SIDE * SIDE)))
    return images[0], images[1]
