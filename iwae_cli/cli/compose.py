"""Composing with Hydra, with every fault of the command line told in one line before anything happens."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, RangeSweep
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from iwae_cli.cli.help import choices, conf_folder, config_files, own_folder, summary
from iwae_cli.config.build import BASES, nearest, one_line, resolve, unknown_key
from iwae_cli.core.errors import UserError
from iwae_cli.core.files import write_text
from iwae_cli.record.former import translated

VERSION_BASE = "1.3"
ESTIMATOR = "estimator"
"""Group that ``iwae-eval`` alone has."""
ABOUT_OBJECTIVE = ("gradient_snr",)
"""Estimators that ask about an objective."""
_HYDRA_PACKAGES = ("hydra._internal.core_plugins", "hydra_plugins", "optuna.samplers")
_EXTRAS = {"ray": "ray", "ray_aws": "ray", "submitit_local": "slurm", "submitit_slurm": "slurm", "optuna": "optuna"}
"""Launchers and sweepers that not everybody has installed, and the extra that brings each."""
_OPEN_HYDRA_GROUPS = ("hydra/launcher", "hydra/sweeper")
_OPEN_HYDRA_OVERRIDES = ("hydra.launcher.", "hydra.sweeper.")
_OPEN_HYDRA_KEYS = {"launcher", "sweeper", "searchpath", "mode"}
_HYDRA_OWN_KEYS = {"overrides", "runtime"}
_ON_ERROR = "on_error"
_NOT_OF_A_SEARCH = (
    "hydra/launcher=",
    "hydra.launcher.",
    "hydra.sweeper.n_trials=",
    "hydra.sweeper.n_jobs=",
    f"{_ON_ERROR}=",
    "restart=",
)
MAX_JOBS = 10_000
"""Of one sweep; each is composed and checked before the first begins, which takes some hundredths of a second."""

MAX_SIDE_BY_SIDE = 1024
"""Processes of a sweep at once."""

_TO_BE_GIVEN = "??? "
"""Begins a value of a preset that must be given; what kind of value follows."""

_BASIC_SWEEPER = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"


@dataclass(frozen=True)
class Job:
    """One run as composed: plain values, the chosen names, and how it was asked for."""

    config: dict[str, Any]
    names: dict[str, str]
    overrides: list[str]


@dataclass(frozen=True)
class Plan:
    """All that one command asks for.

    Attributes:
        jobs: one, or those of a sweep; for a search, which decides as it goes, one of those that it may try.
        multirun: whether it is a sweep.
        arguments: overrides for Hydra.
        varied: keys that are not the same in all jobs.
        is_grid: whether the jobs are all that there will be.
        searched: what else makes a search the same search.
        stop_on_error: whether the first failure ends a sweep.
        base: the config without what is varied, with Hydra's node.
    """

    jobs: list[Job]
    multirun: bool
    arguments: list[str]
    varied: list[str]
    is_grid: bool
    searched: list[str]
    stop_on_error: bool
    base: DictConfig


def plan(overrides: Sequence[str], multirun: bool, config_dir: str | None) -> Plan:
    """Compose and check everything that one command line asks for.

    Raises:
        UserError: anything wrong with it.
    """
    with _hydra(config_dir, overrides) as composer:
        overrides = [o for o in overrides if not o.lstrip("+").startswith("hydra.searchpath=")]
        parsed = composer.parse(overrides)
        overrides = [str(o.input_line) for o in parsed]
        base = composer.compose([o for o in parsed if not o.is_sweep_override()])
        multirun = multirun or base.hydra.mode == RunMode.MULTIRUN
        varied: list[str] = []
        is_grid = base.hydra.sweeper._target_ == _BASIC_SWEEPER
        if multirun:
            all_overrides, varied = composer.grid(parsed, base) if is_grid else composer.sample(parsed, base)
        else:
            for override in parsed:
                if override.is_sweep_override():
                    raise UserError(f"{override.input_line} asks for several runs: add -m (a list is written [1,2])")
            all_overrides = [parsed]
        jobs = []
        for job_overrides in all_overrides:
            cfg = composer.compose(job_overrides)
            task = [str(o.input_line) for o in job_overrides if not o.is_hydra_override()]
            jobs.append(job(cfg, cfg.hydra.runtime.choices, task))
        searched = [] if is_grid else [o for o in overrides if not o.lstrip("+").startswith(_NOT_OF_A_SEARCH)]
        if _ON_ERROR in varied:
            raise UserError(f"{_ON_ERROR} is of the whole sweep: write one of continue, stop")
        stop = _on_error(base) == "stop"
        arguments = [*composer.search_override, *overrides]
        return Plan(jobs, multirun, arguments, varied, is_grid, searched, stop, base)


def hydra_node(plan: Plan, sweep_folder: Path) -> dict[str, Any]:
    """Hydra's launcher, sweeper and choices for a sweep in this folder, resolved."""
    base = copy.deepcopy(plan.base)
    with open_dict(base):
        base.hydra.sweep.dir = str(sweep_folder)
    return {key: _resolved(base.hydra[key], f"hydra.{key}") for key in ("launcher", "sweeper")} | {
        "choices": {str(group): choice for group, choice in base.hydra.runtime.choices.items()}
    }


def save(config: DictConfig, file: Path) -> None:
    """Write ``multirun.yaml``, which Hydra's own sweeper alone writes."""
    write_text(file, OmegaConf.to_yaml(config))


def workers_each(hydra: Mapping[str, Any], jobs: int | None, cores: int) -> int | None:
    """How many workers the evaluation of one job may have, so that jobs side by side share the cores; None: all.

    Args:
        hydra: see ``hydra_node``.
        jobs: how many there are, where that is known.
        cores: of this machine.
    """
    launcher, at_once = hydra["launcher"], jobs or hydra["sweeper"].get("n_jobs")
    name = launcher["_target_"].rpartition(".")[2]
    if name == "JoblibLauncher":
        from joblib import effective_n_jobs

        asked = launcher["n_jobs"]
        if asked == 0 or asked > MAX_SIDE_BY_SIDE:
            raise UserError(f"hydra.launcher.n_jobs must be 1 to {MAX_SIDE_BY_SIDE}, or -1 for all cores, got {asked}")
        side_by_side = effective_n_jobs(asked)
        return max(1, cores // min(side_by_side, at_once or side_by_side))
    if name == "LocalLauncher":
        return max(1, cores // (at_once or 1))
    if name == "RayLauncher":
        return max(1, int((launcher["ray"].get("remote") or {}).get("num_cpus") or 1))
    # One after the other, or SLURM, which gives every job cores of its own.
    return None


def check_display(overrides: Sequence[str], config_dir: str | None, resolve: bool) -> list[str]:
    """The overrides for ``--cfg`` and ``--info``, checked as far as they can be without importing torch.

    Args:
        overrides, config_dir: as given.
        resolve: whether interpolations will be resolved.

    Raises:
        UserError: anything wrong with them.
    """
    with _hydra(config_dir, overrides) as composer:
        overrides = [o for o in overrides if not o.lstrip("+").startswith("hydra.searchpath=")]
        parsed = composer.parse(overrides)
        cfg = composer.compose([o for o in parsed if not o.is_sweep_override()])
        if resolve:
            job(cfg, {}, [])
        return [*composer.search_override, *(str(o.input_line) for o in parsed)]


def job(cfg: DictConfig, chosen: Mapping[str, Any], overrides: Sequence[str]) -> Job:
    """The plain values of a composed config, without Hydra's node and with ``WANDB_MODE`` honoured.

    Raises:
        UserError: a value is missing or cannot be resolved.
    """
    config = _resolved(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in ("hydra", _ON_ERROR)]))
    for key, value in config.items():
        if isinstance(value, str) and value.startswith(_TO_BE_GIVEN):
            raise UserError(f"{key} has no value: write {key}=..., {value.removeprefix(_TO_BE_GIVEN)}")
    # What becomes of a sweep is no part of a run.
    overrides = [o for o in overrides if not o.lstrip("+").startswith(f"{_ON_ERROR}=")]
    mode = os.environ.get("WANDB_MODE")
    explicit = any(o.lstrip("+").partition("=")[0] in ("logger", "logger.mode") for o in overrides)
    if mode and not explicit and isinstance(config.get("logger"), dict):
        modes = ("online", "offline", "disabled")
        if mode not in modes:
            raise UserError(f"WANDB_MODE must be one of {', '.join(modes)}, got {mode}{nearest(mode, modes)}")
        config["logger"]["mode"] = mode
    return Job(config, {group: str(chosen[group]) for group in BASES if group in chosen}, list(overrides))


def evaluation_config(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """A run's ``config.yaml`` with overrides of ``evaluation``, ``device``, ``data_dir`` and ``data.path``.

    With ``estimator=...`` it holds that node too; one that asks about an objective holds that of the run inside,
    with overrides of ``objective``.

    Raises:
        UserError: an override of something else, a wrong one, or not such a file.
    """
    own = ("evaluation", "device", "data_dir")
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    saved = translated(saved) if isinstance(saved, dict) else {}
    if not {*BASES, *own} <= saved.keys():
        raise UserError(f"{file} is not the configuration of a run")
    with _hydra(None, ()) as composer:
        parsed = composer.parse(overrides)
        about_objective = any(o.key_or_group == ESTIMATOR and o.value() in ABOUT_OBJECTIVE for o in parsed)
        # Where data lie may change, what they hold may not: that is compared with what the run was trained on.
        moved = ["data.path"] if "path" in saved["data"] else []
        allowed = (*own, *moved, ESTIMATOR, *(["objective"] if about_objective else []))
        for override in parsed:
            key = override.key_or_group
            if not {key, key.partition(".")[0]} & {*allowed}:
                hint = nearest(key.partition(".")[0], allowed)
                raise UserError(f"{key} cannot be changed after training{hint} (allowed are {', '.join(allowed)})")
            if override.is_sweep_override():
                raise UserError(f"{override.input_line}: iwae-eval does one evaluation (a list is written [1,2])")
        chosen = [override for override in parsed if override.key_or_group in composer.groups]
        fresh = composer.compose([override for override in chosen if override.key_or_group != ESTIMATOR])
        config = OmegaConf.create({key: saved[key] for key in ("data", *allowed) if key in saved})
        for group in ("evaluation", "device"):
            # An older run does not say what could not be chosen yet.
            if config[group].get("_target_") == fresh[group]["_target_"]:
                config[group] = {**fresh[group], **config[group]}
        for override in chosen:
            key = override.key_or_group
            config[key] = composer.estimator(override) if key == ESTIMATOR else fresh[key]
        for override in parsed:
            if override not in chosen:
                if override.key_or_group.startswith(f"{ESTIMATOR}.") and ESTIMATOR not in config:
                    names = " or ".join(f"{ESTIMATOR}={name}" for name in composer.groups[ESTIMATOR])
                    raise UserError(f"{override.key_or_group} belongs to an estimator: write {names} before it")
                composer.check_key(override, OmegaConf.to_container(config, resolve=False))
                OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
    changed = _resolved(config)
    if about_objective:
        changed[ESTIMATOR]["objective"] = changed.pop("objective")
    if "data_dir" in saved["data"]:
        changed["data"]["data_dir"] = changed["data_dir"]
    return {**saved, **changed}


class _Composer:
    """Hydra's compose with our checks in front; to be had from ``_hydra``."""

    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders
        uris = ",".join(quoted(f"file://{folder}") for folder in folders)
        self.search_override = [f"hydra.searchpath=[{uris}]"] if folders else []
        self._loader = GlobalHydra.instance().config_loader()
        self._parser = OverridesParser.create(config_loader=self._loader)
        self.groups = choices([conf_folder(), *folders])
        for group in _OPEN_HYDRA_GROUPS:
            self.groups[group] = sorted(self._loader.get_group_options(group))
        self._cache: dict[tuple[str, ...], DictConfig] = {}

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        parsed: dict[str, Override] = {}
        for text in overrides:
            # Hydra knows no null where it chooses, but an empty list.
            if text.startswith("experiment="):
                text = re.sub(r"([=,(]\s*)null(?=\s*([,)]|$))", r"\1[]", text)
            key, sign, value = text.partition("=")
            try:
                (override,) = self._parser.parse_overrides([text])
                if not override.key_or_group:
                    raise ValueError("no key")
            except (HydraException, ValueError):
                # ValueError also of an integer of thousands of digits.
                word = text.strip("+~-'\" ")
                hint = "" if sign or not word else f"; did you mean {word}=...?"
                if sign and not value.isascii():
                    hint = f"; did you mean {shlex.quote(f'{key}={quoted(value)}')}?"
                shown = repr(text if len(text) < 200 else f"{text[:100]}...")
                raise UserError(f"cannot read {shown}: write key=value, quote special characters{hint}") from None
            before = parsed.setdefault(override.key_or_group, override)
            # As text, since Python holds 1, 1.0 and true to be equal.
            if before.type != override.type or repr(before.value()) != repr(override.value()):
                both = f"{before.input_line} and {override.input_line}"
                raise UserError(f"{both} contradict each other: write one of them")
        return list(parsed.values())

    def estimator(self, override: Override) -> Any:
        """The node that ``estimator=...`` chooses; it is no part of a run's config, so that Hydra would not find it."""
        self._check_choice(override)
        return compose(f"{ESTIMATOR}/{override.value()}")[ESTIMATOR]

    def grid(self, parsed: Sequence[Override], base: DictConfig) -> tuple[list[list[Override]], list[str]]:
        """The overrides of every job, and the keys that are varied."""
        at_once = base.hydra.sweeper.max_batch_size
        if at_once is not None and at_once < 1:
            raise UserError(f"hydra.sweeper.max_batch_size must be >= 1 or null, got {at_once}")
        swept = [*self._sweeper_params(base), *parsed]
        _check_number({o.key_or_group: o for o in swept}.values())
        try:
            (combinations,) = BasicSweeper.split_arguments(swept, None)
        except HydraException as error:
            raise UserError(one_line(error)) from None
        return [self.parse(overrides) for overrides in combinations], _varied(swept)

    def sample(self, parsed: Sequence[Override], base: DictConfig) -> tuple[list[list[Override]], list[str]]:
        """The overrides of one job that a search may try, so that it can be checked before anything runs."""
        if base.hydra.sweeper.get("custom_search_space"):
            raise UserError("hydra.sweeper.custom_search_space cannot be used: it would call what it names")
        swept = [*self._sweeper_params(base), *parsed]
        _check_number([o for o in swept if o.is_discrete_sweep()], most=None)
        chosen: dict[str, Override] = {}
        for override in swept:
            if not override.is_sweep_override():
                chosen[override.key_or_group] = override
                continue
            value = override.value()
            first = (
                next(iter(override.sweep_string_iterator())) if override.is_discrete_sweep() else str(value.start)  # type: ignore[union-attr]
            )
            (chosen[override.key_or_group],) = self.parse([f"{override.get_key_element()}={first}"])
        return [list(chosen.values())], _varied(swept)

    def _sweeper_params(self, base: DictConfig) -> list[Override]:
        sweeper = _resolved(base.hydra.sweeper, "hydra.sweeper")
        return self.parse([f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()])

    def compose(self, overrides: Sequence[Override]) -> DictConfig:
        """One job's config with Hydra's node, checked up to the values themselves."""
        for override in overrides:
            if override.key_or_group.partition(".")[0] == ESTIMATOR:
                asked = override.input_line
                raise UserError(f"{asked} is asked of a finished run: write iwae-eval RUN_FOLDER {asked}")
        chosen = [o for o in overrides if self._check_choice(o)]
        others = [o for o in overrides if o not in chosen]
        try:
            cfg = self._compose(overrides)
        except UserError:
            # Of a key that is not there Hydra does not say what is near.
            self._check_keys(others, self._compose(chosen))
            raise
        # With what is added, all of it would be there already.
        added = any(o.is_add() or o.is_force_add() for o in others)
        self._check_keys(others, self._compose(chosen) if added else cfg)
        self._check_hydra_node(cfg)
        return cfg

    def _check_keys(self, overrides: Sequence[Override], known: DictConfig) -> None:
        plain = OmegaConf.to_container(known, resolve=False)
        for override in overrides:
            self.check_key(override, plain)

    def check_key(self, override: Override, known: Any) -> None:
        """Refuse a key that is not in ``known`` (a ``+`` may add one below a group: its class decides)."""
        key = override.key_or_group
        if override.package is not None:
            raise UserError(f"{override.input_line}: packages cannot be changed, write {key}=...")
        if override.is_delete():
            raise UserError(f"~{key}: nothing can be taken away, choose another value with {key}=...")
        if key == "hydra" or override.is_hydra_override():
            if not key.startswith(_OPEN_HYDRA_OVERRIDES):
                raise UserError(f"{key} cannot be changed; runs go to output_dir=..., several runs are asked for by -m")
            return
        node, path = known, ""
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                added = override.is_add() or override.is_force_add()
                if added and path and isinstance(node, dict):
                    return
                there = node if isinstance(node, dict) else {}
                names = [str(name) for name in there if name not in ("_target_", "hydra")]
                if not path:
                    groups = (g for g in self.groups if "/" not in g and g != ESTIMATOR)
                    names = [*dict.fromkeys([*names, *groups])]
                raise UserError(unknown_key(key, path, names))
            node, path = node[part], f"{path}.{part}" if path else part
        if override.is_add():
            raise UserError(f"+{key} is there already: write {key}=... without +")

    def _check_choice(self, override: Override) -> bool:
        """Whether ``override`` chooses from a group; if so, it must be one of the choices."""
        group = override.key_or_group
        if group not in self.groups:
            return False
        if override.package is not None:
            raise UserError(f"{override.input_line}: packages cannot be changed, write {group}=...")
        if override.is_delete():
            raise UserError(f"~{group}: nothing can be taken away, choose another with {group}=...")
        names, name = self.groups[group], override.value()
        if override.type.name != "CHANGE" and "/" not in group:
            raise UserError(f"+{group} is there already: write {group}={_text(name)} without +")
        if group == "experiment" and name == []:
            return True
        if not isinstance(name, str) or name not in names:
            if group in _OPEN_HYDRA_GROUPS and isinstance(name, str) and name in _EXTRAS:
                raise UserError(_not_installed(group, name))
            listed = ", ".join(summary(names))
            raise UserError(f"{group} must be one of {listed}, got {_text(name)}{nearest(name, names)}")
        return True

    def _compose(self, overrides: Sequence[Override]) -> DictConfig:
        lines = tuple(str(override.input_line) for override in overrides)
        if lines not in self._cache:
            try:
                self._cache[lines] = compose(
                    "config", overrides=[*self.search_override, *lines], return_hydra_config=True
                )
            except (HydraException, OmegaConfBaseException) as error:
                missing = re.search(r"Could not (?:find|load) '(hydra/(?:launcher|sweeper))/(\w+)'", str(error))
                if missing and missing[2] in _EXTRAS:
                    raise UserError(_not_installed(missing[1], missing[2])) from None
                told = [_without_details(str(e)) for e in (error, error.__cause__) if e is not None]
                raise UserError(" ".join(dict.fromkeys(told))) from error
            except UnicodeDecodeError as error:
                raise UserError(f"{self._not_text()} cannot be read: {one_line(error)}") from error
            except (yaml.YAMLError, OSError) as error:
                raise UserError(one_line(error)) from error
            except (AttributeError, TypeError, ValueError, AssertionError) as error:
                # Of Hydra, which looks into a preset and into its own node without asking what has been made of them.
                asked = f"{shlex.join(lines)} cannot be composed"
                if any(line.lstrip("+~").startswith("hydra.") for line in lines):
                    asked = "Hydra's own node cannot be so (open are hydra.launcher and hydra.sweeper)"
                raise UserError(f"{asked}: {type(error).__name__}: {_without_details(str(error))}") from error
        return self._cache[lines]

    def _not_text(self) -> str:
        """Which file it is: the error of the codec does not say."""
        for file in (file for folder in self._folders for file in config_files(folder)):
            try:
                file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                return str(file)
        return "a configuration"

    def _check_hydra_node(self, cfg: DictConfig) -> None:
        """Hydra builds callbacks, loggers, launchers and sweepers from its node: nothing of ours may run there."""
        ours, asked = _own_hydra_node(), _hydra_plain(cfg)
        for key in sorted({*ours, *asked} - _OPEN_HYDRA_KEYS):
            if ours.get(key) != asked.get(key):
                raise UserError(f"hydra.{key} cannot be changed (open are hydra.launcher and hydra.sweeper)")
        for key in ("launcher", "sweeper"):
            for path, target in _targets(_resolved(cfg.hydra[key], f"hydra.{key}"), f"hydra.{key}"):
                resolve(target, object, path, _HYDRA_PACKAGES)


@contextmanager
def _hydra(config_dir: str | None, overrides: Sequence[str]) -> Iterator[_Composer]:
    """Hydra looking into ``conf``, then ``--config-dir``, then ``hydra.searchpath``."""
    folders = [] if config_dir is None else [own_folder(config_dir, "--config-dir")]
    with initialize_config_dir(str(conf_folder()), version_base=VERSION_BASE, job_name="iwae-train"):
        composer = _Composer(folders)
        search = [o for o in overrides if o.lstrip("+").startswith("hydra.searchpath=")]
        for override in composer.parse(search):
            value = override.value()
            for entry in value if isinstance(value, list) else [value]:
                # A pkg:// entry would import a package.
                if not isinstance(entry, str) or ("://" in entry and not entry.startswith("file://")):
                    raise UserError(f"hydra.searchpath must be a list of folders, got {entry}: write [file:///folder]")
                folders.append(own_folder(entry.removeprefix("file://"), "hydra.searchpath"))
        yield _Composer(folders) if search else composer


def _check_number(swept: Iterable[Override], most: int | None = MAX_JOBS) -> None:
    """Refuse a sweep of no job or of more than ``most``, without expanding it."""
    jobs = 1
    for override in swept:
        if override.is_discrete_sweep():
            n = _number_of_values(override, (most or 0) + 1)
            if n == 0:
                raise UserError(f"{override.input_line} gives no job")
            jobs *= n
    if most is not None and jobs > most:
        raise UserError(f"a sweep may have {most:,} jobs, and this one has more: ask for it in parts")


def _number_of_values(override: Override, most: int) -> int:
    """How many values a discrete sweep has, counted up to ``most``."""
    value = override.value()
    try:
        values = value.range() if isinstance(value, RangeSweep) else override.sweep_string_iterator()
        return sum(1 for _ in islice(values, most))
    except (HydraException, ValueError, ArithmeticError) as error:
        raise UserError(f"{override.input_line}: {_without_details(str(error))}") from None


def quoted(text: str) -> str:
    """``text`` as a quoted value of Hydra's grammar."""
    return QuotedString(text, Quote.single).with_quotes()


def _varied(overrides: Sequence[Override]) -> list[str]:
    return list(dict.fromkeys(o.key_or_group for o in overrides if o.is_sweep_override()))


def _on_error(cfg: DictConfig) -> str:
    allowed, value = ("continue", "stop"), cfg[_ON_ERROR]
    if value not in allowed:
        raise UserError(f"{_ON_ERROR} must be one of {', '.join(allowed)}, got {_text(value)}{nearest(value, allowed)}")
    return str(value)


def _resolved(cfg: Any, prefix: str = "") -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key or prefix)
        if isinstance(error, MissingMandatoryValue):
            raise UserError(f"{key} has no value: write {key}=...") from None
        # Of an error inside a resolver OmegaConf names the class first, and a KeyError is quoted.
        told = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error.msg or error)).strip('"')
        raise UserError(f"{key}: {_without_details(told)}") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@cache
def _own_hydra_node() -> dict[str, Any]:
    """Hydra's node as we wrote it, without what a folder of the user's may add."""
    return _hydra_plain(compose("config", return_hydra_config=True))


def _hydra_plain(cfg: DictConfig) -> dict[str, Any]:
    node = OmegaConf.to_container(cfg.hydra, resolve=False)
    assert isinstance(node, dict)
    node["job"].pop("override_dirname", None)
    return {str(key): value for key, value in node.items() if key not in _HYDRA_OWN_KEYS}


def _not_installed(group: str, name: str) -> str:
    return f"{group}={name} is not installed: pip install 'iwae-cli[{_EXTRAS[name]}]'"


def _targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                yield f"{path}._target_", value
            yield from _targets(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, f"{path}[{index}]")


def _without_details(message: str) -> str:
    """The message of a Hydra or OmegaConf error without the search path and types that follow it."""
    told = takewhile(
        lambda line: not re.match(r"\s*(full_key|object_type|Config search path|Available)", line), message.splitlines()
    )
    return one_line(" ".join(told))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
