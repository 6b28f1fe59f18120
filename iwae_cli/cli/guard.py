"""Refuse a preset that would have Hydra run foreign code or write files: Hydra builds objects from its own node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from iwae_cli.config.build import resolve
from iwae_cli.core.errors import UserError

_NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
_FIXED = {
    "callbacks": {},
    "env": {},
    "hydra_logging": _NO_LOGGING,
    "job_logging": _NO_LOGGING,
    "output_subdir": None,
    "run": {"dir": "."},
    "sweep": {"dir": "${output_dir}/sweeps", "subdir": "."},
}
_FIXED_JOB = {"chdir": False, "env_set": {}, "env_copy": []}
_PACKAGES = ("hydra._internal.core_plugins", "hydra_plugins", "optuna.samplers")


def check_node(node: Any, engines: Mapping[str, Any]) -> None:
    """Compare what could run code or write files with what conf/config.yaml sets.

    Args:
        node: Hydra's node, plain, not resolved.
        engines: its ``launcher`` and ``sweeper``, resolved; they may name classes of Hydra's own packages.

    Raises:
        UserError: a part is not as it should be.
    """
    for key, value in _FIXED.items():
        if node[key] != value:
            raise UserError(f"hydra.{key} cannot be changed (open are hydra.launcher and hydra.sweeper)")
    if any(node["job"][key] != value for key, value in _FIXED_JOB.items()):
        raise UserError("hydra.job cannot be changed (open are hydra.launcher and hydra.sweeper)")
    for path, target in _targets(engines, "hydra"):
        resolve(target, object, path, _PACKAGES)


def _targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_target_":
                yield f"{path}._target_", value
            yield from _targets(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, f"{path}[{index}]")
