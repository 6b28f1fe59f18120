"""Base classes of all data sets: three splits in memory, and one protocol for binarizing them."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from iwae_cli.core.errors import UserError
from iwae_cli.core.interfaces import Observation
from iwae_cli.core.noise import numpy_generator

SPLITS = ("train", "validation", "test")
Binarization = Literal["dynamic", "fixed", "none"]
GreyBinarization = Literal["dynamic", "none"]
"""The choices for grey images."""

_CHUNK = 1000
"""Images binarized in one call: bounds the memory and does not change the values."""


@dataclass(frozen=True)
class Split:
    """Observations to score, the same for every model.

    Attributes:
        name: train, validation or test.
        x: (n, pixels); uint8 in {0, 1} for binary data, uint8 grey levels, or float32 for real-valued data.
        sha256: of dtype, shape and values of ``x``; two results are comparable if it is equal.
        labels: classes, (n,), or None.
    """

    name: str
    x: Shaped[Tensor, "n pixels"]
    sha256: str
    labels: UInt8[Tensor, " n"] | None = None


@dataclass(frozen=True)
class Data:
    """A data set in memory.

    Attributes:
        name: its name in records.
        protocol: one sentence: splits, binarization, source.
        train, validation, test: (images, pixels); uint8 grey values 0 to ``levels`` - 1, or float32.
        levels: number of grey levels, 2 for binary data; None for real values.
        binarization: ``dynamic`` (redrawn at every access in training; one keyed draw for evaluation), ``fixed``
            (already binary) or ``none`` (values are used unchanged).
        image_shape: (height, width), (channels, height, width), or (pixels,) of what is no image.
        facts: for the record, plain JSON values.
        labels: classes of each split by its name, (images,) each.
    """

    name: str
    protocol: str
    train: Shaped[Tensor, "n pixels"]
    validation: Shaped[Tensor, "m pixels"]
    test: Shaped[Tensor, "l pixels"]
    levels: int | None
    binarization: Binarization
    image_shape: tuple[int, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, UInt8[Tensor, " _"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.binarization == "dynamic" and self.levels is None:
            raise ValueError(f"levels of {self.name} must be a number: dynamic binarization needs the white level")
        if not 1 <= len(self.image_shape) <= 3:
            raise ValueError(f"image_shape of {self.name} must have one to three sizes, got {self.image_shape}")
        pixels = math.prod(self.image_shape)
        for name in SPLITS:
            images = getattr(self, name)
            if images.shape[0] == 0 or images.shape[1] != pixels:
                raise ValueError(f"{name} split of {self.name} must be (n >= 1, {pixels}), got {tuple(images.shape)}")
            if len(self.labels.get(name, images)) != len(images):
                raise ValueError(f"labels of {self.name} must be one for each of its {len(images)} {name} images")
            top = 1 if self.binarization == "fixed" else self.levels and self.levels - 1
            if top is not None and (images.dtype != torch.uint8 or int(images.max()) > top):
                raise ValueError(f"{name} split of {self.name} must hold uint8 values 0 to {top}")

    def batch(
        self, images: Shaped[Tensor, "batch pixels"], generator: torch.Generator
    ) -> Float[Tensor, "batch pixels"]:
        """Return training rows for a model: float32, with a fresh binarization if it is dynamic."""
        if self.binarization == "dynamic":
            assert self.levels is not None
            u = torch.rand(images.shape, generator=generator, device=images.device, dtype=torch.float32)
            return u.mul_(self.levels - 1).lt_(images)
        return images.to(torch.float32)

    def std(self) -> float:
        """Return the standard deviation of the pixels of the training split about their means, in the units of x."""
        return math.sqrt(float(self.train.float().var(0, correction=0).mean()))

    def pictured(self, x: Shaped[Tensor, "n pixels"]) -> Shaped[np.ndarray, "n *image"]:
        """Return observations as images in [0, 1], real values between the least and the greatest of training."""
        low, high = 0.0, 1.0
        if self.binarization == "none":
            low, high = map(float, self.train.aminmax()) if self.levels is None else (0.0, self.levels - 1.0)
        scaled = (x.double() - low) / max(high - low, 1e-30)
        return scaled.clamp(0, 1).cpu().numpy().reshape(-1, *self.image_shape)

    def mean(self) -> np.ndarray:
        """Return the mean of every pixel over the training split, (pixels,), float64; a probability for binary data."""
        scale = self.levels - 1 if self.binarization == "dynamic" and self.levels else 1
        # Integers are summed exactly, and without a copy of the split in float64.
        images = self.train.numpy()
        total = images.sum(0, dtype=np.float64 if self.levels is None else np.int64)
        return np.asarray(total / (len(images) * scale))

    def sha256(self) -> str:
        """Return a hash of all three splits."""
        return _sha256(self.train, self.validation, self.test)

    def evaluation_split(self, name: str, binarization_seed: int, first: int | None = None) -> Split:
        """Return one split as every model is scored on it.

        A dynamic split is binarized once, x_ij ~ Bernoulli(grey_ij / (levels - 1)), keyed by
        (``binarization_seed``, split, image), independently of a run's seed and of the latent noise. Image i
        uses numbers i * pixels to (i + 1) * pixels of the counter-based stream of its split, so that its draw
        does not depend on other images. ``first`` is the number of images, from the first; None is all.
        """
        if name not in SPLITS:
            raise ValueError(f"name must be one of {', '.join(SPLITS)}, got {name!r}")
        images = getattr(self, name)[:first]
        if self.binarization == "dynamic":
            assert self.levels is not None
            grey = images.numpy()
            x = np.empty(grey.shape, dtype=np.uint8)
            uniform = numpy_generator(binarization_seed, "binarization", name)
            for start in range(0, len(grey), _CHUNK):
                chunk = grey[start : start + _CHUNK]
                x[start : start + _CHUNK] = uniform.random(chunk.shape) < chunk / (self.levels - 1)
            images = torch.from_numpy(x)
        return Split(name, images, _sha256(images), self.labels[name][:first] if name in self.labels else None)


def _sha256(*splits: Tensor) -> str:
    digest = hashlib.sha256()
    for values in (split.numpy() for split in splits):
        digest.update(f"{values.dtype} {values.shape} ".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


class Dataset(ABC):
    """The source of a data set; ``load`` reads it. This is what a yaml of ``conf/data`` names.

    Attributes:
        name: of the data set, or of its source, for the name of a run.
        observation: kind of its pixels, as a model is given them.
        limit: number of training images that are used, from the first; None is all.
    """

    name: str
    observation: Observation
    limit: int | None = None

    @abstractmethod
    def load(self) -> Data:
        """Return the data set, after a download if files are missing; a UserError names those truncated or altered."""

    def fingerprint(self) -> str | None:
        """Return a hash of what the data set is read from, for the identity of a run.

        None, unless overridden: the content of every file and folder is then hashed that an argument names.
        """
        return None


class GreyDataset(Dataset, ABC):
    """A data set of grey images, binarized or, with ``binarization="none"``, unchanged.

    Their results are not comparable, so the second has another name, ``<name>_grey``. Images of two levels, or of real
    values (``levels`` None), are always unchanged.
    """

    levels: int | None
    fixed = "binary as they are"
    """How images of two levels are described."""

    def __init__(self, binarization: GreyBinarization = "dynamic", limit: int | None = None) -> None:
        if binarization not in get_args(GreyBinarization):
            raise ValueError(f"binarization must be one of dynamic, none, got {binarization!r}")
        self.limit = limit
        self.binarization: GreyBinarization = binarization
        binary = self.levels == 2 or binarization == "dynamic"
        self.observation = "real" if self.levels is None else "binary" if binary else "grey"

    def data(
        self,
        splits: Sequence[Shaped[Tensor, "_ pixels"]],
        image_shape: tuple[int, ...],
        source: str,
        *,
        which: str = "",
        how: str = "",
        labels: Sequence[UInt8[Tensor, " _"]] = (),
        **facts: str,
    ) -> Data:
        """Return ``splits`` (train, validation, test) of images, with a protocol that says what they are.

        ``which`` names the images of the validation split, ``how`` more about all of them.
        """
        train, validation, test = splits
        name, first = self.name, ""
        binarization: Binarization = "none"
        if self.levels is None:
            how += ", real values as they are"
        elif self.levels == 2:
            binarization, how = "fixed", f"{how}, {self.fixed}"
        elif self.binarization == "dynamic":
            binarization = "dynamic"
            how += ", binarized dynamically: redrawn at every access in training, one keyed draw for evaluation"
        else:
            name, how = f"{name}_grey", f"{how}, grey levels 0 to {self.levels - 1} as they are, not binarized"
        if self.limit is not None:
            if not 1 <= self.limit <= len(train):
                raise UserError(f"data.limit must be null or from 1 to {len(train):,} images, got {self.limit}")
            name, first = f"{name}_first{self.limit}", f" (the first of {len(train):,})"
            train = train[: self.limit]
        sizes = "x".join(map(str, image_shape))
        what = f"observations of {sizes} values" if len(image_shape) == 1 else f"images of {sizes}"
        protocol = (
            f"{len(train):,} training{first}, {len(validation):,} validation{which} and {len(test):,} test {what}"
            f"{how}; {source}"
        )
        x = (train, validation, test)
        classes = {name: of[: len(rows)] for name, of, rows in zip(SPLITS, labels, x, strict=False)}
        return Data(name, protocol, *x, self.levels, binarization, image_shape, facts, classes)
