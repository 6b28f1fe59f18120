"""The protocol of binarization, the same for every data set, against probabilities worked out by hand."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from iwae_cli.core.noise import derive
from iwae_cli.data.base import Binarization, Data


def made(
    train: torch.Tensor,
    levels: int | None = 256,
    binarization: Binarization = "dynamic",
    test: torch.Tensor | None = None,
) -> Data:
    return Data(
        name="made",
        protocol="made up",
        train=train,
        validation=train[:1],
        test=train if test is None else test,
        levels=levels,
        binarization=binarization,
        image_shape=(train.shape[1],),
    )


def greys(n: int, levels: int = 256) -> torch.Tensor:
    """Every grey level in turn along a row, the same rows."""
    return torch.arange(levels, dtype=torch.uint8).expand(n, levels).contiguous()


def assert_bernoulli(x: torch.Tensor, p: torch.Tensor) -> None:
    """Column means within five standard errors of ``p``, exactly where ``p`` is 0 or 1."""
    n = len(x)
    sd = (p * (1 - p) / n).sqrt()
    assert set(x.unique().tolist()) == {0, 1}
    assert torch.all((x.double().mean(0) - p).abs() <= 5 * sd)


@pytest.mark.parametrize("levels", [17, 256])
def test_both_binarizations_have_the_grey_value_as_their_mean(levels: int, generator: torch.Generator) -> None:
    data = made(greys(4000, levels), levels)
    p = torch.arange(levels, dtype=torch.float64) / (levels - 1)
    batch = data.batch(data.train, generator)
    assert batch.dtype == torch.float32
    assert_bernoulli(batch, p)
    split = data.evaluation_split("test", 0)
    assert split.x.dtype == torch.uint8
    assert_bernoulli(split.x, p)
    np.testing.assert_allclose(data.mean(), p, rtol=1e-15)


def test_training_redraws_at_every_access(generator: torch.Generator) -> None:
    data = made(greys(50))
    first, second = (data.batch(data.train, generator) for _ in range(2))
    # Two independent draws differ at a pixel with probability 2 p (1 - p), a third on average over grey levels.
    assert (first != second).double().mean().item() == pytest.approx(1 / 3, abs=0.03)
    again = data.batch(data.train, torch.Generator().manual_seed(0))
    assert torch.equal(first, again)


def test_the_binarization_of_training_does_not_follow_the_default_dtype() -> None:
    data = made(greys(50))
    one = data.batch(data.train, torch.Generator().manual_seed(3))
    torch.set_default_dtype(torch.float64)
    try:
        other = data.batch(data.train, torch.Generator().manual_seed(3))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(one, other)


def test_the_evaluation_draw_is_keyed_by_seed_split_and_image_alone() -> None:
    data = made(greys(2500))
    draw = data.evaluation_split("test", 7)
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(draw.x, data.evaluation_split("test", 7).x)
    for other in (data.evaluation_split("test", 8), data.evaluation_split("train", 7)):
        assert (draw.x != other.x).double().mean().item() == pytest.approx(1 / 3, abs=0.01)
    # Neighbours share no noise, and the draw of an image does not depend on the others or on their number.
    assert (draw.x[:-1] != draw.x[1:]).double().mean().item() == pytest.approx(1 / 3, abs=0.01)
    changed = greys(1300)
    changed[:1200] = 128
    fewer = made(changed).evaluation_split("test", 7)
    assert torch.equal(fewer.x[1200:], draw.x[1200:1300])


def test_one_image_can_be_drawn_without_the_others() -> None:
    data = made(greys(1100))
    philox = np.random.Philox(key=derive(7, "binarization", "test")).advance(1050 * 256 // 4)
    u = np.random.Generator(philox).random(256)
    assert np.array_equal(data.evaluation_split("test", 7).x[1050].numpy(), u < np.arange(256) / 255)


def test_the_hash_is_of_the_values_that_are_scored() -> None:
    data = made(greys(20))
    split = data.evaluation_split("test", 0)
    assert split.sha256 == hashlib.sha256(b"uint8 (20, 256) " + split.x.numpy().tobytes()).hexdigest()
    assert split.sha256 != data.evaluation_split("test", 1).sha256
    assert (split.name, split.sha256) == ("test", data.evaluation_split("test", 0).sha256)


def test_fixed_and_real_values_are_scored_unchanged(generator: torch.Generator) -> None:
    binary = (greys(3) > 100).to(torch.uint8)
    data = made(binary, 2, "fixed")
    assert torch.equal(data.evaluation_split("test", 0).x, binary)
    assert torch.equal(data.batch(binary, generator), binary.float())
    np.testing.assert_allclose(data.mean(), binary[0], rtol=0)
    real = torch.randn(40, 5)
    data = made(real, None, "none")
    assert torch.equal(data.evaluation_split("test", 0).x, real)
    assert data.evaluation_split("test", 0).sha256 == data.evaluation_split("test", 1).sha256
    np.testing.assert_allclose(data.mean(), real.double().mean(0), rtol=1e-14)


def test_the_mean_of_many_bright_images_does_not_overflow() -> None:
    data = made(torch.full((70_000, 2), 255, dtype=torch.uint8))
    assert data.mean().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("train", "levels", "binarization", "message"),
    [
        (greys(2), 2, "fixed", "train split of made must hold uint8 values 0 to 1"),
        (greys(2), 17, "dynamic", "train split of made must hold uint8 values 0 to 16"),
        (torch.rand(2, 256), 256, "dynamic", "train split of made must hold uint8 values 0 to 255"),
        (greys(2), None, "dynamic", "levels of made must be a number"),
        (greys(2)[:0], 256, "dynamic", "train split of made must be"),
    ],
)
def test_values_that_break_the_protocol_are_refused(
    train: torch.Tensor, levels: int | None, binarization: Binarization, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(train, levels, binarization, test=greys(1))


def test_images_of_another_shape_are_refused() -> None:
    x = greys(2)
    for shape in ((256,), (16, 16), (4, 8, 8)):
        Data("made", "made up", x, x, x, levels=256, binarization="dynamic", image_shape=shape)
    with pytest.raises(ValueError, match="image_shape of made must have one to three sizes"):
        Data("made", "made up", x, x, x, levels=256, binarization="dynamic", image_shape=(2, 2, 8, 8))
    with pytest.raises(ValueError, match=r"train split of made must be \(n >= 1, 784\), got \(2, 256\)"):
        Data("made", "made up", x, x, x, levels=256, binarization="dynamic", image_shape=(28, 28))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="name must be one of train, validation, test, got 'valid'"):
        made(greys(2)).evaluation_split("valid", 0)


def test_within_image_noise_is_real() -> None:
    """A guard on the guard above: a constant draw would have passed the hash tests."""
    x = made(torch.full((400, 100), 128, dtype=torch.uint8)).evaluation_split("test", 0).x.double()
    p = 128 / 255
    assert x.sum(1).var().item() == pytest.approx(100 * p * (1 - p), rel=5 * math.sqrt(2 / 399))
