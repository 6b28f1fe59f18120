"""Random numbers derived from keys, so that there is no generator state to save or to lose.

Every number is a function of (seed, stream, index, ...). Training derives one generator per step; evaluation
derives its noise per image and block of samples, so that the value of a bound cannot depend on how the work
was cut into chunks, batches, workers or sessions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 64
"""Samples drawn together: a block is always drawn whole, then sliced."""


def derive(*key: int | str) -> int:
    """A 128-bit integer that is a hash of ``key``; different keys never share a stream in practice.

    Adding an index to a seed would make (seed 0, index 1) collide with (seed 1, index 0); hashing does not.
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "little")


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A torch generator on ``device`` seeded from ``key`` (63 bits; torch's CPU generator keeps 32 of them)."""
    return torch.Generator(device).manual_seed(derive(*key) >> 65)


def numpy_generator(*key: int | str) -> np.random.Generator:
    """A counter-based (Philox) numpy generator that keeps all 128 bits of the key."""
    return np.random.Generator(np.random.Philox(key=derive(*key)))


@runtime_checkable
class Noise(Protocol):
    """Where a model's randomness comes from: standard draws for one stochastic layer at a time."""

    def normal(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """Standard normal draws."""
        ...

    def uniform(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """Uniform draws on [0, 1)."""
        ...


class GeneratorNoise:
    """Noise read from one torch generator in the order of the calls: for training steps and for pictures."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> None:
        self._generator = generator
        self._dtype = dtype

    def normal(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """Standard normal draws; ``layer`` is not used, the order of the calls decides."""
        return torch.randn(k, batch, size, generator=self._generator, dtype=self._dtype, device=self._generator.device)

    def uniform(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """Uniform draws on [0, 1); ``layer`` is not used, the order of the calls decides."""
        return torch.rand(k, batch, size, generator=self._generator, dtype=self._dtype, device=self._generator.device)


class KeyedNoise:
    """Noise for evaluation: a function of (seed, stream, layer, image, sample index) alone.

    Drawn in float32 whatever ``dtype`` is, so that two precisions can be compared on the same noise.

    Args:
        seed: the evaluation seed (not the training seed).
        stream: what the draws are for, such as ``"test"``.
        images: index of each image of the batch within its split.
        start: index of the first sample; a multiple of ``BLOCK``.
        dtype, device: of the returned tensors.

    Raises:
        ValueError: ``start`` is not a multiple of ``BLOCK``.
    """

    def __init__(
        self,
        seed: int,
        stream: str,
        images: Sequence[int],
        start: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if start % BLOCK:
            raise ValueError(f"start must be a multiple of {BLOCK}, got {start}")
        self._key = (seed, stream)
        self._images = images
        self._block = start // BLOCK
        self._dtype = dtype
        self._device = device

    def normal(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """Standard normal draws for samples ``start`` to ``start + k`` of every image."""
        return self._draw("normal", layer, k, batch, size)

    def uniform(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """Uniform draws on [0, 1) for samples ``start`` to ``start + k`` of every image."""
        return self._draw("uniform", layer, k, batch, size)

    def _draw(self, kind: str, layer: int, k: int, batch: int, size: int) -> Tensor:
        if batch != len(self._images):
            raise ValueError(f"batch must be the {len(self._images)} images of this noise, got {batch}")
        blocks = -(-k // BLOCK)
        out = np.empty((batch, blocks * BLOCK, size), dtype=np.float32)
        for image, of_image in zip(self._images, out.reshape(batch, blocks, BLOCK, size), strict=True):
            philox = np.random.Philox(key=derive(*self._key, kind, layer, int(image)))
            random = np.random.Generator(philox)
            fill = random.standard_normal if kind == "normal" else random.random
            begun = philox.state  # as it is before the first number
            counter = begun["state"]["counter"]
            for block, whole in enumerate(of_image, start=self._block):
                # The third word of the 256-bit counter numbers the block: 2^128 numbers lie between two blocks.
                counter[2] = block
                philox.state = begun
                fill(out=whole, dtype=np.float32)
        drawn = torch.from_numpy(out).transpose(0, 1)[:k]
        return drawn.to(device=self._device, dtype=self._dtype)
