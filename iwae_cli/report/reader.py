"""Read run folders: the finished runs, and the reason for every other one. Nothing is written."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from iwae_cli.core.errors import UserError
from iwae_cli.record import schema
from iwae_cli.record.first_stage import stage_before
from iwae_cli.record.folder import SET_ASIDE, RunFolder
from iwae_cli.record.former import ADDED, applies
from iwae_cli.record.identity import RECIPE, evaluation_name, path_keys, training_config, unused
from iwae_cli.record.summary import SPLITS, number_at, split_rows, table_of

MARKS = {"status.json", "result.json", "checkpoint.pt", "metrics.jsonl", "train.log", ".lock"}
"""A folder with one of these files is a run folder, complete or not."""
SWEEP = "sweep.json"
NOT_RECORDED = "not recorded"  # value of a key that nothing shows an evaluation was made with
SOURCES = "sources."  # begin of the keys of source files
GROUPS = ("model", "objective", "optimizer", "schedule")  # whose chosen name is in result.json


@dataclass(frozen=True)
class Score:
    """One evaluation of a run by L_k."""

    name: str  # folder in evaluations/
    k: int  # samples per image
    weights: str  # last or best
    precision: str  # of the weights
    sha256: Mapping[str, str]  # of the images by split
    splits: Mapping[str, Mapping[str, Any]]  # numbers by split, nats, as in result.json
    reasons: Mapping[str, str]  # for each number that is None, by "<split>.<name>"
    active_units: tuple[int, ...] | None  # of each layer, nearest to x first; None where they are not defined
    arrays: Path  # of the per-image values
    keys: Mapping[str, Any]  # evaluation.* of the configuration that it was made with
    recipe: int = RECIPE  # of its refined proposals


@dataclass(frozen=True)
class Estimate:
    """One evaluation of a run by another estimator than L_k."""

    name: str  # folder in evaluations/
    objective: str  # whose gradients it is about, with its choices; empty where it is about none
    estimator: str
    weights: str  # last or best
    numbers: Mapping[str, Any]  # by dotted key of result.json
    columns: Sequence[str]  # headings of the columns of numbers
    lines: Mapping[str, Sequence[str]]  # for every label its numbers as printed, one per column

    @property
    def heading(self) -> str:
        """Its name, and what it is about."""
        return f"{self.name} of {self.objective}" if self.objective else self.name


@dataclass(frozen=True)
class LeftOut:
    """A run that is in no table."""

    path: Path  # for a job that has not started, where it would be
    state: str  # one or two words, such as interrupted, failed, damaged
    why: str  # one line


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    config: Mapping[str, Any]  # resolved
    result: Mapping[str, Any]  # content of result.json
    scores: tuple[Score, ...]  # evaluations by L_k, the one in result.json first
    estimates: tuple[Estimate, ...] = ()

    @property
    def identity(self) -> str:
        """Name of the training."""
        return self.result["identity"]

    @property
    def dataset(self) -> str:
        """Name of the data, including the binarization."""
        return str(self.result["dataset"]["name"])

    @property
    def seed(self) -> int:
        """Training seed."""
        return int(self.config["seed"])

    @property
    def draws(self) -> int | None:
        """Draws of q that the training has scored; None in results of versions before 0.6."""
        return self.result.get("draws")

    @property
    def seconds(self) -> float | None:
        """Seconds of training; None where they are unknown."""
        return (self.result.get("seconds") or {}).get("train")

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Every dotted key of the configuration, and the chosen name of each group (``schedule`` is ``burda``)."""
        keys = flatten(self.config)
        keys["data"] = self.dataset
        for group in GROUPS:
            # Results of older versions have no name for optimizer and schedule: use the class.
            named = group in self.result or group in ("model", "objective")
            keys[group] = str(self.result[group]["name"]) if named else class_name(keys[f"{group}._target_"])
        keys.update((key, value) for key, value in ADDED.items() if key not in keys and applies(key, self.config))
        # Two files of a user may have one name; the data sets of this package are known by theirs.
        if any(self.config["data"].get(key) is not None for key in path_keys(self.config["data"]) if key != "data_dir"):
            keys["data.sha256"] = str(self.result.get("data_sha256"))[:8]
        source = self.config.get("init_from")
        # Its name without seed and hash; alone it would mix second stages of different first trainings.
        keys["init_from"] = source and re.sub(r"-seed\d+-[0-9a-f]{8}$", "", Path(source).name)
        keys["init_from.training"] = stage_before(source, self.result)
        return keys | {name: digest[:8] for name, digest in self._sources.items()}

    @property
    def _sources(self) -> dict[str, str]:
        """Hashes of source files from outside this package by key; none where an older version has not recorded any."""
        return {f"{SOURCES}{file}": digest for file, digest in (self.result.get("sources") or {}).items()}

    @property
    def unread_first_stage(self) -> str | None:
        """Name of the folder of ``init_from`` where that cannot be read; None where it can, or there is none."""
        source = self.config.get("init_from")
        return Path(source).name if source and self.keys["init_from.training"] == Path(source).name else None

    @cached_property
    def training(self) -> dict[str, Any]:
        """The part of ``keys`` that decides the trained weights, without the seed: equal for seeds of one setting."""
        decides = training_config(self.config, {})
        for key in ("seed", "precision", "fingerprints"):
            del decides[key]
        names = {*flatten(decides), *GROUPS, *self._sources, "init_from.training", "device.precision", "data.sha256"}
        without_effect = unused({"posterior": "diagonal", "prior": "standard", **self.config["model"]})
        names |= ADDED.keys() - {f"model.{key}" for key in without_effect}
        names.discard("training._target_")  # older runs have no node ``training``, and there is one class of it
        return {key: value for key, value in self.keys.items() if key in names}


@dataclass
class Found:
    """Content of some paths."""

    runs: list[Run] = field(default_factory=list)  # finished, sorted by path
    left_out: list[LeftOut] = field(default_factory=list)  # all other runs
    notes: list[str] = field(default_factory=list)  # on runs that count, one line each


def read(paths: Sequence[str | Path]) -> Found:
    """Return every run in ``paths``: run folders, sweep folders, or folders that hold some at any depth.

    Raises:
        UserError: a path is missing, or none of them holds a run.
    """
    found = Found()
    folders: set[Path] = set()
    for path in map(Path, paths):
        if not path.is_dir():
            what = "is a file" if path.exists() else "is not there"
            raise UserError(f"{path} {what}; name a folder of runs, such as outputs")
        folders.update(_walk(path, found))
    first: dict[str, Run] = {}
    for folder in sorted(folders):
        run = _read_run(folder, found)
        # By the hash: the readable part may differ between versions.
        if run is not None and (counted := first.setdefault(run.identity.rpartition("-")[2], run)) is not run:
            found.left_out.append(LeftOut(run.path, "copy", f"the same training as {counted.path}, which counts"))
    found.runs = list(first.values())
    if not found.runs and not found.left_out:
        raise UserError(f"no run in {', '.join(map(str, paths))}; iwae-train writes them into output_dir=")
    return found


def _walk(top: Path, found: Found) -> Iterator[Path]:
    """Yield the run folders in ``top``, without descending into one; links may lead in circles."""

    def unreadable(error: OSError) -> None:
        found.left_out.append(LeftOut(Path(error.filename), "damaged", f"cannot be read: {error.strerror}"))

    seen: set[Path] = set()
    for place, folders, files in os.walk(top, onerror=unreadable, followlinks=True):
        path = Path(place).resolve()
        inside, folders[:] = sorted(name for name in folders if not name.startswith(".")), []
        if path in seen:
            continue
        seen.add(path)
        if SWEEP in files:
            yield from _jobs(Path(place), found)
        elif not MARKS.isdisjoint(files):
            yield path
        else:
            folders += inside


def _jobs(sweep: Path, found: Found) -> Iterator[Path]:
    """Yield the run folders of a sweep's jobs; record jobs without a folder as left out."""
    outputs = sweep.parent.parent
    try:
        jobs = (schema.read_json(sweep / SWEEP, schema.Sweep) or {})["jobs"]
    except UserError as error:
        found.left_out.append(LeftOut(sweep, "damaged", _within(sweep, error)))
        return
    for job in jobs:
        names = [Path(job[key]) for key in ("folder", "identity") if job.get(key)]
        places = [base / name for name in names for base in (Path(), sweep, outputs)]
        place = next((p for p in places if p.is_dir() and any((p / mark).exists() for mark in MARKS)), None)
        if place is not None:
            yield place.resolve()
            continue
        state, why = job.get("status") or "not begun", job.get("error")
        if state == "finished":
            state, why = "gone", "its run folder is not there"
        which = f"job of sweep {sweep.name} ({' '.join(job.get('overrides') or ())})"
        why = why or "has no run folder; the command of the sweep starts it"
        found.left_out.append(LeftOut(outputs / names[-1] if names else sweep, state, f"{which}: {why}"))


def _read_run(path: Path, found: Found) -> Run | None:
    """Return a finished run, or record why it is none."""
    folder = RunFolder(path)
    try:
        if SET_ASIDE.search(path.name):
            found.left_out.append(LeftOut(path, "set aside", "by restart=true; the run that took its place counts"))
            return None
        result = folder.result()
        if result is None:
            found.left_out.append(_unfinished(folder))
            return None
        config = folder.config(result)
        others = list(_evaluations(folder, config, result, found))
        scores = (_score(result, config, path / "log_likelihood.npz"), *(x for x in others if isinstance(x, Score)))
        status = folder.status_record().get("status")
        if status != "finished":
            what = {"running": "being evaluated again", None: "without status.json"}.get(status, f"{status} since")
            found.notes.append(f"{result['identity']} is {what}; its last result counts")
        return Run(path, config, result, scores, tuple(x for x in others if isinstance(x, Estimate)))
    except UserError as error:
        found.left_out.append(LeftOut(path, "damaged", _within(path, error)))
    return None


def _unfinished(folder: RunFolder) -> LeftOut:
    status = folder.status_record()
    if not status:
        return LeftOut(folder.path, "not begun", "there is neither status.json nor result.json")
    state, step, error = status["status"], status["step"], status["error"]
    resume, where = "the same command resumes it", f"process {status['pid']}"
    if state == "running" and not process_alive(status["host"], status["pid"]):
        return LeftOut(folder.path, "killed", f"at step {step} or later, {where} is gone; {resume}")
    states = {
        "finished": ("damaged", "status.json says finished and there is no result.json"),
        "running": ("running", f"step {step} or later, {where} on {status['host']}"),
        "interrupted": ("interrupted", f"at step {step}: {error}; {resume}"),
        "failed": ("failed", f"at step {step}: {error}"),
    }
    return LeftOut(folder.path, *states[state])


def process_alive(host: Any, pid: Any) -> bool:
    """Return whether a process may still exist; processes of other hosts are assumed to."""
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
        # A zombie is dead too; only Linux shows it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, ValueError, TypeError):
        return False
    except (OSError, IndexError):
        return True  # the process of another user, or no /proc


def _evaluations(
    folder: RunFolder, config: Mapping[str, Any], top: Mapping[str, Any], found: Found
) -> Iterator[Score | Estimate]:
    """Yield the evaluations of the same weights other than the one in ``result.json``."""
    for path in sorted(folder.path.glob("evaluations/*/result.json")):
        if path.parent.name == top["evaluation"]["name"]:
            continue
        try:
            result = schema.read_json(path, schema.Result)
        except UserError as error:
            found.notes.append(f"{folder.identity}: {_within(folder.path, error)}; this evaluation is left out")
            continue
        if result is None or result["steps"] != top["steps"]:
            continue
        if "estimator" in result:
            numbers = {key: number_at(result, key) for _, key, _ in result.get("rows") or split_rows(result)}
            asked, node = result["estimator"], result["estimator"].get("objective")
            chosen = [f"{k}={v}" for k, v in node.items() if k not in ("_target_", "k", *unused(node))] if node else []
            objective = " ".join([class_name(node["_target_"]), *chosen]) if node else ""
            name, weights = path.parent.name, result["weights"]
            yield Estimate(name, objective, asked["name"], weights, numbers, *table_of(result))
        else:
            yield _score(result, config, path.with_name("log_likelihood.npz"))


def _score(result: Mapping[str, Any], config: Mapping[str, Any], arrays: Path) -> Score:
    evaluation, units = result["evaluation"], result.get("active_units")
    made, recipe = _made_with(result, config)
    return Score(
        name=evaluation["name"],
        k=evaluation["k"],
        weights=result["weights"],
        precision=evaluation["precision"],
        sha256=result["dataset"]["evaluation_sha256"],
        splits={name: result[name] for name in SPLITS if result.get(name)},
        reasons=result.get("reasons") or {},
        active_units=None if units is None else tuple(units),
        arrays=arrays,
        keys=flatten({"evaluation": made}),
        recipe=recipe,
    )


def _made_with(result: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the settings of an evaluation by L_k, ``NOT_RECORDED`` for those that nothing shows, and its recipe.

    ``config`` is that of the run, whose own evaluation has all of its settings. The name of an evaluation ends with a
    hash of what decides its numbers, which tells ``refine=all`` from a number that takes every image.
    """
    held, splits = result["evaluation"], [name for name in result if name in SPLITS and result[name]]
    first, precision = re.search(r"-first(\d+)\+", held["name"]), held["precision"]
    made = {
        **{key: held.get(key, NOT_RECORDED) for key in ("k", "seed", "binarization_seed")},
        **{"weights": result["weights"], "splits": splits, "images": int(first[1]) if first else None},
        "jackknife": any("nll_jackknife" in result[name] for name in splits),
    }
    recipes = range(RECIPE, 0, -1)
    own = any(evaluation_name(config, recipe) == held["name"] for recipe in recipes)
    most = max(((result[name].get("refined") or {"n": 0})["n"] for name in splits), default=0)
    made["refine"], recipe = next(
        (
            (refine, recipe)
            for recipe in recipes
            for refine in (config["evaluation"].get("refine", 0), 0, "all", most, 200)
            if evaluation_name({"evaluation": made | {"refine": refine}, "device": {"precision": precision}}, recipe)
            == held["name"]
        ),
        (NOT_RECORDED, RECIPE),
    )
    others = {key: value if own else NOT_RECORDED for key, value in config["evaluation"].items() if key != "_target_"}
    return others | made | {"precision": precision}, recipe


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted key; a list is one value, as JSON."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str) if isinstance(value, list) else value
    return flat


def class_name(target: Any) -> str:
    """Return the last part of a dotted name."""
    return str(target).rpartition(".")[2]


def _within(folder: Path, error: UserError) -> str:
    """Return an error with names of files relative to their folder."""
    return str(error).replace(f"{folder}{os.sep}", "")
