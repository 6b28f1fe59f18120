"""One adapter per engine that runs the jobs of a sweep: its extra, its start-up, how it shares cores, preemption."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from iwae_cli.core.errors import UserError

BATCHED = "batched"
"""The launcher that trains jobs of the same shapes as one program, then evaluates one job after the other."""


class Launcher:
    """Jobs one after the other in this process; ``node`` is Hydra's node of the launcher, resolved."""

    extra: str | None = None
    """Extra of this package that installs the engine."""
    elsewhere: bool = False
    """Whether jobs run on other machines, which may hold data that this one lacks."""
    preempts: bool = False
    """Whether a signal tells jobs to save their state and end, to be queued again by the engine."""

    def start(self, node: Mapping[str, Any]) -> None:
        """Prepare the engine."""

    def workers(self, node: Mapping[str, Any], jobs: int | None, cores: int) -> int | None:
        """Return how many evaluation workers each job may have so that parallel ``jobs`` share the cores; None: all."""
        return None


class _Joblib(Launcher):
    """Processes of this machine."""

    def workers(self, node: Mapping[str, Any], jobs: int | None, cores: int) -> int | None:
        from joblib import effective_n_jobs

        try:
            parallel = effective_n_jobs(node["n_jobs"])
        except ValueError as error:
            raise UserError(f"hydra.launcher.n_jobs must be 1 or more, or -1 for all cores: {error}") from None
        return max(1, cores // min(parallel, jobs or parallel))


class _Submitit(Launcher):
    """SLURM, which gives every job cores of its own."""

    extra = "slurm"
    elsewhere = True
    preempts = True


class _SubmititLocal(_Submitit):
    """Submitit's processes of this machine, all jobs at once."""

    elsewhere = False

    def workers(self, node: Mapping[str, Any], jobs: int | None, cores: int) -> int | None:
        return max(1, cores // (jobs or 1))


class _Ray(Launcher):
    """Ray, which gives every job the cores it asks for, perhaps on other machines."""

    extra = "ray"
    elsewhere = True

    def start(self, node: Mapping[str, Any]) -> None:
        # Before the sweep sets its signal handlers: Ray installs one for SIGTERM.
        import ray

        init = node["ray"]["init"]
        if "address" not in init and "RAY_ADDRESS" not in os.environ:
            # Hardly anything is sent through its memory, of which it would take a third of the machine's.
            init = {"object_store_memory": 78_643_200, **init}
        ray.init(**init)

    def workers(self, node: Mapping[str, Any], jobs: int | None, cores: int) -> int | None:
        return max(1, int((node["ray"].get("remote") or {}).get("num_cpus") or 1))


LAUNCHERS: Mapping[str, Launcher] = {
    "joblib": _Joblib(),
    "ray": _Ray(),
    "ray_aws": _Ray(),
    "submitit_local": _SubmititLocal(),
    "submitit_slurm": _Submitit(),
}
"""Choice of ``hydra/launcher`` -> adapter; an engine that is not listed runs its jobs as ``Launcher`` says."""


def adapter(name: str) -> Launcher:
    """Return the adapter of a choice of ``hydra/launcher``."""
    return LAUNCHERS.get(name, Launcher())
