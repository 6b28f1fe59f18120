"""A stopped sweep ends as one table too, and its numbers do not depend on order, launcher or processes."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Fault, terminate
from small_runs import TINY, bits, evaluate, finished, last_of_each, read_json, run, run_folders, saved_step

from iwae_cli.cli.report import report
from iwae_cli.cli.train import train
from iwae_cli.core.device import Device
from iwae_cli.core.errors import RunFailed, UserError
from iwae_cli.core.files import RunLock
from iwae_cli.record.summary import measured
from iwae_cli.runs.experiment import Experiment
from iwae_cli.sweeps.launchers import LAUNCHERS, adapter
from iwae_cli.sweeps.records import Attempt, Planned, SweepFolder
from iwae_cli.sweeps.sweep import Sweep

QUICK = (*TINY, "schedule.passes=1", "evaluation.k=5")


def needs(module: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(f"hydra_plugins.{module}")
    return pytest.mark.skipif(not there, reason=f"{module} is not installed: it is an extra")


ENGINES = [
    pytest.param(["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], id="joblib"),
    pytest.param(["hydra/launcher=submitit_local"], id="submitit", marks=needs("hydra_submitit_launcher")),
    pytest.param(
        ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"], id="ray", marks=needs("hydra_ray_launcher")
    ),
]


def start(*overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "iwae_cli", "-m", *last_of_each(*overrides)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def sweep_of(output_dir: Path) -> dict[str, Any]:
    (path,) = output_dir.glob("sweeps/*/sweep.json")
    value: dict[str, Any] = read_json(path)
    for job in value["jobs"]:
        if "folder" in job:
            job["path"] = (path.parent / job["folder"]).resolve()
    return value


def statuses(output_dir: Path) -> list[str]:
    return [job["status"] for job in sweep_of(output_dir)["jobs"]]


def running(output_dir: Path, since: float, step: int = 0) -> list[dict[str, Any]]:
    """Records of the jobs at work that have come to a step."""
    found = []
    for path in output_dir.glob("sweeps/*/jobs/[!.]*.json"):
        record = json.loads(path.read_text()) if path.stat().st_mtime > since else {}
        if record.get("status") == "running" and "folder" in record:
            metrics = path.parent.parent / record["folder"] / "metrics.jsonl"
            if metrics.exists() and metrics.stat().st_mtime > since and len(metrics.read_text().splitlines()) >= step:
                found.append(record)
    return found


def wait_for(process: subprocess.Popen[str], output_dir: Path, jobs: int, since: float = 0.0) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if len(found := running(output_dir, since, step=1)) >= jobs:
            return found
        time.sleep(0.02)
    raise AssertionError("nothing happened for two minutes")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], dict[int, BaseException]]:
    """Runs that only note that they happened, or raise what is put under their seed."""
    seen: list[int] = []
    raising: dict[int, BaseException] = {}

    def pretend(self: Experiment) -> dict[str, Any]:
        seen.append(self.seed)
        if self.seed in raising:
            raise raising[self.seed]
        return {"validation": {"nll": float(self.seed)}}

    monkeypatch.setattr("iwae_cli.runs.runner.run", pretend)
    return seen, raising


def test_the_folder_records_jobs_and_their_states(runs: Any, tmp_path: Path, capsys: Any) -> None:
    runs[1][1] = RunFailed("it diverged")
    runs[1][2] = ZeroDivisionError("a bug")
    assert train(["-m", "seed=0,1,2", "objective.k=1", "output_dir=there", "on_error=continue"]) == 1
    sweep = sweep_of(Path("there"))
    assert sweep["command"].startswith("iwae-train -m seed=0,1,2")
    assert (sweep["launcher"], sweep["sweeper"]) == ("basic", "basic")
    assert [job["status"] for job in sweep["jobs"]] == ["finished", "failed", "failed"]
    assert [job["error"] for job in sweep["jobs"]] == [None, "it diverged", "a bug"]
    for seed, job in enumerate(sweep["jobs"]):
        assert job["overrides"] == [f"seed={seed}", "objective.k=1", "output_dir=there"]
        assert job["path"] == (tmp_path / "there" / job["identity"]).resolve()
        assert job["identity"].startswith(f"digits-gaussian_mlp_50-iwae-k1-seed{seed}-")
    out, err = capsys.readouterr()
    assert "1 finished, 2 failed" in out and "it diverged" in out
    assert err.count("Traceback") == 1 and "ZeroDivisionError: a bug" in err and "2 failed" in err.splitlines()[-1]


def test_stop_at_the_first_error(runs: Any, capsys: Any) -> None:
    seen, raising = runs
    raising[1] = RunFailed("it diverged")
    assert train(["-m", "seed=0,1,2", "on_error=stop"]) == 1
    assert seen == [0, 1] and statuses(Path("outputs")) == ["finished", "failed", "pending"]
    assert "job 1 (seed=1) failed: it diverged" in capsys.readouterr().err
    raising.clear()
    assert train(["-m", "seed=0,1,2"]) == 0, "the same sweep, however it deals with errors"
    assert statuses(Path("outputs")) == ["finished"] * 3


def test_the_table_shows_what_is_scored_and_breaks_no_name(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    scores = [("test", 86.0, 5000), ("validation", 85.5, 5000), ("test", 84.0, 50)]
    names = [f"a_data_set-a_model-an_objective-k50-seed{seed}-0123abcd" for seed in range(3)]
    for name, (split, nll, k) in zip(names, scores, strict=True):
        (tmp_path / name / "evaluations" / "e").mkdir(parents=True)
        text = json.dumps({split: {"nll": nll, "k": k}})
        (tmp_path / name / "evaluations" / "e" / "result.json").write_text(text)
    planned = [Planned([f"seed={i}", "batch_size=20"], tmp_path / name, "e") for i, name in enumerate(names)]
    sweep = Sweep(tmp_path / "sweeps" / "s", planned, {}, False)

    def work() -> None:
        """All jobs end between two looks at them, as those of several processes do."""
        for number, one in enumerate(planned):
            attempt = Attempt(sweep.folder, number, one.overrides)
            attempt.begins(one.folder, one.evaluation)
            attempt.ends("finished")

    sweep.run(work)
    out, err = capsys.readouterr()
    assert [line.rpartition("; ")[2] for line in err.splitlines()] == [f"{n} of 3 jobs" for n in (1, 2, 3)]
    for text in (*names, "86.00 (NLL_5000 test)", "85.50 (NLL_5000 validation)", "84.00 (NLL_50 test)"):
        assert text in out
    Sweep(tmp_path / "sweeps" / "t", planned[:1], {}, False).run(lambda: None)
    assert "batch_size=20 finished 86.00" in " ".join(capsys.readouterr().out.split())


def test_a_sweep_says_what_it_does_and_ends_with_means_over_seeds_and_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["-m", "objective=elbo,iwae", "seed=0,1", *QUICK]
    code, out, err = run(*line)
    assert code == 0
    jobs = sweep_of(tmp_path / "outputs")["jobs"]
    results = [read_json(job["path"] / "result.json") for job in jobs]
    for number, (job, result) in enumerate(zip(jobs, results, strict=True)):
        name = f"job {number} ({' '.join(job['overrides'][:2])})"
        size = (
            f"1,297 images, {result['parameters']:,} parameters, 13 steps, then 250 images x 5 samples; cpu, 1 thread"
        )
        first, *between, last = [text for text in err.splitlines() if text.startswith(name)]
        assert first == f"{name}: outputs/{job['identity']}: {size}"
        assert any(": evaluating test  image 250/250" in text for text in between)
        took = sum(result["seconds"].values())
        assert last == f"{name} finished: NLL_5 test {result['test']['nll']:.2f}, {took:.1f} s; {number + 1} of 4 jobs"
    assert all(text.startswith("job ") for text in err.splitlines())
    assert "images/s" not in out and "bound L_5" not in out, "one table, and no lines of the jobs"
    for objective, of in (("elbo", results[:2]), ("iwae", results[2:])):
        values = [result["test"]["nll"] for result in of]
        mean, error = f"{sum(values) / 2:.6f}", statistics.stdev(values) / 2**0.5
        (row,) = [text.split() for text in out.splitlines() if text.startswith(f" {objective} ")]
        assert row[2] == "±" and len(row[1].partition(".")[2]) == len(row[3].partition(".")[2])
        assert float(row[1]) == pytest.approx(float(mean), abs=0.06 * error)
        assert float(row[3]) == pytest.approx(error, rel=0.06), "two digits"
    (following,) = [text.split(maxsplit=1)[1] for text in out.splitlines() if text.startswith("next ")]
    program, *arguments = shlex.split(following)
    assert program == "iwae-report" and report(arguments) == 0
    assert "over objective=elbo" in capsys.readouterr().out
    code, again, err = run(*line)
    assert code == 0 and again == out and err.count("\n") == 4, "nothing is left to announce"


def test_the_means_of_a_sweep_are_of_its_own_evaluations(tmp_path: Path) -> None:
    """Under the seed that it asks for, also where a run has refined values under another one."""
    assert run("-m", "seed=0,1", *QUICK, f"output_dir={tmp_path}")[0] == 0
    code, _, err = evaluate(run_folders(tmp_path)[0], "evaluation.refine=3")
    assert code == 0, err
    code, out, _ = run("-m", "seed=0,1", *QUICK, "evaluation.seed=7", f"output_dir={tmp_path}")
    nlls = [read_json(folder / "result.json")["test"]["nll"] for folder in run_folders(tmp_path)]
    assert code == 0 and measured(statistics.fmean(nlls), statistics.stdev(nlls) / 2**0.5) in out
    assert out.count("digits, test, k = 5") == 1, "one table"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("objective.k=5,0", "job 1 (objective.k=0): objective.k must be >= 1, got 0"),
        (
            "objective=dreg model.posterior=diagonal,mixture",
            "job 1 (model.posterior=mixture): objective.gradient=dreg needs independent draws",
        ),
    ],
)
def test_one_wrong_job_and_nothing_has_run(runs: Any, capsys: Any, line: str, words: str) -> None:
    assert train(["-m", *line.split()]) == 2
    err = capsys.readouterr().err
    assert runs[0] == [] and os.listdir() == [] and words in err and err.count("\n") == 1


def test_missing_data_end_a_sweep_once_before_its_first_job(
    runs: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where jobs run elsewhere, these machines' files say nothing."""

    def offline(*_: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr("iwae_cli.data.mnist.MNIST._fetch", offline)
    assert train(["-m", "data=digits,mnist", "seed=0,1", "data_dir=nowhere"]) == 2
    err = capsys.readouterr().err
    assert runs[0] == [] and os.listdir() == [] and err.count("t10k-images-idx3-ubyte") == 2, "asked for, and missing"
    (line,) = [line for line in err.splitlines() if line.startswith("iwae-train: data=mnist needs")]
    assert "/nowhere/MNIST/raw" in line and "(no network)" in line and "data_dir=DIR" in line and len(line) <= 300
    monkeypatch.setattr("iwae_cli.sweeps.launchers.Launcher.elsewhere", True)
    assert train(["-m", "data=mnist", "seed=0,1", "data_dir=nowhere"]) == 0 and runs[0] == [0, 1]


def test_one_training_in_two_words_is_one_job(runs: Any, capsys: Any) -> None:
    for swept in ("seed=3,3", "seed=3 optimizer.lr=0.002,2e-3"):
        runs[0].clear()
        assert train(["-m", *swept.split(), "output_dir=there"]) == 0 and runs[0] == [3]
        out, err = capsys.readouterr()
        assert err.splitlines()[0] == "1 of 2 jobs asks for the training of another: it runs once"
        assert out.count("digits-gaussian_mlp_50-iwae-k5-seed3-") == 1


def test_a_queued_job_restarts_once_however_early_it_was_stopped(tmp_path: Path) -> None:
    """It has set the old run aside if the folder is younger than its first attempt."""
    folder = SweepFolder(tmp_path)
    folder.jobs.mkdir()
    config = tmp_path / "run" / "config.yaml"
    config.parent.mkdir()
    config.write_text("old")
    os.utime(config, (time.time() - 100,) * 2)
    first = Attempt(folder, 0, ["seed=0"])
    assert not first.has_made(config.parent)
    first.begins()
    first.ends("interrupted")
    assert not Attempt(folder, 0, ["seed=0"]).has_made(config.parent), "the old run is still there"
    config.write_text("new")
    assert Attempt(folder, 0, ["seed=0"]).has_made(config.parent)
    assert not Attempt(folder, 0, ["seed=0"]).has_made(tmp_path / "none")


def test_a_restarting_sweep_trains_nothing_twice(runs: Any, capsys: Any) -> None:
    assert train(["-m", "evaluation.k=5,6", "restart=true"]) == 2 and runs[0] == [] and os.listdir() == []
    (line,) = capsys.readouterr().err.splitlines()
    assert "job 1 (evaluation.k=6): restart=true would set aside" in line and "iwae-eval" in line
    assert train(["-m", "evaluation.k=5,6"]) == 0 and runs[0] == [0, 0]
    assert train(["-m", "seed=0,1", "restart=true"]) == 0 and runs[0] == [0, 0, 0, 1]
    runs[1][1] = RunFailed("it diverged")
    for typed, said in ((), "the same command resumes"), (("restart=true",), "the same command without restart=true"):
        capsys.readouterr()
        assert train(["-m", "seed=0,1", *typed]) == 1 and said in capsys.readouterr().out


def test_the_keys_of_a_preset_sweep_vary_once(runs: Any, tmp_path: Path) -> None:
    preset = "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,1', objective.k: 2}}}"
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "seeds.yaml").write_text(f"# @package _global_\n{preset}\n")
    assert train(["--config-dir=conf", "experiment=seeds", "batch_size=20,30"]) == 0 and runs[0] == [0, 0, 1, 1]
    assert sweep_of(Path("outputs"))["varied"] == ["seed", "batch_size"]


def test_a_logger_has_its_token_and_its_sweep_which_no_file_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "hunter2")
    seen: list[tuple[int, str, str]] = []

    def pretend(experiment: Any) -> dict[str, Any]:
        seen.append((experiment.seed, experiment.loggers[0].name, experiment.group))
        return {"validation": {"nll": 0.0}}

    monkeypatch.setattr("iwae_cli.runs.runner.run", pretend)
    assert train(["-m", "seed=0,1", "logger=offline", "logger.wandb.name=x${oc.env:TOKEN}"]) == 0
    assert seen == [(seed, "xhunter2", sweep_of(Path("outputs"))["group"]) for seed in range(2)]
    assert not [path for path in Path().rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]


def test_a_key_that_not_all_choices_have_is_checked_job_by_job(runs: Any, capsys: Any) -> None:
    line = ["-m", "objective.m=4", "objective.k=5", "seed=0,1"]
    assert train([*line, "objective=miwae,piwae"]) == 0 and runs[0] == [0, 0, 1, 1]
    assert all("-k20-" in job["identity"] for job in sweep_of(Path("outputs"))["jobs"])
    assert train([*line, "objective=iwae,miwae"]) == 2
    assert "objective.m is unknown" in capsys.readouterr().err and len(runs[0]) == 4


def test_two_sweeps_share_a_run_and_the_order_of_jobs_does_not_matter(tmp_path: Path) -> None:
    up, down = tmp_path / "up", tmp_path / "down"
    assert run("-m", "seed=0,1", *QUICK, f"output_dir={up}")[0] == 0
    before = {folder.name: (folder / "checkpoint.pt").stat().st_mtime_ns for folder in run_folders(up)}
    code, out, _ = run("-m", "seed=1,2", *QUICK, f"output_dir={up}")
    assert code == 0 and "2 finished" in out
    after = {folder.name: (folder / "checkpoint.pt").stat().st_mtime_ns for folder in run_folders(up)}
    assert len(before) == 2 and len(after) == 3 and before.items() <= after.items()
    assert len(list(up.glob("sweeps/*/sweep.json"))) == 2
    assert run("-m", "seed=1,0", *QUICK, f"output_dir={down}")[0] == 0
    assert len(run_folders(down)) == 2 and all(bits(folder) == bits(up / folder.name) for folder in run_folders(down))


def test_the_same_sweep_twice_at_the_same_time(tmp_path: Path, runs: Any) -> None:
    assert train(["-m", "seed=0,1"]) == 0
    (folder,) = Path("outputs/sweeps").iterdir()
    with RunLock(folder):
        assert train(["-m", "seed=0,1"]) == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_and_stopped_a_sweep_is_finished_by_the_same_command(engine: list[str], tmp_path: Path) -> None:
    """First SIGKILL takes one job, where it is not the sweep itself; then SIGTERM comes to what is left.

    The first job fails: the command reports it, and the others finish, with the numbers of a run alone.
    """
    # Side by side, the first has to last until the second has begun.
    alone = ["seed=0", *QUICK, "schedule.passes=30", "batch_size=20", "validation.every=40"]
    place = tmp_path / "many"
    line = [*alone, "optimizer.lr=1e30,0.001,0.002", *engine, f"output_dir={place}"]
    process, since, left = start(*line), 0.0, 2
    killed: dict[Path, int] = {}
    if "ray" not in engine[0]:
        os.kill(wait_for(process, place, 1)[0]["pid"], signal.SIGKILL)
        out, err = process.communicate(timeout=300)
        left = 2 - statuses(place).count("finished")
        assert process.returncode == 1 and "killed" in statuses(place), (out, err)
        assert "the launcher gave up" in err and "Traceback" not in err
        assert left == 1 or "submitit" not in engine[0], "jobs of submitit stand alone"
        killed = {folder: saved_step(folder) for folder in run_folders(place)}
        since, process = time.time(), start(*line)
    jobs = wait_for(process, place, left, since)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, (out, err)
    assert "Traceback" not in err and "interrupted" in out
    assert err.count("diverged in pass 1") == 1 and "job 0 (optimizer.lr=1e+30) failed" in err
    stopped = {folder: saved_step(folder) for record in jobs if (folder := place / Path(record["folder"]).name)}
    assert all(read_json(folder / "status.json")["status"] == "interrupted" for folder in stopped)
    assert all(0 < step < 30 * 65 for step in stopped.values())
    # In this process: workers are known to begin.
    code, out, err = run("-m", *line, *(["hydra.launcher.n_jobs=1"] if "joblib" in engine[0] else []))
    sweep = sweep_of(place)
    assert code == 1 and statuses(place) == ["failed", "finished", "finished"], err
    assert "1 failed, 2 finished" in out and "job 1 (optimizer.lr=0.001) finished: NLL_5 test" in err
    assert all(line.startswith(("job ", "iwae-train: ")) for line in err.splitlines()), err
    for folder, step in stopped.items():
        log = (folder / "train.log").read_text()
        assert f"begin at step {step} of" in log and f"begin at step {killed.get(folder, 0)} of" in log
    assert bits(sweep["jobs"][1]["path"]) == bits(finished(tmp_path / "one", *alone))


def test_stopped_a_sweep_in_one_process_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iwae_cli.training.trainer.SAVE_EVERY_SECONDS", -1.0)
    line = ["-m", "seed=0,1", *QUICK, f"output_dir={tmp_path}"]
    with Fault(terminate, ["checkpoint.pt", "checkpoint.pt"], tmp_path):
        code, out, err = run(*line)
    assert code == 143 and "Traceback" not in err and "interrupted" in out
    assert statuses(tmp_path) == ["interrupted", "pending"]
    (folder,) = run_folders(tmp_path)
    step = saved_step(folder)
    code, out, err = run(*line)
    assert code == 0 and statuses(tmp_path) == ["finished", "finished"], err
    assert 0 < step < 13 and f"begin at step {step} of" in (folder / "train.log").read_text()


@needs("hydra_ray_launcher")
def test_ray_begins_a_lost_job_again(tmp_path: Path) -> None:
    (ray,) = (engine.values[0] for engine in ENGINES if engine.id == "ray")
    line = ["seed=0,1", *QUICK, "schedule.passes=20", "batch_size=20", *ray, f"output_dir={tmp_path}"]
    process = start(*line)
    os.kill(wait_for(process, tmp_path, 1)[0]["pid"], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and statuses(tmp_path) == ["finished"] * 2, (out, err)


@needs("hydra_submitit_launcher")
def test_a_preempted_job_saves_its_state_and_is_queued_again(tmp_path: Path) -> None:
    line = ["seed=0", *QUICK, "schedule.passes=60", "batch_size=20", "hydra/launcher=submitit_local"]
    process = start(*line, "restart=true", f"output_dir={tmp_path}")  # which begins once, not at every turn
    (record,) = wait_for(process, tmp_path, 1)
    os.kill(record["pid"], signal.SIGUSR2)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, (out, err)
    (folder,) = run_folders(tmp_path)
    log = (folder / "train.log").read_text()
    first, second = (entry for entry in log.splitlines() if "begin at step" in entry)
    assert "begin at step 0 of" in first and "begin at step 0 of" not in second
    assert "interrupted by signal 12" in log
    undisturbed = finished(tmp_path / "alone", "seed=0", *QUICK, "schedule.passes=60", "batch_size=20")
    assert bits(undisturbed) == bits(folder)


def test_gpus_are_assigned_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assigned = []
    for number in range(5):
        device = Device("auto")
        device.assign_gpu(number)
        assigned.append(str(device.resolve()))
    assert assigned == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
    on_cpu = Device("cpu")
    on_cpu.assign_gpu(1)
    assert str(on_cpu.resolve()) == "cpu"


def test_cores_are_divided() -> None:
    joblib, local, ray = (LAUNCHERS[name] for name in ("joblib", "submitit_local", "ray"))
    assert joblib.workers({"n_jobs": 4}, 12, 16) == 4
    assert joblib.workers({"n_jobs": 4}, 2, 16) == 8
    assert joblib.workers({"n_jobs": 4}, 3, 16) == 5
    assert joblib.workers({"n_jobs": 4}, 12, 2) == 1
    assert local.workers({}, 8, 16) == 2
    assert ray.workers({"ray": {"remote": {"num_cpus": 3}}}, 8, 16) == 3
    assert adapter("basic").workers({}, 8, 16) is None
    with pytest.raises(UserError, match="n_jobs"):
        joblib.workers({"n_jobs": 0}, 12, 16)
