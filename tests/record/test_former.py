"""A run folder that version 0.2.0 wrote is evaluated, reported and loaded, and is not trained a second time."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from small_runs import read_json, run

import iwae_cli
from iwae_cli.cli import report
from iwae_cli.cli.evaluate import evaluate
from iwae_cli.config.build import construct
from iwae_cli.record.folder import RunFolder
from iwae_cli.record.former import translated

STORED = Path(__file__).parents[1] / "support" / "run_of_0_2_0"
COMMAND = ("experiment=smoke", "schedule.passes=1", "model.latent_sizes=[3]", "model.hidden_sizes=[[8]]")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (stored,) = STORED.iterdir()
    return Path(shutil.copytree(stored, tmp_path / "outputs" / stored.name))


def again(folder: Path, *overrides: str) -> tuple[int, str, str]:
    return run(*COMMAND, "logger=disabled", f"output_dir={folder.parent}", *overrides)


def test_its_logger_is_one_of_this_version(folder: Path) -> None:
    config = RunFolder(folder).config()
    assert config["logger"] == {}, "a disabled W&B is no logger"
    assert translated(config) == config
    former = yaml.safe_load((folder / "config.yaml").read_text())
    former["logger"]["mode"] = "offline"
    assert [type(logger).__name__ for logger in construct(translated(former), ["logger"])["logger"]] == ["WandbLogger"]


def test_it_is_evaluated_reported_and_loaded(folder: Path) -> None:
    result = read_json(folder / "result.json")
    assert evaluate([str(folder), "evaluation.splits=[test]"]) == 0
    (kept,) = folder.glob("evaluations/k500-test-last-*/result.json")
    assert read_json(kept)["test"]["nll"] == pytest.approx(result["test"]["nll"], abs=2e-4)
    assert read_json(kept)["identity"] == folder.name
    model, config = iwae_cli.load(folder)
    assert sum(p.numel() for p in model.parameters()) == result["parameters"]
    assert config["model"]["_target_"] == "iwae_cli.models.architectures.mlp.GaussianMLP"
    out = io.StringIO()
    with redirect_stdout(out):
        assert report.report([str(folder.parent)]) == 0
    assert f"{result['test']['nll']:.2f}" in out.getvalue()


def test_its_command_prints_its_result(folder: Path) -> None:
    code, out, err = again(folder)
    assert code == 0 and f"outputs/{folder.name}" in out, err
    assert f"{read_json(folder / 'result.json')['test']['nll']:.2f}" in out
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_it_has_not_finished_is_not_begun_a_second_time_unasked(folder: Path) -> None:
    (folder / "result.json").unlink()
    (folder / "status.json").write_text(json.dumps({"status": "interrupted", "step": 13}))
    for overrides in ((), ("-m", "schedule.passes=1,2")):
        code, _, err = again(folder, *overrides)
        assert code == 2 and err.count("\n") == 1
        assert f"{folder} is this training, begun by iwae-cli 0.2.0 and not finished" in err and "restart=true" in err
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    quick = ("evaluation.refine=0", "evaluation.k=5")
    assert again(folder, *quick, "seed=1")[0] == 0
    assert again(folder, *quick, "restart=true")[0] == 0
    assert again(folder, *quick)[0] == 0, "the new run is found first"
    assert len(list(folder.parent.iterdir())) == 3
