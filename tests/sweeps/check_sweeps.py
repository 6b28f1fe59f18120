"""A long check, run by hand: a sweep that is killed at random, again and again, ends as one that was left alone.

    python tests/check_sweeps.py --launcher joblib --runs 12 --kills 2

The first kill takes every process of the sweep, the one that was started by the command too; the next one takes a
single job; and so on in turn. Then the same command goes on until it ends well, and every run must be the same as in
a sweep that nobody disturbed, run one after the other: bit for bit but for times, versions, device and git.
With ``--launcher optuna`` it is a search, of which nothing may be lost or tried twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "support"), str(Path(__file__).resolve().parents[2])]

from small_runs import TINY, bits, last_of_each, run_folders  # noqa: E402

LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local"],
    "ray": ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"],
    "optuna": ["hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=0"],
}


def command(launcher: str, runs: int, passes: int, output_dir: Path) -> list[str]:
    """One command line, always the same."""
    varied = [f"seed=range({runs})"]
    splits = "[test]"
    if launcher == "optuna":
        varied = ["optimizer.lr=tag(log,interval(1e-4,1e-2))", f"hydra.sweeper.n_trials={runs}"]
        splits = "[validation]"
    tiny = last_of_each(*TINY, f"schedule.passes={passes}", f"evaluation.splits={splits}", "evaluation.k=5")
    return [sys.executable, "-m", "iwae_cli", "-m", *varied, *tiny, *LAUNCHERS[launcher], f"output_dir={output_dir}"]


def records(output_dir: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """What the jobs say of themselves, and have said since a moment."""
    found = []
    for path in output_dir.glob("sweeps/*/jobs/[!.]*.json"):
        try:
            if path.stat().st_mtime >= since:
                found.append(json.loads(path.read_text()))
        except (ValueError, FileNotFoundError):
            continue
    return found


def everything(session: int) -> list[int]:
    """Every process that was started in the session of the command, or works for it."""
    listed = subprocess.run(["ps", "-eo", "pid=,sess="], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, own in (line.split() for line in listed.splitlines()) if int(own) == session]


def disturb(process: subprocess.Popen[bytes], output_dir: Path, whole: bool, chance: random.Random) -> str:
    """Wait for a random moment while a job is at work, and kill."""
    enough, since = chance.randint(1, 3), time.time()
    while process.poll() is None:
        begun = records(output_dir, since)
        running = [record for record in begun if record["status"] == "running" and "folder" in record]
        if running and len(begun) >= enough:
            time.sleep(chance.uniform(0.0, 2.0))
            if whole:
                for pid in {*everything(process.pid), *(record["pid"] for record in running)}:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                return "everything"
            victim = chance.choice(running)["pid"]
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                return "nothing (the job was over)"
            return f"one job ({victim})"
        time.sleep(0.02)
    return "nothing (the sweep was over)"


def main() -> int:
    """Exit code 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="joblib")
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--passes", type=int, default=60)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", type=Path, help="a folder for the undisturbed sweep, used again if it is there")
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    folder = Path(tempfile.mkdtemp(prefix="check-sweeps-"))
    reference, disturbed = asked.reference or folder / "undisturbed", folder / "disturbed"

    if asked.launcher != "optuna" and not reference.exists():
        subprocess.run(command("basic", asked.runs, asked.passes, reference), check=True, capture_output=True)
    line = command(asked.launcher, asked.runs, asked.passes, disturbed)
    for kill in range(asked.kills):
        process = subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        killed = disturb(process, disturbed, kill % 2 == 0, chance)
        states = [record["status"] for record in records(disturbed)]
        print(f"killed {killed}; the command ended with {process.wait(600)}; records: {sorted(states)}", flush=True)
    for _ in range(3):
        done = subprocess.run(line, capture_output=True, text=True)
        print(f"the same command ended with {done.returncode}", flush=True)
        if done.returncode == 0:
            break
    print(*done.stdout.splitlines()[-asked.runs - 3 :], sep="\n")
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        return 1
    if asked.launcher == "optuna":
        (sweep,) = disturbed.glob("sweeps/*/sweep.json")
        jobs = json.loads(sweep.read_text())["jobs"]
        lines = {" ".join(job["overrides"]) for job in jobs}
        good = len(jobs) == len(lines) == asked.runs and {job["status"] for job in jobs} == {"finished"}
        print(f"{len(lines)} different trials, all finished: {good}")
        return 0 if good else 1
    expected, got = ({f.name: bits(f) for f in run_folders(place)} for place in (reference, disturbed))
    same = [name for name in expected if got.get(name) == expected[name]]
    print(f"{len(same)} of {asked.runs} runs are the same, bit for bit")
    return 0 if len(same) == len(expected) == len(got) == asked.runs else 1


if __name__ == "__main__":
    sys.exit(main())
