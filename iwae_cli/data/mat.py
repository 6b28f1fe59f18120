"""28x28 images in one MATLAB file: that of its authors, or another of the same layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from iwae_cli.core.errors import UserError
from iwae_cli.data.base import GreyBinarization, GreyDataset
from iwae_cli.data.files import Damaged, directory, download, obtain, read_bytes

SIDE = 28


class MatImages(GreyDataset, ABC):
    """Reads ``<data_dir>/<folder>/<file of url>``, downloaded if it is not there, or ``path``, of any size."""

    folder: ClassVar[str]
    url: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    """Variables of the file that hold images, column by column."""
    advice: ClassVar[str]
    """What to do about a damaged file."""

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

    @abstractmethod
    def _pixels(self, path: Path, key: str, values: np.ndarray) -> UInt8[np.ndarray, "n pixels"]:
        """Return the images of one variable, checked."""

    def _read(self, path: Path, content: bytearray) -> list[UInt8[Tensor, "n pixels"]]:
        """Return the images of each of the ``keys``, row by row."""
        # Imported here, since scipy.io takes longer to import than most files to read.
        from scipy.io import loadmat

        try:
            found = loadmat(BytesIO(content))
        except Exception as error:  # damaged files raise errors of many kinds, from struct to zlib
            what = f"cannot be read, it may be truncated ({' '.join(str(error).split())})"
            raise Damaged(path, what, self.advice) from error
        columns = [self._pixels(path, key, found.get(key, np.zeros(()))) for key in self.keys]
        rows = [np.ascontiguousarray(x.reshape(-1, SIDE, SIDE).transpose(0, 2, 1)) for x in columns]
        return [torch.from_numpy(x.reshape(-1, SIDE**2)) for x in rows]

    def _file(self) -> tuple[Path, bytearray]:
        layout = self.url.rpartition("/")[2]
        if self._path is None:
            path = self._root / self.folder / layout
            obtain(type(self).name, self._root, [path], layout, self._fetch)
            return path, read_bytes(path)
        if not self._path.exists():
            raise UserError(
                f"data.path names {self._path}, which does not exist; give a file in the layout of {layout}, "
                "or data.path=null for the authors' own"
            )
        return self._path, read_bytes(self._path)

    def _fetch(self, folder: Path) -> Sequence[Path]:
        path = download(self.url, folder)
        self._read(path, read_bytes(path))
        return [path]
