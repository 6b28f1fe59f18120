"""Run folders read back: what is finished, and of all the rest why it is not in a table. Changes nothing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from iwae_cli.core.errors import UserError
from iwae_cli.record.folder import RunFolder
from iwae_cli.record.identity import training_config

MARKS = ("status.json", "result.json", "checkpoint.pt", "metrics.jsonl", "train.log", ".lock")
"""A folder that has one of these is a run folder, whole or not."""
SWEEP = "sweep.json"
"""What a sweep folder knows of its jobs: ``jobs``, each with ``identity`` or ``folder``, ``status``, ``error``."""
GROUPS = ("model", "objective", "optimizer", "schedule")
"""Groups of which a result says what was chosen."""
SET_ASIDE = re.compile(r"\.old-\d+$")
NUMBERS = ("stderr_images", "stderr_mc", "bias_mc")


@dataclass(frozen=True)
class Score:
    """One evaluation of one run by L_k.

    Attributes:
        name: what the evaluation is called in ``evaluations/``.
        k: samples per image.
        weights: ``last`` or ``best``.
        precision: of the weights.
        sha256: hash of the images by split.
        splits: numbers by split, nats, as in ``result.json``; None stands for what could not be had.
        reasons: why, by ``"<split>.<name>"``.
        active_units: one number a layer, nearest to x first; None where they are not defined.
        arrays: the file of per-image values.
    """

    name: str
    k: int
    weights: str
    precision: str
    sha256: Mapping[str, str]
    splits: Mapping[str, Mapping[str, Any]]
    reasons: Mapping[str, str]
    active_units: tuple[int, ...] | None
    arrays: Path


@dataclass(frozen=True)
class LeftOut:
    """A run that no table has.

    Attributes:
        path: its folder; of a job that never began, where it would be.
        state: one or two words, such as ``interrupted``, ``failed``, ``damaged``, ``not comparable``.
        why: one line.
    """

    path: Path
    state: str
    why: str


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder.
        config: as resolved.
        result: ``result.json``.
        scores: its evaluations by L_k, that of ``result.json`` first.
    """

    path: Path
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    scores: tuple[Score, ...]

    @property
    def identity(self) -> str:
        """Name of the training."""
        return str(self.result["identity"])

    @property
    def dataset(self) -> str:
        """Name of the data, which says how they are binarized."""
        return str(self.result["dataset"]["name"])

    @property
    def seed(self) -> int:
        """Of the training."""
        return int(self.config["seed"])

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Every dotted key of the configuration, and what was typed for a group: ``schedule`` is ``burda``.

        The class is ``schedule._target_``. Of the data the name says how they are binarized.
        """
        flat = _flat(self.config)
        flat["data"] = self.dataset
        for group in GROUPS:
            # Older results know the class alone of an optimizer and a schedule.
            named = group in self.result or group in ("model", "objective")
            flat[group] = str(self.result[group]["name"]) if named else class_name(flat[f"{group}._target_"])
        flat.setdefault("training.backward", "all")  # older runs had no other way
        flat["init_from"] = _ancestor(self.config.get("init_from"))
        flat["init_from.training"] = _training_of(self.config.get("init_from"))
        return flat

    @cached_property
    def training(self) -> dict[str, Any]:
        """Of ``keys``, what decides the weights at the end of the training, but for the seed.

        Two runs that agree in it differ by their seed alone.
        """
        decides = training_config(self.config, {})
        for key in ("seed", "precision", "fingerprints"):
            del decides[key]
        names = {*_flat(decides), *GROUPS, "init_from", "init_from.training", "device.precision"}
        return {key: value for key, value in self.keys.items() if key in names}


@dataclass
class Found:
    """What some paths hold.

    Attributes:
        runs: those that are finished, in the order of their paths.
        left_out: the others.
        notes: what should be known of runs that count, one line each.
        sweep: the sweep folder, if one was asked for and nothing else.
    """

    runs: list[Run] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sweep: Path | None = None


def read(paths: Sequence[str | Path]) -> Found:
    """Everything that lies in ``paths``: run folders, sweep folders, or folders that hold some at any depth.

    Raises:
        UserError: a path is not there, or there is not a single run in any of them.
    """
    found = Found()
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            what = "is a file" if path.exists() else "is not there"
            raise UserError(f"{path} {what}; name a folder of runs, such as outputs")
        if len(paths) == 1 and (path / SWEEP).is_file():
            found.sweep = path
        for folder in _walk(path, found, set()):
            folders.setdefault(folder)
    for folder in sorted(folders):
        _read_one(folder, found)
    _once_each(found)
    if not found.runs and not found.left_out:
        raise UserError(f"no run in {', '.join(map(str, paths))}; iwae-train writes them into output_dir=")
    return found


def _walk(path: Path, found: Found, seen: set[Path]) -> Iterator[Path]:
    """Run folders in ``path``; nothing is looked for inside of one."""
    place = path.resolve()
    if place in seen:
        return
    seen.add(place)
    try:
        entries = {entry.name: entry for entry in os.scandir(path)}
    except OSError as error:
        found.left_out.append(LeftOut(path, "damaged", f"cannot be read: {error.strerror}"))
        return
    if SWEEP in entries:
        yield from _jobs(path, found)
    elif any(mark in entries for mark in MARKS):
        yield place
    else:
        for name in sorted(entries):
            if entries[name].is_dir() and not name.startswith("."):
                yield from _walk(path / name, found, seen)


def _jobs(sweep: Path, found: Found) -> Iterator[Path]:
    """Run folders of a sweep's jobs; those that never began are put down as left out."""
    try:
        jobs = json.loads((sweep / SWEEP).read_text())["jobs"]
        for job in jobs:
            names = [Path(str(job[key])) for key in ("folder", "identity") if job.get(key)]
            places = [base / name for name in names for base in (Path(), sweep, sweep.parent.parent)]
            place = next((p for p in places if p.is_dir() and any((p / mark).exists() for mark in MARKS)), None)
            if place is not None:
                yield place.resolve()
                continue
            wanted = sweep.parent.parent / names[-1] if names else sweep
            line = job.get("overrides") or []
            asked = line if isinstance(line, str) else " ".join(map(str, line))
            state = str(job.get("status") or "not begun")
            state, why = ("gone", "its run folder is not there") if state == "finished" else (state, job.get("error"))
            which = f"job of sweep {sweep.name}" + (f" ({asked})" if asked else "")
            why = why or "has no run folder; the command of the sweep starts it"
            found.left_out.append(LeftOut(wanted, state, f"{which}: {why}"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found.left_out.append(LeftOut(sweep, "damaged", f"{SWEEP} cannot be read: {_said(error)}"))


def _read_one(path: Path, found: Found) -> None:
    folder = RunFolder(path)
    try:
        if SET_ASIDE.search(path.name):
            found.left_out.append(LeftOut(path, "set aside", "by restart=true; the run that took its place counts"))
            return
        result = folder.result()
        if result is None:
            found.left_out.append(_unfinished(folder))
            return
        config = folder.config()
        score = _score(result, path / "log_likelihood.npz")
        run = Run(path, config, result, (score, *_others(folder, result, score, found)))
        assert run.keys and run.training  # whatever they lack is found here
        status = _status(folder).get("status")
        if status != "finished":
            what = {"running": "being evaluated anew", None: "without status.json"}.get(status, f"{status} since")
            found.notes.append(f"{run.identity} is {what}; its last result counts")
        found.runs.append(run)
    except UserError as error:
        found.left_out.append(LeftOut(path, "damaged", str(error).replace(f"{path}{os.sep}", "")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found.left_out.append(LeftOut(path, "damaged", _said(error)))


def _once_each(found: Found) -> None:
    """One training counts once, however many copies of its folder there are."""
    first: dict[str, Run] = {}
    for run in found.runs:
        if run.identity in first:
            why = f"the same training as {first[run.identity].path}, which counts"
            found.left_out.append(LeftOut(run.path, "copy", why))
        else:
            first[run.identity] = run
    found.runs = list(first.values())


def _unfinished(folder: RunFolder) -> LeftOut:
    status = _status(folder)
    state, step, error = status.get("status"), status.get("step"), status.get("error")
    again = "the same command goes on from there"
    if state == "finished":
        return LeftOut(folder.path, "damaged", "status.json says finished and there is no result.json")
    if state == "running":
        if status.get("host") == socket.gethostname() and not _alive(status.get("pid")):
            return LeftOut(
                folder.path, "killed", f"at step {step} or later, process {status.get('pid')} is gone; {again}"
            )
        where = f"process {status.get('pid')} on {status.get('host')}"
        return LeftOut(folder.path, "running", f"step {step} or later, {where}")
    if state == "interrupted":
        return LeftOut(folder.path, "interrupted", f"at step {step}: {error}; {again}")
    if state == "failed":
        return LeftOut(folder.path, "failed", f"at step {step}: {error}")
    if state is None:
        return LeftOut(folder.path, "not begun", "there is neither status.json nor result.json")
    return LeftOut(folder.path, "damaged", f"status.json says {state!r}")


def _status(folder: RunFolder) -> dict[str, Any]:
    try:
        status = json.loads((folder.path / "status.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError("status.json cannot be read") from None
    if not isinstance(status, dict):
        raise ValueError("status.json cannot be read")
    return status


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, TypeError):
        return False
    except OSError:
        pass  # another user's
    return True


def _others(folder: RunFolder, top: Mapping[str, Any], score: Score, found: Found) -> Iterator[Score]:
    """Evaluations of the same weights that ``result.json`` is not about."""
    place = folder.path / "evaluations"
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if path.name == score.name or not (path / "result.json").exists():
            continue
        try:
            result = json.loads((path / "result.json").read_text())
            if "estimator" not in result and result["steps"] == top["steps"]:
                yield _score(result, path / "log_likelihood.npz")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found.notes.append(
                f"{folder.identity}: evaluations/{path.name} is damaged ({_said(error)}) and is left out"
            )


def _score(result: Mapping[str, Any], arrays: Path) -> Score:
    """Raises ValueError, KeyError, TypeError or AttributeError where ``result`` is none."""
    evaluation = result["evaluation"]
    splits = {name: result[name] for name in ("test", "validation", "train") if result.get(name)}
    for name, split in splits.items():
        levels = {f"bounds.{level}": value for level, value in split["bounds"].items() if int(level)}
        for key, value in [("nll", split["nll"]), *((key, split[key]) for key in NUMBERS), *levels.items()]:
            if value is not None and not math.isfinite(value):
                raise ValueError(f"result.json: {name}.{key} must be finite or null, got {value}")
        if split["k"] != evaluation["k"] or split["n"] < 1:
            raise ValueError(f"result.json: {name} is of k = {split['k']}, n = {split['n']}")
    units = result.get("active_units")
    return Score(
        name=str(evaluation["name"]),
        k=int(evaluation["k"]),
        weights=str(result["weights"]),
        precision=str(evaluation["precision"]),
        sha256={str(name): str(value) for name, value in result["dataset"]["evaluation_sha256"].items()},
        splits=splits,
        reasons={str(key): str(value) for key, value in (result.get("reasons") or {}).items()},
        active_units=None if units is None else tuple(map(int, units)),
        arrays=arrays,
    )


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; a list is one value."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return flat


def class_name(target: str) -> str:
    """Of a class's dotted name the last part."""
    return target.rpartition(".")[2]


def _ancestor(path: str | None) -> str | None:
    """The run that this one began from, without its seed: what the seeds of one experiment have in common."""
    return None if path is None else re.sub(r"-seed\d+-[0-9a-f]{8}$", "", Path(path).name)


def _training_of(path: str | None) -> str | None:
    """A hash of what decided the weights that this run began from, but for the seed; None where it cannot be read.

    Its name alone would make seeds of one experiment out of runs that began from different trainings.
    """
    if path is None:
        return None
    try:
        decides = training_config(RunFolder(Path(path)).config(), {})
    except (UserError, OSError, KeyError, TypeError):
        return None
    settings = json.dumps({key: value for key, value in decides.items() if key != "seed"}, sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:8]


def _said(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the key {error.args[0]!r} is missing"
    if isinstance(error, OSError):
        return f"{Path(error.filename or '').name} cannot be read: {error.strerror}"
    return (str(error).splitlines() or [type(error).__name__])[0]
