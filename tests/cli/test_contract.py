"""The run folder as a reader sees it: files, fields, types; and the three ways to its numbers, which must agree."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_runs import TINY, arrays, evaluate, finished, last_of_each, read_json, run, run_folders, snapshot

import iwae_cli
from iwae_cli.record import schema

COMMAND = last_of_each(*TINY, "logger=offline", "evaluation.splits=[train,validation,test]", "seed=4")
REAL = (
    *("data=linear_gaussian", "data.n_train=200", "data.n_validation=50", "data.n_test=60", "model=linear_gaussian"),
    *("schedule=smoke", "batch_size=50", "validation=smoke", "evaluation=smoke"),
    *("logger=disabled", "optimizer.lr=0.01"),
)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.fixture
def folder(template: Path) -> Path:
    """One finished run, not to be changed."""
    return next(iter(run_folders(template / "digits")), None) or finished(template / "digits", *COMMAND)


@pytest.fixture
def real(template: Path) -> Path:
    return next(iter(run_folders(template / "real")), None) or finished(template / "real", *REAL)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of that run, which may be changed."""
    return Path(shutil.copytree(folder, tmp_path / folder.name))


@pytest.fixture
def result(folder: Path) -> Any:
    return read_json(folder / "result.json")


def test_the_files_are_there(folder: Path) -> None:
    expected = {
        *("config.yaml", "overrides.yaml", "status.json", "metrics.jsonl", "metrics.csv", "checkpoint.pt", "best.pt"),
        *("result.json", "log_likelihood.npz", "evaluations", "figures", "train.log", "wandb", "wandb.json"),
    }
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == expected
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{name}.{form}"
        for name in ("samples", "reconstructions", "training", "bound_vs_k", "ess", "kl_per_unit")
        for form in ("png", "pdf", "svg")
    }
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
    (kept,) = (folder / "evaluations").iterdir()
    assert {path.name for path in kept.iterdir()} == {"result.json", "log_likelihood.npz"}
    assert not list(folder.rglob(".tmp-*"))


def test_a_finished_run_prints_when_it_was_trained(copy: Path) -> None:
    """And the command that uploads it, until that was done."""
    os.utime(copy / "checkpoint.pt", (1.0e9, 1.0e9))
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1.0e9))
    (record,) = (copy / "wandb").glob("offline-run-*")
    code, out, _ = run(*COMMAND, f"output_dir={copy.parent}")
    assert code == 0 and when in out and f"wandb sync {copy.name}/wandb/{record.name}" in out
    next(record.glob("*.wandb")).with_suffix(".wandb.synced").touch()
    code, out, _ = run(*COMMAND, f"output_dir={copy.parent}")
    assert code == 0 and when in out and "wandb sync" not in out


SPLIT = {
    *("nll", "stderr_images", "stderr_mc", "bias_mc", "ess_median", "ess_min", "ess_share_below_10", "bits_per_dim"),
    *("khat_share_above_0.7", "top_weight_share_above_0.5", "k", "n", "bounds"),
}
RESULT = {
    *("status", "identity", "weights", "seed", "epochs", "steps", "draws", "parameters", "git", "code", "evaluation"),
    *("active_units", "active_units_authors_rule", "dataset", "model", "objective", "optimizer", "schedule", "seconds"),
    *("versions", "device", "reasons", "test"),
}
"""Keys; their types are those of the schema by which a report reads them."""


def test_every_field_is_there_with_its_type(result: Any, folder: Path) -> None:
    assert result.keys() > RESULT and schema.check(result, schema.Result, folder / "result.json")
    for name, n in (("train", 1297), ("validation", 250), ("test", 250)):
        split = result[name]
        assert split.keys() >= SPLIT
        assert (split["k"], split["n"]) == (50, n)
        assert list(split["bounds"]) == ["1", "5", "50"]
        assert split["nll"] == -split["bounds"]["50"]
        assert split["bounds"]["1"] < split["bounds"]["5"] < split["bounds"]["50"]
        assert split["bits_per_dim"] == pytest.approx(split["nll"] / (64 * math.log(2)))
        assert 1 <= split["ess_min"] <= split["ess_median"] <= 50
        assert split["stderr_mc"] > 0 > split["bias_mc"]
    assert result["status"] == "finished" and result["identity"] == folder.name
    assert (result["seed"], result["epochs"], result["steps"], result["weights"]) == (4, 2, 26, "last")
    assert result["draws"] == 2 * 1297 * 5  # the last minibatch of a pass is smaller
    dataset = result["dataset"]
    assert dataset["name"] == "digits" and "binarized dynamically" in dataset["protocol"]
    assert dataset["sizes"] == {"train": 1297, "validation": 250, "test": 250}
    hashes = dataset["evaluation_sha256"]
    assert set(hashes) == {"train", "validation", "test"} and len(set(hashes.values())) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes.values())
    assert result["model"] | {"name": "one_layer", "latent_sizes": [3], "hidden_sizes": [[8]]} == result["model"]
    assert result["objective"] | {"name": "iwae", "k": 5, "gradient": "total"} == result["objective"]
    assert result["optimizer"]["name"] == "adam"
    assert result["schedule"] == {"name": "constant", "passes": 2, "patience": None}
    # q: 64-8-(3, 3); p: 3-8-64.
    assert result["parameters"] == (64 * 8 + 8) + 2 * (8 * 3 + 3) + (3 * 8 + 8) + (8 * 64 + 64)
    for key in ("active_units", "active_units_authors_rule"):
        (units,) = result[key]
        assert isinstance(units, int) and 0 <= units <= 3
    assert all(result["seconds"][key] > 0 for key in ("train", "evaluate"))
    assert {"iwae-cli", "python", "torch", "numpy"} <= set(result["versions"])
    assert result["device"]["kind"] == "cpu" and result["device"]["precision"] == "float32"
    assert result["reasons"] == {}


def test_per_image_values(folder: Path, result: Any) -> None:
    found = arrays(folder / "log_likelihood.npz")
    keys = ("log_px", "ess", "khat", "top_weight")
    expected = {
        f"{prefix}{key}": n for prefix, n in (("", 250), ("validation_", 250), ("train_", 1297)) for key in keys
    }
    assert {key: len(array) for key, array in found.items()} == expected
    assert {array.dtype for array in found.values()} == {np.dtype(np.float64)}
    for split, prefix in (("test", ""), ("validation", "validation_"), ("train", "train_")):
        summary, n = result[split], result[split]["n"]
        log_px, ess = found[f"{prefix}log_px"], found[f"{prefix}ess"]
        assert summary["nll"] == pytest.approx(-log_px.mean(), rel=1e-14)
        assert summary["stderr_images"] == pytest.approx(log_px.std(ddof=1) / n**0.5)
        assert summary["stderr_mc"] == pytest.approx(np.maximum(0, 1 / ess - 1 / 50).sum() ** 0.5 / n)


DIAGNOSTICS = ("train/kl/1", "train/reconstruction", "train/ess", "train/gradient_norm/p", "train/gradient_norm/q")


def test_the_record_of_training(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["pass"]) for row in rows] == [(13, 1), (26, 2)]
    assert all({"train/bound", "validation/bound", "learning_rate", *DIAGNOSTICS} <= row.keys() for row in rows)
    assert rows[0]["train/bound"] < rows[1]["train/bound"] < 0
    assert {"status": "finished", "step": 26, "error": None}.items() <= read_json(folder / "status.json").items()
    best = torch.load(folder / "best.pt", weights_only=True)
    top = max(rows, key=lambda row: row["validation/bound"])
    assert (best["step"], best["bound"]) == (top["step"], top["validation/bound"])
    assert (folder / "train.log").read_text().count("saved step 26") == 1


def test_config_and_overrides_are_recorded(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["latent_sizes"] == [3] and config["seed"] == 4 and "hydra" not in config
    assert set(COMMAND) < set(yaml.safe_load((folder / "overrides.yaml").read_text()))


def test_the_exact_value_stands_beside_the_estimate(real: Path) -> None:
    result = read_json(real / "result.json")
    for split in ("validation", "test"):
        summary = result[split]
        error = 3 * summary["stderr_mc"] + 2 * abs(summary["bias_mc"])
        assert abs(summary["nll"] - summary["exact_nll"]) < error
    # What the data were drawn from is better on average, but for the luck of 60 observations.
    assert result["dataset"]["generator_nll"] < result["test"]["exact_nll"]
    model, _ = iwae_cli.load(real)
    x = torch.randn(5, 10)
    assert model.generative.exact_log_px(x) is not None


def test_iwae_eval_keeps_its_result_beside_and_touches_nothing_else(copy: Path, result: Any) -> None:
    """Also by another path to the run, and once only."""
    before = snapshot(copy)
    link = copy.with_name("latest")
    link.symlink_to(copy)
    code, out, err = evaluate(str(link), "evaluation.k=500", "evaluation.splits=[test]")
    assert code == 0, err
    assert evaluate(str(copy))[0] == 0
    after = snapshot(copy)
    assert {name: after[name] for name in before} == before
    (arrays_file, result_file) = sorted(set(after) - set(before))
    assert [Path(name).name for name in (arrays_file, result_file)] == ["log_likelihood.npz", "result.json"]
    assert Path(result_file).parts[0] == "evaluations"
    other = read_json(copy / result_file)
    assert other.keys() > RESULT
    assert other["identity"] == result["identity"]
    assert other["test"]["k"] == 500 and list(other["test"]["bounds"]) == ["1", "5", "50", "500"]
    # The same images and more samples of the same noise: a tighter bound on average.
    assert f"{other['test']['nll']:.2f}" in out and other["test"]["nll"] < result["test"]["nll"]
    shutil.rmtree(copy / "evaluations")
    assert evaluate(str(copy))[0] == 0
    (kept,) = copy.glob("evaluations/*/result.json")
    assert {**read_json(kept), "seconds": None} == {**result, "seconds": None}


@pytest.mark.parametrize("fault", ["no config", "damaged config", "nothing"])
def test_what_is_no_run_folder_is_named(copy: Path, fault: str) -> None:
    place = copy / "nowhere" if fault == "nothing" else copy
    if fault == "no config":
        (copy / "config.yaml").unlink()
    elif fault == "damaged config":
        (copy / "config.yaml").write_text("a: [")
    code, _, err = evaluate(str(place), "evaluation.k=60")
    assert code == 2 and err.count("\n") == 1 and place.name[-8:] in err
    with pytest.raises(iwae_cli.core.errors.UserError, match=re.escape(str(place))):
        iwae_cli.load(place)
