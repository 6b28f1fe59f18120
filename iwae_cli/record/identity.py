"""Decide whether two runs are one training, and two evaluations one evaluation."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

RECIPE = 1
"""Of refined proposals: raise it where their fit or their mixture changes, so that no older result answers."""

LONGEST_PART = 40
"""Characters of one readable part of a folder's name."""


def training_name(parts: Sequence[str], config: Mapping[str, Any], fingerprints: Mapping[str, str]) -> str:
    """Return the name of a run folder: readable parts, and a hash of everything that decides the trained weights.

    The classes of ``config`` must have been imported; ``fingerprints`` are hashes of the content of files, where there
    are any: ``data`` and ``init_from``.
    """
    readable = (re.sub(r"[^\w.+]", "_", part)[:LONGEST_PART] for part in parts)
    return "-".join([*readable, _digest(training_config(config, fingerprints))])


def training_config(config: Mapping[str, Any], fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Return the part of a configuration that decides the trained weights and ``best.pt``.

    Left out are paths (the fingerprints stand for the content), device kind and threads, loggers and the final
    evaluation. Training precision and validation are part of it.
    """
    return {
        **{key: config[key] for key in ("model", "objective", "optimizer", "schedule", "seed", "batch_size")},
        "data": {key: value for key, value in config["data"].items() if key not in ("data_dir", "path")},
        "precision": config["device"]["precision"],
        "validation": {key: config["validation"][key] for key in ("k", "every")},
        "fingerprints": dict(fingerprints),
        **{key: config[key] for key in ("with_optimizer", "train")},
        # Only where it differs from the runs that had no such choice.
        **{key: config[key] for key in ("training",) if config.get(key, {}).get("backward", "all") != "all"},
    }


def recorded_as(config: Mapping[str, Any]) -> str:
    """Return a hash of a training in which the paths of its files stand for their content.

    It compares configurations whose files are gone, or that were hashed by another version.
    """
    paths = {"data": config["data"].get("path"), "init_from": config["init_from"]}
    return _digest(training_config(config, {key: str(path) for key, path in paths.items() if path is not None}))


def evaluation_name(config: Mapping[str, Any]) -> str:
    """Return the name of an evaluation within its run: readable parts, and a hash of all that decides its numbers."""
    evaluation = config["evaluation"]
    first = {"images": evaluation["images"]} if evaluation.get("images") else {}  # missing in older records
    if "estimator" in config:
        parts = {key: evaluation[key] for key in ("weights", "seed", "binarization_seed")}
        parts |= {"splits": sorted(evaluation["splits"]), "precision": config["device"]["precision"], **first}
        return f"{estimator_name(config)}-{parts['weights']}-{_digest(parts | {'estimator': config['estimator']})}"
    parts = {key: evaluation[key] for key in ("k", "weights", "seed", "binarization_seed", "jackknife")}
    parts |= {"splits": sorted(evaluation["splits"]), "precision": evaluation_precision(config), **first}
    if evaluation.get("refine", 0):  # missing in older records
        parts |= {"refine": evaluation["refine"], "recipe": RECIPE}
    of = f"first{first['images']}+" if first else ""
    return f"k{parts['k']}-{of}{'+'.join(parts['splits'])}-{parts['weights']}-{_digest(parts)}"


def evaluation_precision(config: Mapping[str, Any]) -> str:
    """Return the precision of the matrix products of L_k: that of the device, or bf16."""
    asked = config["evaluation"].get("precision", "float32")  # missing in older records
    return str(config["device"]["precision"] if asked == "float32" else asked)


def estimator_name(config: Mapping[str, Any]) -> str:
    """Return the name of an estimator other than L_k, from its class: ``GradientSNR`` is ``gradient_snr``."""
    return words(str(config["estimator"]["_target_"]).rpartition(".")[2])


def words(name: str) -> str:
    """Return the name of a class in lower case with underscores: ``GaussianMLP`` is ``gaussian_mlp``."""
    return re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(one_spelling(value), sort_keys=True).encode()).hexdigest()[:8]


def one_spelling(value: Any) -> Any:
    """Return ``value`` in its one spelling.

    Whole floats are integers. A class of this package is known by its name alone, so that code may move, and a key
    that holds the default of its class is left out, so that a class may gain a key. The default itself must then never
    change.
    """
    if isinstance(value, list | tuple):
        return [one_spelling(inner) for inner in value]
    if not isinstance(value, Mapping):
        return int(value) if isinstance(value, float) and value.is_integer() else value
    node = {key: one_spelling(inner) for key, inner in value.items()}
    module, _, name = str(node.get("_target_")).rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    if not inspect.isclass(cls):  # or its module has not been imported
        return node
    own = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
    node["_target_"] = cls.__name__ if own else f"{cls.__module__}.{cls.__name__}"
    for key, parameter in inspect.signature(cls).parameters.items():
        if key in node and _text(node[key]) == _text(one_spelling(parameter.default)):
            del node[key]
    return node


def _text(value: Any) -> str:
    # As JSON, since Python holds 1 and True to be equal; a default may be any object.
    return json.dumps(value, sort_keys=True, default=repr)
