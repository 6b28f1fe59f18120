"""The evaluation of a run: from weights to the content of ``result.json``."""

from __future__ import annotations

import json
import platform
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import iwae_cli
from iwae_cli.config.build import build, construct
from iwae_cli.core import signals
from iwae_cli.core.device import Device, oom_as_run_failed
from iwae_cli.core.errors import UserError
from iwae_cli.core.files import as_user_error, atomic_path, shown, write_json
from iwae_cli.core.noise import generator
from iwae_cli.core.progress import Progress
from iwae_cli.data.base import Data
from iwae_cli.evaluation.active_units import active_units
from iwae_cli.evaluation.estimator import Estimator, EstimatorInput
from iwae_cli.evaluation.fused import check_bf16
from iwae_cli.evaluation.likelihood import Likelihood, log_likelihood, summarize
from iwae_cli.evaluation.settings import Evaluation
from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.objectives.base import Objective
from iwae_cli.record import summary
from iwae_cli.record.folder import RunFolder
from iwae_cli.record.identity import estimator_name, evaluation_name, evaluation_precision
from iwae_cli.training import checkpoint
from iwae_cli.training.checkpoint import State, first_fault, load_best

ACTIVE_UNITS_DRAWS = 500
AUTHORS_IMAGES = 500


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
    kept = shown(run.evaluation(result["evaluation"]["name"]))
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


def evaluate(
    folder: RunFolder,
    model: LatentVariableModel,
    data: Data,
    evaluation: Evaluation,
    device: Device,
    config: Mapping[str, Any],
    state: State,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Evaluate a checkpoint and keep the result in ``evaluations/<name>/``, or read it there if it was done before.

    Args:
        folder: of the run.
        model: built for ``state``, on its device; its weights are replaced by those asked for.
        data: what the run was trained on.
        evaluation, device: the protocol, and what computes it.
        config: the resolved configuration, its ``evaluation`` and ``device`` as they are asked for now.
        state: the checkpoint.
        check: called often, by every worker; may raise to stop.

    Raises:
        UserError: ``evaluation.weights=best`` and there are none, or weights of another model.
        OSError: the folder cannot be written to.
    """
    place = folder.evaluation(evaluation_name(config))
    step, weights = _weights(folder, evaluation, state)
    kept = _kept(place, step, state)
    if kept is not None and _holds(place / "log_likelihood.npz", _names(evaluation.splits)):
        return kept
    _put(weights, model, folder)
    _make(place)
    started = time.monotonic()
    splits: dict[str, Any] = {}
    likelihoods: dict[str, Likelihood] = {}
    hashes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for split_name in evaluation.splits:
        split = data.evaluation_split(split_name, evaluation.binarization_seed)
        with Progress(f"evaluating {split_name}", total=len(split.x), unit="image") as progress:
            likelihoods[split_name] = log_likelihood(
                model,
                split,
                k=evaluation.k,
                seed=evaluation.seed,
                rows=evaluation.rows,
                workers=evaluation.workers,
                with_jackknife=evaluation.jackknife,
                bf16=evaluation.precision == "bf16",
                check=check,
                on_progress=progress.update,
            )
        hashes[split_name] = split.sha256
        splits[split_name], missing = summarize(likelihoods[split_name], split.x.shape[1])
        reasons |= {f"{split_name}.{key}": reason for key, reason in missing.items()}
    units = _active_units(model, data, evaluation, check)
    reasons |= {key: "active units are not defined for discrete layers" for key in units if units[key] is None}
    result = {
        **_facts(model, data, evaluation, device, config, state, step, hashes),
        **splits,
        **units,
        "reasons": reasons,
        "seconds": {"train": state.seconds, "evaluate": time.monotonic() - started},
    }
    _save_arrays(place / "log_likelihood.npz", likelihoods)
    write_json(place / "result.json", result)
    return result


def estimate(
    folder: RunFolder,
    estimator: Estimator,
    subject: EstimatorInput,
    device: Device,
    config: Mapping[str, Any],
    state: State,
    check: Callable[[], None],
) -> dict[str, Any]:
    """What an ``estimator`` finds of a checkpoint, kept and read again as by ``evaluate``.

    Args:
        folder: of the run.
        estimator: what was asked for.
        subject: its model is built for ``state``; the weights are replaced by those asked for.
        device, config, state, check: as for ``evaluate``; ``config`` has an ``estimator`` too.

    Raises:
        UserError: as ``evaluate``, or the estimator cannot look at such a model.
        OSError: as ``evaluate``.
    """
    place = folder.evaluation(evaluation_name(config))
    step, weights = _weights(folder, subject.evaluation, state)
    kept = _kept(place, step, state)
    if kept is not None and _holds(place / "estimates.npz", kept.get("arrays", ())):
        return kept
    _put(weights, subject.model, folder)
    _make(place)
    started = time.monotonic()
    found = estimator.estimate(subject, check)
    facts = _facts(subject.model, subject.data, subject.evaluation, device, config, state, step, found.hashes)
    del facts["evaluation"]["k"]
    result = {
        **facts,
        "estimator": _described(config["estimator"], estimator_name(config)),
        **found.numbers,
        "arrays": sorted(found.arrays),
        "reasons": found.reasons,
        "seconds": {"train": state.seconds, "evaluate": time.monotonic() - started},
    }
    if found.arrays:
        with atomic_path(place / "estimates.npz") as temporary:
            np.savez(temporary, **found.arrays)  # type: ignore[arg-type]
    write_json(place / "result.json", result)
    return result


def _kept(place: Path, step: int, state: State) -> dict[str, Any] | None:
    """The result that is there already, if it is of the same weights of the same state of the run."""
    try:
        kept: dict[str, Any] = json.loads((place / "result.json").read_text())
        # A run that has gone on since may have the same best weights; all else that is told of it has changed.
        same = kept["evaluation"]["step"] == step and kept["steps"] == state.step
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return kept if same else None


def _holds(path: Path, names: Iterable[str]) -> bool:
    """Whether a file of per-image values is there and whole; one that is to hold none need not be."""
    wanted = set(names)
    try:
        # Opened here: numpy leaves a file open that is no archive. Reading compares checksums.
        with path.open("rb") as opened, np.load(opened) as file:
            return wanted <= {name for name in file.files if len(file[name])}
    except FileNotFoundError:
        return not wanted
    except (ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile):
        return False


def _make(place: Path) -> None:
    """The folder of an evaluation: before the work, so that a disk that takes nothing is told before it."""
    place.parent.mkdir(exist_ok=True)
    place.mkdir(exist_ok=True)


def _put(weights: Mapping[str, torch.Tensor], model: LatentVariableModel, folder: RunFolder) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{folder.path} holds a checkpoint of another model: {first_fault(error)}") from None
    model.eval()


def _facts(
    model: LatentVariableModel,
    data: Data,
    evaluation: Evaluation,
    device: Device,
    config: Mapping[str, Any],
    state: State,
    step: int,
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """What was looked at, how, and with what; ``step`` is that of the weights."""
    return {
        "status": "finished" if state.step == state.total_steps else "unfinished",
        "identity": state.identity,  # a folder may have been renamed
        "dataset": {
            "name": data.name,
            "protocol": data.protocol,
            "sizes": {s: len(getattr(data, s)) for s in ("train", "validation", "test")},
            "image_shape": list(data.image_shape),
            "evaluation_sha256": dict(hashes),
            **data.facts,
        },
        **{key: _described(config[key], state.names[key]) for key in ("model", "objective", "optimizer", "schedule")},
        "seed": config["seed"],
        "trained": config["train"],  # "train" is the name of a split
        "init_from": config["init_from"],
        "epochs": state.step // -(-len(data.train) // config["batch_size"]),
        "steps": state.step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": evaluation.weights,
        "evaluation": {
            "name": evaluation_name(config),
            "step": step,
            "k": evaluation.k,
            "seed": evaluation.seed,
            "binarization_seed": evaluation.binarization_seed,
            "precision": device.precision if "estimator" in config else evaluation_precision(config),
        },
        "versions": {"iwae-cli": iwae_cli.__version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "hydra-core", "wandb")},
        "device": {
            "kind": device.resolve().type,
            "machine": platform.machine(),
            "precision": device.precision,
            "threads": torch.get_num_threads(),
            "train_compiler": state.plan.get("compiler"),  # None: the plain step
            "train_runs_at_once": state.plan.get("runs_at_once", 1),
        },
        "git": _git(),
    }


def _weights(folder: RunFolder, evaluation: Evaluation, state: State) -> tuple[int, Mapping[str, torch.Tensor]]:
    if evaluation.weights == "last":
        return state.step, state.model
    return load_best(folder.best, state)


def _active_units(
    model: LatentVariableModel, data: Data, evaluation: Evaluation, check: Callable[[], None]
) -> dict[str, Any]:
    """Ours on the whole test split; the authors' on their first training images with one draw a layer."""
    rules = {
        "active_units": ("test", None, ACTIVE_UNITS_DRAWS),
        "active_units_authors_rule": ("train", AUTHORS_IMAGES, 1),
    }
    return {
        key: active_units(
            model,
            data.evaluation_split(split, evaluation.binarization_seed, images).x,
            draws=draws,
            seed=evaluation.seed,
            stream=key,
            rows=evaluation.rows,
            workers=evaluation.workers,
            on_progress=lambda _: check(),
        )
        for key, (split, images, draws) in rules.items()
    }


def _described(node: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"name": name, **{key: value for key, value in node.items() if key != "_target_"}}


def _save_arrays(path: Path, likelihoods: Mapping[str, Likelihood]) -> None:
    """Per-image values, float64, in the order of the data set; the test split's names have no prefix."""
    arrays = {name: getattr(likelihoods[split], key) for name, (split, key) in _names(likelihoods).items()}
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)


def _names(splits: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Names of the arrays of ``log_likelihood.npz``, each with its split and what it is."""
    keys = ("log_px", "ess", "khat", "top_weight")
    return {f"{'' if split == 'test' else f'{split}_'}{key}": (split, key) for split in splits for key in keys}


def _git() -> dict[str, Any] | None:
    """Commit of the source this runs from, and whether it was changed since; None for an installed package."""
    source = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=source, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", str(source)))}
    except (OSError, subprocess.SubprocessError):
        return None
