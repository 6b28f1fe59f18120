"""Random numbers derived from hashed keys, so that there is no generator state to save.

Every number is a function of (seed, stream, index, ...). Training derives one generator per step. Evaluation derives
its noise per image and block of samples, so that a bound does not depend on chunks, batches, workers or processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 64
"""Samples per block; a block is always drawn whole, then sliced."""


def derive(*key: int | str) -> int:
    """Return a 128-bit hash of ``key``: a sum of seed and index would collide, (0, 1) with (1, 0)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "little")


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """Return a torch generator on ``device`` seeded from ``key`` (63 bits, of which torch's CPU generator keeps 32)."""
    return torch.Generator(device).manual_seed(derive(*key) >> 65)


def numpy_generator(*key: int | str) -> np.random.Generator:
    """Return a counter-based (Philox) numpy generator, which uses all 128 bits of ``derive(*key)``."""
    return np.random.Generator(np.random.Philox(key=derive(*key)))


Kind = Literal["normal", "uniform"]


class Noise:
    """Source of a model's randomness: standard draws for one stochastic layer at a time, from ``_draw``."""

    def normal(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """Return standard normal draws, (k, batch, size)."""
        return self._draw("normal", layer, k, batch, size)

    def uniform(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """Return uniform draws on [0, 1), (k, batch, size)."""
        return self._draw("uniform", layer, k, batch, size)

    def _draw(self, kind: Kind, layer: int, k: int, batch: int, size: int) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class GeneratorNoise(Noise):
    """Noise from one torch generator in the order of the calls, for training and figures; ``layer`` is ignored."""

    generator: torch.Generator
    dtype: torch.dtype = torch.float32

    def _draw(self, kind: Kind, layer: int, k: int, batch: int, size: int) -> Tensor:
        draw = torch.randn if kind == "normal" else torch.rand
        return draw(k, batch, size, generator=self.generator, dtype=self.dtype, device=self.generator.device)


def default_noise(like: Tensor) -> GeneratorNoise:
    """Return the noise of a model that is called without one, of the dtype and on the device of ``like``.

    Its seed is 0, so that equal calls have equal draws.
    """
    return GeneratorNoise(generator(like.device, 0, "default"), like.dtype)


@dataclass(frozen=True, eq=False)
class KeyedNoise(Noise):
    """Noise for evaluation: a function of (seed, stream, layer, image, sample index) alone.

    Always drawn in float32, so that two precisions can be compared on the same noise.

    Args:
        seed: evaluation seed, not the training seed.
        stream: purpose of the draws, such as ``"test"``.
        images: index within its split of each image of the batch.
        start: index of the first sample; a multiple of ``BLOCK``.
        dtype, device: of the returned tensors.
    """

    seed: int
    stream: str
    images: Sequence[int]
    start: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.start % BLOCK:
            raise ValueError(f"start must be a multiple of {BLOCK}, got {self.start}")

    def _draw(self, kind: Kind, layer: int, k: int, batch: int, size: int) -> Tensor:
        if batch != len(self.images):
            raise ValueError(f"batch must be the {len(self.images)} images of this noise, got {batch}")
        blocks = -(-k // BLOCK)
        out = np.empty((batch, blocks * BLOCK, size), dtype=np.float32)
        for image, blocks_of_image in zip(self.images, out.reshape(batch, blocks, BLOCK, size), strict=True):
            philox = np.random.Philox(key=derive(self.seed, self.stream, kind, layer, int(image)))
            random = np.random.Generator(philox)
            fill = random.standard_normal if kind == "normal" else random.random
            initial = philox.state
            counter = initial["state"]["counter"]
            for block, whole in enumerate(blocks_of_image, start=self.start // BLOCK):
                # The third word of the 256-bit counter is the block's number: blocks are 2^128 numbers apart.
                counter[2] = block
                philox.state = initial
                fill(out=whole, dtype=np.float32)
        drawn = torch.from_numpy(out).transpose(0, 1)[:k]
        return drawn.to(device=self.device, dtype=self.dtype)
