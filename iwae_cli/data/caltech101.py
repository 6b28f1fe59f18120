"""Caltech 101 Silhouettes as 28x28 binary images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar, final

import numpy as np
from jaxtyping import UInt8

from iwae_cli.data.base import Data
from iwae_cli.data.files import AFRESH, Damaged
from iwae_cli.data.mat import SIDE, MatImages

SPLITS = ("train_data", "val_data", "test_data")
SIZES = (4_100, 2_264, 2_307)
"""Images of the split that its authors published."""


@final
class Caltech101Silhouettes(MatImages):
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
    folder = "Caltech101Silhouettes"
    keys = SPLITS
    advice = AFRESH
    url: ClassVar[str] = "https://people.cs.umass.edu/~marlin/data/caltech101_silhouettes_28_split1.mat"

    def __init__(self, data_dir: str, path: str | None = None, invert: bool = False, limit: int | None = None) -> None:
        super().__init__(data_dir, path, limit=limit)
        self._invert = invert
        if invert:
            self.name = f"{self.name}_inverted"

    def fingerprint(self) -> str | None:
        """Return the sha256 of the file: no hash of it is published, so that another one may lie in its place."""
        return hashlib.sha256(self._file()[1]).hexdigest()

    def load(self) -> Data:
        """Return the data, see the base class."""
        path, content = self._file()
        splits = self._read(path, content)
        sha256 = hashlib.sha256(content).hexdigest()
        of = "not the published split"
        if tuple(map(len, splits)) == SIZES:
            of = "split 1 of Marlin et al. 2010"
            if self._path is not None:  # another split of the same images may have the same sizes
                of = f"which need not be {of}"
        if self._invert:
            splits = [1 - x for x in splits]
        return self.data(
            splits,
            (SIDE, SIDE),
            f"the file {path.name} (sha256 {sha256[:8]}), {of}",
            how=", inverted (1 - x): objects are 1" if self._invert else ", as in the file: objects are 0",
            sha256=sha256,
        )

    def _pixels(self, path: Path, key: str, values: np.ndarray) -> UInt8[np.ndarray, "n pixels"]:
        if values.ndim != 2 or values.shape[1] != SIDE**2 or not len(values) or not np.isin(values, (0, 1)).all():
            raise Damaged(path, f"has no {key!r} of shape (n, {SIDE**2}) with values 0 and 1")
        return values.astype(np.uint8)
