"""The settings of one run: checked, and the folder that belongs to them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch

from iwae_cli.config.build import build, literals
from iwae_cli.config.optimizer import try_optimizer
from iwae_cli.core.device import Device, compiler
from iwae_cli.core.errors import UserError, check_range
from iwae_cli.core.files import absolute
from iwae_cli.data.base import Data, Dataset
from iwae_cli.data.files import DOWNLOADS
from iwae_cli.evaluation.fused import check_bf16
from iwae_cli.evaluation.likelihood import check_refine
from iwae_cli.evaluation.settings import Evaluation
from iwae_cli.models.base import Architecture
from iwae_cli.objectives.base import Objective
from iwae_cli.record.folder import RunFolder, folder_ending, folders_recording
from iwae_cli.record.former import MARK
from iwae_cli.record.identity import (
    one_spelling,
    path_keys,
    paths_fingerprint,
    recorded_as,
    training_name,
    unused,
    words,
)
from iwae_cli.record.loggers import Logger
from iwae_cli.training import checkpoint
from iwae_cli.training.check import check_outside
from iwae_cli.training.schedule import Schedule
from iwae_cli.training.settings import Training, Validation

MAX_DRAWS = 10_000_000
"""Draws of q in one step; each takes some kilobytes of memory."""

MODELS_FOR = {
    "real": "model.likelihood=gaussian with model=one_layer, two_layer or conv, or model=linear_gaussian",
    "binary": "model=one_layer or model=two_layer, with model.likelihood=bernoulli",
    "grey": "model=one_layer, two_layer or conv with model.likelihood=discretized_logistic",
}
"""What to type for data of each kind of observation."""


_hashes: dict[str, str] = {}


@dataclass(frozen=True)
class Experiment:
    """One training and its evaluation; ``conf/config.yaml`` describes its settings.

    Attributes:
        data, model, objective, optimizer, schedule, validation, evaluation, device, loggers: the objects of the groups;
            ``optimizer`` lacks its parameters.
        data_dir: used by ``data``; here for the record.
        with_optimizer: Adam's moments too, as the authors did for Table 2.
        train: with ``inference`` two generative networks can be compared under equally good posteriors.
        config: the resolved configuration, plain dicts, lists and scalars, its paths absolute.
        names: chosen name of every group, for messages and the record.
        overrides: the command line, for the record.
        group: name of the sweep, if any.

    Raises:
        ValueError: a number out of range, or settings that contradict each other.
    """

    data: Dataset
    model: Architecture
    objective: Objective
    optimizer: partial[torch.optim.Optimizer]
    schedule: Schedule
    validation: Validation
    evaluation: Evaluation
    device: Device
    loggers: tuple[Logger, ...]
    seed: int
    batch_size: int
    data_dir: str
    output_dir: str
    init_from: str | None
    with_optimizer: bool
    train: Literal["all", "inference"]
    training: Training
    restart: bool
    config: dict[str, Any]
    names: dict[str, str]
    overrides: list[str]
    group: str | None = None

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0)
        check_range("batch_size", self.batch_size, 1)
        if self.batch_size * self.objective.num_samples > MAX_DRAWS:
            raise ValueError(
                f"batch_size={self.batch_size:,} with {self.objective.num_samples:,} draws for each image "
                f"(objective.k) is more than the {MAX_DRAWS:,} draws that a step may have"
            )
        for name in ("output_dir", "init_from"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must name a folder, got ''")
        if self.with_optimizer and (self.init_from is None or self.train == "inference"):
            raise ValueError("with_optimizer has a meaning with init_from=RUN_FOLDER and train=all only")
        if self.train == "inference" and self.init_from is None:
            raise ValueError("train=inference needs init_from=RUN_FOLDER: the run whose generative network is kept")
        object.__setattr__(self, "output_dir", absolute(self.output_dir, "output_dir"))
        object.__setattr__(self, "config", _with_absolute_paths(self.config))

    def check(self) -> None:
        """Refuse what cannot run, before any work.

        Raises:
            UserError: data, model, objective, optimizer, device or ``init_from`` that do not go together.
        """
        holds, wants = self.data.observation, self.model.observation
        if holds != wants:
            other = {"binary": "dynamic", "grey": "none"}.get(wants)
            # Of two levels, or without the key, there is no choice.
            may = (
                other and "binarization" in self.config["data"] and getattr(self.data, "levels", None) not in (2, None)
            )
            way = f", or data.binarization={other}" if may else ""
            raise UserError(
                f"data={self.names['data']} holds {holds} observations and model={self.names['model']} is for {wants} "
                f"ones; with this data use {MODELS_FOR[holds]}{way}"
            )
        refusal = self.objective.check(self.model) or self.training.check(self.objective)
        if refusal is not None:
            raise UserError(refusal)
        if self.schedule.patience is not None and self.evaluation.weights == "last":
            raise UserError(
                "schedule.patience ends a training after its best weights: write evaluation.weights=best, "
                "or schedule.patience=null"
            )
        on_cpu = self.device.resolve().type == "cpu"
        try_optimizer(self.optimizer.func, self.optimizer.keywords, "optimizer", on_cpu)
        check_bf16(self.evaluation, self.model, self.device)
        check_refine(self.evaluation, self.model)
        if self.device.compile == "on" and compiler() is None:
            raise UserError("device.compile=on needs a C++ compiler, g++ or what CXX names: write device.compile=auto")
        if self.init_from is not None:
            self._check_source(RunFolder(Path(self.init_from)))

    def _check_source(self, source: RunFolder) -> None:
        try:
            config, initial = source.config(), self.initial
        except UserError as error:
            raise UserError(f"init_from: {error}") from error
        for group in ("model", "optimizer") if self.with_optimizer else ("model",):
            nodes = (self.config[group], config[group])
            here, there = (one_spelling({k: v for k, v in n.items() if k not in unused(n)}) for n in nodes)
            if here != there if group == "model" else here["_target_"] != there.get("_target_"):
                raise UserError(
                    f"init_from={source.path} was run with another {group}: {_differences(group, there, here)}"
                )
            if group == "optimizer" and initial is not None and (lacking := self._lacking(initial)):
                raise UserError(
                    f"with_optimizer=true: the optimizer of init_from={source.path} kept no {', '.join(lacking)}: "
                    f"write with_optimizer=false, or what that run had ({_differences(group, there, here)})"
                )
        if initial is not None and initial.step < initial.total_steps:
            raise UserError(
                f"init_from={source.path} is not finished (step {initial.step:,} of {initial.total_steps:,}); "
                "finish it first: its command resumes it"
            )

    def _lacking(self, initial: checkpoint.State) -> list[str]:
        """Return what the optimizer keeps of a parameter (its moments) and that of ``initial`` did not."""
        parameter = torch.nn.Parameter(torch.zeros(1, 1))
        parameter.grad = torch.zeros_like(parameter)
        optimizer = self.optimizer([parameter])
        with suppress(AssertionError):  # what capturable requires of the device
            optimizer.step()
        kept = {name for values in initial.optimizer["state"].values() for name in values}
        return sorted(optimizer.state[parameter].keys() - kept) if kept else []

    @cached_property
    def initial(self) -> checkpoint.State | None:
        """The checkpoint that this run starts from, if any; read once, so that what is hashed is what is used."""
        return None if self.init_from is None else checkpoint.load(RunFolder(Path(self.init_from)).checkpoint)

    def identity(self) -> str:
        """Return the name of the training: what can be read from its objects, and a hash of what decides its weights.

        Raises:
            UserError: a file whose content belongs to it is missing.
        """
        return self._named(self._fingerprint)

    @cached_property
    def _fingerprint(self) -> str | None:
        return self.data.fingerprint() or paths_fingerprint(self.config["data"], self.config["data_dir"])

    def _named(self, data: str | None, **groups: Any) -> str:
        """Return the name of the training on data with this fingerprint, with these nodes instead of its own."""
        fingerprints = {"data": data}
        if self.initial is not None:
            fingerprints["init_from"] = checkpoint.fingerprint(self.initial, self.with_optimizer)
        known = {key: value for key, value in fingerprints.items() if value is not None}
        model = "_".join([words(type(self.model).__name__), *map(str, self._sizes()), *self._choices()])
        gradient = getattr(self.objective, "gradient", "total")
        objective = words(type(self.objective).__name__) + ("" if gradient in ("total", "score") else f"_{gradient}")
        data = f"{self.data.name}_first{self.data.limit}" if self.data.limit else self.data.name
        parts = (data, model, objective, f"k{self.objective.num_samples}", f"seed{self.seed}")
        return training_name(parts, {**self.config, **groups}, known)

    def shorter(self) -> list[tuple[int, RunFolder]]:
        """Return the runs of this training with another schedule that is the beginning of this one, longest first.

        Each with its number of passes. They are known by the hash: a version, or a user, may name a folder otherwise.
        """
        found = []
        digests: dict[str, str] = {}  # by the schedule
        for file in Path(self.output_dir).glob("*/config.yaml"):
            with suppress(UserError, OSError, KeyError, TypeError, UnicodeDecodeError):
                if f"\nseed: {self.seed}\n" not in file.read_text():
                    continue  # reading is quick, parsing hundreds of runs is not
                (node, theirs), mine = _schedule(file.parent, file.stat().st_mtime_ns), self.schedule
                begins = (
                    theirs.patience is None is mine.patience
                    and theirs.passes < mine.passes
                    and all(theirs.factor(number) == mine.factor(number) for number in range(theirs.passes))
                )
                if not begins:
                    continue
                text = json.dumps(node, sort_keys=True)
                if text not in digests:
                    digests[text] = self._named(self._fingerprint, schedule=node).rpartition("-")[2]
                if digests[text] == file.parent.name.rpartition("-")[2]:
                    found.append((theirs.passes, RunFolder(file.parent)))
        return sorted(found, key=lambda pair: -pair[0])

    def _sizes(self) -> list[int]:
        """Return the first argument of the model that is a size or a list of sizes, such as ``latent_sizes``."""
        for name in inspect.signature(type(self.model)).parameters:
            value = self.config["model"].get(name)
            sizes = value if isinstance(value, list) else [value]
            if sizes and all(type(size) is int for size in sizes):
                return sizes
        return []

    def _choices(self) -> list[str]:
        """Return the choices and classes among the model's arguments that are no defaults, such as the family of q."""
        chosen = []
        hints = get_type_hints(type(self.model).__init__)
        for name, parameter in inspect.signature(type(self.model)).parameters.items():
            value = self.config["model"].get(name)
            if isinstance(value, Mapping) and "_target_" in value:
                chosen.append(words(str(value["_target_"]).rpartition(".")[2]))
            elif value != parameter.default and value in literals(hints.get(name)):
                chosen.append(value)  # no other text, which may be a path or a secret
        return chosen

    def folder(self) -> RunFolder:
        """Return the folder of this training: an existing one under any readable name, or the place of a new one.

        It is found by the hash that ends its name. Where there is no hash to compare, the recorded configuration
        decides: without the file that ``data.path`` names a finished run still has its result, and version 0.2.0
        hashed the same training otherwise.

        Raises:
            UserError: a file that belongs to the identity is missing and no finished run was made with it, or version
                0.2.0 has begun this training and not finished it.
        """
        output_dir = Path(self.output_dir)
        try:
            place = output_dir / self.identity()
        except UserError:
            finished = self._recorded(f"\nseed: {self.seed}\n", finished=True)
            if finished is None:
                raise
            return finished
        existing = folder_ending(output_dir, place.name.rpartition("-")[2], first=place.name)
        if existing is None and not self.restart and self._fingerprint and self.data.fingerprint() is None:
            # Versions before 0.5 did not hash the files of a class from outside; their content is compared later.
            unhashed = self._named(None)
            known = folder_ending(output_dir, unhashed.rpartition("-")[2], first=unhashed)
            existing = known if known and recorded_as(known.config()) == recorded_as(self.config) else None
        former = None if existing or self.restart else self._recorded(MARK, finished=False)
        if former is not None and former.result() is None:
            raise UserError(
                f"{former.path} is this training, begun by iwae-cli 0.2.0 and not finished: finish it with that "
                "version, or write restart=true to train it here from the beginning"
            )
        return existing or former or RunFolder(place)

    def _recorded(self, text: str, finished: bool) -> RunFolder | None:
        """Return a run that recorded this training, among those whose config.yaml holds ``text``."""
        for run in folders_recording(Path(self.output_dir), text):
            try:
                if recorded_as(run.config()) == recorded_as(self.config) and not (finished and run.result() is None):
                    return run
            except (UserError, KeyError, TypeError, AttributeError):
                continue  # damaged
        return None

    def data_sha256(self) -> str:
        """Return the hash of the data; nothing is downloaded. The jobs of one sweep that share data compute it once."""
        key = f"{self.group} {json.dumps(self.config['data'], sort_keys=True)}"
        if key not in _hashes or self.group is None:
            downloads = DOWNLOADS.set(False)
            try:
                _hashes[key] = self.data.load().sha256()
            finally:
                DOWNLOADS.reset(downloads)
        return _hashes[key]

    def load(self) -> Data:
        """Return the data, after checking that model and objective go with them.

        Raises:
            UserError: they are missing, their shape is not that of the run this one starts from or is refused by the
                model, the objective cannot train these networks, a class from outside fails its check, or fewer images
                than ``evaluation`` asks for.
        """
        data = self.data.load()
        self.check_with(data)
        return data

    def check_with(self, data: Data) -> None:
        """Refuse data that model, objective or evaluation do not go with; see ``load``."""
        initial = self.initial
        if initial is not None and initial.image_shape != data.image_shape:
            raise UserError(
                f"init_from={initial.identity} was trained on {initial.image_shape}, data={self.names['data']} has "
                f"{data.image_shape}"
            )
        check_refine(self.evaluation, self.model, data)
        model = check_outside(self.objective, self.model, data)
        refusal = self.objective.check_networks(model)
        if refusal is None and self.train == "inference" and model.shared:
            refusal = "train=inference keeps p, but p and q of this model share parameters: write train=all"
        if refusal is not None:
            raise UserError(refusal)


@lru_cache(maxsize=10_000)
def _schedule(run: Path, changed: int) -> tuple[Any, Schedule]:
    # Cached for the jobs of a sweep.
    node = RunFolder(run).config()["schedule"]
    return node, build(node, Schedule, "schedule")


def _differences(group: str, there: dict[str, Any], here: dict[str, Any]) -> str:
    """Return the keys of a group that differ between two runs; a key left out holds its default."""

    def shown(node: dict[str, Any], key: str) -> str:
        return json.dumps(node[key], separators=(",", ":")).replace('"', "") if key in node else "the default"

    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return "; ".join(f"{group}.{key}={shown(there, key)} there, {shown(here, key)} here" for key in keys)


def _with_absolute_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Return a record that means the same from any folder."""

    def placed(value: Any, key: str) -> Any:
        if isinstance(value, list):
            return [placed(inner, key) for inner in value]
        return absolute(value, key) if isinstance(value, str) and value else value

    config = {**config, "data": dict(config["data"])}
    for node, keys in ((config, ("data_dir", "output_dir", "init_from")), (config["data"], path_keys(config["data"]))):
        node.update({key: placed(node[key], key) for key in keys if key in node})
    return config
