"""The handwritten digits of scikit-learn: real images that need no download."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import zlib
from pathlib import Path
from typing import final

import numpy as np
import torch

from iwae_cli.core.errors import UserError
from iwae_cli.core.noise import numpy_generator
from iwae_cli.data.base import Data, GreyDataset
from iwae_cli.data.files import Damaged, read_bytes

FILE = "datasets/data/digits.csv.gz"
SIDE = 8
LEVELS = 17
SIZES = (1_297, 250, 250)
SHA256 = "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"
"""Hash of the 1,797 x 64 values in the order of the file, one byte each."""
_REINSTALL = "type pip install --force-reinstall scikit-learn"


@final
class Digits(GreyDataset):
    """1,797 handwritten digits of 8x8 pixels with 17 grey levels.

    Alpaydin, Kaynak 1998, Optical Recognition of Handwritten Digits (UCI), its test set as scikit-learn ships it.
    After one fixed permutation, which depends on nothing but this data set, 1,297 are for training, 250 for validation
    and 250 for the test.
    """

    name = "digits"
    levels = LEVELS

    def load(self) -> Data:
        """Return the data, from the file of the installed scikit-learn, without importing it (1.3 s)."""
        spec = importlib.util.find_spec("sklearn")
        places = [Path(folder) / FILE for folder in (spec and spec.submodule_search_locations) or ()]
        path = next((place for place in places if place.exists()), None)
        if path is None:
            raise UserError(f"data=digits reads {FILE} of scikit-learn, which is not there; {_REINSTALL}")
        try:
            rows = gzip.decompress(read_bytes(path)).splitlines() or [b""]
            # 64 pixels and the class.
            table = np.asarray([row.split(b",")[: SIDE * SIDE + 1] for row in rows]).astype(np.uint8)
            values = np.ascontiguousarray(table[:, : SIDE * SIDE])
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise Damaged(path, f"cannot be read as digits ({' '.join(str(error).split())})", _REINSTALL) from error
        if hashlib.sha256(values.tobytes()).hexdigest() != SHA256:
            raise Damaged(path, "is altered or damaged: its digits are not the published ones", _REINSTALL)
        order = numpy_generator("digits", "split").random(len(values)).argsort(kind="stable")
        images, classes = torch.from_numpy(values[order]), torch.from_numpy(table[order, -1])
        return self.data(
            images.split(SIZES),
            (SIDE, SIDE),
            "Alpaydin and Kaynak 1998, the copy in scikit-learn",
            how=f" after one fixed permutation, {LEVELS} grey levels",
            labels=classes.split(SIZES),
        )
