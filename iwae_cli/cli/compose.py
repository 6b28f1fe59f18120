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

from iwae_cli.cli.engines import ENGINES, check_fixed, check_targets, not_installed
from iwae_cli.cli.help import choices, conf_folder, own_folders, summary
from iwae_cli.cli.overrides import MAX_JOBS, parse, quoted, several, values
from iwae_cli.cli.resolve import first_line, plain, resolved, secrets_in, texts_in
from iwae_cli.config.build import BASES, convert, show
from iwae_cli.config.guesses import closest, keys_like, nearest, unknown_key
from iwae_cli.core.errors import UserError, clip, one_line
from iwae_cli.record.folder import RunFolder
from iwae_cli.sweeps.jobs import Job, Plan

ESTIMATOR = "estimator"
"""Group of ``iwae-eval`` alone."""
_WANDB = "iwae_cli.record.wandb.WandbLogger"
_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, TypeError, AttributeError)
"""Hydra looks into presets, and into its own node, without checking their types."""


def plan(overrides: Sequence[str], multirun: bool, config_dir: str | None, in_python: bool = False) -> Plan:
    """Return what a command line asks for, or a call ``in_python``; the values of its keys are not checked yet."""
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
            return Plan([composer.job(parsed)], False, [], True, lines, stop, chosen, launcher, sweeper, base)
        preset = composer.parse([f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()])
        typed = {o.key_or_group for o in parsed}
        parsed = [*(o for o in preset if o.key_or_group not in typed), *parsed]
        is_grid = chosen["hydra/sweeper"] == "basic"
        if sweeper.get("custom_search_space"):
            raise UserError("hydra.sweeper.custom_search_space cannot be used: it would call what it names")
        axes = [(o.key_or_group, values(o, is_grid)) for o in parsed]
        if is_grid and prod(len(found) for _, found in axes) > MAX_JOBS:
            raise UserError(f"a sweep may have {MAX_JOBS:,} jobs, and this one has more: ask for it in parts")
        # Of a search, which decides its jobs itself, one is checked.
        first = [found[0] for found in dict(axes).values()]
        grid = product(*(found for _, found in axes)) if is_grid else [first]
        jobs = [composer.job(composer.parse(texts)) for texts in grid]
        varied = list(dict.fromkeys(o.key_or_group for o in parsed if o.is_sweep_override()))
        return Plan(jobs, True, varied, is_grid, lines, stop, chosen, launcher, sweeper, base)


def checked(overrides: Sequence[str], config_dir: str | None) -> list[str]:
    """Return the overrides of one run for Hydra's ``--cfg`` and ``--info``, checked; hide values of the environment."""
    with _composer(config_dir) as composer:
        parsed = composer.parse(overrides)
        if swept := next((o for o in parsed if o.is_sweep_override()), None):
            line = clip(str(swept.input_line))
            raise UserError(f"{line}: --cfg and --info show one run, so write one value (a list is written [1,2])")
        cfg = composer.compose(parsed)
        for key in cfg:
            # Each alone: one that has no value may be printed without.
            with suppress(UserError):
                resolved(cfg, [str(key)])
        return [*composer.search_path, *(str(o.input_line) for o in parsed)]


def overrides_like(key: str, value: str) -> list[str]:
    """Return the overrides of existing keys that someone may mean who writes ``--key=value``."""
    with _composer(None) as composer:
        like = keys_like(key, "", plain(composer.choose([])))
        return [f"{name}={closest(value, composer.groups.get(name, [])) or clip(value)}" for name in like]


def evaluation_config(run: Path, overrides: Sequence[str], config_dir: str | None) -> dict[str, Any]:
    """Return the configuration of a run with overrides of ``evaluation``, ``device``, ``data_dir`` and ``data.path``.

    With ``estimator=...`` it holds that node too. An estimator whose yaml has a key ``objective`` gets the objective of
    the run there, with overrides of ``objective``.
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
            asked = clip(key)
            if override.is_sweep_override():
                line = clip(str(override.input_line))
                raise UserError(f"{line}: iwae-eval does one evaluation (a list is written [1,2])")
            if key not in allowed and group not in allowed:
                why = f"cannot be changed after training{nearest(group, allowed)}"
                raise UserError(f"{asked} {why} (allowed are {', '.join(allowed)})")
            if group == ESTIMATOR and ESTIMATOR not in fresh:
                names = " or ".join(f"{ESTIMATOR}={name}" for name in composer.groups[ESTIMATOR])
                raise UserError(f"{asked} belongs to an estimator: write {names} before it")
        config = OmegaConf.create({key: saved[key] for key in ("data", *allowed) if key in saved})
        for group in ("evaluation", "device"):
            # A run of an earlier version lacks keys that are new.
            if config[group].get("_target_") == fresh[group]["_target_"]:
                config[group] = {**fresh[group], **config[group]}
        config.update({override.key_or_group: fresh[override.key_or_group] for override in chosen})
        composer.set_values(config, [o for o in parsed if o not in chosen])
    changed = resolved(config)
    if about_objective:
        changed[ESTIMATOR]["objective"] = changed.pop("objective")
    if "data_dir" in saved["data"] and any(o.key_or_group == "data_dir" for o in parsed):
        changed["data"]["data_dir"] = changed["data_dir"]
    if config_dir is not None:
        # An estimator may come from another folder than the model.
        changed["config_dir"] = [str(Path(config_dir).absolute()), *([recorded] if recorded else [])]
    return {**saved, **changed}


@contextmanager
def _composer(config_dir: str | None) -> Iterator[_Composer]:
    own = own_folders(config_dir)
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="iwae-train"):
        yield _Composer(own)


class _Composer:
    """Hydra's compose with checks in front, looking into ``conf``, then into the folders ``own``."""

    def __init__(self, own: Sequence[Path]) -> None:
        self.search_path = [f"hydra.searchpath=[{quoted(f'file://{folder}')}]" for folder in own]  # an override
        loader = GlobalHydra.instance().config_loader()
        self._parser = OverridesParser.create(config_loader=loader)
        self.groups = choices([conf_folder(), *own])
        self.groups |= {group: sorted(loader.get_group_options(group)) for group in ENGINES}
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
        check_fixed(plain(cfg.hydra))
        for key in ("launcher", "sweeper"):
            check_targets(resolved(cfg.hydra[key]), f"hydra.{key}")
        return cfg

    def job(self, overrides: Sequence[Override]) -> Job:
        """Return one run as composed."""
        cfg = self.compose(overrides)
        return job_of(cfg, cfg.hydra, overrides)

    def choose(self, lines: Sequence[str]) -> DictConfig:
        """Return a copy of the config that Hydra composes for choices of groups; composed once."""
        key = tuple(lines)
        if key not in self._composed:
            try:
                cfg = hydra.compose("config", [*self.search_path, *lines], return_hydra_config=True)
            except _ERRORS as error:
                group, _, name = str(getattr(error, "missing_cfg_file", "")).rpartition("/")
                why = f"{clip(shlex.join(lines))} cannot be composed: {type(error).__name__}: {one_line(error)}"
                raise UserError(not_installed(group, name) or why) from error
            OmegaConf.set_readonly(cfg.hydra, False)
            self._composed[key] = cfg
        return copy.deepcopy(self._composed[key])

    def set_values(self, cfg: DictConfig, overrides: Sequence[Override]) -> None:
        """Set keys of ``cfg`` that exist, or that ``+`` adds below a group (whose class decides)."""
        known = plain(cfg)
        for override in overrides:
            key, added = override.key_or_group, override.is_add() or override.is_force_add()
            if not key.startswith("hydra"):
                _check_key(key, known, added)
            elif not key.startswith(("hydra.launcher.", "hydra.sweeper.")):
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
        if override.is_add() and group not in ENGINES:
            raise UserError(f"+{group} is there already: write {group}={show(override.value())} without +")
        if override.is_sweep_override():
            return True
        names, value = self.groups[group], override.value()
        for name in value if isinstance(value, list) and group in ("logger", "experiment") else [value]:
            if not isinstance(name, str) or name not in names:
                raise UserError(not_installed(group, name) or _no_choice(group, name, names))
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
    written = plain(cfg.logger) if "logger" in cfg else {}
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


def _no_choice(group: str, name: Any, names: Sequence[str]) -> str:
    if group == "device" and (gpu := re.fullmatch(r"(?:cuda|gpu):?(\d{1,3})", str(name))):
        return f"device={name}: name the GPU by a variable: CUDA_VISIBLE_DEVICES={gpu[1]} iwae-train device=cuda ..."
    there = clip(", ".join(summary(list(names))), 120)
    return f"{group} must be one of {there}, got {show(name)}{nearest(name, names)}"
