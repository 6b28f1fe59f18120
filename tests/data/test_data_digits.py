"""The embedded digits, against scikit-learn's own reader."""

from __future__ import annotations

import gzip
import importlib.machinery
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from iwae_cli.core.errors import UserError
from iwae_cli.core.noise import derive
from iwae_cli.data.base import Dataset
from iwae_cli.data.digits import Digits
from iwae_cli.data.mnist import MNIST
from iwae_cli.data.omniglot import Omniglot


@pytest.mark.parametrize("binarization", ["dynamic", "none"])
def test_the_splits_are_one_keyed_permutation_of_the_digits_of_scikit_learn(binarization: Any) -> None:
    data = Digits(binarization).load()
    theirs = load_digits().data.astype(np.uint8)
    u = np.random.Generator(np.random.Philox(key=derive("digits", "split"))).random(1797)
    order = np.argsort(u)
    assert len(set(u.tolist())) == 1797
    ours = np.concatenate([data.train, data.validation, data.test])
    assert np.array_equal(ours, theirs[order])
    assert [len(data.train), len(data.validation), len(data.test)] == [1297, 250, 250]


def test_the_facts_of_the_protocol() -> None:
    data = Digits().load()
    assert (data.levels, data.binarization, data.image_shape) == (17, "dynamic", (8, 8))
    assert int(data.train.max()) == 16
    # The data scored by default: its hash changes only with the file, the split or the noise.
    assert data.evaluation_split("test", 0).sha256 == "21de408b07fc54acbb76f0f89c9a073f56957de52306cb7bb49456b32b32f061"


@pytest.mark.parametrize(
    "content",
    [None, b"", b"not a gzip file", gzip.compress(b"1,2,3\n4,5\n"), gzip.compress(b"1,2\n" * 1797)],
    ids=["no scikit-learn", "empty", "no gzip", "lines of unequal length", "altered"],
)
def test_a_missing_or_wrong_file_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    """scikit-learn is installed in a folder of the test, or nowhere."""
    spec = importlib.machinery.ModuleSpec("sklearn", None)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if content is None else spec)
    path = tmp_path / "datasets" / "data" / "digits.csv.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(content or b"")
    with pytest.raises(UserError, match="^data=digits" if content is None else f"^{path} "):
        Digits().load()


@pytest.mark.parametrize("kind", [Digits, partial(MNIST, "somewhere"), partial(Omniglot, "somewhere")])
def test_what_a_model_must_be_for_follows_the_binarization(kind: Callable[..., Dataset]) -> None:
    observations = [kind().observation, kind(binarization="dynamic").observation, kind(binarization="none").observation]
    assert observations == ["binary", "binary", "grey"]


def test_grey_digits_are_seen_as_the_levels_of_the_file(generator: torch.Generator) -> None:
    grey, binary = Digits(binarization="none").load(), Digits().load()
    assert (grey.name, grey.levels, grey.binarization) == ("digits_grey", 17, "none")
    assert torch.equal(grey.batch(grey.train[:9], generator), grey.train[:9].float())
    for seed in (0, 1):
        assert torch.equal(grey.evaluation_split("test", seed).x, grey.test)
    np.testing.assert_allclose(grey.mean(), grey.train.numpy().astype(float).mean(0), rtol=1e-14)
    np.testing.assert_allclose(grey.mean() / 16, binary.mean(), rtol=1e-14)
