"""Evaluate a run: from its weights to ``result.json`` and the per-image arrays; and load its model."""

from __future__ import annotations

import logging
import platform
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import iwae_cli
from iwae_cli.config.build import build, construct
from iwae_cli.core import progress, signals
from iwae_cli.core.device import Device, oom_as_run_failed
from iwae_cli.core.errors import Interrupted, UserError
from iwae_cli.core.files import as_user_error, atomic_path, shown, write_json
from iwae_cli.core.noise import generator
from iwae_cli.evaluation.estimator import Estimator, EstimatorInput
from iwae_cli.evaluation.fused import check_bf16
from iwae_cli.evaluation.likelihood import LogLikelihood, check_refine
from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.objectives.base import Objective
from iwae_cli.record import schema, summary
from iwae_cli.record.first_stage import training_hash
from iwae_cli.record.folder import RunFolder
from iwae_cli.record.identity import changed, estimator_name, evaluation_name, evaluation_precision, sources
from iwae_cli.training import checkpoint
from iwae_cli.training.checkpoint import State

log = logging.getLogger("iwae_cli")

SOURCE = Path(iwae_cli.__file__).parent
"""Folder of the package."""


@oom_as_run_failed()
def evaluate_run(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the checkpoint of a run, keep the result in its ``evaluations/``, print it and return it.

    Args:
        folder: the run folder; nothing else in it is changed.
        config: the configuration of the run, with ``evaluation``, ``device`` and ``data.data_dir`` as asked for now;
            with an ``estimator`` unless L_k is asked for. An estimator with the key ``objective`` holds that node.

    Raises:
        UserError: no run folder, no checkpoint, a checkpoint of another model, missing data, or a folder that cannot
            be written to.
        Interrupted: by a signal.
    """
    run = RunFolder(folder)
    objects = construct(config, ("data", "model", "evaluation", "device"))
    evaluation, device = objects["evaluation"], objects["device"]
    if "estimator" in config:
        if device.resolve().type == "mps":
            raise UserError("estimator=... sums in float64, which mps does not have: write device=cpu")
        if evaluation.precision != "float32":
            raise UserError("estimator=... has no evaluation.precision=bf16: write evaluation.precision=float32")
        estimator = build({k: v for k, v in config["estimator"].items() if k != "objective"}, Estimator, "estimator")
    else:
        check_bf16(evaluation, objects["model"], device)
        check_refine(evaluation, objects["model"])
        estimator = LogLikelihood()
    device.setup()
    state = checkpoint.load(run.checkpoint)
    model = _build(objects["model"], state).to(device=device.resolve(), dtype=device.dtype)
    node = config.get("estimator", {}).get("objective")
    if node is not None:
        asked = build(node, Objective, "objective")
        refusal = asked.check(objects["model"])  # its k is the estimator's, which checks the networks
        if refusal is not None:
            raise UserError(refusal)
    data = objects["data"].load()
    checkpoint.require_data(state.identity, state.data_sha256, data.sha256(), data.name)
    _say_changes(state, config)
    if "estimator" not in config:
        check_refine(evaluation, objects["model"], data)
    subject = EstimatorInput(model, data, evaluation)
    if node is not None:
        subject = replace(subject, objective=lambda k: build({**node, "k": k}, Objective, "objective"))
    with as_user_error(run.path, "an evaluation is kept there, so mend that first"), signals.caught() as caught:
        result = evaluate(run, subject, device, config, state, caught.check, estimator)
    summary.result_table(result, folder=shown(run.evaluation(result["evaluation"]["name"])))
    return result


def load(run_folder: str | Path) -> tuple[LatentVariableModel, dict[str, Any]]:
    """Return the model of a run with its last weights, on the CPU and in evaluation mode, and its configuration.

    Raises:
        UserError: no run folder, no checkpoint, or a checkpoint of another model.
    """
    run = RunFolder(Path(run_folder))
    config = run.config()
    state = checkpoint.load(run.checkpoint)
    return trained(run, config, state, state.weights), config


def trained(
    run: RunFolder, config: Mapping[str, Any], state: State, weights: Mapping[str, torch.Tensor]
) -> LatentVariableModel:
    """Return the model of a run with these weights, see ``load``."""
    model = _build(construct(config, ("model",))["model"], state)
    _put(weights, model, run)
    _say_changes(state, config)
    return model


def _say_changes(state: State, config: Mapping[str, Any]) -> None:
    if what := changed(state.sources, sources(config)):
        progress.announce(f"{what} since this run, whose weights were trained by the code as it was")


def _build(architecture: Architecture, state: State) -> LatentVariableModel:
    """Return the networks with arbitrary weights, which those of a checkpoint replace."""
    pixels = torch.Size(state.image_shape).numel()
    model = architecture.build(state.image_shape, np.full(pixels, 0.5), generator("cpu", 0), state.levels)
    # Weights of a run in float64 would lose half of their digits in a float32 model.
    return model.to(next(iter(state.model.values())).dtype)


def _put(weights: Mapping[str, torch.Tensor], model: LatentVariableModel, run: RunFolder) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        fault = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(f"{run.checkpoint} is a checkpoint of another model: {fault[0].strip()}") from None
    model.eval()


def evaluate(
    run: RunFolder,
    subject: EstimatorInput,
    device: Device,
    config: Mapping[str, Any],
    state: State,
    check: Callable[[], None],
    estimator: Estimator | None = None,
) -> dict[str, Any]:
    """Estimate from a checkpoint; return the result, which is kept in ``evaluations/<name>/`` and read there again.

    Args:
        subject: its model was built for ``state`` and is on its device; its weights are replaced by those asked for.
        config: the resolved configuration, its ``evaluation``, ``device`` and ``estimator`` as asked for now.
        check: called often, by every worker; may raise to stop.
        estimator: what ``config`` names; None is L_k.

    Raises:
        UserError: ``evaluation.weights=best`` without such weights, weights of another model, or a model that the
            estimator is not for.
        OSError: the folder cannot be written to.
    """
    estimator = estimator or LogLikelihood()
    finished = state.step == state.total_steps
    # What is evaluated before the end stays beside what is evaluated later.
    name = evaluation_name(config) + ("" if finished else f"-step{state.step}")
    place = run.evaluation(name)
    best = subject.evaluation.weights == "best"
    step, weights = checkpoint.load_best(run.best, state) if best else (state.step, state.weights)
    kept = _kept(place / "result.json", step, state)
    code = sources({"estimator": config.get("estimator")})
    if (
        kept is not None
        and kept.get("sources", {}) | code == kept.get("sources", code)  # an estimator that was edited estimates again
        and _holds(place / estimator.file, kept.get("arrays"))
        and all((place / name).is_file() for name in kept.get("figures", ()))
    ):
        return kept
    _put(weights, subject.model, run)
    # Before the work, so that a disk that takes nothing is noticed now.
    with suppress(FileExistsError):  # a file in its place is no directory, which the next line says
        place.parent.mkdir()
    place.mkdir(exist_ok=True)
    started = time.monotonic()
    try:
        found = estimator.estimate(subject, check)
    except BaseException:
        # Refused, interrupted, failed: no empty folder stays behind.
        with suppress(OSError):
            place.rmdir()
            place.parent.rmdir()
        raise
    unfinished = f"after step {state.step:,} of {state.total_steps:,}: the training is not finished"
    result = {
        **_facts(subject, device, config, state, step, name),
        "init_from_training": _first_stage(run, config),
        **found.numbers,
        "rows": [list(row) for row in found.rows],
        "notes": [*([] if finished else [unfinished]), *found.notes],
        "arrays": sorted(found.arrays),
        "reasons": dict(found.reasons),
        "seconds": {"train": state.seconds, "evaluate": time.monotonic() - started},
    }
    result["dataset"]["evaluation_sha256"] = dict(found.hashes)
    if found.figures:
        result["figures"] = _draw(place, found.figures, result["reasons"])
    if found.arrays:
        with atomic_path(place / estimator.file) as temporary:
            np.savez(temporary, **found.arrays)  # type: ignore[arg-type]
    write_json(place / "result.json", result)
    return result


def _draw(place: Path, figures: Mapping[str, Callable[[Path], None]], reasons: dict[str, str]) -> list[str]:
    """Draw figures and return the names of those that succeed; ``reasons`` gets why one does not."""
    drawn = []
    again = f"it is drawn again by the same command once {shown(place / 'result.json')} is removed"
    for name, draw in figures.items():
        if (why := not_drawn(partial(draw, place / name), f"{name} is", again)) is None:
            drawn.append(name)
        else:
            reasons["figures"] = why
    return drawn


def not_drawn(draw: Callable[[], None], what: str, again: str) -> str | None:
    """Draw; return why that failed, after a warning: no error of a drawing library takes the numbers away."""
    try:
        draw()
    except Interrupted:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        log.warning("%s missing: %s; %s", what, why, again)
        log.info("how it failed", exc_info=True)
        return why
    return None


def _kept(path: Path, step: int, state: State) -> dict[str, Any] | None:
    """Return the result that exists already, if it is of the same weights and the same state of the run."""
    try:
        kept = schema.read_json(path, schema.Result)
    except UserError as error:
        log.warning("%s; it is evaluated again", error)
        return None
    # A run that was trained further may have the same best weights; other facts of it have changed.
    return kept if kept and kept["evaluation"]["step"] == step and kept["steps"] == state.step else None


def _holds(path: Path, names: Iterable[str] | None) -> bool:
    """Whether a file of arrays is whole and holds those named (None: any, as L_k of 0.2.0); no file for no names."""
    try:
        # Opened here: numpy leaves a file open that is not an archive. Reading compares checksums.
        with path.open("rb") as opened, np.load(opened) as file:
            whole = {name for name in file.files if len(file[name])}
    except FileNotFoundError:
        return names is not None and not list(names)
    except (ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile):
        return False
    return bool(whole) if names is None else whole.issuperset(names)


def _first_stage(run: RunFolder, config: Mapping[str, Any]) -> str | None:
    """Return the hash of the training that a run began from, which may have moved since the run recorded it."""
    recorded = None
    with suppress(UserError):
        recorded = (run.result() or {}).get("init_from_training")
    return config["init_from"] and (recorded or training_hash(config["init_from"]))


def _facts(
    subject: EstimatorInput, device: Device, config: Mapping[str, Any], state: State, step: int, name: str
) -> dict[str, Any]:
    """Return what was evaluated, how, and with what; ``step`` is that of the weights, ``name`` of the evaluation."""
    model, data, evaluation = subject.model, subject.data, subject.evaluation
    first = f"the first {evaluation.images:,}" if evaluation.images and "estimator" not in config else ""
    groups = {key: _described(config[key], state.names[key]) for key in ("model", "objective", "optimizer", "schedule")}
    facts = {
        "status": "finished" if state.step == state.total_steps else "unfinished",
        "identity": state.identity,  # a folder may have been renamed
        "dataset": {
            "name": data.name,
            "protocol": data.protocol + (f"; evaluated: {first} images of each split" if first else ""),
            "sizes": {s: len(getattr(data, s)) for s in ("train", "validation", "test")},
            "image_shape": list(data.image_shape),
            "evaluation_sha256": {},
            **data.facts,
        },
        **groups,
        "seed": config["seed"],
        "trained": config["train"],  # "train" is the name of a split
        "init_from": config["init_from"],
        "epochs": state.step // -(-len(data.train) // config["batch_size"]),
        "steps": state.step,
        "draws": state.draws,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": evaluation.weights,
        "evaluation": {
            "name": name,
            "step": step,
            "k": evaluation.k,
            "seed": evaluation.seed,
            "binarization_seed": evaluation.binarization_seed,
            "precision": evaluation_precision(config),
        },
        "versions": {"iwae-cli": iwae_cli.__version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "hydra-core", "wandb")},
        "device": {
            "kind": device.resolve().type,
            "name": torch.cuda.get_device_name(device.resolve()) if device.resolve().type == "cuda" else None,
            "machine": platform.machine(),
            "precision": device.precision,
            "threads": torch.get_num_threads(),
            "train_compiler": state.plan.get("compiler"),  # None: the plain step
            "train_runs_at_once": state.plan.get("runs_at_once", 1),
        },
        "git": git_state(SOURCE),
        "code": git_state(Path.cwd()),
        "sources": state.sources | sources({"estimator": config.get("estimator")}),
        "data_sha256": state.data_sha256,
    }
    if "estimator" in config:
        del facts["evaluation"]["k"]  # that of L_k
        facts["estimator"] = _described(config["estimator"], estimator_name(config))
    return facts


def _described(node: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"name": name, **{key: value for key, value in node.items() if key != "_target_"}}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of a folder and whether its files were changed since; None outside a git repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if folder == SOURCE:
            # An installed package may lie inside the repository of something else.
            git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", f"--untracked-files={'normal' if folder == SOURCE else 'no'}", "--", ".")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None
