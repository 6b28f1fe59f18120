"""Run folders made by hand, as those of real runs (a test compares the two), with numbers that a test may choose."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

PACKAGE = "iwae_cli"
CONFIG: dict[str, Any] = {
    "data": {"_target_": f"{PACKAGE}.data.mnist.MNIST", "data_dir": "data", "binarization": "dynamic"},
    "model": {
        "_target_": f"{PACKAGE}.models.mlp.GaussianMLP",
        "latent_sizes": [50],
        "hidden_sizes": [[200, 200]],
        "likelihood": "bernoulli",
    },
    "objective": {"_target_": f"{PACKAGE}.objectives.iwae.IWAE", "k": 50, "gradient": "total"},
    "optimizer": {
        "_target_": "torch.optim.Adam",
        "lr": 0.001,
        "betas": [0.9, 0.999],
        "eps": 1e-4,
        "weight_decay": 0.0,
        "fused": True,
    },
    "schedule": {"_target_": f"{PACKAGE}.training.schedule.Burda", "stages": 8},
    "validation": {"_target_": f"{PACKAGE}.training.settings.Validation", "k": 50, "every": 5},
    "evaluation": {
        "_target_": f"{PACKAGE}.evaluation.protocol.Evaluation",
        "k": 5000,
        "splits": ["validation", "test"],
        "weights": "last",
        "seed": 0,
        "binarization_seed": 0,
        "rows": 2000,
        "workers": None,
        "jackknife": False,
    },
    "device": {"_target_": f"{PACKAGE}.device.Device", "kind": "auto", "precision": "float32", "threads": 1},
    "logger": {
        "_target_": f"{PACKAGE}.sinks.wandb.WandbLogger",
        "mode": "offline",
        "project": "iwae-cli",
        "entity": None,
        "group": None,
        "tags": [],
        "name": None,
    },
    "seed": 0,
    "batch_size": 20,
    "data_dir": "data",
    "output_dir": "outputs",
    "init_from": None,
    "with_optimizer": False,
    "train": "all",
    "restart": False,
}
MODELS = {"one_layer": ([50], [[200, 200]]), "two_layer": ([100, 50], [[200, 200], [100, 100]])}


def config(model: str = "one_layer", objective: str = "iwae", k: int = 50, seed: int = 0, **changed: Any) -> Any:
    """As resolved; ``changed`` has dotted keys with ``__`` for dots."""
    made = json.loads(json.dumps(CONFIG))
    made["model"]["latent_sizes"], made["model"]["hidden_sizes"] = MODELS[model]
    made["objective"]["k"], made["seed"] = k, seed
    made["objective"]["_target_"] = f"{PACKAGE}.objectives.{objective}.{objective.upper()}"
    if objective == "elbo":
        made["objective"]["analytic_kl"] = False
    for key, value in changed.items():
        *groups, last = key.split("__")
        node = made
        for group in groups:
            node = node[group]
        node[last] = value
    return made


def write(
    output_dir: Path,
    settings: dict[str, Any],
    log_px: np.ndarray,
    *,
    data: str = "mnist",
    names: tuple[str, str] = ("one_layer", "iwae"),
    choices: tuple[str, str] = ("burda", "burda"),
    units: list[int] | None = None,
    images: str = "one binarization",
    arrays: bool = True,
) -> Path:
    """A finished run whose test images have these values.

    ``names`` were chosen for model and objective, ``choices`` for optimizer and schedule.
    """
    digest = hashlib.sha256(json.dumps([data, settings, names], sort_keys=True).encode()).hexdigest()[:8]
    identity = f"{data}-{names[0]}-{names[1]}-k{settings['objective'].get('k', 1)}-seed{settings['seed']}-{digest}"
    folder = output_dir / identity
    folder.mkdir(parents=True)
    asked = settings["evaluation"]
    evaluation = f"k{asked['k']}-test-{asked['weights']}-{hashlib.sha256(images.encode()).hexdigest()[:8]}"
    n, nll = len(log_px), -float(np.mean(log_px))
    split = {
        "nll": nll,
        "k": asked["k"],
        "n": n,
        "stderr_images": float(np.std(log_px, ddof=1) / np.sqrt(n)),
        "stderr_mc": 0.004,
        "bias_mc": -0.002,
        "bounds": {"1": -nll - 3.0, "50": -nll - 0.5, str(asked["k"]): -nll},
        "ess_median": 800.0,
        "ess_min": 40.0,
        "ess_share_below_10": 0.0,
        "khat_share_above_0.7": 0.0,
        "top_weight_share_above_0.5": 0.0,
        "bits_per_dim": nll / 784 / float(np.log(2)),
    }
    result = {
        "status": "finished",
        "identity": identity,
        "dataset": {
            "name": data,
            "protocol": "binarized",
            "sizes": {"train": 59600, "validation": 400, "test": n},
            "evaluation_sha256": {"test": hashlib.sha256(images.encode()).hexdigest()},
        },
        "model": {"name": names[0]},
        "objective": {"name": names[1]},
        "optimizer": {"name": choices[0]},
        "schedule": {"name": choices[1]},
        "seed": settings["seed"],
        "trained": settings["train"],
        "init_from": settings["init_from"],
        "epochs": 3280,
        "steps": 100,
        "parameters": 1,
        "weights": asked["weights"],
        "evaluation": {
            "name": evaluation,
            "step": 100,
            "k": asked["k"],
            "seed": 0,
            "binarization_seed": 0,
            "precision": settings["device"]["precision"],
        },
        "versions": {},
        "device": {"kind": "cpu"},
        "git": None,
        "test": split,
        "active_units": units,
        "active_units_authors_rule": units,
        "reasons": {},
        "seconds": {"train": 1.0, "evaluate": 1.0},
    }
    status = {"status": "finished", "step": 100, "pid": 1, "host": "elsewhere", "error": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "status.json").write_text(json.dumps(status))
    rows = [{"step": s, "pass": s, "train/bound": -100.0 + s, "validation/bound": -99.0 + s} for s in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if arrays:
        np.savez(folder / "log_likelihood.npz", log_px=np.asarray(log_px, dtype=np.float64))
    return folder


def change(path: Path, **values: Any) -> None:
    """Change a JSON file at the top."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def values(nll: float, n: int = 40, seed: int = 0) -> np.ndarray:
    """Per-image values whose mean is exactly -``nll``, nearly."""
    spread = np.random.default_rng(seed).normal(size=n)
    return -nll + spread - spread.mean()
