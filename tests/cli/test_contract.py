"""The run folder as others read it: files, fields, types; and the three ways to its numbers, which must agree."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_runs import TINY, arrays, finished, last_of_each, read_json, run, run_folders, snapshot

import iwae_cli
from iwae_cli.cli.evaluate import evaluate as command
from iwae_cli.evaluation.likelihood import log_likelihood

COMMAND = last_of_each(*TINY, "logger=offline", "evaluation.splits=[train,validation,test]", "seed=4")
REAL = (
    *("data=linear_gaussian", "data.n_train=200", "data.n_validation=50", "data.n_test=60", "model=linear_gaussian"),
    *(
        "schedule=smoke",
        "batch_size=50",
        "validation=smoke",
        "evaluation=smoke",
        "logger=disabled",
        "optimizer.lr=0.01",
    ),
)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.fixture
def folder(template: Path) -> Path:
    """One finished run, for looking only."""
    return next(iter(run_folders(template / "digits")), None) or finished(template / "digits", *COMMAND)


@pytest.fixture
def real(template: Path) -> Path:
    return next(iter(run_folders(template / "real")), None) or finished(template / "real", *REAL)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same run, for changing."""
    return Path(shutil.copytree(folder, tmp_path / folder.name))


@pytest.fixture
def result(folder: Path) -> Any:
    return read_json(folder / "result.json")


def test_the_files_are_there(folder: Path) -> None:
    expected = {
        *("config.yaml", "overrides.yaml", "status.json", "metrics.jsonl", "metrics.csv", "checkpoint.pt", "best.pt"),
        *("result.json", "log_likelihood.npz", "evaluations", "figures", "train.log", "wandb"),
    }
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == expected
    assert {path.name for path in (folder / "figures").iterdir()} == {
        *("samples.png", "reconstructions.png", "training.png", "bound_vs_k.png")
    }
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
    (kept,) = (folder / "evaluations").iterdir()
    assert {path.name for path in kept.iterdir()} == {"result.json", "log_likelihood.npz"}
    assert not list(folder.rglob(".tmp-*"))


def test_a_finished_run_prints_when_it_was_trained(copy: Path) -> None:
    """And the command that uploads it, until that was done."""
    os.utime(copy / "checkpoint.pt", (1.0e9, 1.0e9))
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1.0e9))
    message = f"trained already, finished at {when}: nothing was trained now, this is its result"
    (record,) = (copy / "wandb").glob("offline-run-*")
    command = f"wandb sync {copy.name}/wandb/{record.name}"
    code, out, _ = run(*COMMAND, f"output_dir={copy.parent}")
    assert code == 0 and message in out.splitlines() and command in out
    next(record.glob("*.wandb")).with_suffix(".wandb.synced").touch()
    code, out, _ = run(*COMMAND, f"output_dir={copy.parent}")
    assert code == 0 and message in out.splitlines() and "wandb sync" not in out
    code, out, _ = run(*last_of_each(*COMMAND, "evaluation.k=5"), f"output_dir={copy.parent}")
    assert code == 0 and message in out.splitlines() and "NLL_5," in out


NUMBER = (int, float)
SPLIT = {
    "nll": float,
    "k": int,
    "n": int,
    "stderr_images": float,
    "stderr_mc": float,
    "bias_mc": float,
    "bounds": dict,
    "ess_median": float,
    "ess_min": float,
    "ess_share_below_10": float,
    "khat_share_above_0.7": float,
    "top_weight_share_above_0.5": float,
    "bits_per_dim": float,
}
RESULT = {
    "status": str,
    "identity": str,
    "dataset": dict,
    "model": dict,
    "objective": dict,
    "optimizer": dict,
    "schedule": dict,
    "seed": int,
    "epochs": int,
    "steps": int,
    "parameters": int,
    "weights": str,
    "active_units": list,
    "active_units_authors_rule": list,
    "seconds": dict,
    "versions": dict,
    "device": dict,
    "git": dict | None,
    "evaluation": dict,
    "reasons": dict,
    **dict.fromkeys(("train", "validation", "test"), dict),
}


def check_types(value: dict[str, Any], fields: dict[str, Any]) -> None:
    missing = fields.keys() - value.keys()
    assert not missing
    wrong = {key: value[key] for key, kind in fields.items() if not isinstance(value[key], kind)}
    assert not wrong


def test_every_field_is_there_with_its_type(result: Any, folder: Path) -> None:
    check_types(result, RESULT)
    for name, n in (("train", 1297), ("validation", 250), ("test", 250)):
        split = result[name]
        check_types(split, SPLIT)
        assert (split["k"], split["n"]) == (50, n)
        assert list(split["bounds"]) == ["1", "5", "50"]
        assert split["nll"] == -split["bounds"]["50"]
        assert split["bounds"]["1"] < split["bounds"]["5"] < split["bounds"]["50"]
        assert split["bits_per_dim"] == pytest.approx(split["nll"] / (64 * math.log(2)))
        assert 1 <= split["ess_min"] <= split["ess_median"] <= 50
        assert split["stderr_mc"] > 0 > split["bias_mc"]
    assert result["status"] == "finished" and result["identity"] == folder.name
    assert (result["seed"], result["epochs"], result["steps"], result["weights"]) == (4, 2, 26, "last")
    dataset = result["dataset"]
    assert dataset["name"] == "digits" and "binarized dynamically" in dataset["protocol"]
    assert dataset["sizes"] == {"train": 1297, "validation": 250, "test": 250}
    hashes = dataset["evaluation_sha256"]
    assert set(hashes) == {"train", "validation", "test"} and len(set(hashes.values())) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes.values())
    assert result["model"] | {"name": "one_layer", "latent_sizes": [3], "hidden_sizes": [[8]]} == result["model"]
    assert result["objective"] | {"name": "iwae", "k": 5, "gradient": "total"} == result["objective"]
    assert result["optimizer"]["name"] == "adam" and result["schedule"] == {"name": "constant", "passes": 2}
    # q: 64-8-(3, 3); p: 3-8-64.
    assert result["parameters"] == (64 * 8 + 8) + 2 * (8 * 3 + 3) + (3 * 8 + 8) + (8 * 64 + 64)
    for key in ("active_units", "active_units_authors_rule"):
        (units,) = result[key]
        assert isinstance(units, int) and 0 <= units <= 3
    assert all(result["seconds"][key] > 0 for key in ("train", "evaluate"))
    assert {"iwae-cli", "python", "torch", "numpy"} <= set(result["versions"])
    assert result["device"]["kind"] == "cpu" and result["device"]["precision"] == "float32"
    assert result["reasons"] == {}


def test_hashes_do_not_depend_on_the_run(result: Any, tmp_path: Path) -> None:
    other = read_json(finished(tmp_path, *COMMAND, "seed=5", "evaluation.seed=3") / "result.json")
    assert other["dataset"]["evaluation_sha256"] == result["dataset"]["evaluation_sha256"]
    assert other["test"]["nll"] != result["test"]["nll"]


def test_no_json_holds_what_json_does_not_know(folder: Path, real: Path) -> None:
    paths = [path for place in (folder, real) for path in place.rglob("*.json") if "wandb" not in path.parts]
    assert len(paths) >= 6
    for path in paths:
        read_json(path)
    for place in (folder, real):
        for line in (place / "metrics.jsonl").read_text().splitlines():
            assert not {"NaN", "Infinity"} & set(re.findall(r"[A-Za-z]+", line))
            json.loads(line)


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
        log_px, ess, khat, top = (found[prefix + key] for key in keys)
        v = np.maximum(0, 1 / ess - 1 / 50)
        assert summary["nll"] == pytest.approx(-log_px.mean(), rel=1e-14)
        assert summary["stderr_images"] == pytest.approx(log_px.std(ddof=1) / n**0.5)
        assert summary["stderr_mc"] == pytest.approx(v.sum() ** 0.5 / n)
        assert summary["bias_mc"] == pytest.approx(-v.mean() / 2)
        assert summary["ess_share_below_10"] == pytest.approx((ess < 10).mean())
        assert summary["khat_share_above_0.7"] == pytest.approx((khat[~np.isnan(khat)] > 0.7).mean())
        assert summary["top_weight_share_above_0.5"] == pytest.approx((top > 0.5).mean())


def test_the_record_of_training(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["pass"]) for row in rows] == [(13, 1), (26, 2)]
    assert all({"train/bound", "validation/bound", "learning_rate"} <= row.keys() for row in rows)
    assert rows[0]["train/bound"] < rows[1]["train/bound"] < 0
    assert {"status": "finished", "step": 26, "error": None}.items() <= read_json(folder / "status.json").items()
    best = torch.load(folder / "best.pt", weights_only=True)
    top = max(rows, key=lambda row: row["validation/bound"])
    assert (best["step"], best["bound"]) == (top["step"], top["validation/bound"])
    assert (folder / "train.log").read_text().count("saved step 26") == 1


def test_what_was_asked_for(folder: Path) -> None:
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


def test_load_gives_the_model_of_the_result(folder: Path, result: Any) -> None:
    model, config = iwae_cli.load(folder)
    assert not model.training and next(model.parameters()).dtype == torch.float32
    assert config == yaml.safe_load((folder / "config.yaml").read_text())
    from iwae_cli.data.digits import Digits

    split = Digits().load().evaluation_split("test", 0)
    assert split.sha256 == result["dataset"]["evaluation_sha256"]["test"]
    again = log_likelihood(model, split, k=50, seed=0, rows=config["evaluation"]["rows"])
    np.testing.assert_array_equal(again.log_px, arrays(folder / "log_likelihood.npz")["log_px"])
    assert -again.log_px.mean() == result["test"]["nll"]
    assert iwae_cli.load(str(folder))[1] == config


def evaluate(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = command(list(arguments))
    return code, out.getvalue(), err.getvalue()


def test_iwae_eval_keeps_its_result_beside_and_touches_nothing_else(copy: Path) -> None:
    before = snapshot(copy)
    code, out, err = evaluate(str(copy), "evaluation.k=500", "evaluation.splits=[test]")
    assert code == 0, err
    after = snapshot(copy)
    assert {name: after[name] for name in before} == before
    new = sorted(set(after) - set(before))
    assert [Path(name).name for name in new] == ["log_likelihood.npz", "result.json"]
    assert all(Path(name).parts[0] == "evaluations" for name in new)
    result = read_json(copy / new[1])
    check_types(result, {key: kind for key, kind in RESULT.items() if key not in ("train", "validation")})
    assert result["test"]["k"] == 500 and list(result["test"]["bounds"]) == ["1", "5", "50", "500"]
    assert f"{result['test']['nll']:.2f}" in out
    # The same images and more samples of the same noise: a tighter bound on average.
    assert result["test"]["nll"] < read_json(copy / "result.json")["test"]["nll"]


def test_iwae_eval_of_the_same_again_gives_the_same(copy: Path, result: Any) -> None:
    before = snapshot(copy)
    assert evaluate(str(copy))[0] == 0
    assert snapshot(copy) == before
    shutil.rmtree(copy / "evaluations")
    assert evaluate(str(copy))[0] == 0
    (kept,) = copy.glob("evaluations/*/result.json")
    again = read_json(kept)
    assert {split: again[split] for split in ("train", "validation", "test")} == {
        split: result[split] for split in ("train", "validation", "test")
    }


def test_precision_is_a_small_shift_and_another_evaluation(copy: Path, result: Any) -> None:
    code, _, err = evaluate(str(copy), "device.precision=float64")
    assert code == 0, err
    assert len(list((copy / "evaluations").iterdir())) == 2
    (other,) = (r for path in copy.glob("evaluations/*/result.json") if (r := read_json(path)) != result)
    assert other["device"]["precision"] == "float64"
    # The same weights and noise: only rounding differs.
    assert 0 < abs(other["test"]["nll"] - result["test"]["nll"]) < 1e-4


def test_a_checkpoint_of_another_model_is_refused(copy: Path) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["model"]["latent_sizes"] = [4]
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    code, _, err = evaluate(str(copy), "evaluation.k=60")
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and "another model" in err and str(copy) in err
    with pytest.raises(iwae_cli.core.errors.UserError, match="is a checkpoint of another model: size mismatch"):
        iwae_cli.load(copy)


@pytest.mark.parametrize("missing", ["config.yaml", "checkpoint.pt", None])
def test_what_is_no_run_is_named(copy: Path, missing: str | None) -> None:
    place = copy / "nowhere" if missing is None else copy
    if missing:
        (copy / missing).unlink()
    code, _, err = evaluate(str(place), "evaluation.k=60")
    assert code == 2 and len(err.strip().splitlines()) == 1 and str(place) in err
    with pytest.raises(iwae_cli.core.errors.UserError, match=re.escape(str(place))):
        iwae_cli.load(place)
