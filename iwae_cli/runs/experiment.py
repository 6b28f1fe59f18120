"""What a run is, and the ways to it: train and evaluate, evaluate again, load into a notebook."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from iwae_cli.config.build import build, construct, try_optimizer
from iwae_cli.core import signals
from iwae_cli.core.device import Device, compiler, oom_as_run_failed
from iwae_cli.core.errors import UserError
from iwae_cli.core.files import RunLock, as_user_error
from iwae_cli.core.noise import generator
from iwae_cli.data.base import Data, Dataset
from iwae_cli.evaluation.estimator import Estimator, EstimatorInput
from iwae_cli.evaluation.fused import check_bf16
from iwae_cli.evaluation.settings import Evaluation
from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.objectives.base import Objective
from iwae_cli.record import summary
from iwae_cli.record.folder import RunFolder
from iwae_cli.record.identity import evaluation_name, training_name
from iwae_cli.record.wandb import WandbLogger, left_to_upload
from iwae_cli.runs.evaluate import estimate, evaluate
from iwae_cli.runs.runner import Runner
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
        """The data that it is run on.

        Raises:
            UserError: they are not there, or not of the shape of what this run begins from.
        """
        data, initial = self.data.load(), self.initial
        if initial is not None and initial.image_shape != data.image_shape:
            raise UserError(
                f"init_from={initial.identity} was trained on {initial.image_shape}, data={self.names['data']} has "
                f"{data.image_shape}"
            )
        return data

    @oom_as_run_failed()
    def run(self) -> dict[str, Any]:
        """Train (or go on, or skip what is done), evaluate, write the result, print it.

        Returns:
            The content of ``result.json``.

        Raises:
            UserError: bad input, found before anything is written, or an ``output_dir`` that cannot be written to.
            RunLocked: another process has this run.
            RunFailed: training diverged, or ``output_dir`` could no longer be written to.
            Interrupted: by a signal; the state has been saved and the same command goes on from there.
        """
        self.check()
        self.device.setup()
        data = self.load()
        folder = self.folder()
        with as_user_error(folder.path, "mend that, or choose another folder with output_dir=..."):
            if self.restart and folder.path.exists():
                with RunLock(folder.path):
                    aside = folder.set_aside()
                log.warning("restart: the old run is kept as %s", aside.name)
            since, sync = _trained_at(folder), left_to_upload(folder.path)
            try:
                folder.path.mkdir(parents=True, exist_ok=True)
                with RunLock(folder.path), logging_to(folder), signals.caught() as caught:
                    result = self._finished(folder)
                    lacking = self._lacking(folder, result, pictures=len(data.image_shape) == 2)
                    if result is None or lacking:
                        result = Runner(self, data, folder, caught).run()
                        sync = self.logger.sync_command()
            except OSError as error:
                # What cannot be written to may still be read.
                result = self._finished(folder)
                if result is None:
                    raise
                log.warning("%s cannot be written to (%s); this is what it holds", folder.path, error.strerror)
        summary.result_table(result, folder=_shown(folder), sync=sync, since=since)
        return result

    def _finished(self, folder: RunFolder) -> dict[str, Any] | None:
        """The result, if the run is finished and was evaluated as it is asked for."""
        result = folder.result()
        asked = evaluation_name(self.config)
        as_asked = result is not None and result["evaluation"]["name"] == asked and folder.status() == "finished"
        return result if as_asked else None

    def _lacking(self, folder: RunFolder, result: dict[str, Any] | None, pictures: bool) -> list[str]:
        """What is to be made again of a finished run, ``result`` being what was asked for; it trains nothing anew.

        Raises:
            UserError: it was trained to its end and is to be evaluated in another way, without a checkpoint.
        """
        there = folder.checkpoint.exists()
        if result is None:
            if not there and (folder.status() == "finished" or folder.result() is not None):
                raise UserError(
                    f"{folder.path} is finished, and for another evaluation it needs its checkpoint.pt, which is gone; "
                    "restart=true trains anew and keeps the old folder under another name"
                )
            return []
        lacking = folder.lacks(pictures)
        if lacking and not there:
            log.warning(
                "gone or damaged: %s; to be made again they need checkpoint.pt, which is gone too "
                "(restart=true trains anew)",
                ", ".join(lacking),
            )
            return []
        if lacking:
            log.warning("made again, since it was gone or damaged: %s", ", ".join(lacking))
        return lacking


@oom_as_run_failed()
def evaluate_run(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the checkpoint of a run once more, and keep the result in its ``evaluations/``; print it.

    Args:
        folder: the run folder; nothing else in it is touched.
        config: the run's configuration, with ``evaluation``, ``device``, ``data.data_dir`` as asked for now; with an
            ``estimator`` if it is not L_k that is asked for, which may hold an ``objective``.

    Returns:
        As ``result.json``.

    Raises:
        UserError: no run folder, no checkpoint, a checkpoint of another model, data that is not there, or a folder
            that cannot be written to.
        Interrupted: by a signal.
    """
    run = RunFolder(folder)
    objects = construct(config, ("data", "model", "evaluation", "device"))
    asked = _estimator(config, objects["model"]) if "estimator" in config else None
    device: Device = objects["device"]
    if device.resolve().type == "mps" and asked is not None:
        raise UserError("estimator=... sums in float64, which mps has not: write device=cpu")
    if asked is None:
        check_bf16(objects["evaluation"], objects["model"], device)
    elif objects["evaluation"].precision != "float32":
        raise UserError("estimator=... has no evaluation.precision=bf16: write evaluation.precision=float32")
    device.setup()
    state = checkpoint.load(run.checkpoint)
    model = _build(objects["model"], state).to(device=device.resolve(), dtype=device.dtype)
    data = objects["data"].load()
    checkpoint.require_data(state, data)
    evaluation: Evaluation = objects["evaluation"]
    with as_user_error(run.path, "an evaluation is kept there, so mend that first"), signals.caught() as caught:
        if asked is None:
            result = evaluate(run, model, data, evaluation, device, config, state, caught.check)
        else:
            estimator, objective = asked
            subject = EstimatorInput(model, data, evaluation, objective)
            result = estimate(run, estimator, subject, device, config, state, caught.check)
    kept = _shown(RunFolder(run.evaluation(result["evaluation"]["name"])))
    if asked is None:
        summary.result_table(result, folder=kept)
    else:
        summary.estimates_table(result, estimator.table(result), estimator.notes(result), folder=kept)
    return result


def _estimator(config: dict[str, Any], model: Architecture) -> tuple[Estimator, Callable[[int], Objective]]:
    """What another estimate than L_k needs: the estimator, and the objective that it asks about, with any k."""
    node = {key: value for key, value in config["estimator"].items() if key != "objective"}
    asked = config["estimator"].get("objective", config["objective"])

    def objective(k: int) -> Objective:
        made: Objective = build({**asked, "k": k}, Objective, "objective")
        return made

    if "objective" in config["estimator"]:
        refusal = build(asked, Objective, "objective").check(model)
        if refusal is not None:
            raise UserError(refusal)
    return build(node, Estimator, "estimator"), objective


def load(run_folder: str | Path) -> tuple[LatentVariableModel, dict[str, Any]]:
    """The model of a run with its last weights, on the CPU and in evaluation mode, and the run's configuration.

    Raises:
        UserError: no run folder, no checkpoint, or a checkpoint of another model.
    """
    run = RunFolder(Path(run_folder))
    config = run.config()
    state = checkpoint.load(run.checkpoint)
    model = _build(construct(config, ("model",))["model"], state)
    try:
        model.load_state_dict(state.model)
    except RuntimeError as error:
        raise UserError(f"{run.checkpoint} is a checkpoint of another model: {checkpoint.first_fault(error)}") from None
    return model.eval(), config


def _build(architecture: Architecture, state: checkpoint.State) -> LatentVariableModel:
    """The networks, for weights that are put in next: neither the mean nor the initial weights matter."""
    pixels = torch.Size(state.image_shape).numel()
    mean = torch.full((pixels,), 0.5).double().numpy()
    model = architecture.build(state.image_shape, mean, generator("cpu", 0), state.levels)
    # Weights of a run in float64 would lose half of their digits in a float32 model.
    return model.to(next(iter(state.model.values())).dtype)


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


def _shown(folder: RunFolder) -> Path:
    """The path as it would be typed here."""
    here = Path.cwd()
    return folder.path.relative_to(here) if folder.path.is_relative_to(here) else folder.path


def _trained_at(folder: RunFolder) -> str | None:
    """The time of day at which the training of a finished run ended; None if there is anything to train."""
    if folder.status() != "finished" or not folder.checkpoint.exists():
        return None
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.checkpoint.stat().st_mtime))


@contextmanager
def logging_to(folder: RunFolder) -> Iterator[None]:
    """Meanwhile everything that is logged goes to ``train.log`` with the time of day, and warnings to the terminal."""
    file = _LogFile(folder.log)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    level = log.level
    log.setLevel(logging.INFO)
    for handler in (file, terminal):
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(level)
        for handler in (file, terminal):
            log.removeHandler(handler)
            with suppress(OSError):
                handler.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: where there is no room for a line of the log, the run itself fails and says so."""
