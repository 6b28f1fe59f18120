"""Noise is a function of its key: chunks, other images and the order of calls do not change it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from iwae_cli.core.noise import BLOCK, KeyedNoise, derive, generator, numpy_generator

IMAGES = [3, 0, 11, 7]
K = 5 * BLOCK
SIZE = 5


def draw(noise: KeyedNoise, kind: str, k: int, batch: int, layer: int = 1, size: int = SIZE) -> Tensor:
    method: Callable[[int, int, int, int], Tensor] = getattr(noise, kind)
    return method(layer, k, batch, size)


def whole(kind: str) -> Tensor:
    return draw(KeyedNoise(4, "test", IMAGES), kind, K, len(IMAGES))


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_samples_do_not_depend_on_the_chunk(kind: str) -> None:
    expected = whole(kind)
    for chunk in (BLOCK, 4 * BLOCK):
        pieces = [
            draw(KeyedNoise(4, "test", IMAGES, start), kind, min(chunk, K - start), len(IMAGES))
            for start in range(0, K, chunk)
        ]
        assert torch.equal(torch.cat(pieces), expected)
    for k in (1, BLOCK - 1, BLOCK + 1):
        assert torch.equal(draw(KeyedNoise(4, "test", IMAGES), kind, k, len(IMAGES)), expected[:k])
    double = draw(KeyedNoise(4, "test", IMAGES, dtype=torch.float64), kind, K, len(IMAGES))
    assert double.dtype == torch.float64
    if kind == "normal":
        assert torch.equal(double, expected.double())


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_an_image_does_not_depend_on_its_batch_or_on_the_order_of_calls(kind: str) -> None:
    expected = whole(kind)
    for row, image in enumerate(IMAGES):
        noise = KeyedNoise(4, "test", [image])
        draw(noise, kind, 7, 1, layer=2)
        assert torch.equal(draw(noise, kind, K, 1), expected[:, [row]])
        assert torch.equal(draw(noise, kind, K, 1), expected[:, [row]])
    backwards = draw(KeyedNoise(4, "test", range(11, -1, -1)), kind, K, 12)
    assert torch.equal(backwards[:, [11 - image for image in IMAGES]], expected)


@pytest.mark.parametrize(
    "other",
    [
        KeyedNoise(5, "test", IMAGES),
        KeyedNoise(4, "validation", IMAGES),
        KeyedNoise(4, "test", [i + 1 for i in IMAGES]),
        KeyedNoise(4, "test", IMAGES, start=BLOCK),
        # With seed + index these would be the same numbers.
        KeyedNoise(3, "test", [i + 1 for i in IMAGES]),
    ],
    ids=["seed", "stream", "images", "start", "seed and image"],
)
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_another_key_is_another_stream(other: KeyedNoise, kind: str) -> None:
    compare(whole(kind), draw(other, kind, K, len(IMAGES)))


def test_layers_and_kinds_are_independent() -> None:
    other_layer = draw(KeyedNoise(4, "test", IMAGES), "normal", K, len(IMAGES), layer=2)
    # A uniform draw must not be a function of the normal draw of the same key.
    other_kind = torch.special.ndtri(whole("uniform").double()).clamp(-9, 9).float()
    for other in (other_layer, other_kind):
        compare(whole("normal"), other)


def compare(here: Tensor, there: Tensor) -> None:
    """Raise AssertionError unless the two draws look independent."""
    assert (here == there).double().mean() < 1e-3
    pair = torch.stack([here.flatten(), there.flatten()]).double()
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / math.sqrt(here.numel())


@pytest.mark.parametrize(("kind", "law"), [("normal", stats.norm), ("uniform", stats.uniform)])
def test_draws_have_their_distribution(kind: str, law: stats.rv_continuous) -> None:
    values = draw(KeyedNoise(0, "law", range(20)), kind, 640, 20, size=4).double().numpy()
    n = values.size
    sd = law.std()
    assert abs(values.mean() - law.mean()) < 4 * sd / math.sqrt(n)
    fourth = law.stats(moments="k") + 3
    assert abs(values.var() - sd**2) < 4 * sd**2 * math.sqrt((fourth - 1) / n)
    assert stats.kstest(values.ravel(), law.cdf).pvalue > 1e-3
    assert kind == "normal" or (values.min() >= 0 and values.max() < 1)
    # Along every axis neighbours are independent: samples (inside and across blocks), images, units.
    centred = (values - law.mean()) / sd
    for axis in range(3):
        lead, lag = np.delete(centred, 0, axis), np.delete(centred, -1, axis)
        assert abs((lead * lag).mean()) < 4 / math.sqrt(lead.size)


def test_a_block_is_the_jumped_stream_of_numpy() -> None:
    """Block b reads numpy's documented Philox.jumped(b): 2^128 numbers lie between the starts of two blocks."""
    noise = draw(KeyedNoise(4, "test", [9], start=2 * BLOCK), "normal", 2 * BLOCK, 1)
    for index, block in enumerate((2, 3)):
        bits = np.random.Philox(key=derive(4, "test", "normal", 1, 9)).jumped(block)
        expected = np.random.Generator(bits).standard_normal((BLOCK, SIZE), dtype=np.float32)
        np.testing.assert_array_equal(noise[index * BLOCK : (index + 1) * BLOCK, 0].numpy(), expected)


def test_keys_distinguish_types_and_boundaries() -> None:
    assert len({derive("a", "bc"), derive("ab", "c"), derive("abc"), derive(1), derive("1"), derive(1, 1)}) == 6
    # Fixed, or no recorded number could be reproduced. From `printf "(0, 'test')" | b2sum -l 128`:
    assert derive(0, "test") == int.from_bytes(bytes.fromhex("7f583dab6070fb8662d8ec26a43cbbc8"), "little")


def test_generators_are_keyed() -> None:
    same = [torch.randn(4, generator=generator("cpu", 0, "step", 1)) for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], torch.randn(4, generator=generator("cpu", 0, "step", 2)))
    a, b = (numpy_generator(1, "x").random(4) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert (numpy_generator(1, "y").random(4) != a).all()
