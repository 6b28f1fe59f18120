"""A run from Python: ``iwae_cli.open`` and ``iwae_cli.train``, against the files of the run and the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from small_runs import TINY, TINY_TWO_LAYERS, arrays, finished, read_json, run

import iwae_cli
from iwae_cli.core.errors import UserError
from iwae_cli.data.digits import Digits
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.iwae import IWAE

OTHERWISE = ("evaluation.seed=3", "evaluation.binarization_seed=5", "evaluation.splits=[validation,test]")
RUNS: dict[str, tuple[str, ...]] = {
    "as by default": TINY,
    "two layers, best weights, first images": (
        *TINY_TWO_LAYERS,
        *OTHERWISE,
        "evaluation.weights=best",
        "evaluation.images=70",
        "objective.gradient=dreg",
    ),
    "grey": ("data.binarization=none", "model.likelihood=discretized_logistic", *TINY, *OTHERWISE),
    "discrete": (
        "model=discrete",
        "model.latent_sizes=[6,4]",
        "objective=vimco",
        *TINY[2:],
        "device.precision=float64",
    ),
}


@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)
def test_log_px_is_what_the_run_recorded(overrides: tuple[str, ...], tmp_path: Path) -> None:
    opened = iwae_cli.open(finished(tmp_path, *overrides))
    result, recorded = read_json(opened.path / "result.json"), arrays(opened.path / "log_likelihood.npz")
    assert opened.result == result and opened.config["evaluation"]["k"] == 50
    seed = result["evaluation"]["seed"]
    for name in opened.config["evaluation"]["splits"]:
        split = opened.split(name)
        assert split.sha256 == result["dataset"]["evaluation_sha256"][name]
        expected = recorded["log_px" if name == "test" else f"{name}_log_px"]
        np.testing.assert_array_equal(opened.log_px(split, 50, seed=seed).numpy(), expected)
        assert -expected.mean() == result[name]["nll"] and len(expected) == len(split.x) == result[name]["n"]
    images = split.x.reshape(-1, 8, 8).numpy()  # the last split is the test split
    for x in (split.x, split.x.float(), images):
        np.testing.assert_array_equal(opened.log_px(x, 50, seed=seed).numpy(), expected)
    assert (opened.log_px(split, 50, seed=seed + 1).numpy() != expected).any()


def test_labels_are_those_of_scikit_learn(tiny_run: Path) -> None:
    opened, (pixels, target) = iwae_cli.open(tiny_run), load_digits(return_X_y=True)
    by_image = {row.astype(np.uint8).tobytes(): label for row, label in zip(pixels, target, strict=True)}
    for name, n in (("train", 1297), ("validation", 250), ("test", 250)):
        grey, labels = getattr(opened.data, name), opened.split(name).labels
        assert labels is not None and labels.tolist() == [by_image[row.tobytes()] for row in grey.numpy()]
        assert len(labels) == n
    limited = Digits(limit=10).load().evaluation_split("train", 0)
    assert limited.labels is not None and limited.labels.tolist() == opened.data.labels["train"][:10].tolist()


def test_a_run_has_its_model_objective_and_metrics(tiny_run: Path) -> None:
    opened = iwae_cli.open(str(tiny_run))
    assert type(opened.objective) is IWAE and opened.objective.num_samples == 5 and tiny_run.name in repr(opened)
    assert [json.dumps(row) for row in opened.metrics] == (tiny_run / "metrics.jsonl").read_text().splitlines()
    loaded, config = iwae_cli.load(tiny_run)
    assert config == opened.config and not opened.model.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), opened.model.parameters(), strict=True))
    log_w = opened.model(opened.split("test").x, 50)
    assert log_w.shape == (50, 250) and torch.equal(log_w, opened.model(opened.split("test").x, 50))
    assert opened.result is not None
    assert -opened.objective.bound(log_w).mean().item() == pytest.approx(opened.result["test"]["nll"], abs=0.1)
    x = opened.split("test").x.float()
    assert torch.equal(opened.model.draw(x, 3).log_q, opened.model.inference.sample(x, 3)[1])
    assert torch.equal(opened.model.generative.sample(5)[1], opened.model.generative.sample(5)[1])


def test_encode_and_sample(tiny_run: Path) -> None:
    opened = iwae_cli.open(tiny_run)
    x = opened.split("test").x
    (means,) = opened.encode(x)
    loc, _ = opened.model.inference.layers[0](x.float())
    torch.testing.assert_close(means, loc.double(), rtol=1e-5, atol=1e-6)
    drawn = opened.sample(2_000)
    assert drawn.shape == (2_000, 64) and set(drawn.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(drawn, opened.sample(2_000, seed=0)) and not torch.equal(drawn, opened.sample(2_000, seed=1))
    # After 26 steps p still begins at the training mean.
    assert (drawn.mean(0) - torch.from_numpy(opened.data.mean())).abs().max() < 0.15


def test_discrete_layers_are_encoded_as_probabilities(tmp_path: Path) -> None:
    opened = iwae_cli.open(finished(tmp_path, *RUNS["discrete"]))
    first, second = opened.encode(opened.split("test").x)
    assert first.shape == (250, 6) and second.shape == (250, 4)
    assert min(first.min(), second.min()) >= 0 and max(first.max(), second.max()) <= 1
    draws, _ = opened.model.inference.sample(opened.split("test").x.double(), 4_000)
    for mean, h in zip((first, second), draws, strict=True):
        assert (mean - h.mean(0)).abs().max() < 5 * 0.5 * (1 / 500 + 1 / 4_000) ** 0.5


def test_wrong_observations_are_refused_in_words(tiny_run: Path) -> None:
    opened = iwae_cli.open(tiny_run)
    binary, grey = opened.split("test").x, opened.data.test
    doors: list[Callable[[Any], Any]] = [opened.encode, lambda x: opened.log_px(x, 5)]
    for x, words in (
        (grey, "x must be 0 or 1 for Bernoulli, got values from 0 to 16"),
        (grey / 16, "x must be 0 or 1 for Bernoulli, got values from 0 to 1"),
        (binary[:, :5], r"x must be \(n, 64\) or \(n, 8, 8\), got \(250, 5\)"),
        (binary[0], r"got \(64,\)"),
        (binary[:0], r"got \(0, 64\)"),
    ):
        for door in doors:
            with pytest.raises(ValueError, match=words):
                door(x)
    with pytest.raises(ValueError, match=r"x must be \(batch, pixels\), got \(64,\)"):
        opened.model(binary[0], 3)
    for wrong in (lambda: opened.log_px(binary, 0), lambda: opened.sample(0), lambda: opened.model(binary, 0)):
        with pytest.raises(ValueError, match=r"^[kn] must be >= 1, got 0"):
            wrong()
    with pytest.raises(ValueError, match="train, validation, test"):
        opened.split("valid")


def test_what_is_missing_fails_alone_and_in_words(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.yaml"):
        iwae_cli.open(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
    opened = iwae_cli.open(copy)
    opened.config["data"] = {**opened.config["data"], "limit": 100}
    with pytest.raises(UserError, match="the files of digits_first100 are not those"):
        opened.split("test")
    (copy / "checkpoint.pt").unlink()
    opened = iwae_cli.open(copy)
    assert opened.result is not None and opened.metrics
    with pytest.raises(UserError, match=r"checkpoint\.pt is not there"):
        _ = opened.model
    (copy / "result.json").unlink()
    assert opened.result is None


def test_train_is_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*TINY, "objective=dreg", "output_dir=a"]
    opened = iwae_cli.train(*overrides)
    printed = capsys.readouterr().out
    folder = finished(tmp_path / "b", *TINY, "objective=dreg")
    assert opened.path.name == folder.name and opened.path.parent == tmp_path / "a"
    for name, values in arrays(folder / "log_likelihood.npz").items():
        np.testing.assert_array_equal(arrays(opened.path / "log_likelihood.npz")[name], values)
    assert opened.path.name in printed and "NLL_50" in printed
    before = (opened.path / "checkpoint.pt").stat().st_mtime_ns
    again = iwae_cli.train(*overrides)
    assert again.result == opened.result and (opened.path / "checkpoint.pt").stat().st_mtime_ns == before
    assert isinstance(again.model, LatentVariableModel)


DAMAGED = f"data=omniglot data.path={__file__}"


@pytest.mark.parametrize(
    "line", ["objective=iwea", "data=linear_gaussian", "seed=${oc.env:SECRET}", "output_dir=", DAMAGED]
)
def test_train_refuses_what_the_command_refuses(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET", "a-token-of-somebody")
    with pytest.raises(UserError) as refused:
        iwae_cli.train(*line.split())
    assert "a-token" not in str(refused.value)
    assert run(*line.split()) == (2, "", f"iwae-train: {refused.value}\n") and not list(tmp_path.iterdir())


def test_train_refuses_a_sweep() -> None:
    with pytest.raises(UserError, match="a sweep"):
        iwae_cli.train("experiment=sweeps/table1")
