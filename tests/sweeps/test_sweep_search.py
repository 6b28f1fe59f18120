"""A search minimizes the validation NLL, accepts failures as results, and resumes after SIGKILL."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path

import pytest
from small_runs import TINY, read_json, run, run_folders
from test_sweep import needs, start, statuses, sweep_of, wait_for

from iwae_cli.cli.train import train

LINE = (*TINY, "schedule.passes=1", "evaluation.k=5", "evaluation.splits=[validation]", "hydra/sweeper=optuna")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.skipif(not needs("hydra_optuna_sweeper").args[0], reason="optuna is installed")
def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["-m", "hydra/sweeper=optuna"], ["experiment=sweeps/search"]):
        assert train(argv) == 2
        assert "pip install 'iwae-cli[optuna]'" in capsys.readouterr().err and os.listdir() == []


@needs("hydra_optuna_sweeper")
def test_a_search_minimizes_the_validation_nll_and_counts_what_is_done(tmp_path: Path) -> None:
    tmp_path /= "o'b, c=d"  # marks of Hydra's grammar
    place, lr = f'output_dir="{tmp_path}"', "optimizer.lr=tag(log,interval(1e-4,1e-2))"
    done = start(*LINE, lr, "hydra.sweeper.n_trials=2", place)
    assert done.wait(300) == 0, done.communicate()
    assert statuses(tmp_path) == ["finished"] * 2
    more = start(*LINE, lr, "hydra.sweeper.n_trials=3", place)
    out, err = more.communicate(timeout=300)
    assert more.returncode == 0, err
    assert statuses(tmp_path) == ["finished"] * 3 and len(run_folders(tmp_path)) == 3
    import optuna

    (storage,) = tmp_path.glob("sweeps/*/optuna.db")
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{storage}")
    trials = optuna.load_study(study.study_name, f"sqlite:///{storage}").trials
    expected = [read_json(job["path"] / "result.json")["validation"]["nll"] for job in sweep_of(tmp_path)["jobs"]]
    assert [trial.value for trial in trials] == expected
    best = trials[expected.index(min(expected))]
    (winner,) = [line for line in out.splitlines() if line.startswith("winner ")]
    assert f"job {best.number} (optimizer.lr={best.params['optimizer.lr']}), " in winner
    assert f"least NLL_5 validation: {min(expected):.4f} nats" in winner
    run_folder = sweep_of(tmp_path)["jobs"][best.number]["path"]
    (following,) = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("next ")]
    program, named, split = shlex.split(following)
    assert (program, Path(named).resolve(), split) == ("iwae-eval", run_folder, "evaluation.splits=[test]")
    assert f"job 2 (optimizer.lr={trials[2].params['optimizer.lr']}) finished: NLL_5 validation" in err


@needs("hydra_optuna_sweeper")
def test_a_trial_that_fails_is_a_result(tmp_path: Path) -> None:
    line = ["optimizer.lr=choice(1e30,1e-3)", "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.seed=0"]
    done = start(*LINE, *line, f"output_dir={tmp_path}")
    _, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert {"failed", "finished"} == set(statuses(tmp_path)) and "diverged" in err


@needs("hydra_optuna_sweeper")
def test_a_killed_search_finishes_the_trial_that_was_cut_short(tmp_path: Path) -> None:
    line = [*LINE, "schedule.passes=40", "batch_size=20", "optimizer.lr=interval(1e-4,1e-2)"]
    line += ["hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1", f"output_dir={tmp_path}", "restart=true"]
    process = start(*line)
    wait_for(process, tmp_path, 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (cut,) = run_folders(tmp_path)
    again = start(*line)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert statuses(tmp_path) == ["finished"] * 2 and len(run_folders(tmp_path)) == 2
    assert (cut / "result.json").exists()


@needs("hydra_optuna_sweeper")
def test_a_search_that_cannot_be_is_refused_before_anything_runs() -> None:
    for wrong, message in {
        "evaluation.splits=[test]": "evaluation.splits must hold validation",
        "objective.kk=1,5": "objective.kk is unknown",
        "objective.k=choice(0,5)": "objective.k must be >= 1, got 0",
        "hydra.sweeper.custom_search_space=os.system": "would call what it names",
    }.items():
        code, _, err = run("-m", *LINE, wrong)
        assert code == 2 and message in err and os.listdir() == []
