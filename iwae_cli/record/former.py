"""Configurations of runs of earlier versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MARK = "validation_k:"
"""Text that the config.yaml of 0.2.0 holds and that of later versions does not."""

MODULES = {
    **{
        f"iwae_cli.models.{name}": f"iwae_cli.models.architectures.{name}"
        for name in ("categorical", "conv", "discrete", "linear_gaussian", "mlp")
    },
    "iwae_cli.device": "iwae_cli.core.device",
    "iwae_cli.evaluation.protocol": "iwae_cli.evaluation.settings",
    "iwae_cli.sinks.wandb": "iwae_cli.record.wandb",
    "iwae_cli.training.protocol": "iwae_cli.training.settings",
}
"""Former module of a class -> its module; classes keep their names, except as in ``CLASSES``."""

CLASSES = {"WandbSink": "WandbLogger"}

ADDED = {
    "training.backward": "all",
    "training.kl_warmup": 0,
    "training.clip": None,
    "training.ema": None,
    "schedule.patience": None,
    "model.activation": "tanh",
    "model.noise_std": None,
    "model.posterior": "diagonal",
    "model.posterior_size": 5,
    "model.prior": "standard",
    "model.prior_components": 500,
}
"""Keys that older versions did not have, with what they did."""


def applies(key: str, config: Mapping[str, Any]) -> bool:
    """Return whether a key of ``ADDED`` is one of the class that a configuration names."""
    group, _, name = key.partition(".")
    place, _, cls = str(config["model"]["_target_"]).rpartition(".")
    having = ("GaussianMLP",) if name == "activation" else ("GaussianMLP", "GaussianConvolutional")
    return group != "model" or (place.startswith("iwae_cli.") and cls in having)


def translated(config: Any) -> Any:
    """Return the configuration with the class paths and keys of this version; one of this version is unchanged."""
    config = _with_class_paths(config)
    evaluation = config.get("evaluation") if isinstance(config, dict) else None
    if isinstance(evaluation, dict) and "validation_k" in evaluation:
        validation = {"k": evaluation.pop("validation_k"), "every": evaluation.pop("validation_every", None)}
        config["validation"] = {"_target_": "iwae_cli.training.settings.Validation", **validation}
        if isinstance(logger := config.get("logger"), dict) and "_target_" in logger:
            config["logger"] = {} if logger.get("mode") == "disabled" else {"wandb": logger}
    return config


def _with_class_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_class_paths(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    node = {key: _with_class_paths(inner) for key, inner in value.items()}
    if isinstance(node.get("_target_"), str):
        module, _, name = node["_target_"].rpartition(".")
        if module in MODULES:
            node["_target_"] = f"{MODULES[module]}.{CLASSES.get(name, name)}"
    return node
