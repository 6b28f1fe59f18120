"""Grey images that are not binarized: the levels of the file, under another name, with the mean in levels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from iwae_cli.data.base import Dataset
from iwae_cli.data.digits import Digits
from iwae_cli.data.mnist import MNIST
from iwae_cli.data.omniglot import Omniglot


@pytest.mark.parametrize("kind", [Digits, partial(MNIST, "somewhere"), partial(Omniglot, "somewhere")])
def test_what_a_model_must_be_for_follows_the_binarization(kind: Callable[..., Dataset]) -> None:
    observations = [kind().observation, kind(binarization="dynamic").observation, kind(binarization="none").observation]
    assert observations == ["binary", "binary", "grey"]


def test_grey_digits_are_the_digits_of_the_file(generator: torch.Generator) -> None:
    grey, binary = Digits(binarization="none").load(), Digits().load()
    assert (grey.name, binary.name) == ("digits_grey", "digits")
    assert (grey.levels, grey.binarization) == (17, "none")
    joined = torch.cat([grey.train, grey.validation, grey.test]).numpy()
    original = load_digits().data.astype(np.uint8)
    np.testing.assert_array_equal(joined[np.lexsort(joined.T)], original[np.lexsort(original.T)])
    # As a model sees them, in training and in evaluation.
    assert torch.equal(grey.batch(grey.train[:9], generator), grey.train[:9].float())
    for seed in (0, 1):
        assert torch.equal(grey.evaluation_split("test", seed).x, grey.test)
    np.testing.assert_allclose(grey.mean(), grey.train.numpy().astype(float).mean(0), rtol=1e-14)
    np.testing.assert_allclose(grey.mean() / 16, binary.mean(), rtol=1e-14)
