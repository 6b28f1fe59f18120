"""Which training another run began from (``init_from``). Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iwae_cli.core.errors import UserError
from iwae_cli.record import former
from iwae_cli.record.folder import RunFolder
from iwae_cli.record.identity import is_own, path_keys, training_config, unused


def training_hash(path: str, second_stages: frozenset[str] = frozenset()) -> str | None:
    """Return a hash of a training without its seed, by its run folder; None where that cannot be read.

    It is of the settings, the content of data files, the source files from outside this package, and of the training
    that this one began from. ``second_stages`` are the folders that began from this one.
    """
    run = RunFolder(Path(path))
    place = os.path.realpath(run.path)
    try:
        result = run.result() or {}
        config = run.config(result)
    except UserError:
        return None
    if place in second_stages:  # a config.yaml that was edited may name its own folder
        return None
    data, content = config["data"], result.get("data_sha256")
    decides = _settings(config)
    if content is not None and not is_own(data):
        # Which arguments of a class are paths is known only where it has been imported; the content counts instead.
        paths = [key for key, value in data.items() if isinstance(value, str) and {"/", "."} & set(value)]
        decides["data"] = {key: data[key] for key in decides["data"] if key == "_target_" or key not in paths}
    elif all(data[key] is None for key in path_keys(data) if key != "data_dir"):
        content = None
    decides |= {
        "data_sha256": content,
        "sources": result.get("sources") or {},
        "init_from": stage_before(config["init_from"], result, second_stages | {place}),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:8]


def stage_before(
    source: str | None, result: Mapping[str, Any], second_stages: frozenset[str] = frozenset()
) -> str | None:
    """Return what tells the training that a run began from: its hash, or else the name of its folder.

    ``result`` is the ``result.json`` of the run; before version 0.9 it held no hash.
    """
    recorded = result.get("init_from_training")
    return source and (recorded or training_hash(source, second_stages) or Path(source).name)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide weights, without the seed and without keys that do what older versions did.

    They are the same whether or not the classes that they name have been imported.
    """
    node, decides = config.get("training", {}), training_config(config, {})
    decides["training"] = {key: node[key] for key in node if key not in ("_target_", *unused(node))}
    del decides["seed"]
    for name, value in former.ADDED.items():
        group, _, key = name.partition(".")
        if former.applies(name, config) and key in decides[group] and decides[group][key] == value:
            decides[group] = {other: decides[group][other] for other in decides[group] if other != key}
    return decides
