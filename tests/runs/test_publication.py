"""Between two files, two reads, two states: what a kill or another process finds there never becomes a result."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TINY, TINY_TWO_LAYERS, arrays, bits, finished, read_json, run, run_folders

from iwae_cli.cli import train as cli
from iwae_cli.core.errors import Interrupted
from iwae_cli.core.files import RunLock
from iwae_cli.core.noise import generator
from iwae_cli.runs.runner import Runner


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A finished run of its own for every test."""
    if not run_folders(template):
        finished(template, *TINY)
    shutil.copytree(template, tmp_path / "outputs")
    (found,) = run_folders(tmp_path / "outputs")
    return found


def again(folder: Path, *overrides: str) -> tuple[int, str, str]:
    return run(*TINY, f"output_dir={folder.parent}", *overrides)


class Killed(BaseException):
    """No error that a run may outlive, such as one of its pictures."""


def dies(*_: Any, **__: Any) -> None:
    raise Killed("killed here")


@pytest.mark.parametrize("where", ["write_json", "Runner._pictures"])
def test_the_arrays_always_belong_to_the_result(folder: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bits(folder)
    with monkeypatch.context() as context:
        context.setattr(f"iwae_cli.runs.runner.{where}", dies)
        with pytest.raises(Killed, match="killed here"):
            again(folder, "evaluation.k=60")
    assert read_json(folder / "status.json")["status"] == "failed"
    assert again(folder)[0] == 0
    assert bits(folder) == before


def test_what_was_missing_after_the_result_is_made_by_the_same_command(folder: Path) -> None:
    """As after a kill between the result and the last word of the status."""
    status = read_json(folder / "status.json")
    (folder / "status.json").write_text(json.dumps({**status, "status": "running"}))
    shutil.rmtree(folder / "figures")
    (folder / "metrics.csv").unlink()
    assert again(folder)[0] == 0
    assert read_json(folder / "status.json")["status"] == "finished"
    assert {path.stem for path in (folder / "figures").iterdir()} >= {"training", "bound_vs_k", "samples"}
    assert (folder / "metrics.csv").exists()


@pytest.mark.parametrize("error", [Interrupted(2), RuntimeError("no memory")])
def test_a_finished_run_stays_finished_if_another_evaluation_is_not(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("status.json", "config.yaml", "overrides.yaml", "result.json", "log_likelihood.npz")
    before = {name: (folder / name).read_bytes() for name in files}

    def stopped(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("iwae_cli.runs.evaluate.log_likelihood", stopped)
    if isinstance(error, Interrupted):
        assert again(folder, "evaluation.k=60")[0] == 130
    else:
        with pytest.raises(RuntimeError):
            again(folder, "evaluation.k=60")
    assert {name: (folder / name).read_bytes() for name in files} == before


def test_a_look_at_an_unfinished_run_is_not_taken_for_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best weights may be the same later; step, passes and seconds are not."""
    overrides = (*TINY, "evaluation.weights=best", f"output_dir={tmp_path / 'outputs'}")
    with monkeypatch.context() as context:
        context.setattr(Runner, "on_step", lambda session, step: step == 20 and signal.raise_signal(signal.SIGTERM))
        assert run(*overrides)[0] == 143
    (folder,) = run_folders(tmp_path / "outputs")
    assert cli.evaluate([str(folder)]) == 0
    (look,) = folder.glob("evaluations/*/result.json")
    assert (read_json(look)["status"], read_json(look)["steps"]) == ("unfinished", 20)
    assert run(*overrides)[0] == 0
    result = read_json(folder / "result.json")
    assert (result["status"], result["steps"], result["epochs"]) == ("finished", 26, 2)


def test_a_folder_renamed_while_somebody_waits_at_its_door_is_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process opened the lock file, then ``restart=true`` renamed the folder and made a new one."""
    (tmp_path / "run").mkdir()
    opened: Callable[[RunLock, Path], int] = RunLock._locked
    calls = []

    def slow(lock: RunLock, path: Path) -> int:
        descriptor = opened(lock, path)
        if not calls:
            (tmp_path / "run").rename(tmp_path / "run.old-1")
            (tmp_path / "run").mkdir()
        calls.append(path)
        return descriptor

    monkeypatch.setattr(RunLock, "_locked", slow)
    with RunLock(tmp_path / "run"):
        assert len(calls) == 2 and "process" in (tmp_path / "run" / ".lock").read_text()


def test_the_order_of_the_images_is_drawn_once_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def counted(device: Any, *key: Any) -> torch.Generator:
        drawn.append(key)
        return generator(device, *key)

    monkeypatch.setattr("iwae_cli.training.minibatches.generator", counted)
    finished(tmp_path / "outputs", *TINY)
    assert drawn == [(0, "order", 0), (0, "order", 1)]


def test_a_number_has_one_spelling(folder: Path) -> None:
    assert again(folder, "optimizer.weight_decay=0", "optimizer.lr=0.001")[0] == 0
    assert run_folders(folder.parent) == [folder]


def test_what_a_run_begins_from_must_be_the_same_model(folder: Path) -> None:
    code, _, err = again(folder, f"init_from={folder}", "model.latent_sizes=[4]", "seed=1")
    assert code == 2 and err.endswith(" was run with another model: model.latent_sizes=[3] there, [4] here\n")
    code, _, err = again(folder, f"init_from={folder}", "model=two_layer", *TINY_TWO_LAYERS[1:3], "seed=1")
    assert code == 2 and "model.latent_sizes=[3] there, [4,3] here; model.hidden_sizes=[[8]] there, [[12],[8]]" in err
    assert run_folders(folder.parent) == [folder]


def test_what_a_run_begins_from_must_be_finished(folder: Path) -> None:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({**state, "step": 13}, folder / "checkpoint.pt")
    code, _, err = again(folder, f"init_from={folder}", "seed=1")
    assert code == 2 and "is not finished (step 13 of 26)" in err
    assert run_folders(folder.parent) == [folder]


def test_data_that_has_changed_is_refused(folder: Path) -> None:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({**state, "data_sha256": "0" * 64}, folder / "checkpoint.pt")
    assert cli.evaluate([str(folder), "evaluation.k=60"]) == 2
    assert [path.name for path in folder.glob("evaluations/*")] == [arrays_of(folder)]


def arrays_of(folder: Path) -> str:
    """Name of the one evaluation whose arrays are the run's."""
    (name,) = {
        path.parent.name
        for path in folder.glob("evaluations/*/log_likelihood.npz")
        if arrays(path)["log_px"].tobytes() == arrays(folder / "log_likelihood.npz")["log_px"].tobytes()
    }
    return name


def test_recorded_paths_mean_the_same_from_any_folder(tmp_path: Path) -> None:
    folder = finished(Path("relative"), *TINY, "seed=2")
    recorded = (folder / "config.yaml").read_text()
    assert f"output_dir: {tmp_path / 'relative'}" in recorded
    assert f"data_dir: {tmp_path / 'data'}" in recorded
