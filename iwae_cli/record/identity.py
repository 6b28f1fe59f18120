"""What makes two runs the same run, and two evaluations the same evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def training_name(
    config: Mapping[str, Any], names: Mapping[str, str], samples: int, fingerprints: Mapping[str, str]
) -> str:
    """Name of a run folder: readable parts, and a hash of all that decides the trained weights.

    Args:
        config: the resolved configuration.
        names: chosen name of every group.
        samples: draws of q per observation and step.
        fingerprints: hashes of what a path names: ``data`` and ``init_from``, where there is one.
    """
    # A choice of one's own may lie deeper, as in model=mine/small; a run folder may not.
    chosen = [names[group].replace("/", "_") for group in ("data", "model", "objective")]
    parts = [*chosen, f"k{samples}", f"seed{config['seed']}"]
    return "-".join([*parts, _digest(training_config(config, fingerprints))])


def training_config(config: Mapping[str, Any], fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What of a configuration decides the trained weights and ``best.pt``.

    Left out: paths (a hash of what they name stands for it), the device kind and threads, the logger, and
    the final evaluation. Training precision and the cadence of validation belong to it.
    """
    data = {key: value for key, value in config["data"].items() if key not in ("data_dir", "path")}
    return {
        **{key: config[key] for key in ("model", "objective", "optimizer", "schedule", "seed", "batch_size")},
        "data": data,
        "precision": config["device"]["precision"],
        "validation": {key: config["validation"][key] for key in ("k", "every")},
        "fingerprints": dict(fingerprints),
        **{key: config[key] for key in ("with_optimizer", "train")},
        # Only where it is not what all runs had before there was a choice.
        **{key: config[key] for key in ("training",) if config.get(key, {}).get("backward", "all") != "all"},
    }


def evaluation_name(config: Mapping[str, Any]) -> str:
    """Name of an evaluation within its run: readable parts, and a hash of all that decides its numbers."""
    evaluation = config["evaluation"]
    if "estimator" in config:
        parts = {key: evaluation[key] for key in ("weights", "seed", "binarization_seed")}
        parts |= {"splits": sorted(evaluation["splits"]), "precision": config["device"]["precision"]}
        return f"{estimator_name(config)}-{parts['weights']}-{_digest(parts | {'estimator': config['estimator']})}"
    parts = {key: evaluation[key] for key in ("k", "weights", "seed", "binarization_seed", "jackknife")}
    parts |= {"splits": sorted(evaluation["splits"]), "precision": evaluation_precision(config)}
    return f"k{parts['k']}-{'+'.join(parts['splits'])}-{parts['weights']}-{_digest(parts)}"


def evaluation_precision(config: Mapping[str, Any]) -> str:
    """Of the products of L_k: that of the device, or bf16 by name."""
    asked = config["evaluation"].get("precision", "float32")  # older records do not say
    return str(config["device"]["precision"] if asked == "float32" else asked)


def estimator_name(config: Mapping[str, Any]) -> str:
    """What another estimate than L_k is called: the module of its class."""
    return str(config["estimator"]["_target_"].split(".")[-2])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(_canonical(value), sort_keys=True).encode()).hexdigest()[:8]


def _canonical(value: Any) -> Any:
    """One spelling for one number: 0 and 0.0 are the same training."""
    if isinstance(value, Mapping):
        return {key: _canonical(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
