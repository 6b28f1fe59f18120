"""Compose a command line into plain values; the only file that imports hydra and omegaconf.

Hydra composes the choices of the groups once. Values are then set one by one, because only a config without them shows
which keys exist. Every fault is a ``UserError`` of one line, raised before anything happens.
"""

from __future__ import annotations

import copy
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any, Literal

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from iwae_cli.cli.help import choices, conf_folder, own_folder, summary
from iwae_cli.cli.stdio import forgiving
from iwae_cli.config.build import BASES, SEVERAL, convert, nearest, one_line, resolve, show, unknown_key
from iwae_cli.core.errors import UserError
from iwae_cli.record.folder import RunFolder
from iwae_cli.sweeps.jobs import Job, Plan, run_job
from iwae_cli.sweeps.launchers import adapter

ESTIMATOR = "estimator"
"""Group of ``iwae-eval`` alone."""
MAX_JOBS = 10_000
"""Jobs of one sweep at most; each is checked before the first begins, which takes hundredths of a second."""
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


def plan(overrides: Sequence[str], multirun: bool, config_dir: str | None) -> Plan:
    """Return what a command line asks for.

    Raises:
        UserError: anything wrong with it but the values of the keys.
    """
    with _composer(config_dir) as composer:
        parsed = composer.parse(overrides)
        lines = [*composer.search_path, *(str(o.input_line) for o in parsed)]
        base = composer.compose([o for o in parsed if not o.is_sweep_override()])
        stop = convert(base["on_error"], Literal["continue", "stop"], "on_error") == "stop"
        chosen = base.hydra.runtime.choices
        launcher, sweeper = (_resolved(base.hydra[key]) for key in ("launcher", "sweeper"))
        multirun = multirun or base.hydra.mode == RunMode.MULTIRUN
        swept = [o for o in parsed if o.is_sweep_override()]
        if not multirun:
            if swept:
                raise UserError(f"{swept[0].input_line} asks for several runs: add -m (a list is written [1,2])")
            jobs = [_job(base, chosen, parsed)]
            return Plan(jobs, False, [], True, lines, stop, chosen, launcher, sweeper)
        parsed = [*composer.parse([f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]), *parsed]
        is_grid = chosen["hydra/sweeper"] == "basic"
        if sweeper.get("custom_search_space"):
            raise UserError("hydra.sweeper.custom_search_space cannot be used: it would call what it names")
        values = [(o.key_or_group, _values(o, is_grid)) for o in parsed]
        if is_grid and prod(len(found) for _, found in values) > MAX_JOBS:
            raise UserError(f"a sweep may have {MAX_JOBS:,} jobs, and this one has more: ask for it in parts")
        grid = product(*(found for _, found in values))
        jobs = []
        # Of a search, which decides its jobs itself, one is checked.
        for texts in grid if is_grid else [[found[0] for found in dict(values).values()]]:
            of_job = composer.parse(texts)
            cfg = composer.compose(of_job)
            jobs.append(_job(cfg, cfg.hydra.runtime.choices, of_job))
        varied = list(dict.fromkeys(o.key_or_group for o in parsed if o.is_sweep_override()))
        return Plan(jobs, True, varied, is_grid, lines, stop, chosen, launcher, sweeper)


def engine(plan: Plan) -> Callable[[Path, dict[str, str | int]], None]:
    """Return a function that runs the jobs of a sweep by Hydra's sweeper and launcher, given a folder and values."""

    def run(path: Path, further: dict[str, str | int]) -> None:
        values = {"hydra.sweep.dir": str(path), **further}
        fixed = [f"{key}={_quoted(value) if isinstance(value, str) else value}" for key, value in values.items()]
        run_hydra(["--multirun", *plan.overrides, *fixed], _sweep_job)

    return run


def _sweep_job(cfg: DictConfig) -> float | None:
    """Task function of Hydra's launchers: one job of a sweep, perhaps in another process."""
    node = HydraConfig.get()
    chosen = node.runtime.choices
    job = _job(cfg, chosen, OverridesParser.create().parse_overrides(list(node.overrides.task)))
    with forgiving():
        return run_job(job, Path(node.sweep.dir), node.job.num, chosen["hydra/launcher"])


def checked(overrides: Sequence[str], config_dir: str | None) -> list[str]:
    """Return the overrides of one run for Hydra's ``--cfg`` and ``--info``, checked as ``plan`` does."""
    with _composer(config_dir) as composer:
        parsed = [o for o in composer.parse(overrides) if not o.is_sweep_override()]
        composer.compose(parsed)
        return [*composer.search_path, *(str(o.input_line) for o in parsed)]


def evaluation_config(run: Path, overrides: Sequence[str], config_dir: str | None) -> dict[str, Any]:
    """Return the configuration of a run with overrides of ``evaluation``, ``device``, ``data_dir`` and ``data.path``.

    With ``estimator=...`` it holds that node too. An estimator whose yaml has a key ``objective`` gets the objective of
    the run there, with overrides of ``objective``.

    Raises:
        UserError: an override of something else, a wrong one, or ``run`` is no run folder.
    """
    saved = RunFolder(run).config()
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
                raise UserError(f"{override.input_line}: iwae-eval does one evaluation (a list is written [1,2])")
            if not {key, group} & {*allowed}:
                hint = nearest(group, allowed)
                raise UserError(f"{key} cannot be changed after training{hint} (allowed are {', '.join(allowed)})")
            if group == ESTIMATOR and ESTIMATOR not in fresh:
                names = " or ".join(f"{ESTIMATOR}={name}" for name in composer.groups[ESTIMATOR])
                raise UserError(f"{key} belongs to an estimator: write {names} before it")
        config = OmegaConf.create({key: saved[key] for key in ("data", *allowed) if key in saved})
        for group in ("evaluation", "device"):
            # A run of an earlier version lacks keys that are new.
            if config[group].get("_target_") == fresh[group]["_target_"]:
                config[group] = {**fresh[group], **config[group]}
        for override in chosen:
            config[override.key_or_group] = fresh[override.key_or_group]
        composer.set_values(config, [o for o in parsed if o not in chosen])
    changed = _resolved(config)
    if about_objective:
        changed[ESTIMATOR]["objective"] = changed.pop("objective")
    if "data_dir" in saved["data"]:
        changed["data"]["data_dir"] = changed["data_dir"]
    return {**saved, **changed}


def run_hydra(arguments: list[str], task: Callable[[DictConfig], Any] | None = None) -> None:
    """Run Hydra's own main with ``arguments``; exceptions of ``task`` are raised as they are."""

    main = hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")(
        task or (lambda cfg: None)
    )
    before, sys.argv = sys.argv, ["iwae-train", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise SystemExit(UserError.exit_code) from None
    finally:
        sys.argv = before


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
        self.search_path = [] if folder is None else [f"hydra.searchpath=[{_quoted(f'file://{folder}')}]"]
        loader = GlobalHydra.instance().config_loader()
        self._parser = OverridesParser.create(config_loader=loader)
        self.groups = choices([conf_folder(), *([folder] if folder else [])])
        self.groups |= {group: sorted(loader.get_group_options(group)) for group in _ENGINES}
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Return the overrides, each key once."""
        parsed: dict[str, Override] = {}
        for text in overrides:
            try:
                (override,) = self._parser.parse_overrides([text])
                if not override.key_or_group:
                    raise ValueError("no key")
            except (HydraException, ValueError):
                # ValueError also for an integer of thousands of digits.
                raise UserError(f"cannot read {text[:100]!r}: write key=value, quote special characters") from None
            key = override.key_or_group
            if override.package is not None:
                raise UserError(f"{text}: packages cannot be changed, write {key}=...")
            if override.is_delete():
                raise UserError(f"~{key}: nothing can be taken away, choose another value with {key}=...")
            before = parsed.setdefault(key, override)
            # As text: in Python 1, 1.0 and true are equal.
            if before.type != override.type or repr(before.value()) != repr(override.value()):
                raise UserError(f"{before.input_line} and {text} contradict each other: write one of them")
        return list(parsed.values())

    def compose(self, overrides: Sequence[Override]) -> DictConfig:
        """Return the config of one run with Hydra's node; its values are not checked yet."""
        for override in overrides:
            if override.key_or_group.partition(".")[0] == ESTIMATOR:
                asked = override.input_line
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
                why = f"{shlex.join(lines)} cannot be composed: {type(error).__name__}: {one_line(error)}"
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
                raise UserError(f"{key} cannot be changed; runs go to output_dir=..., several runs are asked for by -m")
            try:
                OmegaConf.update(cfg, key, override.value(), force_add=added)
            except (OmegaConfBaseException, AssertionError) as error:
                raise UserError(f"{override.input_line}: {_first_line(error)}") from None

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
                there = f"{group} must be one of {', '.join(summary(names))}, got {show(name)}{nearest(name, names)}"
                raise UserError(_not_installed(group, name) or there)
        return True


def _check_key(key: str, node: Any, added: bool) -> None:
    path = ""
    for part in key.split("."):
        there = node if isinstance(node, dict) else {}
        if part not in there:
            if path and there and added:
                return
            names = [str(name) for name in there if name not in ("_target_", "hydra")]
            raise UserError(unknown_key(key, path, names if path else [*names, "experiment"]))
        node, path = node[part], f"{path}.{part}" if path else part


def _job(cfg: DictConfig, chosen: Mapping[str, Any], overrides: Sequence[Override]) -> Job:
    """Return the plain values of a run, without Hydra's node, with ``WANDB_MODE`` where no logger was typed."""
    # How a sweep treats errors is no part of a run.
    config = _resolved(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in ("hydra", "on_error")]))
    keys = [str(o.key_or_group) for o in overrides]
    mode = os.environ.get("WANDB_MODE")
    if mode and not any(key == "logger" or (key.startswith("logger.") and key.endswith(".mode")) for key in keys):
        for node in (config.get("logger") or {}).values():
            if isinstance(node, dict) and node.get("_target_") == _WANDB:
                node["mode"] = convert(mode, Literal["online", "offline", "disabled"], "WANDB_MODE")
    names = {group: str(chosen[group]) for group in BASES if group in chosen}
    lines = [str(o.input_line) for o in overrides if o.key_or_group != "on_error" and not o.is_hydra_override()]
    return Job(config, names, lines)


def _values(override: Override, is_grid: bool) -> list[str]:
    """Return what the jobs of a sweep have in place of ``override``, as Hydra's basic sweeper writes it."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        if is_grid:
            raise UserError(f"{override.input_line} is a range for a search: add hydra/sweeper=optuna")
        value: Any = override.value()
        return [f"{key}={value.start}"]
    try:
        found = [f"{key}={text}" for text in islice(override.sweep_string_iterator(), MAX_JOBS + 1)]
    except (HydraException, ValueError, ArithmeticError) as error:
        raise UserError(f"{override.input_line}: {_first_line(error)}") from None
    if not found:
        raise UserError(f"{override.input_line} gives no job")
    return found


def _check_hydra(node: DictConfig) -> None:
    """Refuse a preset that would have Hydra run foreign code or write files: Hydra builds objects from its own node."""
    plain: Any = OmegaConf.to_container(node, resolve=False)
    for key, value in _FIXED.items():
        first, _, rest = key.partition(".")
        if (plain[first][rest] if rest else plain[first]) != value:
            raise UserError(f"hydra.{key} cannot be changed (open are hydra.launcher and hydra.sweeper)")
    nodes: list[tuple[str, Any]] = [(f"hydra.{key}", _resolved(node[key])) for key in ("launcher", "sweeper")]
    for path, value in nodes:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        nodes += [(f"{path}.{key}", inner) for key, inner in items]  # extends the list that is walked
        if path.endswith("._target_"):
            resolve(value, object, path, _ENGINE_PACKAGES)


def _resolved(cfg: Any) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        is_missing = isinstance(error, MissingMandatoryValue)
        why = f" has no value: write {error.full_key}=..." if is_missing else f": {_first_line(error)}"
        raise UserError(f"{error.full_key}{why}") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _not_installed(group: str, name: Any) -> str | None:
    """Return the message about a launcher or sweeper that an extra brings; None for anything else."""
    if group not in _ENGINES or not isinstance(name, str):
        return None
    extra = adapter(name).extra if group == "hydra/launcher" else {"optuna": "optuna"}.get(name)
    return extra and f"{group}={name} is not installed: pip install 'iwae-cli[{extra}]'"


def _quoted(text: str) -> str:
    """Return ``text`` as a quoted value of Hydra's grammar."""
    return QuotedString(text, Quote.single).with_quotes()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
