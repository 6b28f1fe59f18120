"""The result of a run and its arrays belong together, whichever evaluation or process was interrupted."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from faults import Fault, Forks, terminate
from small_runs import TINY, TINY_TWO_LAYERS, bits, last_of_each, read_json, run, run_folders

from iwae_cli.cli.evaluate import evaluate
from iwae_cli.core.errors import Interrupted
from iwae_cli.training import trainer


def again(folder: Path, *overrides: str) -> tuple[int, str, str]:
    return run(*TINY, f"output_dir={folder.parent}", *overrides)


def test_the_arrays_belong_to_the_result_after_a_kill(folder: Path, forks: Forks) -> None:
    """A finished run is evaluated in another way, and killed while that is published."""
    before = bits(folder)
    for events in (["log_likelihood.npz"], ["result.json"], ["figures/training.png"]):
        forks.start(last_of_each(*TINY, "evaluation.k=60"), "kill", events, folder.parent)
        assert forks.end()[0] == -signal.SIGKILL
        assert read_json(folder / "status.json")["status"] == "running"
    assert again(folder)[0] == 0
    assert bits(folder) == before


def test_a_training_command_leaves_alone_what_iwae_eval_is_writing(folder: Path) -> None:
    def train(folder: Path) -> None:
        assert again(folder, "evaluation.k=60")[0] == 0

    for event in ("log_likelihood.npz", "result.json"):
        with Fault(train, [f"evaluations/k70-*/{event}"], folder.parent) as fault:
            assert evaluate([str(folder), "evaluation.k=70"]) == 0
        assert not fault.left
        (kept,) = folder.glob("evaluations/k70-*")
        assert sorted(path.name for path in kept.iterdir()) == ["log_likelihood.npz", "result.json"]
        shutil.rmtree(kept)


@pytest.mark.parametrize("error", [Interrupted(2), RuntimeError("no memory")])
def test_a_finished_run_stays_finished_if_another_evaluation_fails(folder: Path, error: Exception) -> None:
    def fail(_: Path) -> None:
        raise error

    files = ("status.json", "config.yaml", "overrides.yaml", "result.json", "log_likelihood.npz")
    before = {name: (folder / name).read_bytes() for name in files}
    with Fault(fail, ["check"], folder.parent):
        if isinstance(error, Interrupted):
            assert again(folder, "evaluation.k=60")[0] == 130
        else:
            with pytest.raises(RuntimeError):
                again(folder, "evaluation.k=60")
    assert {name: (folder / name).read_bytes() for name in files} == before


def test_an_evaluation_of_an_unfinished_run_is_not_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best weights may be the same later; step, passes and seconds are not."""
    output_dir = tmp_path / "outputs"
    overrides = (*TINY, "evaluation.weights=best", f"output_dir={output_dir}")
    with monkeypatch.context() as context, Fault(terminate, ["checkpoint.pt"] * 19, output_dir):
        context.setattr(trainer, "SAVE_EVERY_SECONDS", -1.0)
        assert run(*overrides)[0] == 143
    (folder,) = run_folders(output_dir)
    capsys.readouterr()
    assert evaluate([str(folder)]) == 0
    (kept,) = folder.glob("evaluations/*/result.json")
    early = read_json(kept)
    assert (early["status"], early["steps"], early["draws"]) == ("unfinished", 20, (1297 + 7 * 100) * 5)
    assert kept.parent.name == early["evaluation"]["name"] and kept.parent.name.endswith("-step20")
    assert "after step 20 of 26: the training is not finished" in capsys.readouterr().out
    assert run(*overrides)[0] == 0
    assert read_json(kept) == early and len(list(folder.glob("evaluations/*"))) == 2
    result = read_json(folder / "result.json")
    assert (result["status"], result["steps"], result["draws"]) == ("finished", 26, 2 * 1297 * 5)
    assert result["epochs"] == 2


def test_the_source_of_a_run_must_be_the_same_model_and_finished(folder: Path) -> None:
    code, _, err = again(folder, f"init_from={folder}", "model.latent_sizes=[4]", "seed=1")
    assert code == 2 and "model.latent_sizes=[3] there, [4] here" in err
    code, _, err = again(folder, f"init_from={folder}", "model=two_layer", *TINY_TWO_LAYERS[1:3], "seed=1")
    assert code == 2 and "model.latent_sizes=[3] there, [4,3] here; model.hidden_sizes=[[8]] there, [[12],[8]]" in err
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({**state, "step": 13}, folder / "checkpoint.pt")
    code, _, err = again(folder, f"init_from={folder}", "seed=1")
    assert code == 2 and "step 13 of 26" in err
    assert run_folders(folder.parent) == [folder]
