"""Which commands mean the same run, and what is done about a run that is there already."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import TINY, TINY_TWO_LAYERS, arrays, bits, finished, read_json, run, run_folders, snapshot

from iwae_cli.cli.compose import plan
from iwae_cli.cli.evaluate import evaluate as iwae_eval
from iwae_cli.cli.help import conf_folder
from iwae_cli.record.identity import evaluation_name
from iwae_cli.training.trainer import Trainer


def identity(*overrides: str) -> str:
    return plan(overrides, False, None).jobs[0].experiment().identity()


def evaluation(*overrides: str) -> str:
    return evaluation_name(plan(list(overrides), False, None).jobs[0].config)


def test_a_choice_that_lies_deeper_makes_no_deeper_folder(tmp_path: Path) -> None:
    own = tmp_path / "own" / "model" / "mine"
    own.mkdir(parents=True)
    shutil.copyfile(conf_folder() / "model" / "one_layer.yaml", own / "small.yaml")
    job = plan(["model=mine/small"], False, str(tmp_path / "own")).jobs[0]
    assert job.experiment().identity() == identity().replace("-one_layer-", "-mine_small-")


OF_THE_WEIGHTS = [
    "seed=1",
    "batch_size=21",
    "data=linear_gaussian",
    "model=two_layer",
    "model.latent_sizes=[49]",
    "objective=elbo",
    "objective.k=6",
    "objective.gradient=dreg",
    "optimizer=burda",
    "optimizer.lr=0.002",
    "schedule=cosine",
    "schedule.passes=99",
    "schedule.final=0.2",
    "device.precision=float64",
    "evaluation.validation_k=51",
    "evaluation.validation_every=4",
]
OF_THE_EVALUATION = [
    "evaluation.k=500",
    "evaluation.splits=[test]",
    "evaluation.weights=best",
    "evaluation.seed=1",
    "evaluation.binarization_seed=1",
    "evaluation.precision=bf16",
]
OF_NEITHER = [
    "output_dir=elsewhere",
    "data_dir=elsewhere",
    "logger=disabled",
    "logger.wandb.tags=[a]",
    "device=cpu",
    "device.threads=2",
    "evaluation.rows=1000",
    "evaluation.workers=1",
    "restart=true",
]


def test_what_decides_the_weights_makes_another_run() -> None:
    names = {override: identity(override) for override in ["seed=0", *OF_THE_WEIGHTS]}
    assert len(set(names.values())) == len(names), names
    assert identity("seed=0") == identity()


@pytest.mark.parametrize("override", [*OF_THE_EVALUATION, *OF_NEITHER])
def test_what_cannot_change_the_weights_does_not(override: str) -> None:
    assert identity(override) == identity()


def test_what_decides_the_numbers_makes_another_evaluation() -> None:
    names = {override: evaluation(override) for override in ["evaluation.k=5000", *OF_THE_EVALUATION]}
    names["device.precision=float64"] = evaluation("device.precision=float64")
    assert len(set(names.values())) == len(names), names
    assert {evaluation(override) for override in OF_NEITHER} == {evaluation()}
    assert evaluation("evaluation.splits=[test,validation]") == evaluation("evaluation.splits=[validation,test]")


def test_the_name_can_be_read() -> None:
    name = identity("objective=iwae", "objective.k=50", "model=two_layer", "seed=3")
    assert name.startswith("digits-two_layer-iwae-k50-seed3-")
    assert evaluation("evaluation.splits=[test]").startswith("k5000-test-last-")


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    """data.path is a path; what it names decides."""
    from scipy.io import savemat

    for name, value in (("a", 0.25), ("b", 0.25), ("c", 0.5)):
        images = torch.full((784, 20), value).numpy()
        savemat(tmp_path / f"{name}.mat", {"data": images, "testdata": images})
    a, b, c = (identity("data=omniglot", f"data.path={tmp_path / name}.mat") for name in "abc")
    assert a == b != c


# Runs that are there already. Each test has a copy of one finished run.


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def outputs(template: Path, tmp_path: Path) -> Path:
    if not run_folders(template):
        finished(template, *TINY)
    shutil.copytree(template, tmp_path / "outputs")
    return tmp_path / "outputs"


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "run", lambda *_: pytest.fail("it trains"))


def only(outputs: Path) -> Path:
    (folder,) = run_folders(outputs)
    return folder


def test_the_same_command_again_prints_the_result_and_touches_nothing(outputs: Path, no_training: None) -> None:
    before = snapshot(only(outputs))
    code, out, err = run(*TINY, f"output_dir={outputs}")
    assert code == 0, err
    assert snapshot(only(outputs)) == before
    result = read_json(only(outputs) / "result.json")
    assert f"{result['test']['nll']:.2f}" in out and only(outputs).name in out


def test_another_evaluation_skips_training_and_both_are_kept(outputs: Path, no_training: None) -> None:
    folder = only(outputs)
    checkpoint, metrics = (snapshot(folder)[name] for name in ("checkpoint.pt", "metrics.csv"))
    first = read_json(folder / "result.json")
    for k in (100, 60):
        code, out, err = run(*TINY, f"output_dir={outputs}", f"evaluation.k={k}")
        assert code == 0 and f"NLL_{k}" in out, err
    assert run_folders(outputs) == [folder]
    kept = {read_json(path)["test"]["k"]: path for path in folder.glob("evaluations/*/result.json")}
    assert sorted(kept) == [50, 60, 100]
    result = read_json(folder / "result.json")
    assert result == read_json(kept[60]) and read_json(kept[50]) == first
    assert (folder / "log_likelihood.npz").read_bytes() == kept[60].with_name("log_likelihood.npz").read_bytes()
    assert not (arrays(folder / "log_likelihood.npz")["ess"] > 60).any()
    assert snapshot(folder)["checkpoint.pt"] == checkpoint
    assert snapshot(folder)["metrics.csv"][1] == metrics[1]
    assert read_json(folder / "status.json")["status"] == "finished"


def test_going_back_to_an_earlier_evaluation_computes_nothing(
    outputs: Path, no_training: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = only(outputs)
    first = read_json(folder / "result.json")
    assert run(*TINY, f"output_dir={outputs}", "evaluation.k=60")[0] == 0
    monkeypatch.setattr("iwae_cli.runs.evaluate.log_likelihood", lambda *_, **__: pytest.fail("it evaluates"))
    assert run(*TINY, f"output_dir={outputs}")[0] == 0
    assert read_json(folder / "result.json") == first


def test_bfloat16_is_another_evaluation_with_its_shift_beside_it(outputs: Path, no_training: None) -> None:
    folder = only(outputs)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    exact = read_json(folder / "result.json")
    del config["evaluation"]["precision"]
    assert evaluation_name(config) == exact["evaluation"]["name"], "as of runs from before there was a choice"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert iwae_eval([str(folder), "evaluation.precision=bf16"]) == 0
    code, out, err = run(*TINY, f"output_dir={outputs}", "evaluation.precision=bf16")
    assert code == 0, err
    result = read_json(folder / "result.json")
    assert (exact["evaluation"]["precision"], result["evaluation"]["precision"]) == ("float32", "bf16")
    test = result["test"]
    assert test["bf16_shift_images"] == test["n"] == 250
    assert test["bf16_shift"] == pytest.approx(test["nll"] - exact["test"]["nll"], abs=1e-5) != 0
    assert f"{test['bf16_shift']:+.4f}" in out
    code, _, err = run(*TINY, f"output_dir={outputs}", "evaluation.precision=bf16", "device.precision=float64")
    assert (code, err.count("\n")) == (2, 1)
    assert "evaluation.precision=bf16 is for device.precision=float32; write evaluation.precision=float32" in err


def test_the_best_weights_are_another_evaluation(outputs: Path, no_training: None) -> None:
    folder = only(outputs)
    best = torch.load(folder / "best.pt", weights_only=True)
    best["model"] = {name: torch.zeros_like(value) for name, value in best["model"].items()}
    torch.save(best, folder / "best.pt")
    last = read_json(folder / "result.json")
    assert run(*TINY, f"output_dir={outputs}", "evaluation.weights=best")[0] == 0
    result = read_json(folder / "result.json")
    assert (last["weights"], result["weights"]) == ("last", "best")
    # All weights zero: every pixel is on with probability 1/2, and nothing depends on the latents.
    assert result["test"]["nll"] == pytest.approx(64 * 0.6931471805599453, rel=1e-6)
    assert result["active_units"] == [0]


def test_restart_sets_the_old_run_aside_and_begins_again(outputs: Path) -> None:
    folder, before, expected = only(outputs), snapshot(only(outputs)), bits(only(outputs))
    for number in (1, 2):
        code, _, err = run(*TINY, f"output_dir={outputs}", "restart=true")
        assert code == 0, err
        assert folder.with_name(f"{folder.name}.old-{number}").is_dir()
        assert bits(folder) == expected
    assert snapshot(folder.with_name(f"{folder.name}.old-1")) == before
    assert snapshot(folder)["checkpoint.pt"][0] > before["checkpoint.pt"][0]


def test_restart_of_what_is_not_there_is_a_beginning(tmp_path: Path) -> None:
    code, _, err = run(*TINY, "schedule.passes=1", f"output_dir={tmp_path / 'new'}", "restart=true")
    assert code == 0, err
    assert [path.name for path in (tmp_path / "new").iterdir()] == [only(tmp_path / "new").name]


def test_a_damaged_result_is_named(outputs: Path) -> None:
    path = only(outputs) / "result.json"
    path.write_text(path.read_text()[:100])
    before = snapshot(only(outputs))
    code, _, err = run(*TINY, f"output_dir={outputs}")
    assert code == 2 and str(path) in err and len(err.strip().splitlines()) == 1
    assert snapshot(only(outputs)) == before
    path.unlink()
    assert run(*TINY, f"output_dir={outputs}")[0] == 0


def test_divergence_is_a_failed_run_with_advice(tmp_path: Path) -> None:
    code, _, err = run(*TINY, "optimizer.lr=1e30", f"output_dir={tmp_path}")
    assert code == 1
    assert "diverged in pass 1" in err and "smaller optimizer.lr" in err and "Traceback" not in err
    status = read_json(only(tmp_path) / "status.json")
    assert status["status"] == "failed" and "diverged" in status["error"]
    assert not (only(tmp_path) / "result.json").exists()


def test_results_do_not_depend_on_the_order_of_the_runs_in_one_process(tmp_path: Path) -> None:
    """One of them asks for float64 and two threads, which torch keeps for the whole process."""
    commands = {
        "a": (*TINY, "device.precision=float64", "device.threads=2", "seed=7"),
        "b": (*TINY_TWO_LAYERS, "objective.gradient=dreg"),
    }
    there = {name: bits(finished(tmp_path / "there", *commands[name])) for name in ("a", "b")}
    back = {name: bits(finished(tmp_path / "back", *commands[name])) for name in ("b", "a")}
    assert there == back
