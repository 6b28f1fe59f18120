"""OMNIGLOT characters as 28x28 grey images, in the file of the paper's authors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from iwae_cli.data.base import Data
from iwae_cli.data.files import AFRESH, Damaged, check_hash
from iwae_cli.data.mat import SIDE, MatImages

VALIDATION = 1_345


@final
class Omniglot(MatImages):
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
    folder = "OMNIGLOT"
    keys = ("data", "testdata")
    advice = "give a whole file in the layout of the authors' chardata.mat"
    url: ClassVar[str] = "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat"
    md5: ClassVar[str] = "21ecaf34373511aa7691cf2e0802aa3d"

    def fingerprint(self) -> str | None:
        """Return the sha256 of the file that ``path`` names; None for the authors' file, which never changes."""
        return None if self._path is None else hashlib.sha256(self._file()[1]).hexdigest()

    def load(self) -> Data:
        """Return the data, see the base class."""
        path, content = self._file()
        train, test = self._read(path, content)
        facts: dict[str, Any] = {}
        source = "the file chardata.mat of Burda et al. 2016"
        if self._path is not None:
            source = f"the file {path.name}, which has the layout of that of Burda et al. 2016 but is another"
            facts = {"sha256": hashlib.sha256(content).hexdigest()}
        train = train[np.random.RandomState(123).permutation(len(train))]
        validation = min(VALIDATION, len(train) // 10)
        splits = (*train.split([len(train) - validation, validation]), test)
        return self.data(splits, (SIDE, SIDE), source, which=" (the last after one fixed permutation)", **facts)

    def _read(self, path: Path, content: bytearray) -> list[UInt8[Tensor, "n pixels"]]:
        if self._path is None:
            check_hash(path, content, "md5", self.md5, f"{AFRESH}, or read it as it is with data.path=FILE")
        return super()._read(path, content)

    def _pixels(self, path: Path, key: str, values: np.ndarray) -> UInt8[np.ndarray, "n pixels"]:
        least = 10 if key == "data" else 1
        fits = values.ndim == 2 and values.shape[0] == SIDE**2 and values.shape[1] >= least
        if not (fits and values.dtype.kind in "uif" and values.min() >= 0 and values.max() <= 1):  # NaN neither
            what = f"has no {key!r} of shape ({SIDE**2}, {least} or more) with numbers in [0, 1]"
            raise Damaged(path, what, self.advice)
        return np.rint(values.T * 255.0).astype(np.uint8)
