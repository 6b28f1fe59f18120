"""The settings of a final evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from iwae_cli.core.errors import check_range

MAX_K = 100_000_000  # samples of one image, which take hours
MAX_ROWS = 10_000_000  # values of one layer of 200 units for so many rows are 8 GB
MAX_WORKERS = 1024  # threads; no machine has so many cores


@dataclass
class Evaluation:
    """The settings of a final evaluation. This is what a yaml of ``conf/evaluation`` names, and describes.

    ``precision=bf16``, products of bfloat16 numbers with float32 sums, is for Gaussian models of binary pixels on a
    CPU. ``refine=200``, the default, takes a smaller split whole; twenty images are refined together, with 64 samples
    at least, also if ``rows`` is less.
    """

    k: int
    splits: list[Literal["train", "validation", "test"]]
    weights: Literal["last", "best"]
    seed: int
    binarization_seed: int
    rows: int
    workers: int | None
    jackknife: bool = False
    precision: Literal["float32", "bf16"] = "float32"
    refine: int | Literal["all"] = 0
    images: int | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("k", 1, MAX_K),
            ("rows", 64, MAX_ROWS),  # one block of samples at least
            ("workers", 1, MAX_WORKERS),
            ("images", 1, math.inf),
            ("seed", 0, math.inf),
            ("binarization_seed", 0, math.inf),
        ):
            check_range(name, getattr(self, name), least, most)
        if self.refine != "all":
            check_range("refine", self.refine, 0)
        if not self.splits:
            raise ValueError("splits must name at least one of train, validation, test, got []")
        if len(set(self.splits)) < len(self.splits):
            raise ValueError(f"splits must not repeat, got {self.splits}")
        if self.jackknife and self.k < 2:
            raise ValueError(f"jackknife needs k >= 2, got k={self.k}")
