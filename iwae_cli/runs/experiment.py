"""What a run is, and the ways to it: train and evaluate, evaluate again, load into a notebook."""

from __future__ import annotations

import json
import logging
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from iwae_cli.config.build import try_optimizer
from iwae_cli.core.device import Device, compiler
from iwae_cli.core.errors import UserError
from iwae_cli.data.base import Data, Dataset
from iwae_cli.evaluation.fused import check_bf16
from iwae_cli.evaluation.settings import Evaluation
from iwae_cli.models.base import Architecture
from iwae_cli.objectives.base import Objective
from iwae_cli.record.folder import RunFolder
from iwae_cli.record.identity import training_name
from iwae_cli.record.wandb import WandbLogger
from iwae_cli.training import checkpoint
from iwae_cli.training.schedule import Schedule
from iwae_cli.training.settings import Training

log = logging.getLogger("iwae_cli")

MAX_DRAWS = 10_000_000
"""Draws of q in one step; each takes some kilobytes of memory."""


class Experiment:
    """One training and its evaluation.

    Args:
        data, model, objective, optimizer, schedule, evaluation, device, logger: what the groups of the configuration
            name; ``optimizer`` still wants its parameters.
        seed: of the weights, the order of the images and the training noise.
        batch_size: images a step.
        data_dir: where files of data sets lie (used by ``data``; recorded).
        output_dir: where run folders go; made if need be.
        init_from: a run folder whose last weights this run begins from, instead of random ones.
        with_optimizer: begin from its optimizer's memory too (Adam's moments), as the authors did for Table 2.
        train: ``all``, or ``inference`` to train the inference network with the generative network frozen, so that two
            generative networks can be compared under equally good posteriors.
        training: how a step goes back through its draws.
        restart: set an existing folder of this run aside and begin again.
        config: the resolved configuration, plain dicts, lists and scalars.
        names: chosen name of every group, for the name of the folder.
        overrides: the command line, for the record.
        group: name of the sweep, if any.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        data: Dataset,
        model: Architecture,
        objective: Objective,
        optimizer: partial[torch.optim.Optimizer],
        schedule: Schedule,
        evaluation: Evaluation,
        device: Device,
        logger: WandbLogger,
        seed: int,
        batch_size: int,
        data_dir: str,
        output_dir: str,
        init_from: str | None,
        with_optimizer: bool,
        train: Literal["all", "inference"],
        training: Training,
        restart: bool,
        config: dict[str, Any],
        names: dict[str, str],
        overrides: list[str],
        group: str | None = None,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if batch_size * objective.num_samples > MAX_DRAWS:
            raise ValueError(
                f"batch_size={batch_size:,} with {objective.num_samples:,} draws for each image (objective.k) is more "
                f"than the {MAX_DRAWS:,} draws that a step may have"
            )
        for name, folder in (("output_dir", output_dir), ("init_from", init_from)):
            if folder == "":
                raise ValueError(f"{name} must name a folder, got ''")
        if with_optimizer and (init_from is None or train == "inference"):
            raise ValueError("with_optimizer has a meaning with init_from=RUN_FOLDER and train=all only")
        if train == "inference" and init_from is None:
            raise ValueError("train=inference needs init_from=RUN_FOLDER: the run whose generative network is kept")
        self.data = data
        self.model = model
        self.objective = objective
        self.optimizer = optimizer
        self.schedule = schedule
        self.evaluation = evaluation
        self.device = device
        self.logger = logger
        self.seed = seed
        self.batch_size = batch_size
        self.output_dir = Path(output_dir).absolute()
        self.with_optimizer = with_optimizer
        self.train = train
        self.training = training
        self.restart = restart
        self.source = None if init_from is None else RunFolder(Path(init_from))
        self.config = _with_absolute_paths(config)
        self.names = names
        self.overrides = overrides
        self.group = group

    def check(self) -> None:
        """Refuse what cannot be, before any work.

        Raises:
            UserError: data, model and objective that do not go together, or a device that is not there.
        """
        if self.data.observation != self.model.observation:
            right = {
                "real": "model=linear_gaussian",
                "binary": "model=one_layer or model=two_layer, with model.likelihood=bernoulli",
                "grey": "model=one_layer, two_layer or conv with model.likelihood=discretized_logistic",
            }
            if self.model.observation == "grey":
                right["binary"] += ", or data.binarization=none"
            raise UserError(
                f"data={self.names['data']} holds {self.data.observation} observations and model="
                f"{self.names['model']} is for {self.model.observation} ones; "
                f"with this data use {right[self.data.observation]}"
            )
        refusal = self.objective.check(self.model) or self.training.check(self.objective)
        if refusal is not None:
            raise UserError(refusal)
        on_cpu = self.device.resolve().type == "cpu"
        try_optimizer(self.optimizer.func, self.optimizer.keywords, "optimizer", on_cpu)
        check_bf16(self.evaluation, self.model, self.device)
        if self.device.compile == "on" and compiler() is None:
            raise UserError("device.compile=on needs a C++ compiler, g++ or what CXX names: write device.compile=auto")
        if self.source is not None:
            try:
                source, initial = self.source.config(), self.initial
            except UserError as error:
                raise UserError(f"init_from: {error}") from error
            groups = ("model", "optimizer") if self.with_optimizer else ("model",)
            for group in groups:
                mine, theirs = self.config[group], source[group]
                if mine != theirs if group == "model" else mine["_target_"] != theirs.get("_target_"):
                    differences = _differences(group, theirs, mine)
                    raise UserError(f"init_from={self.source.path} was run with another {group}: {differences}")
            if initial is not None and initial.step < initial.total_steps:
                raise UserError(
                    f"init_from={self.source.path} is not finished (step {initial.step:,} of {initial.total_steps:,}); "
                    "finish it first: its command again goes on"
                )

    @cached_property
    def initial(self) -> checkpoint.State | None:
        """The checkpoint this run begins from, if any; read once, so that what is hashed is what is used."""
        return None if self.source is None else checkpoint.load(self.source.checkpoint)

    def identity(self) -> str:
        """Name of the run folder."""
        initial = self.initial
        prints = {
            "data": self.data.fingerprint(),
            "init_from": None if initial is None else checkpoint.fingerprint(initial, self.with_optimizer),
        }
        known = {key: value for key, value in prints.items() if value is not None}
        return training_name(self.config, self.names, self.objective.num_samples, known)

    def folder(self) -> RunFolder:
        """Where the run goes, or lies."""
        return RunFolder(self.output_dir / self.identity())

    def load(self) -> Data:
        """Return the data, after checking that model and objective go with them.

        Raises:
            UserError: they are not there, not of the shape of what this run begins from, or of one that the model
                refuses; or the objective cannot train these networks.
        """
        data, initial = self.data.load(), self.initial
        if initial is not None and initial.image_shape != data.image_shape:
            raise UserError(
                f"init_from={initial.identity} was trained on {initial.image_shape}, data={self.names['data']} has "
                f"{data.image_shape}"
            )
        model = self.model.outline(data.image_shape, data.levels)
        refusal = self.objective.check_networks(model)
        if refusal is None and self.train == "inference" and model.shared:
            refusal = f"train=inference keeps p, but p and q of this model share parameters ({model.shared[0]})"
        if refusal is not None:
            raise UserError(refusal)
        return data


def _differences(group: str, there: dict[str, Any], here: dict[str, Any]) -> str:
    """Which keys of a group are not the same in two runs."""

    def shown(node: dict[str, Any], key: str) -> str:
        return json.dumps(node[key], separators=(",", ":")).replace('"', "") if key in node else "nothing"

    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return "; ".join(f"{group}.{key}={shown(there, key)} there, {shown(here, key)} here" for key in keys)


def _with_absolute_paths(config: dict[str, Any]) -> dict[str, Any]:
    """What is recorded must mean the same from any folder; identity does not look at paths."""
    config = {**config, "data": dict(config["data"])}
    for node, keys in ((config, ("data_dir", "output_dir", "init_from")), (config["data"], ("data_dir", "path"))):
        node.update({key: str(Path(node[key]).absolute()) for key in keys if node.get(key) is not None})
    return config
