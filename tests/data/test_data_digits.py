"""The embedded digits, against scikit-learn's own reader."""

from __future__ import annotations

import gzip
import importlib.machinery
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from iwae_cli.core.errors import UserError
from iwae_cli.core.noise import derive
from iwae_cli.data.digits import Digits


def test_the_splits_are_one_keyed_permutation_of_the_digits_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    data = Digits().load()
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
    for words in ("1,297 training, 250 validation and 250 test", "binarized dynamically", "one fixed permutation"):
        assert words in data.protocol


def elsewhere(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Let scikit-learn be installed in ``folder``; the path its digits would have."""
    spec = importlib.machinery.ModuleSpec("sklearn", None)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "sklearn" else None)
    path = folder / "datasets" / "data" / "digits.csv.gz"
    path.parent.mkdir(parents=True)
    return path


def test_no_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^data=digits reads .*; type pip install --force-reinstall scikit-learn$"):
        Digits().load()


def test_an_altered_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = elsewhere(monkeypatch, tmp_path)
    with gzip.open(path, "wt") as file:
        np.savetxt(file, np.zeros((1797, 65), dtype=int), fmt="%d", delimiter=",")
    with pytest.raises(UserError, match=rf"^{path} is altered or damaged"):
        Digits().load()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a gzip file", gzip.compress(b"1,2,3\n4,5\n"), gzip.compress(b"1,2\n" * 99)[:-9]],
    ids=["empty", "no gzip", "lines of unequal length", "cut short"],
)
def test_a_damaged_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes) -> None:
    path = elsewhere(monkeypatch, tmp_path)
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path} (is altered or damaged|cannot be read as digits)"):
        Digits().load()
