"""Read run folders: the finished runs, and the reason for every other one. Nothing is written."""

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
from iwae_cli.record.folder import SET_ASIDE, RunFolder
from iwae_cli.record.identity import training_config
from iwae_cli.record.summary import SPLITS, number_at, split_rows, table_of

MARKS = {"status.json", "result.json", "checkpoint.pt", "metrics.jsonl", "train.log", ".lock"}
"""A folder with one of these files is a run folder, complete or not."""
SWEEP = "sweep.json"
"""File of a sweep folder: ``jobs``, each with ``identity`` or ``folder``, ``status``, ``error``."""
GROUPS = ("model", "objective", "optimizer", "schedule")
"""Groups whose chosen name is in ``result.json``."""
NUMBERS = ("stderr_images", "stderr_mc", "bias_mc")
GAP = ("gap_q", "gap_q_stderr")
"""How much too high NLL_k by the trained q is at least, nats; missing in evaluations without refined proposals."""
MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)
"""Errors from reading a file that does not hold what it should."""


@dataclass(frozen=True)
class Score:
    """One evaluation of a run by L_k.

    Attributes:
        name: folder in ``evaluations/``.
        k: samples per image.
        weights: ``last`` or ``best``.
        precision: of the weights.
        sha256: hash of the images by split.
        splits: numbers by split, nats, as in ``result.json``; None for a missing number.
        reasons: reason for each missing number, by ``"<split>.<name>"``.
        active_units: one number per layer, nearest to x first; None where they are not defined.
        arrays: path of the per-image values.
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
class Estimate:
    """One evaluation of a run by another estimator than L_k.

    Attributes:
        name: folder in ``evaluations/``.
        estimator: name of the estimator.
        weights: ``last`` or ``best``.
        numbers: by dotted key of ``result.json``.
        columns: headings of the columns of numbers.
        lines: for every label its numbers as printed, one per column.
    """

    name: str
    estimator: str
    weights: str
    numbers: Mapping[str, Any]
    columns: Sequence[str]
    lines: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class LeftOut:
    """A run that is in no table.

    Attributes:
        path: run folder; for a job that has not started, where it would be.
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
        path: run folder.
        config: resolved configuration.
        result: content of ``result.json``.
        scores: evaluations by L_k, the one in ``result.json`` first.
        estimates: evaluations by other estimators.
    """

    path: Path
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    scores: tuple[Score, ...]
    estimates: tuple[Estimate, ...] = ()

    @property
    def identity(self) -> str:
        """Name of the training."""
        return str(self.result["identity"])

    @property
    def dataset(self) -> str:
        """Name of the data, including the binarization."""
        return str(self.result["dataset"]["name"])

    @property
    def seed(self) -> int:
        """Training seed."""
        return int(self.config["seed"])

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Every dotted key of the configuration, and the chosen name of each group (``schedule`` is ``burda``)."""
        keys = flatten(self.config)
        keys["data"] = self.dataset
        for group in GROUPS:
            # Results of older versions have no name for optimizer and schedule: use the class.
            named = group in self.result or group in ("model", "objective")
            keys[group] = str(self.result[group]["name"]) if named else class_name(keys[f"{group}._target_"])
        keys.setdefault("training.backward", "all")  # the only choice of older versions
        source = self.config.get("init_from")
        # Its name without seed and hash; alone it would mix second stages of different first trainings.
        keys["init_from"] = source and re.sub(r"-seed\d+-[0-9a-f]{8}$", "", Path(source).name)
        keys["init_from.training"] = source and _training_hash(source)
        return keys

    @cached_property
    def training(self) -> dict[str, Any]:
        """The part of ``keys`` that decides the trained weights, without the seed: equal for seeds of one setting."""
        decides = training_config(self.config, {})
        for key in ("seed", "precision", "fingerprints"):
            del decides[key]
        names = {*flatten(decides), *GROUPS, "init_from", "init_from.training", "device.precision"}
        return {key: value for key, value in self.keys.items() if key in names}


@dataclass
class Found:
    """Content of some paths.

    Attributes:
        runs: finished runs, sorted by path.
        left_out: all other runs.
        notes: remarks on runs that count, one line each.
    """

    runs: list[Run] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
        if run is None:
            continue
        counted = first.setdefault(run.identity, run)
        if counted is not run:
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
        for job in json.loads((sweep / SWEEP).read_text())["jobs"]:
            names = [Path(str(job[key])) for key in ("folder", "identity") if job.get(key)]
            places = [base / name for name in names for base in (Path(), sweep, outputs)]
            place = next((p for p in places if p.is_dir() and any((p / mark).exists() for mark in MARKS)), None)
            if place is not None:
                yield place.resolve()
                continue
            state, why = str(job.get("status") or "not begun"), job.get("error")
            if state == "finished":
                state, why = "gone", "its run folder is not there"
            which = f"job of sweep {sweep.name} ({' '.join(map(str, job.get('overrides') or ()))})"
            why = why or "has no run folder; the command of the sweep starts it"
            found.left_out.append(LeftOut(outputs / names[-1] if names else sweep, state, f"{which}: {why}"))
    except MALFORMED as error:
        found.left_out.append(LeftOut(sweep, "damaged", f"{SWEEP} cannot be read: {_reason(error)}"))


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
        others = list(_evaluations(folder, result, found))
        scores = (_score(result, path / "log_likelihood.npz"), *(x for x in others if isinstance(x, Score)))
        run = Run(path, folder.config(), result, scores, tuple(x for x in others if isinstance(x, Estimate)))
        assert run.keys and run.training  # raises here if a key is missing
        status = folder.status_record().get("status")
        if status != "finished":
            what = {"running": "being evaluated again", None: "without status.json"}.get(status, f"{status} since")
            found.notes.append(f"{run.identity} is {what}; its last result counts")
        return run
    except UserError as error:
        found.left_out.append(LeftOut(path, "damaged", str(error).replace(f"{path}{os.sep}", "")))
    except MALFORMED as error:
        found.left_out.append(LeftOut(path, "damaged", _reason(error)))
    return None


def _unfinished(folder: RunFolder) -> LeftOut:
    status = folder.status_record()
    state, step, error = status.get("status"), status.get("step"), status.get("error")
    resume = "the same command resumes it"
    where = f"process {status.get('pid')}"
    states = {
        None: ("not begun", "there is neither status.json nor result.json"),
        "finished": ("damaged", "status.json says finished and there is no result.json"),
        "running": ("running", f"step {step} or later, {where} on {status.get('host')}"),
        "interrupted": ("interrupted", f"at step {step}: {error}; {resume}"),
        "failed": ("failed", f"at step {step}: {error}"),
    }
    if state == "running" and not process_alive(status.get("host"), status.get("pid")):
        return LeftOut(folder.path, "killed", f"at step {step} or later, {where} is gone; {resume}")
    return LeftOut(folder.path, *states.get(state, ("damaged", f"status.json says {state!r}")))


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


def _evaluations(folder: RunFolder, top: Mapping[str, Any], found: Found) -> Iterator[Score | Estimate]:
    """Yield the evaluations of the same weights other than the one in ``result.json``."""
    place = folder.path / "evaluations"
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if path.name == top["evaluation"]["name"] or not (path / "result.json").exists():
            continue
        try:
            result = json.loads((path / "result.json").read_text())
            if result["steps"] != top["steps"]:
                continue
            if result["evaluation"].get("k") is not None:
                yield _score(result, path / "log_likelihood.npz")
            elif "estimator" in result:
                numbers = {key: number_at(result, key) for _, key, _ in result.get("rows") or split_rows(result)}
                estimator, weights = str(result["estimator"]["name"]), str(result["weights"])
                yield Estimate(path.name, estimator, weights, numbers, *table_of(result))
        except MALFORMED as error:
            why = f"evaluations/{path.name} is damaged ({_reason(error)}) and is left out"
            found.notes.append(f"{folder.identity}: {why}")


def _score(result: Mapping[str, Any], arrays: Path) -> Score:
    """Raises an error of ``MALFORMED`` where ``result`` is not a result of L_k."""
    evaluation = result["evaluation"]
    splits = {name: result[name] for name in SPLITS if result.get(name)}
    for name, split in splits.items():
        numbers = {key: split[key] for key in ("nll", *NUMBERS)}
        numbers |= {f"bounds.{level}": value for level, value in split["bounds"].items() if int(level)}
        if "refined" in split or split.get("gap_q") is not None:
            refined = split["refined"]
            numbers |= {key: split[key] for key in GAP}
            numbers |= {f"refined.{key}": refined[key] for key in ("nll", *NUMBERS)}
            if refined["k"] != split["k"] or not 1 <= refined["n"] <= split["n"]:
                raise ValueError(f"result.json: {name}.refined is of k = {refined['k']}, n = {refined['n']}")
            whole = split.get("nll_refined")
            if whole is not None and (whole != refined["nll"] or refined["n"] != split["n"]):
                raise ValueError(f"result.json: {name}.nll_refined is {whole}, not {name}.refined.nll of all images")
        for key, value in numbers.items():
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


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted key; a list is one value, as JSON."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return flat


def class_name(target: str) -> str:
    """Return the last part of a dotted name."""
    return target.rpartition(".")[2]


def _training_hash(path: str) -> str | None:
    """Return a hash of the settings of a run, without the seed, that decided its weights; None if unreadable."""
    try:
        decides = training_config(RunFolder(Path(path)).config(), {})
    except (UserError, OSError, KeyError, TypeError):
        return None
    settings = json.dumps({key: value for key, value in decides.items() if key != "seed"}, sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:8]


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the key {error.args[0]!r} is missing"
    if isinstance(error, OSError):
        return f"{Path(error.filename or '').name} cannot be read: {error.strerror}"
    return (str(error).splitlines() or [type(error).__name__])[0]
