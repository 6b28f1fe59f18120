"""Compose a command line into plain values by Hydra.

Hydra composes the choices of the groups once. Values are then set one by one, because only a config without them shows
which keys exist. Every fault is a ``UserError`` of one line, raised before anything happens.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iwae_cli.cli.help import choices, conf_folder, own_folder, summary
from iwae_cli.cli.overrides import MAX_JOBS, parse, quoted, several, values
from iwae_cli.cli.resolve import first_line, resolved, secrets_in, texts_in
from iwae_cli.config.build import BASES, SEVERAL, convert, resolve, show
from iwae_cli.config.guesses import closest, keys_like, nearest, unknown_key
from iwae_cli.core.errors import UserError, clip, one_line
from iwae_cli.record.folder import RunFolder
from iwae_cli.sweeps.jobs import Job, Plan
from iwae_cli.sweeps.launchers import adapter

ESTIMATOR = "estimator"
"""Group of ``iwae-eval`` alone."""
_WANDB = "iwae_cli.record.wandb.WandbLogger"
_ENGINES = ("hydra/launcher", "hydra/sweeper")
_ENGINE_KEYS = ("hydra.launcher.", "hydra.sweeper.")
_COMPOSITION_ERRORS = (
    *(HydraException, OmegaConfBaseException, yaml.YAMLError),
    *(OSError, ValueError, TypeError, AttributeError),
)
_NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
_FIXED = {
    **{"callbacks": {}, "env": {}, "hydra_logging": _NO_LOGGING, "job_logging": _NO_LOGGING, "output_subdir": None},
    **{"run.dir": ".", "sweep.dir": "${output_dir}/sweeps", "sweep.subdir": "."},
    **{"job.chdir": False, "job.env_set": {}, "job.env_copy": []},
}
"""What in Hydra's node could run code or write files, as conf/config.yaml sets it."""
_ENGINE_PACKAGES = ("hydra._internal.core_plugins", "hydra_plugins", "optuna.samplers")


def plan(overrides: Sequence[str], multirun: bool, config_dir: str | None, in_python: bool = False) -> Plan:
    """Return what a command line asks for, or a call ``in_python``.

    Raises:
        UserError: anything wrong with it but the values of the keys.
    """
    with _composer(config_dir) as composer:
        parsed = composer.parse(overrides)
        lines = [*composer.search_path, *(str(o.input_line) for o in parsed)]
        swept = [o for o in parsed if o.is_sweep_override()]
        # Which other keys there are depends on the choices of each job.
        common = [o for o in parsed if o.is_hydra_override() or o.key_or_group == "on_error" or composer.is_choice(o)]
        base = composer.compose([o for o in common if o not in swept])
        stop = convert(resolved(base, ["on_error"])["on_error"], Literal["continue", "stop"], "on_error") == "stop"
        chosen = base.hydra.runtime.choices
        launcher, sweeper = (resolved(base.hydra[key]) for key in ("launcher", "sweeper"))
        size = sweeper.get("max_batch_size")
        if size is not None and not (type(size) is int and size > 0):
            raise UserError(f"hydra.sweeper.max_batch_size must be null or an integer >= 1, got {show(size)}")
        if not multirun and base.hydra.mode != RunMode.MULTIRUN:
            if swept:
                raise UserError(several(swept[0], in_python))
            cfg = composer.compose(parsed)
            jobs = [job_of(cfg, cfg.hydra, parsed)]
            return Plan(jobs, False, [], True, lines, stop, chosen, launcher, sweeper, base)
        parsed = [*composer.parse([f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]), *parsed]
        is_grid = chosen["hydra/sweeper"] == "basic"
        if sweeper.get("custom_search_space"):
            raise UserError("hydra.sweeper.custom_search_space cannot be used: it would call what it names")
        axes = [(o.key_or_group, values(o, is_grid)) for o in parsed]
        if is_grid and prod(len(found) for _, found in axes) > MAX_JOBS:
            raise UserError(f"a sweep may have {MAX_JOBS:,} jobs, and this one has more: ask for it in parts")
        grid = product(*(found for _, found in axes))
        jobs = []
        # Of a search, which decides its jobs itself, one is checked.
        for texts in grid if is_grid else [[found[0] for found in dict(axes).values()]]:
            of_job = composer.parse(texts)
            cfg = composer.compose(of_job)
            jobs.append(job_of(cfg, cfg.hydra, of_job))
        varied = list(dict.fromkeys(o.key_or_group for o in parsed if o.is_sweep_override()))
        return Plan(jobs, True, varied, is_grid, lines, stop, chosen, launcher, sweeper, base)


def checked(overrides: Sequence[str], config_dir: str | None) -> list[str]:
    """Return the overrides of one run for Hydra's ``--cfg`` and ``--info``, checked as ``plan`` does.

    What the composed values take from the environment is hidden, see ``without_hidden``.
    """
    with _composer(config_dir) as composer:
        parsed = [o for o in composer.parse(overrides) if not o.is_sweep_override()]
        cfg = composer.compose(parsed)
        for key in cfg:
            # Each alone: one that has no value may be printed without.
            with suppress(UserError):
                resolved(cfg, [str(key)])
        return [*composer.search_path, *(str(o.input_line) for o in parsed)]


def overrides_like(key: str, value: str) -> list[str]:
    """Return the overrides of existing keys that someone may mean who writes ``--key=value``."""
    with _composer(None) as composer:
        tree: Any = OmegaConf.to_container(composer.choose([]), resolve=False)
        like = keys_like(key, "", tree)
        return [f"{name}={closest(value, composer.groups.get(name, [])) or clip(value)}" for name in like]


def evaluation_config(run: Path, overrides: Sequence[str], config_dir: str | None) -> dict[str, Any]:
    """Return the configuration of a run with overrides of ``evaluation``, ``device``, ``data_dir`` and ``data.path``.

    With ``estimator=...`` it holds that node too. An estimator whose yaml has a key ``objective`` gets the objective of
    the run there, with overrides of ``objective``.

    Raises:
        UserError: an override of something else, a wrong one, or ``run`` is no run folder.
    """
    saved = RunFolder(run).config()
    recorded = saved.get("config_dir")
    if recorded is not None and config_dir is None and os.path.isdir(convert(recorded, str, "config_dir")):
        config_dir = recorded
    with _composer(config_dir) as composer:
        parsed = composer.parse(overrides)
        chosen = [o for o in parsed if composer.is_choice(o)]
        fresh = composer.choose([f"{'+' * (o.key_or_group == ESTIMATOR)}{o.input_line}" for o in chosen])
        about_objective = "objective" in (fresh.get(ESTIMATOR) or {})
        # Where data lie may change; what they hold is compared with what the run was trained on.
        allowed = ["evaluation", "device", "data_dir", *(["data.path"] if "path" in saved["data"] else []), ESTIMATOR]
        allowed += ["objective"] if about_objective else []
        for override in parsed:
            key, group = override.key_or_group, override.key_or_group.partition(".")[0]
            if override.is_sweep_override():
                asked = clip(str(override.input_line))
                raise UserError(f"{asked}: iwae-eval does one evaluation (a list is written [1,2])")
            if not {key, group} & {*allowed}:
                hint = nearest(group, allowed)
                raise UserError(
                    f"{clip(key)} cannot be changed after training{hint} (allowed are {', '.join(allowed)})"
                )
            if group == ESTIMATOR and ESTIMATOR not in fresh:
                names = " or ".join(f"{ESTIMATOR}={name}" for name in composer.groups[ESTIMATOR])
                raise UserError(f"{clip(key)} belongs to an estimator: write {names} before it")
        config = OmegaConf.create({key: saved[key] for key in ("data", *allowed) if key in saved})
        for group in ("evaluation", "device"):
            # A run of an earlier version lacks keys that are new.
            if config[group].get("_target_") == fresh[group]["_target_"]:
                config[group] = {**fresh[group], **config[group]}
        for override in chosen:
            config[override.key_or_group] = fresh[override.key_or_group]
        composer.set_values(config, [o for o in parsed if o not in chosen])
    changed = resolved(config)
    if about_objective:
        changed[ESTIMATOR]["objective"] = changed.pop("objective")
    if "data_dir" in saved["data"]:
        changed["data"]["data_dir"] = changed["data_dir"]
    if config_dir is not None:
        # An estimator may come from another folder than the model.
        changed["config_dir"] = [str(Path(config_dir).absolute()), *([recorded] if recorded else [])]
    return {**saved, **changed}


@contextmanager
def _composer(config_dir: str | None) -> Iterator[_Composer]:
    folder = None if config_dir is None else own_folder(config_dir, "--config-dir")
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="iwae-train"):
        yield _Composer(folder)


class _Composer:
    """Hydra's compose with checks in front, looking into ``conf``, then into ``folder``.

    Attributes:
        groups: group -> its choices.
        search_path: overrides that make Hydra look into ``folder``.
    """

    def __init__(self, folder: Path | None) -> None:
        self.search_path = [] if folder is None else [f"hydra.searchpath=[{quoted(f'file://{folder}')}]"]
        loader = GlobalHydra.instance().config_loader()
        self._parser = OverridesParser.create(config_loader=loader)
        self.groups = choices([conf_folder(), *([folder] if folder else [])])
        self.groups |= {group: sorted(loader.get_group_options(group)) for group in _ENGINES}
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Return the overrides, each key once."""
        return parse(overrides, self._parser, self.groups)

    def compose(self, overrides: Sequence[Override]) -> DictConfig:
        """Return the config of one run with Hydra's node; its values are not checked yet."""
        for override in overrides:
            if override.key_or_group.partition(".")[0] == ESTIMATOR:
                asked = clip(str(override.input_line), 60)
                raise UserError(f"{asked} is for a finished run: write iwae-eval RUN_FOLDER {asked}")
        chosen = [o for o in overrides if self.is_choice(o)]
        cfg = self.choose([str(o.input_line) for o in chosen])
        self.set_values(cfg, [o for o in overrides if o not in chosen])
        _check_hydra(cfg.hydra)
        return cfg

    def choose(self, lines: Sequence[str]) -> DictConfig:
        """Return a copy of the config that Hydra composes for choices of groups; composed once."""
        key = tuple(lines)
        if key not in self._composed:
            try:
                cfg = hydra.compose("config", [*self.search_path, *lines], return_hydra_config=True)
            # Hydra looks into presets, and into its own node, without checking their types.
            except _COMPOSITION_ERRORS as error:
                group, _, name = str(getattr(error, "missing_cfg_file", "")).rpartition("/")
                why = f"{clip(shlex.join(lines))} cannot be composed: {type(error).__name__}: {one_line(error)}"
                raise UserError(_not_installed(group, name) or why) from error
            OmegaConf.set_readonly(cfg.hydra, False)
            self._composed[key] = cfg
        return copy.deepcopy(self._composed[key])

    def set_values(self, cfg: DictConfig, overrides: Sequence[Override]) -> None:
        """Set keys of ``cfg`` that exist, or that ``+`` adds below a group (whose class decides)."""
        known = OmegaConf.to_container(cfg, resolve=False)
        for override in overrides:
            key, added = override.key_or_group, override.is_add() or override.is_force_add()
            if not key.startswith("hydra"):
                _check_key(key, known, added)
            elif not key.startswith(_ENGINE_KEYS):
                raise UserError(f"{clip(key)} cannot be changed; runs go to output_dir=..., several runs need -m")
            try:
                OmegaConf.update(cfg, key, override.value(), force_add=added)
            except (OmegaConfBaseException, AssertionError) as error:
                raise UserError(f"{clip(str(override.input_line))}: {first_line(error)}") from None

    def is_choice(self, override: Override) -> bool:
        """Return whether ``override`` chooses from a group, after checking that the choice is there."""
        group = override.key_or_group
        if group not in self.groups:
            return False
        if override.is_add() and group not in _ENGINES:
            raise UserError(f"+{group} is there already: write {group}={show(override.value())} without +")
        if override.is_sweep_override():
            return True
        names, value = self.groups[group], override.value()
        for name in value if isinstance(value, list) and group in (*SEVERAL, "experiment") else [value]:
            if not isinstance(name, str) or name not in names:
                raise UserError(_not_installed(group, name) or _no_choice(group, name, names))
        return True


def _check_key(key: str, tree: Any, added: bool) -> None:
    path, node = "", tree
    for part in key.split("."):
        there = node if isinstance(node, dict) else {}
        if part not in there:
            if path and there and added:
                return
            names = [str(name) for name in there if name not in ("_target_", "hydra")]
            raise UserError(unknown_key(key, path, names if path else [*names, "experiment"], tree))
        node, path = node[part], f"{path}.{part}" if path else part


def job_of(cfg: DictConfig, node: Any, overrides: Sequence[Override]) -> Job:
    """Return the plain values of a run without Hydra's ``node``, with ``WANDB_MODE`` where no logger was typed."""
    # How a sweep treats errors is no part of a run.
    config = resolved(cfg, [str(key) for key in cfg if key not in ("hydra", "on_error")])
    # As the processes of a sweep know it, too. Recorded, so that the run can be evaluated and loaded without it.
    config.update(("config_dir", url.removeprefix("file://")) for url in node.searchpath)
    keys = [str(o.key_or_group) for o in overrides]
    # A token in a logger's key belongs into no record; the other keys decide the numbers.
    written: Any = OmegaConf.to_container(cfg.logger, resolve=False) if "logger" in cfg else {}
    # What an agent of W&B starts is a run of its server already.
    mode = os.environ.get("WANDB_MODE") or ("online" if "WANDB_SWEEP_ID" in os.environ else None)
    if mode and not any(key == "logger" or (key.startswith("logger.") and key.endswith(".mode")) for key in keys):
        for logger in [*(config.get("logger") or {}).values(), *written.values()]:
            if isinstance(logger, dict) and logger.get("_target_") == _WANDB:
                logger["mode"] = convert(mode, Literal["online", "offline", "disabled"], "WANDB_MODE")
    secret = any(secrets_in(text) for _, text in texts_in(written))
    names = {group: str(node.runtime.choices[group]) for group in BASES if group in node.runtime.choices}
    lines = [str(o.input_line) for o in overrides if o.key_or_group != "on_error" and not o.is_hydra_override()]
    return Job(config, names, lines, written if secret else None)


def _check_hydra(node: DictConfig) -> None:
    """Refuse a preset that would have Hydra run foreign code or write files: Hydra builds objects from its own node."""
    plain: Any = OmegaConf.to_container(node, resolve=False)
    for key, value in _FIXED.items():
        first, _, rest = key.partition(".")
        if (plain[first][rest] if rest else plain[first]) != value:
            raise UserError(f"hydra.{key} cannot be changed (open are hydra.launcher and hydra.sweeper)")
    nodes: list[tuple[str, Any]] = [(f"hydra.{key}", resolved(node[key])) for key in ("launcher", "sweeper")]
    for path, value in nodes:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        nodes += [(f"{path}.{key}", inner) for key, inner in items]  # extends the list that is walked
        if path.endswith("._target_"):
            resolve(value, object, path, _ENGINE_PACKAGES)


def _no_choice(group: str, name: Any, names: Sequence[str]) -> str:
    if group == "device" and (gpu := re.fullmatch(r"(?:cuda|gpu):?(\d{1,3})", str(name))):
        return f"device={name}: name the GPU by a variable: CUDA_VISIBLE_DEVICES={gpu[1]} iwae-train device=cuda ..."
    there = clip(", ".join(summary(list(names))), 120)
    return f"{group} must be one of {there}, got {show(name)}{nearest(name, names)}"


def _not_installed(group: str, name: Any) -> str | None:
    """Return the message about a launcher or sweeper that an extra brings; None for anything else."""
    if group not in _ENGINES or not isinstance(name, str):
        return None
    extra = adapter(name).extra if group == "hydra/launcher" else {"optuna": "optuna"}.get(name)
    return extra and f"{group}={name} is not installed: pip install 'iwae-cli[{extra}]'"
