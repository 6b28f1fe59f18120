"""Measure this program and others in turn, and write a table: ``python -m benchmarks [--quick] [--whole]``.

Every program runs in its own process, pinned to the cores of the case. All processes of a case are alive at the same
time and take turns in short rounds, so that other load on the machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import CASES, TINY, Case, Job
from benchmarks.reach import REFERENCE_ESTIMATES, REFERENCE_SEED, Estimate, Ladder, Reference, climb
from benchmarks.table import markdown, one_line

ROOT = Path(__file__).resolve().parents[1]
ROUNDS, QUICK_ROUNDS = 7, 5
STEPS, QUICK_STEPS = 2000, 200
"""Training steps before anything is timed, so that importance weights are as uneven as in a real run."""
WARM_UP_SECONDS, ROUND_SECONDS, QUICK_SECONDS = 0.5, 2.0, 1.0
TRAINED = 10_000
"""Training steps before the case ``reach``: four passes over MNIST, about a minute."""
CLIMB_SECONDS, TINY_SECONDS = 120.0, 2.0
"""Processor seconds of every program in the case ``reach``."""
SAMPLES = Ladder(5000, 4)
"""Of q, in the case ``reach``."""
TARGET = -97.0
"""Validation bound L_50 of a whole run, nats."""
UPDATE_LIMIT, NLL_LIMIT = 0.01, 5.0
"""Largest differences from ours that count as the same work: in training a share of the distance that the weights
moved, in evaluation standard errors of the difference of two estimates."""
WHOLE, SEEDS = Case("train", "one_layer", 5, 20), (0, 1, 2)


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Attributes:
        label: as shown.
        module: of ``benchmarks.peers``.
        requires: packages to be installed.
        options: for the worker; overrides of the command line for ours.
        kinds, models, least_k, most_k: the cases it is measured in.
        quick: the kinds of case it is measured in with ``--quick``.
        whole: whether it takes part in whole runs.
        ladder: its efforts in cases of kind ``reach``.
    """

    label: str
    module: str
    requires: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("train", "evaluate")
    models: tuple[str, ...] = ("one_layer", "two_layer", "tiny")
    least_k: int = 1
    most_k: float = math.inf
    quick: tuple[str, ...] = ()
    whole: bool = False
    ladder: Ladder = SAMPLES

    def is_in(self, case: Case, quick: bool) -> bool:
        """Return whether it is measured in a case."""
        kinds = self.quick if quick else self.kinds
        return case.kind in kinds and case.model in self.models and self.least_k <= case.k <= self.most_k


CONTENDERS = (
    Contender(
        "ours",
        "ours",
        kinds=("train", "evaluate", "reach"),
        quick=("train", "evaluate"),
        whole=True,
        ladder=Ladder(50, 4, "refined, k = {:,}"),
    ),
    Contender("ours, q alone", "ours", options=("evaluation.refine=0",), kinds=("reach",)),
    Contender("ours, AIS from q", "ours_ais", kinds=("reach",), ladder=Ladder(50, 2, "16 chains, {:,} temperatures")),
    Contender("ours, plain step", "ours", options=("device.compile=off",), kinds=("train",)),
    Contender("ours, roulette", "ours", options=("training.backward=roulette",), kinds=("train",), least_k=5),
    Contender("ours, 16 at once", "ours", options=("hydra/launcher=batched",), kinds=("train",), most_k=5),
    Contender("ours, bf16 products", "ours", options=("evaluation.precision=bf16",), kinds=("evaluate",)),
    Contender("JAX", "with_jax", ("jax", "optax"), quick=("train", "evaluate"), whole=True),
    Contender("JAX, bf16 products", "with_jax", ("jax", "optax"), ("bf16",), kinds=("evaluate",)),
    Contender(
        "Pythae",
        "with_pythae",
        ("pythae",),
        kinds=("train", "evaluate", "reach"),
        models=("one_layer", "tiny"),
        quick=("train",),
    ),
    Contender("Pyro", "with_pyro", ("pyro",)),
    Contender("floor: matrix products", "floor", quick=("train", "evaluate")),
    Contender("floor: and tanh, exp", "floor", options=("tanh+exp",)),
    Contender("floor: bf16 products", "floor", options=("bf16",), kinds=("evaluate",)),
    Contender("floor: bf16, and tanh, exp", "floor", options=("bf16", "tanh+exp"), kinds=("evaluate",)),
)


class WorkerFailed(Exception):
    """A worker ended early; the message is the last line of its log."""


class Worker:
    """A process that runs ``benchmarks.worker``."""

    def __init__(self, contender: Contender, job: Job, logs: Path) -> None:
        name = re.sub(r"\W+", "_", f"{job.case.name} {contender.label} {job.seed}")
        self._log = logs / f"{name}.txt"
        cores = sorted(os.sched_getaffinity(0))[-job.case.cores :]
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.case.cores), "IWAE_ALLOW_TARGETS": "benchmarks"}
        if job.case.cores == 1:
            environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        self._started = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.peers.{contender.module}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=environment,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
        self._write(job.to_json())

    def answer(self) -> dict[str, Any]:
        """Return the next answer, and ``after``: seconds since the process was started."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            lines = self._log.read_text().splitlines()
            raise WorkerFailed(lines[-1] if lines else f"exit code {self._process.returncode}")
        return {**json.loads(line), "after": time.perf_counter() - self._started}

    def ask(self, **request: Any) -> dict[str, Any]:
        """Let it do a part of its work; return its answer."""
        self._write(request)
        return self.answer()

    def end(self) -> dict[str, Any]:
        """End it; return its last answer."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        answer = self.answer()
        self._process.wait()
        return answer

    def kill(self) -> None:
        """Kill it, and close its pipes."""
        self._process.kill()
        with self._process:
            pass

    def _write(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            print(json.dumps(value), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return  # ``answer`` raises the reason


def measure(job: Job, contenders: Sequence[Contender], rounds: int, seconds: float, logs: Path) -> dict[str, Any]:
    """Measure one case; return by label the numbers of every contender, or ``{"failed": why}``."""
    results: dict[str, Any] = {}
    workers: dict[str, Worker] = {}
    checks: dict[str, Any] = {}

    def attempt(label: str, work: Any) -> Any:
        try:
            return work()
        except WorkerFailed as error:
            print(f"    {label} failed: {error}", file=sys.stderr)
            results[label] = {"failed": str(error)}
            workers.pop(label).kill()
            return None

    try:
        for contender in contenders:
            label = contender.label
            workers[label] = Worker(contender, Job(job.case, job.files, (*contender.options, *job.overrides)), logs)
            # One after the other: each has the core to itself while it starts.
            ready = attempt(label, workers[label].answer)
            if ready is not None:
                checks[label] = ready["check"]
                results[label] = {"settings": ready["settings"], "set_up": ready["after"], "ms": [], "cpu_ms": []}
                attempt(label, lambda worker=workers[label]: worker.ask(seconds=WARM_UP_SECONDS))
        for number in range(rounds):
            order = list(workers)
            turn = number % max(1, len(order))
            for label in order[turn:] + order[:turn]:
                done = attempt(label, lambda worker=workers[label]: worker.ask(seconds=seconds))
                if done is not None:
                    results[label]["ms"].append(1000 * done["wall"] / done["units"])
                    results[label]["cpu_ms"].append(1000 * done["cpu"] / done["units"])
        for label in list(workers):
            done = attempt(label, workers[label].end)
            if done is not None:
                results[label].update(peak_mb=done["peak_mb"], beyond_mb=done["peak_mb"] - done["base_mb"])
    finally:
        for worker in workers.values():
            worker.kill()
    _compare(job, checks, results)
    return results


def _compare(job: Job, checks: dict[str, Any], results: dict[str, Any]) -> None:
    """Add ``check`` to every result: the difference from ours, computed from the same weights."""
    mine = checks.get("ours")
    if mine is None:
        return
    for label, check in checks.items():
        if label == "ours" or "failed" in results[label] or label.startswith("floor"):
            continue
        if "nll" not in check and check["weights"] is None:
            results[label]["check"] = {"none": "draws differ by design", "same": True}
            continue
        if "nll" in check:
            apart = check["nll"] - mine["nll"]
            error = 2**0.5 * mine["stderr_mc"]
            results[label]["check"] = {"nll": apart, "error": error, "same": abs(apart) < NLL_LIMIT * error}
            continue
        begun, ours, theirs = job.weights(), np.load(mine["weights"]), np.load(check["weights"])
        moved = np.sqrt(sum(np.square(ours[name] - begun[name]).sum() for name in begun))
        apart = np.sqrt(sum(np.square(ours[name] - theirs[name]).sum() for name in begun))
        update = float(apart / moved)
        found: dict[str, Any] = {"update": update, "same": update < UPDATE_LIMIT}
        if check["bounds"] is not None:
            found["bound"] = max(abs(a - b) for a, b in zip(check["bounds"], mine["bounds"], strict=True))
        results[label]["check"] = found


def reach(job: Job, contenders: Sequence[Contender], limit: float, logs: Path) -> dict[str, Any]:
    """Measure the time to a right NLL (see ``benchmarks.reach``); return the reference, the limit and the results."""
    workers: dict[str, Worker] = {}
    results: dict[str, Any] = {}

    def ask(label: str, effort: int, seed: int) -> Estimate | None:
        try:
            done = workers[label].ask(effort=effort, seed=seed)
        except WorkerFailed as error:
            print(f"    {label} failed: {error}", file=sys.stderr)
            results[label] = {"failed": str(error)}
            return None
        return Estimate(done["log_px"], done["wall"], done["cpu"])

    try:
        for contender in contenders:
            label = contender.label
            workers[label] = Worker(contender, Job(job.case, job.files, (*contender.options, *job.overrides)), logs)
            try:
                results[label] = {"settings": workers[label].answer()["settings"]}
            except WorkerFailed as error:
                results[label] = {"failed": str(error)}
                continue
            ask(label, contender.ladder.first, REFERENCE_SEED)
        seeds = range(REFERENCE_SEED, REFERENCE_SEED + REFERENCE_ESTIMATES)
        found = [estimate for seed in seeds if (estimate := ask("ours", job.case.k, seed))]
        if len(found) < len(seeds):
            return {"results": results}
        reference = Reference.of(found)
        ladders = {c.label: c.ladder for c in contenders if "failed" not in results[c.label]}
        for label, result in climb(ask, ladders, reference, limit).items():
            results[label] = {**result, **results[label]}
            if result:
                # Estimates are lower bounds: one that is above the reference shows that one of the two is wrong.
                above, stderr = result["top"]
                results[label]["check"] = {"above": above, "error": stderr, "same": above < NLL_LIMIT * stderr}
    finally:
        for worker in workers.values():
            worker.kill()
    mean = float(reference.log_px.mean())
    facts = {"k": job.case.k, "log_px": mean, "error": reference.error}
    return {"reference": facts, "limit": limit, "results": results}


def whole_runs(files: Path, overrides: tuple[str, ...], logs: Path) -> dict[str, Any]:
    """Measure the seconds to ``TARGET``, one program at a time, for every seed in turn."""
    results: dict[str, Any] = {}
    for seed in SEEDS:
        for contender in CONTENDERS:
            if not contender.whole or _missing(contender):
                continue
            options = (*contender.options, *overrides)
            worker = Worker(contender, Job(WHOLE, files, options, whole=TARGET, seed=seed), logs)
            try:
                done = worker.answer()
            except WorkerFailed as error:
                results[contender.label] = {"failed": str(error)}
                continue
            finally:
                worker.kill()
            print(
                f"    {contender.label}, seed {seed}: {done['seconds']:.0f} s, {done['steps']:,} steps", file=sys.stderr
            )
            found = results.setdefault(contender.label, {"seconds": [], "from_start": [], "steps": [], "curves": []})
            if "failed" not in found:
                found["seconds"].append(done["seconds"])
                found["from_start"].append(done["after"] - done["validating"])
                found["steps"].append(done["steps"])
                found["curves"].append(done["curve"])
    return results


def _missing(contender: Contender) -> list[str]:
    return [name for name in contender.requires if find_spec(name) is None]


def _data(data_dir: Path) -> tuple[str, tuple[str, ...]]:
    """Return the data set in words, and the overrides that choose it."""
    raw = data_dir / "MNIST" / "raw"
    if any((raw / f"train-images-idx3-ubyte{end}").exists() for end in ("", ".gz")):
        return "MNIST, binarized dynamically", ("data=mnist", f"data_dir={data_dir}")
    words = "no MNIST in data_dir, so digits of scikit-learn enlarged to 28x28, binarized dynamically"
    return words, ("data=digits", "data._target_=benchmarks.digits.EnlargedDigits")


def _machine() -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    versions = {"python": platform.python_version()}
    for name in ("iwae-cli", "torch", "jax", "optax", "pythae", "pyro-ppl", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": git.stdout.strip() or None,
        "versions": versions,
    }


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def main(argv: Sequence[str]) -> int:
    """Measure, write, print; return 1 if a contender that is installed failed or did other work than ours."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="three cases, four programs, minutes; all take under an hour"
    )
    parser.add_argument("--whole", action="store_true", help="whole runs to a validation bound on MNIST, instead")
    parser.add_argument("--cases", help="only these, comma separated: " + ", ".join(c.name for c in (*CASES, *TINY)))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    arguments = parser.parse_args(argv)
    wanted = (
        arguments.cases.split(",") if arguments.cases else [c.name for c in CASES if c.quick or not arguments.quick]
    )
    cases = [case for case in (*CASES, *TINY) if case.name in wanted]
    if len(cases) < len(wanted):
        parser.error(f"--cases {arguments.cases} names an unknown case; there are: " + ", ".join(c.name for c in CASES))
    cores = len(os.sched_getaffinity(0))
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if arguments.quick else (ROUNDS, ROUND_SECONDS)
    tiny = set(cases) <= set(TINY)
    if tiny:
        rounds, seconds = QUICK_ROUNDS, 0.01

    words, overrides = _data(Path(os.environ.get("IWAE_DATA_DIR", "data")).absolute())
    if arguments.whole:
        if "data=mnist" not in overrides:
            parser.error(f"--whole is about MNIST; there is only: {words}")
        cases = []
    folder = arguments.out.absolute() / time.strftime("%Y%m%d-%H%M%S")
    files, logs = folder / "files", folder / "logs"
    files.mkdir(parents=True)
    logs.mkdir()
    started = time.perf_counter()
    print(f"data and weights: {words}", file=sys.stderr)
    steps = 20 if tiny or arguments.whole else QUICK_STEPS if arguments.quick else STEPS
    long = steps if tiny else TRAINED
    wanted = {f"{c.weights}:{c.model}:{long if c.kind == 'reach' else steps}" for c in cases or [WHOLE]}
    command = [sys.executable, "-m", "benchmarks.prepare", str(files), ",".join(sorted(wanted)), *overrides]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "IWAE_ALLOW_TARGETS": "benchmarks"}, check=True)

    missing = {c.label: _missing(c) for c in CONTENDERS if _missing(c)}
    record: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks", *argv]),
        "machine": _machine(),
        "data": words,
        "rounds": rounds,
        "round_seconds": seconds,
        "load_before": os.getloadavg(),
        "rows": [contender.label for contender in CONTENDERS],
        "missing": missing,
        "cases": {},
        "reach": {},
        "whole": None,
    }
    for case in cases:
        if case.cores > cores:
            print(f"{case.name}: this machine lends {cores} cores only", file=sys.stderr)
            continue
        able = [c for c in CONTENDERS if c.is_in(case, arguments.quick) and c.label not in missing]
        job = Job(case, files, overrides)
        if case.kind == "reach":
            record["reach"][case.name] = reach(job, able, TINY_SECONDS if tiny else CLIMB_SECONDS, logs)
            results = record["reach"][case.name]["results"]
        else:
            results = record["cases"][case.name] = measure(job, able, rounds, seconds, logs)
        print(f"{one_line(case.name, results)} ({time.perf_counter() - started:.0f} s)", file=sys.stderr)
        _write(folder, record)
    if arguments.whole:
        record["whole"] = {"target": TARGET, "case": WHOLE.name, "results": whole_runs(files, overrides, logs)}
    record["load_after"] = os.getloadavg()
    record["minutes"] = (time.perf_counter() - started) / 60
    _write(folder, record)
    for file in files.glob("*.npz"):
        file.unlink()
    files.rmdir()
    print(markdown(record))
    print(f"written: {folder}", file=sys.stderr)
    measured = [*record["cases"].values(), *(case["results"] for case in record["reach"].values())]
    measured += [record["whole"]["results"]] if record["whole"] else []
    found = [result for results in measured for result in results.values()]
    return int(any("failed" in result or not result.get("check", {}).get("same", True) for result in found))


def _write(folder: Path, record: dict[str, Any]) -> None:
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "table.md").write_text(markdown(record) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
