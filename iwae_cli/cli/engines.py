"""Hydra's own node: its launchers and sweepers are open; what could run foreign code or write files is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iwae_cli.config.build import resolve
from iwae_cli.core.errors import UserError
from iwae_cli.sweeps.launchers import adapter

ENGINES = ("hydra/launcher", "hydra/sweeper")
_PACKAGES = ("hydra._internal.core_plugins", "hydra_plugins", "optuna.samplers")
_NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
_FIXED: Mapping[str, Any] = {
    "callbacks": {},
    "env": {},
    "hydra_logging": _NO_LOGGING,
    "job_logging": _NO_LOGGING,
    "output_subdir": None,
    "run.dir": ".",
    "sweep.dir": "${output_dir}/sweeps",
    "sweep.subdir": ".",
    "job.chdir": False,
    "job.env_set": {},
    "job.env_copy": [],
}
"""As conf/config.yaml sets it."""


def check_fixed(node: Mapping[str, Any]) -> None:
    """Refuse a preset that would have Hydra run foreign code or write files; ``node`` is Hydra's, unresolved."""
    for key, value in _FIXED.items():
        first, _, rest = key.partition(".")
        if (node[first][rest] if rest else node[first]) != value:
            raise UserError(f"hydra.{key} cannot be changed (open are hydra.launcher and hydra.sweeper)")


def check_targets(node: Any, path: str) -> None:
    """Refuse foreign classes in the resolved node of a launcher or sweeper: Hydra builds objects from it."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if key == "_target_":
            resolve(value, object, f"{path}.{key}", _PACKAGES)
        check_targets(value, f"{path}.{key}")


def not_installed(group: str, name: Any) -> str | None:
    """Return the message about a launcher or sweeper that an extra brings; None for anything else."""
    if group not in ENGINES or not isinstance(name, str):
        return None
    extra = "optuna" if name == "optuna" else None
    if group == "hydra/launcher":
        extra = adapter(name).extra
    return extra and f"{group}={name} is not installed: pip install 'iwae-cli[{extra}]'"
