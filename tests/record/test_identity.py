"""Which commands mean the same run, and what is done about a run that is there already."""

from __future__ import annotations

import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.io import savemat
from small_runs import TINY, TINY_TWO_LAYERS, arrays, bits, evaluate, finished, read_json, run, run_folders, snapshot

from iwae_cli.cli.compose import plan
from iwae_cli.cli.evaluate import evaluate as iwae_eval
from iwae_cli.cli.help import conf_folder
from iwae_cli.core.errors import UserError
from iwae_cli.evaluation.ais.estimator import AIS
from iwae_cli.objectives.iwae import IWAE
from iwae_cli.record.identity import evaluation_name, one_spelling
from iwae_cli.training.trainer import Trainer


def identity(*overrides: str) -> str:
    return plan(list(overrides), False, None).jobs[0].experiment().identity()


def evaluation(*overrides: str) -> str:
    return evaluation_name(plan(list(overrides), False, None).jobs[0].config)


OF_THE_WEIGHTS = (
    *("seed=1", "batch_size=21", "data=linear_gaussian", "model=two_layer", "model.latent_sizes=[49]"),
    *("objective=elbo", "objective.k=6", "objective.gradient=dreg", "optimizer=burda", "optimizer.lr=0.002"),
    *("schedule=cosine", "schedule.passes=99", "schedule.final=0.2", "device.precision=float64"),
    *("validation.k=51", "validation.every=4"),
)
OF_THE_EVALUATION = (
    *("evaluation=smoke", "evaluation.splits=[test]", "evaluation.weights=best", "evaluation.seed=1"),
    *("evaluation.binarization_seed=1", "evaluation.precision=bf16"),
)
OF_NEITHER = (
    *("output_dir=elsewhere", "data_dir=elsewhere", "logger=disabled", "logger.wandb.tags=[a]", "device=cpu"),
    *("device.threads=2", "evaluation.rows=1000", "evaluation.workers=1", "restart=true", "on_error=stop"),
)


def test_what_decides_the_weights_makes_another_run() -> None:
    names = {override: identity(override) for override in ["seed=0", *OF_THE_WEIGHTS]}
    assert len(set(names.values())) == len(names), names
    assert identity("seed=0") == identity()


def test_what_cannot_change_the_weights_does_not() -> None:
    assert {identity(override) for override in (*OF_THE_EVALUATION, *OF_NEITHER)} == {identity()}


def test_what_decides_the_numbers_makes_another_evaluation() -> None:
    names = {override: evaluation(override) for override in ["evaluation.k=5000", *OF_THE_EVALUATION]}
    names["device.precision=float64"] = evaluation("device.precision=float64")
    assert len(set(names.values())) == len(names), names
    assert {evaluation(override) for override in OF_NEITHER} == {evaluation()}
    assert evaluation("evaluation.splits=[test,validation]") == evaluation("evaluation.splits=[validation,test]")


def test_the_readable_part_names_the_objects(tmp_path: Path) -> None:
    deeper = ("model.latent_sizes=[100,50,20]", "model.hidden_sizes=[[9],[8],[7]]")
    assert identity(*deeper, "seed=3").startswith("digits-gaussian_mlp_100_50_20-iwae-k5-seed3-")
    assert identity("objective=dreg", "objective.k=50").startswith("digits-gaussian_mlp_50-iwae_dreg-k50-seed0-")
    chosen = ("model.posterior=full", "model.prior=mixture", "model.activation=tanh")  # the last is the default
    assert identity(*deeper, *chosen).startswith("digits-gaussian_mlp_100_50_20_mixture_full-iwae-k5-seed0-")
    assert identity("model=conv").startswith("digits-gaussian_convolutional_50-iwae-k5-")
    assert evaluation("evaluation.splits=[test]").startswith("k5000-test-last-")


def test_a_dict_and_a_text_which_may_be_a_secret_are_not_in_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from typing import Literal\n"
        "from iwae_cli.models.architectures.mlp import GaussianMLP\n"
        "class MyMLP(GaussianMLP):\n"
        "    def __init__(self, options: dict[str, int] = {}, text: str = '', form: Literal['a', 'b'] = 'a'):\n"
        "        super().__init__([3], [[8]])\n"
    )
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(
        "_target_: mine.MyMLP\noptions: {a: 1}\ntext: token\nform: b\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("IWAE_ALLOW_TARGETS", "mine")
    (job,) = plan(["model=mine"], False, "conf").jobs
    assert job.experiment().identity().startswith("digits-my_mlp_b-iwae-k5-")


def test_a_training_whose_images_began_otherwise_does_not_answer(tmp_path: Path) -> None:
    """In version 0.6 the images of a VampPrior began partly outside of [0, 1], where they stayed."""
    (job,) = plan(["model.prior=vamp", "model.prior_components=3", f"output_dir={tmp_path}"], False, None).jobs
    assert not job.experiment().identity().endswith("-f7877bd2")


def test_a_key_without_effect_makes_no_other_model_of_a_first_run(tiny_run: Path, tmp_path: Path) -> None:
    asked = (*TINY, f"init_from={tiny_run}", f"output_dir={tmp_path}")
    (job,) = plan([*asked, "model.prior_components=9", "model.posterior_size=9"], False, None).jobs
    job.experiment().check()
    (job,) = plan([*asked, "model.prior=mixture"], False, None).jobs
    with pytest.raises(UserError, match="was run with another model"):
        job.experiment().check()


def test_an_optimizer_continues_with_all_that_it_keeps_or_not_at_all(tiny_run: Path, tmp_path: Path) -> None:
    asked = (*TINY, f"init_from={tiny_run}", "with_optimizer=true", "seed=1", f"output_dir={tmp_path}")
    code, _, err = run(*asked, "+optimizer.amsgrad=true")
    assert code == 2 and err.count("\n") == 1 and "kept no max_exp_avg_sq" in err and "with_optimizer=false" in err
    assert "optimizer.amsgrad=the default there, true here" in err and not run_folders(tmp_path)
    finished(tmp_path, *asked, "optimizer.lr=0.01")


def test_two_spellings_of_one_training_are_one(tmp_path: Path) -> None:
    assert identity("objective=dreg") == identity("objective.gradient=dreg") != identity()
    assert identity("model.latent_sizes=[100,50]", "model.hidden_sizes=[[200,200],[100,100]]") == identity(
        "model=two_layer"
    )
    assert identity("schedule=constant", "schedule.passes=5") == identity("schedule=smoke", "schedule.passes=5")
    assert identity("optimizer.lr=1", "optimizer.weight_decay=0") == identity("optimizer.lr=1.0")
    for schedule in ("linear", "moments"):  # beta_1 is of schedule=log alone
        tvo = identity("objective=tvo", f"objective.schedule={schedule}", "objective.beta_1=0.3")
        assert tvo == identity("objective=tvo", f"objective.schedule={schedule}")
    assert identity("objective=tvo", "objective.beta_1=0.3") != identity("objective=tvo")
    one = ("objective=tvo", "objective.partitions=1")  # which is the ELBO with any schedule
    assert identity(*one) == identity(*one, "objective.schedule=linear") == identity(*one, "objective.beta_1=0.3")
    node = yaml.safe_load((conf_folder() / "model" / "one_layer.yaml").read_text())
    short = {key: value for key, value in node.items() if key != "likelihood"}
    (tmp_path / "model" / "mine").mkdir(parents=True)
    (tmp_path / "model" / "mine" / "short.yaml").write_text(yaml.safe_dump(short))
    (job,) = plan(["model=mine/short"], False, str(tmp_path)).jobs
    assert "likelihood" not in job.config["model"]
    assert job.experiment().identity() == identity()


def test_a_class_of_this_package_may_move_and_one_of_a_user_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash holds the name of the one, and the dotted path of the other."""
    node = {"_target_": "iwae_cli.objectives.iwae.IWAE", "k": 5}
    for package in ("iwae_cli", "mine"):
        twin = type("IWAE", (IWAE,), {"__module__": f"{package}.objectives.elsewhere"})
        monkeypatch.setitem(sys.modules, twin.__module__, types.ModuleType(twin.__module__))
        sys.modules[twin.__module__].IWAE = twin
        spelled = one_spelling({**node, "_target_": f"{twin.__module__}.IWAE"})
        assert (spelled == one_spelling(node)) == (package == "iwae_cli")


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    for name, value in (("a", 0.25), ("b", 0.25), ("c", 0.5)):
        images = torch.full((784, 20), value).numpy()
        savemat(tmp_path / f"{name}.mat", {"data": images, "testdata": images})
    a, b, c = (identity("data=omniglot", f"data.path={tmp_path / name}.mat") for name in "abc")
    assert a == b != c


def test_a_finished_run_needs_no_data(tmp_path: Path) -> None:
    """It has its result; a training or an evaluation that would need the file has the error of the data."""
    images = np.random.default_rng(0).integers(0, 256, (784, 60)) / 255.0
    savemat(tmp_path / "a.mat", {"data": images[:, :40], "testdata": images[:, 40:]})
    outputs = tmp_path / "outputs"
    command = (*TINY, "data=omniglot", f"data.path={tmp_path / 'a.mat'}", "evaluation.k=5", f"output_dir={outputs}")
    folder = finished(outputs, *command)
    (tmp_path / "a.mat").rename(tmp_path / "b.mat")
    for lost in ((), ("metrics.csv",)):
        for name in lost:
            (folder / name).unlink()
        code, out, err = run(*command)
        line, *more = err.splitlines()
        assert code == 0 and folder.name in out and len(line) <= 300
        assert "the data could not be compared" in line and "a.mat" in line
        assert len(more) == len(lost) and all(text.startswith("not regenerated: ") for text in more)
    for other in ("seed=1", "evaluation.k=6", "optimizer.lr=0.01", "restart=true"):
        code, _, err = run(*command, other)
        assert code == 2 and err.count("\n") == 1 and f"data.path names {tmp_path / 'a.mat'}" in err, other
    assert [path.name for path in outputs.iterdir()] == [folder.name], "nothing is set aside for a new run"


SHAPES = """
from pathlib import Path
import numpy as np
import torch
from iwae_cli.data.base import Data, Dataset
from shapes_helper import SPLITS

class Shapes(Dataset):
    name, observation = "shapes", "binary"

    def __init__(self, source: Path | None = None, data_dir: str = "", files: list[str] | None = None, n: int = 60):
        self.read = [source] if source else [f"{data_dir}/a.npy"] if data_dir else files

    def load(self) -> Data:
        x = torch.cat([torch.from_numpy(np.load(file)) for file in self.read])
        return Data("shapes", "shapes", *x.tensor_split(SPLITS), 2, "fixed", (8, 8))
"""


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user's data set: its yaml, its module with a helper, and a file that it reads."""
    (tmp_path / "conf" / "data").mkdir(parents=True)
    arguments = "source: null\ndata_dir: ''\nfiles: null\n"
    (tmp_path / "conf" / "data" / "shapes.yaml").write_text(f"_target_: shapes.Shapes\n{arguments}")
    (tmp_path / "shapes.py").write_text(SHAPES)
    (tmp_path / "shapes_helper.py").write_text("SPLITS = [40, 50]\n")
    (tmp_path / "images").mkdir()
    write_images(tmp_path, 0)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("IWAE_ALLOW_TARGETS", "shapes")
    for name in ("shapes", "shapes_helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def write_images(folder: Path, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 2, (60, 64), dtype=np.uint8)
    np.save(folder / "images" / "a.npy", images)


def shapes_command(*overrides: str) -> tuple[str, ...]:
    return ("--config-dir", "conf", *TINY, "data=shapes", "schedule.passes=1", "evaluation.k=2", *overrides)


@pytest.mark.parametrize("argument", ["source=images/a.npy", "data_dir=images", "files=[images/a.npy]"])
def test_other_content_under_one_path_of_a_users_data_set_is_another_run(shapes: Path, argument: str) -> None:
    """An argument is a path by its annotation or by its name; what a folder hides is not looked at."""
    outputs = shapes / "outputs"
    command = shapes_command(f"data.{argument}", f"output_dir={outputs}")
    first = finished(outputs, *command)
    recorded = str(yaml.safe_load((first / "config.yaml").read_text())["data"])
    assert str(shapes / "images") in recorded, "absolute, so that iwae-eval finds it from any folder"
    code, _, err = evaluate(first, "evaluation.k=3")
    assert code == 0, err
    (shapes / "images" / ".lock").touch()
    (shapes / "images" / ".git" / "objects").mkdir(parents=True)
    (shapes / "images" / ".git" / "objects" / "index").touch()
    code, out, err = run(*command)
    assert (code, err) == (0, "") and first.name in out
    write_images(shapes, 1)
    second = finished(outputs, *command)
    (of_first, of_second) = (read_json(folder / "result.json") for folder in (first, second))
    assert of_first["test"]["nll"] != of_second["test"]["nll"]
    write_images(shapes, 0)
    code, out, err = run(*command)
    assert (code, err) == (0, "") and first.name in out and "trained already" in out


def test_a_finished_run_compares_its_data(shapes: Path) -> None:
    """Also where no argument is a path, and where a version before 0.5 has not hashed it."""
    outputs = shapes / "outputs"
    command = shapes_command("data.source=images/a.npy", f"output_dir={outputs}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iwae_cli.runs.experiment.paths_fingerprint", lambda *_: None)
        folder = finished(outputs, *command)
        before = snapshot(folder)
    assert run(*command)[0] == 0
    write_images(shapes, 1)
    for more in ((), ("evaluation.k=3",)):
        code, out, err = run(*command, *more)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "the files of shapes are not those that" in err and "restart=true" in err
    assert run_folders(outputs) == [folder] and snapshot(folder) == before
    assert run(*command, "restart=true")[0] == 0
    assert len(run_folders(outputs)) == 2


def test_nothing_is_downloaded_to_compare(tmp_path: Path) -> None:
    (job,) = plan(["data=mnist", f"data_dir={tmp_path / 'none'}"], False, None).jobs
    with pytest.raises(UserError, match="of data=mnist are not in"):
        job.experiment().data_sha256()
    assert not (tmp_path / "none").exists()


def test_a_change_of_a_users_source_is_said(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of what it imports; the result stays that of the code as it was."""
    outputs = shapes / "outputs"
    command = shapes_command("data.source=images/a.npy", f"output_dir={outputs}")
    folder = finished(outputs, *command)
    assert set(read_json(folder / "result.json")["sources"]) == {"shapes.py", "shapes_helper.py"}
    (shapes / "unrelated.py").touch()
    before = snapshot(folder)
    for name in ("shapes.py", "shapes_helper.py"):
        text = (shapes / name).read_text()
        (shapes / name).write_text(f"{text}# changed\n")
        code, out, err = run(*command)
        assert code == 0 and folder.name in out
        assert err.startswith(f"{name} has changed since this run") and "restart=true" in err and err.count("\n") == 1
        assert iwae_eval([str(folder)]) == 0
        assert f"{name} has changed since this run" in capsys.readouterr().err
        (shapes / name).write_text(text)
    assert run(*command)[2] == "" and snapshot(folder) == before
    # Another evaluation does not make the new code that of the training.
    trained = read_json(folder / "result.json")["sources"]
    (shapes / "shapes.py").write_text(f"{(shapes / 'shapes.py').read_text()}# changed\n")
    assert run(*command, "evaluation.k=3")[0] == 0
    assert read_json(folder / "result.json")["sources"] == trained
    assert "shapes.py has changed since this run" in run(*command, "evaluation.k=3")[2]


# Runs that are there already. Each test has a copy of one finished run.


@pytest.fixture
def outputs(tiny_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_run.parent, tmp_path / "outputs")
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


def test_a_run_is_found_under_any_name_of_its_folder(outputs: Path, no_training: None) -> None:
    """As under a name of another version, or of a user."""
    folder = only(outputs)
    named = folder.rename(folder.with_name(f"mine-{folder.name.rpartition('-')[2]}"))
    for overrides in ((), ("evaluation.k=60",), ("objective.gradient=total",)):
        code, out, err = run(*TINY, f"output_dir={outputs}", *overrides)
        assert code == 0 and f"outputs/{named.name}" in out, err
    assert run_folders(outputs) == [named]


def test_another_evaluation_skips_training_and_both_are_kept(
    outputs: Path, no_training: None, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    with monkeypatch.context() as patch:
        patch.setattr("iwae_cli.evaluation.likelihood.log_likelihood", lambda *_, **__: pytest.fail("it evaluates"))
        assert run(*TINY, f"output_dir={outputs}", "evaluation.k=100")[0] == 0
    assert read_json(folder / "result.json") == read_json(kept[100])
    assert run(*TINY, f"output_dir={outputs}", "evaluation.k=60")[0] == 0
    assert not (arrays(folder / "log_likelihood.npz")["ess"] > 60).any()
    assert snapshot(folder)["checkpoint.pt"] == checkpoint
    assert snapshot(folder)["metrics.csv"][1] == metrics[1]
    assert read_json(folder / "status.json")["status"] == "finished"


def test_bfloat16_is_another_evaluation_with_its_shift_beside_it(
    outputs: Path, no_training: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iwae_cli.evaluation.fused.has_bf16", lambda: True)  # elsewhere it is only slow
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
    assert "write evaluation.precision=float32" in err


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


def test_restart_sets_the_old_run_aside_and_retrains(outputs: Path) -> None:
    """Under the name that the folder has; the weights of both are one start for ``init_from``."""
    folder, before, expected = only(outputs), snapshot(only(outputs)), bits(only(outputs))
    old = folder.with_name(f"{folder.name}.old-1")
    code, _, err = run(*TINY, f"output_dir={outputs}", "restart=true")
    assert code == 0, err
    assert bits(folder) == expected and snapshot(old) == before
    named = folder.rename(folder.with_name(f"mine-{folder.name.rpartition('-')[2]}"))
    assert run(*TINY, f"output_dir={outputs}", "restart=true")[0] == 0
    assert {path.name for path in run_folders(outputs)} == {named.name, f"{named.name}.old-1", old.name}
    assert identity(*TINY, f"init_from={named}") == identity(*TINY, f"init_from={old}") != identity(*TINY)


def test_results_do_not_depend_on_the_order_of_the_runs_in_one_process(tmp_path: Path) -> None:
    """One of them asks for float64 and two threads, which torch keeps for the whole process."""
    commands = {
        "a": (*TINY, "device.precision=float64", "device.threads=2", "seed=7"),
        "b": (*TINY_TWO_LAYERS, "objective.gradient=dreg"),
    }
    there = {name: bits(finished(tmp_path / "there", *commands[name])) for name in ("a", "b")}
    back = {name: bits(finished(tmp_path / "back", *commands[name])) for name in ("b", "a")}
    assert there == back


def test_no_older_result_of_an_estimator_answers_for_what_it_reports_now(monkeypatch: pytest.MonkeyPatch) -> None:
    config = plan([], False, None).jobs[0].config
    asked = config | {"estimator": {"_target_": "iwae_cli.evaluation.ais.estimator.AIS"}}
    before = evaluation_name(asked)
    monkeypatch.setattr(AIS, "recipe", AIS.recipe + 1)
    assert evaluation_name(asked) != before
    monkeypatch.setattr(AIS, "recipe", AIS.recipe - 1)
    assert evaluation_name(asked) == before
