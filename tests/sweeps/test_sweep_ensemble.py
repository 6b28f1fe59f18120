"""``hydra/launcher=batched``: jobs that train at once have the numbers that they have alone, except for rounding."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import killed_at
from small_runs import TINY, bits, last_of_each, read_json, run, run_folders, wandb_records

from iwae_cli.cli.compose import plan
from iwae_cli.core.files import RunLock
from iwae_cli.record.jsonl import read_history
from iwae_cli.runs.experiment import Experiment
from iwae_cli.sweeps import ensemble as sweep_ensemble
from iwae_cli.training import ensemble
from iwae_cli.training.steps.graph import CannotCompileError

BATCHED = "hydra/launcher=batched"
QUICK = (*TINY, "evaluation.k=5")


def sweep(output_dir: Path, *overrides: str) -> tuple[int, str, str]:
    return run("-m", *QUICK, *overrides, f"output_dir={output_dir}")


def loaded(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return checkpoint


def jobs_of(output_dir: Path) -> list[dict[str, Any]]:
    (path,) = output_dir.glob("sweeps/*/sweep.json")
    jobs: list[dict[str, Any]] = read_json(path)["jobs"]
    return [job | {"path": (path.parent / job["folder"]).resolve()} for job in jobs]


def at_once(output_dir: Path) -> list[int]:
    """Return for every run how many runs trained at once."""
    return sorted(loaded(folder)["plan"]["runs_at_once"] for folder in run_folders(output_dir))


def test_the_numbers_are_those_of_each_run_alone(tmp_path: Path) -> None:
    """Of several seeds and objectives."""
    line = ["seed=0,1", "objective=iwae,dreg"]
    assert sweep(tmp_path / "alone", *line)[0] == 0
    code, out, err = sweep(tmp_path / "together", *line, BATCHED)
    assert code == 0, err
    assert "4 finished" in out and "training 4 runs" in err
    folders = run_folders(tmp_path / "together")
    assert [folder.name for folder in folders] == [folder.name for folder in run_folders(tmp_path / "alone")]
    for folder in folders:
        other = tmp_path / "alone" / folder.name
        mine, theirs = loaded(folder), loaded(other)
        torch.testing.assert_close(mine["model"], theirs["model"], rtol=1e-3, atol=1e-5)
        assert mine["plan"]["runs_at_once"] == 4 and theirs["plan"]["runs_at_once"] == 1
        result, expected = read_json(folder / "result.json"), read_json(other / "result.json")
        assert result["test"]["nll"] == pytest.approx(expected["test"]["nll"], abs=1e-3)
        assert result["device"]["train_runs_at_once"] == 4 and expected["device"]["train_runs_at_once"] == 1
        rows, expected_rows = [
            [json.loads(row) for row in (place / "metrics.jsonl").read_text().splitlines()] for place in (folder, other)
        ]
        assert [row.keys() for row in rows] == [row.keys() for row in expected_rows]
        for row, expected_row in zip(rows, expected_rows, strict=True):
            assert row == pytest.approx(expected_row, rel=1e-5)
        assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}


def test_a_failure_is_reported_when_it_happens_and_the_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    ended = sweep_ensemble.Runner.ended

    def spy(self: Any, error: BaseException, *rest: Any) -> BaseException:
        seen.append(f"{error} at step {self.state.step} of {self.trainer.total_steps}")
        return ended(self, error, *rest)

    monkeypatch.setattr(sweep_ensemble.Runner, "ended", spy)
    code, out, err = sweep(tmp_path, "optimizer.lr=0.001,1e30", "logger=offline", BATCHED)
    assert code == 1 and "1 finished, 1 failed" in out
    assert err.count("diverged in pass 1") == 1 and "has no row" not in err
    (text,) = seen
    assert "at step 13 of 26" in text
    for job in jobs_of(tmp_path):
        failed = "optimizer.lr=1e+30" in job["overrides"]
        assert read_json(job["path"] / "status.json")["status"] == ("failed" if failed else "finished")
        records = wandb_records(*job["path"].glob("wandb/offline-run-*"))
        (ended,) = (entry["exit"] for entry in records if entry["type"] == "exit")
        assert (ended.get("exit_code", 0) == 0) != failed
        rows, logged = read_history(job["path"]), [entry for entry in records if entry["type"] == "history"]
        assert len(logged) >= len(rows) >= 2 * (not failed), "the record of the training is in W&B too"


@pytest.mark.parametrize("how", ["a disk that is full", "no graph of those that are left"])
def test_what_happens_to_one_does_not_hurt_the_others(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    on_pass, step = sweep_ensemble.Runner.on_pass, ensemble.batched_step

    def fails(self: Any, step: int, metrics: Any) -> None:
        if self.experiment.seed == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder.path / "metrics.jsonl"))
        on_pass(self, step, metrics)

    def built_once(members: Any, machine_code: bool) -> Any:
        built.append(len(members))
        if len(built) > 1 and how.startswith("no graph"):
            raise CannotCompileError("no compiler any more")
        return step(members, machine_code)

    monkeypatch.setattr(sweep_ensemble.Runner, "on_pass", fails)
    monkeypatch.setattr(ensemble, "batched_step", built_once)
    code, out, err = sweep(tmp_path, "seed=0,1,2", BATCHED)
    assert code == 1 and "2 finished, 1 failed" in out and built == [3, 2], err
    assert err.count("cannot be written to (No space left on device") == 1 and "Traceback" not in err, err
    assert ("train one after the other from here on: no compiler any more" in err) == how.startswith("no graph")
    for folder in run_folders(tmp_path):
        if "seed1" not in folder.name:
            log = (folder / "train.log").read_text()
            if how.startswith("no graph"):
                assert "at step 13 after" in log and "continues alone" in log and "begin at step 13 of 26" in log
                at_once = "3 until step 13, then 2 until step 13, then 1"
            else:
                at_once = "3 until step 13, then 2"
            assert loaded(folder)["plan"]["runs_at_once"] == at_once


def test_a_run_that_cannot_resume_is_reported_when_it_has_its_turn(tmp_path: Path) -> None:
    assert sweep(tmp_path, "seed=0", "schedule.passes=1")[0] == 0
    (folder,) = run_folders(tmp_path)
    for file in ("result.json", "status.json"):
        (folder / file).unlink()
    state = loaded(folder)
    torch.save(state | {"step": 0, "data_sha256": "of other data"}, folder / "checkpoint.pt")
    code, out, err = sweep(tmp_path, "seed=0,1,2", "schedule.passes=1", BATCHED)
    assert code == 1 and "training 2 runs" in err and "1 failed" in out and "2 finished" in out, out[-900:]
    assert err.count("the files of digits are not those that") == 1


def test_stop_at_the_first_error(tmp_path: Path) -> None:
    code, out, err = sweep(tmp_path, "optimizer.lr=0.001,1e30", BATCHED, "on_error=stop")
    assert code == 1 and "1 interrupted, 1 failed" in out, err
    stopped, failed = jobs_of(tmp_path)
    assert (stopped["status"], failed["status"]) == ("interrupted", "failed")
    assert loaded(stopped["path"])["step"] == 13
    assert read_json(stopped["path"] / "status.json")["status"] == "interrupted"


TWO = "seed=0,1"
AT_ONCE = {
    # One objective side by side.
    f"objective=iwae,elbo objective.k=3 optimizer.lr=0.1,0.2 {TWO}": [["ELBO"] * 4 + ["IWAE"] * 4],
    f"objective.k=3,5 {TWO}": [["IWAE"] * 2] * 2,
    f"seed=range({sweep_ensemble.AT_ONCE + 2})": [["IWAE"] * sweep_ensemble.AT_ONCE, ["IWAE"] * 2],
    "objective.k=3,5": [],
    "model.latent_sizes=[3],[4]": [],
    f"objective._target_=own_parts.OwnIWAE {TWO}": [],
    f"training.backward=roulette {TWO}": [],
    f"training.clip=1.0 {TWO}": [],
    f"training.ema=0.9 {TWO}": [],
    f"training.kl_warmup=2 {TWO}": [],
    f"schedule.patience=5 {TWO}": [],
}
"""The jobs of a sweep -> the objectives of those that train at once."""


@pytest.mark.parametrize("line", AT_ONCE)
def test_what_can_train_at_once(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IWAE_ALLOW_TARGETS", "own_parts")
    jobs = plan(last_of_each(*TINY, *line.split()), True, None).jobs
    found = sweep_ensemble.batches([job.experiment() for job in jobs])
    assert [[type(experiment.objective).__name__ for experiment in members] for members in found] == AT_ONCE[line]


def test_jobs_that_cannot_be_mapped_train_alone_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise CannotCompileError("no rule for aten.mine")

    monkeypatch.setattr(sweep_ensemble, "train_ensemble", fail)
    code, _, err = sweep(tmp_path, "seed=0,1", "schedule.passes=1", BATCHED)
    assert code == 0 and "these runs train one after the other from here on: no rule for aten.mine" in err
    assert at_once(tmp_path) == [1, 1]


def test_a_locked_run_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = last_of_each(*QUICK, "seed=0", "schedule.passes=1", f"output_dir={tmp_path}")
    held = plan(line, False, None).jobs[0].experiment().folder().path
    held.mkdir(parents=True)
    lock = RunLock(held)
    lock.__enter__()
    # Not time.sleep itself, which waiting for another program calls too.
    waits = SimpleNamespace(sleep=lambda seconds: lock.__exit__(None, None, None))
    monkeypatch.setattr("iwae_cli.sweeps.jobs.time", waits)
    code, _, err = sweep(tmp_path, "seed=0,1,2", "schedule.passes=1", BATCHED)
    assert code == 0 and "waiting:" in err and "training 2 runs" in err
    assert at_once(tmp_path) == [1, 2, 2]


def test_finished_runs_are_not_repeated_and_restarted_ones_begin_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep(tmp_path, "seed=0,1", "schedule.passes=1", BATCHED)[0] == 0
    before = {folder.name: bits(folder) for folder in run_folders(tmp_path)}
    code, _, err = sweep(tmp_path, "seed=0,1", "schedule.passes=1", BATCHED, "restart=true")
    assert code == 0 and err.count("training 2 runs") == 1, err
    assert {folder.name for folder in run_folders(tmp_path)} == {*before, *(f"{name}.old-1" for name in before)}
    assert {name: bits(tmp_path / name) for name in before} == before
    load = Experiment.load

    def signalled(self: Experiment) -> Any:
        signal.raise_signal(signal.SIGTERM)  # to this thread, so that it is received before the next line
        return load(self)

    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "load", signalled)
        code, out, _ = sweep(tmp_path, "seed=0,1", "evaluation.k=6", "schedule.passes=1", BATCHED)
    assert code == 143 and "2 pending" in out, "a signal before the training stops the sweep"
    for name in before:
        (tmp_path / name / "checkpoint.pt").unlink()
    code, _, err = sweep(tmp_path, "seed=0,1", "schedule.passes=1", BATCHED)
    assert code == 0 and "training" not in err
    assert not any((tmp_path / name / "checkpoint.pt").exists() for name in before)


def test_a_search_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    code, _, err = run("-m", "hydra/sweeper=optuna", "seed=0,1", BATCHED, f"output_dir={tmp_path}")
    assert code == 2 and "a search decides its jobs as it goes" in err


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed sweep of two runs."""
    place = tmp_path_factory.mktemp("whole")
    assert sweep(place, "seed=0,1", BATCHED)[0] == 0
    return place


@pytest.mark.parametrize("died", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_sweep_resumes(
    died: signal.Signals, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the second of two ends a step that the first has ended."""
    line = last_of_each("-m", *QUICK, "seed=0,1", BATCHED, f"output_dir={tmp_path / 'stopped'}")
    if died == signal.SIGKILL:
        killed_at(17, line, seed=1)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(
                sweep_ensemble.Runner,
                "on_step",
                lambda self, step: step == 17 and self.experiment.seed == 1 and signal.raise_signal(died),
            )
            assert run(*line)[0] == 143
        assert [job["status"] for job in jobs_of(tmp_path / "stopped")] == ["interrupted"] * 2
    folders = run_folders(tmp_path / "stopped")
    steps = [loaded(folder)["step"] for folder in folders]
    assert steps == ([17, 16] if died == signal.SIGKILL else [17, 17])
    exit_code, _, err = sweep(tmp_path / "stopped", "seed=0,1", BATCHED)
    assert exit_code == 0, err
    for folder in folders:
        expected = whole / folder.name
        if died == signal.SIGKILL:
            # At different steps they cannot train at once: each resumes alone, and warns.
            assert "resuming is not exact: runs_at_once was 2 and is 1" in (folder / "train.log").read_text()
            torch.testing.assert_close(loaded(folder)["model"], loaded(expected)["model"], rtol=1e-3, atol=1e-5)
        else:
            assert bits(folder) == bits(expected)
