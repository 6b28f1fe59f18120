"""Give composed jobs to Hydra's launchers, and searches, ``--cfg`` and completion to Hydra's own main."""

from __future__ import annotations

import copy
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from iwae_cli.cli.compose import job_of
from iwae_cli.cli.help import conf_folder
from iwae_cli.cli.overrides import quoted
from iwae_cli.cli.resolve import first_line, resolved
from iwae_cli.cli.stdio import forgiving
from iwae_cli.core.errors import UserError
from iwae_cli.sweeps.jobs import Job, Plan, run_job


def engine(plan: Plan, path: Path, jobs: Sequence[Job], further: Mapping[str, str | int]) -> None:
    """Run a sweep in a folder: the ``jobs`` of a grid by Hydra's launcher, a search by its sweeper with values."""
    if not plan.is_grid:
        values = {"hydra.sweep.dir": str(path), **further}
        fixed = [f"{key}={quoted(value) if isinstance(value, str) else value}" for key, value in values.items()]
        run_hydra(["--multirun", *plan.overrides, *fixed], _sweep_job)
        return
    plan.base.hydra.sweep.dir = str(path)
    composed: Any = _Composed()
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=composed, callbacks=composed),
        task_function=_sweep_job,
        config=plan.base,
    )
    size = plan.sweeper.get("max_batch_size") or len(jobs)
    for first in range(0, len(jobs), size):
        texts = [[json.dumps(job.sent())] for job in jobs[first : first + size]]
        for result in launcher.launch(texts, initial_job_idx=first):
            _ = result.return_value  # raises what the task raised


class _Composed:
    """Hydra's config loader and callbacks for launchers: jobs are composed already, and come as their only override."""

    def load_sweep_config(self, master: DictConfig, overrides: Sequence[str]) -> DictConfig:
        cfg = copy.deepcopy(master)
        with open_dict(cfg):
            cfg.job = overrides[0].encode()  # in a text, OmegaConf would see interpolations
        return cfg

    def on_job_start(self, **_: Any) -> None:
        pass

    def on_job_end(self, **_: Any) -> None:
        pass


def _sweep_job(cfg: DictConfig) -> float | None:
    """Task function of Hydra's launchers: one job of a sweep, perhaps in another process."""
    node = HydraConfig.get()
    if "job" in cfg:
        job = Job(**json.loads(cfg.job))
        if job.logger is not None:
            whole = OmegaConf.create({**job.config, "logger": job.logger})
            job = replace(job, config=resolved(whole))
    else:  # of a search
        job = job_of(cfg, node, OverridesParser.create().parse_overrides(list(node.overrides.task)))
    with forgiving():
        return run_job(job, Path(node.sweep.dir), node.job.num, node.runtime.choices["hydra/launcher"])


def run_hydra(arguments: list[str], task: Callable[[DictConfig], Any] | None = None) -> None:
    """Run Hydra's own main with ``arguments``; exceptions of ``task`` are raised as they are."""

    main = hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")(
        task or (lambda cfg: None)
    )
    before, sys.argv = sys.argv, ["iwae-train", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        if task is not None:
            raise
        raise UserError(f"{shlex.join(arguments)}: {first_line(error)}") from None
    except SystemExit as end:
        if end.code:
            raise SystemExit(UserError.exit_code) from None
    finally:
        sys.argv = before
