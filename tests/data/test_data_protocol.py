"""The protocol of binarization, the same for every data set, against probabilities worked out by hand."""

from __future__ import annotations

import hashlib
from typing import Any

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
    assert split.sha256 == hashlib.sha256(f"uint8 (4000, {levels}) ".encode() + split.x.numpy().tobytes()).hexdigest()
    assert_bernoulli(split.x, p)
    np.testing.assert_allclose(data.mean(), p, rtol=1e-15)


def test_training_redraws_at_every_access(generator: torch.Generator) -> None:
    data = made(greys(50))
    first, second = (data.batch(data.train, generator) for _ in range(2))
    # Two independent draws differ at a pixel with probability 2 p (1 - p), a third on average over grey levels.
    assert (first != second).double().mean().item() == pytest.approx(1 / 3, abs=0.03)
    again = data.batch(data.train, torch.Generator().manual_seed(0))
    assert torch.equal(first, again)


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


@pytest.mark.parametrize(
    ("train", "changed"),
    [
        (greys(2), {"levels": 2, "binarization": "fixed"}),
        (greys(2), {"levels": 17}),
        (torch.rand(2, 256), {}),
        (greys(2), {"levels": None}),
        (greys(2)[:0], {}),
        (greys(2), {"image_shape": (2, 2, 8, 8)}),
        (greys(2), {"image_shape": (28, 28)}),
    ],
)
def test_values_and_shapes_that_break_the_protocol_are_refused(train: torch.Tensor, changed: dict[str, Any]) -> None:
    chosen = {"levels": 256, "binarization": "dynamic", "image_shape": (256,)} | changed
    with pytest.raises(ValueError, match="made"):
        Data("made", "made up", train, train, greys(1), **chosen)
