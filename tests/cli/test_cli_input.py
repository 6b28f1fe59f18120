"""Wrong input: one line that names the override, exit code 2, nothing done and nothing left behind."""

from __future__ import annotations

import importlib
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from small_runs import last_of_each

import iwae_cli
from iwae_cli.cli.compose import plan
from iwae_cli.cli.evaluate import evaluate as command
from iwae_cli.cli.help import conf_folder, config_files
from iwae_cli.cli.train import train
from iwae_cli.core.errors import UserError
from iwae_cli.sweeps.jobs import say_unused

WRONG = {
    # Groups and choices.
    "objektive=elbo": "objektive objective",
    "objective=iwea": "objective iwae",
    "'objective={k: 3}'": "objective",
    "seed=3-1": "seed",
    "objective=[iwae,elbo]": "objective",
    "logger=[offline,onlin]": "logger online",
    "+objective=elbo": "objective=elbo",
    "~objective": "~objective",
    "estimator=ais": "iwae-eval estimator=ais",
    "experiment=burda/swap_vae_to_iwae": "init_from",
    # Keys.
    "objective.kk=3": "objective.kk objective.k?",
    "+objective.kk=3": "objective.kk objective.k?",
    "+foo=1": "foo seed",
    "seed.x=3": "seed.x",
    "seed@x=3": "seed@x",
    # Types and ranges.
    "seed=true": "seed integer",
    "seed=\"'3'\"": "seed integer",
    "objective.gradient=slt": "objective.gradient stl?",
    "logger.wandb.mode=ofline": "logger.wandb.mode offline",
    "logger.wandb.project=a/b": "logger.wandb.project 128",
    f"logger.wandb.group={'g' * 129}": "logger.wandb.group 128",
    "logger.wandb.tags=\"['']\"": "logger.wandb.tags 64",
    "model.latent_sizes=[a]": "model.latent_sizes[0] integer",
    "seed=2.0": "seed integer 2.0",
    "optimizer.lr=true": "optimizer.lr number true",
    "restart=1": "restart true false",
    "data_dir=5": "data_dir text",
    "optimizer.betas=[1,2,3]": "optimizer.betas 2,",
    "optimizer.betas=[1]": "optimizer.betas[1] given",
    "model.hidden_sizes=[[1],[a]]": "model.hidden_sizes[1][0] integer",
    f"training.tau=1{'0' * 400}": "training.tau number 401",
    "training=5": "training _target_",
    f"seed={2**63}": "seed",
    f"seed={'9' * 5000}": "seed=9999",
    "objective.k=0": "objective.k 1",
    "optimizer.lr=nan": "optimizer.lr finite",
    "optimizer.lr=-1": "optimizer.lr Adam",
    "model=linear_gaussian": "model=one_layer",
    "on_error=stopp": "on_error stop?",
    "-m seed=0,1 hydra.sweeper.max_batch_size=-1": "hydra.sweeper.max_batch_size must be null",
    "evaluation.splits=test": "'evaluation.splits=[test]'",
    "model.latent_sizes=50": "'model.latent_sizes=[50]'",
    "evaluation.splits=[val]": "evaluation.splits[0] validation?",
    "training.clip=1e-300": "training.clip null 1e-06",
    "training.ema=0.9999999999999999": "training.ema null 0.999",
    "training.ema=1e-300": "training.ema null 0.999",
    # Grammar, interpolations, missing values.
    "objective.k=[": "objective.k=[",
    "output_dir=zwölf": "output_dir=",
    "'seed=${nowhere}'": "seed nowhere",
    "seed=???": "seed=...",
    "seed=1 seed=2": "seed=1 seed=2",
    # Targets, and Hydra's own node.
    "optimizer._target_=os.system": "optimizer._target_ torch.optim",
    "optimizer._target_=torch.optim.adam.Tensor": "optimizer._target_",
    "objective._target_=iwae_cli.objectives.iwae.IWEA": "objective._target_ IWAE?",
    "hydra.launcher._target_=os.system": "hydra.launcher._target_",
    "hydra.run.dir=elsewhere": "hydra.run output_dir=",
    "hydra/launcher=nowhere": "hydra/launcher basic",
    "'output_dir=out/${now:%Y}'": "output_dir ${now:...}",
    "'seed=${hydra:job.num}'": "seed ${hydra:...}",
    "output_dir=~nobody77/x": "~nobody77",
    "'seed=1 batch_size=2'": "without quotes",
    # Sweeps.
    "objective.k=1,5": "objective.k -m",
    "-m objective.k=1,2,0": "job 2 (objective.k=0): objective.k must be >= 1",
    "-m seed=range(1000000000)": "10,000",
    "-m seed=range(9,3)": "seed=range(9,3)",
    # Before keys without effect are said.
    "model.prior_components=3 data=linear_gaussian": "data=linear_gaussian",
    "-m model.prior_components=3 data=digits,linear_gaussian": "job 1 (data=linear_gaussian)",
    # Options.
    "--config-dir=nowhere": "--config-dir nowhere",
    "--objective=elbo": "objective=elbo",
    "--cfg job objective.kk=3": "objective.k?",
    "--cfg job seed=0,1": "seed=0,1: one value",
    "-m --info config objective.k=choice(5,50)": "objective.k=choice(5,50): one value",
}
"""What is typed -> what the line must name: the override, and what to type."""


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that refuses ``argv``."""
    before = sorted(os.listdir())
    code = train(argv)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("iwae-train: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert len(err) <= 301 and err[:-1].isprintable(), err
    assert sorted(os.listdir()) == before
    assert not GlobalHydra.instance().is_initialized()
    return err


MEANT = {
    "device=gpu": "cuda",
    "device=cuda:1": "CUDA_VISIBLE_DEVICES=1 iwae-train device=cuda",
    "logger=none": "disabled",
    "objective=vae": "elbo",
    "objective=IWAE": "iwae",
    "data=binarized_mnist": "mnist_fixed",
    "model=two-layer": "two_layer",
    "lr=0.1": "optimizer.lr",
    "optimizer.learning_rate=0.1": "optimizer.lr",
    "epochs=3": "schedule.passes",
    "schedule=burda epochs=3": "schedule.stages",
    "k=50": "objective.k or evaluation.k",
    "seed=0..3": "-m 'seed=range(0,4)'",
    "-m seed=1-4": "-m 'seed=range(1,5)'",
    "warmup=3": "training.kl_warmup",
    "--data mnist": "data=mnist",
    "--epochs 5": "schedule.passes=5",
    "-k=3": "objective.k=3 or evaluation.k=3",
    "data mnist": "data=mnist",
    "mnist": "data=mnist",
    "help": "--help",
    "seed = 3": "seed=..., without blanks",
}
"""First guesses of people who know other programs -> what the line must suggest."""
ADVISED = (
    *("objective=elbo model.posterior=mixture", "objective=iwae model.posterior=mixture model.posterior_size=3"),
    *(f"objective={name} model.posterior=mixture" for name in ("dreg", "jvi", "umiwae", "vimco", "reinforce")),
    "objective=tvo model.posterior=mixture objective.gradient=covariance objective.k=7",
    "objective=rws model.posterior=mixture objective.gradient=dreg",
    *(f"objective={name} model.prior=vamp model.prior_components=3" for name in ("dreg", "stl", "rws", "piwae")),
    "objective=elbo model.prior=vamp objective.analytic_kl=true",
    *(f"{choice} model.prior=vamp" for choice in ("model=two_layer", "model.posterior=full")),
)
"""Combinations that are refused with what to write instead."""
NOTHING_LIKE_IT = ("data=cifar10", "optimizer=sgd", "resume=true", "objective.m=4", "data.val=100", "--x 3")


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, *shlex.split(line))
    assert not [word for word in WRONG[line].split() if word not in err], err


UNUSED = {
    "model.prior_components=3": "model.prior_components model.prior=standard model.prior=mixture model.prior=vamp",
    "model.posterior=full model.posterior_size=3": "posterior=full model.posterior=coupling model.posterior=mixture",
    "objective=tvo objective.schedule=linear objective.beta_1=0.1": "objective.beta_1 objective.schedule=log",
    "objective=tvo objective.partitions=1 objective.schedule=linear": "objective.schedule objective.partitions=2",
    "-m model.posterior=diagonal,full model.posterior_size=3": "model.posterior_size model.posterior=coupling",
    "-m model.posterior=diagonal,mixture model.posterior_size=3": "",
    "model.posterior=mixture model.posterior_size=3": "",
    "model.prior={_target_:own.Flow} model.prior_components=3": "prior_components model.prior=Flow model.prior=vamp",
    "training.tau=0.1": "training.tau training.backward=all training.backward=roulette",
    "training.tau=0.1 training.backward=roulette": "",
}
"""Keys that the choices of all jobs leave without effect, with what is said."""


@pytest.mark.parametrize("line", UNUSED)
def test_a_key_without_effect_is_said(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    say_unused(plan([word for word in line.split() if word != "-m"], "-m" in line, None))
    err = capsys.readouterr().err
    assert err.count("\n") == bool(UNUSED[line]) and all(word in err for word in UNUSED[line].split())


def test_first_guesses_are_answered_by_what_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    for line, meant in MEANT.items():
        err = refused(capsys, *shlex.split(line))
        assert re.search(rf"(did you mean |write |variable: ){re.escape(meant)}[? \n,]", err), err
    for line in NOTHING_LIKE_IT:
        assert "did you mean" not in (err := refused(capsys, *shlex.split(line))), err


@pytest.mark.parametrize("line", ADVISED)
def test_what_a_refusal_says_to_write_is_accepted(line: str) -> None:
    def check(*overrides: str) -> None:
        experiment = plan(last_of_each(*overrides), False, None).jobs[0].experiment()
        experiment.check()
        experiment.load()

    with pytest.raises(UserError, match=": write ") as refusal:
        check(*line.split())
    for instead in str(refusal.value).rpartition(": write ")[2].split(", or "):
        check(*line.split(), *instead.split())


@pytest.mark.parametrize("place", ["/a=b", "/a(1)", "/[x]", "/zwölf", "a{b}", "c,d", '/quote"s=', "/back\\sl=ash"])
def test_the_form_that_is_suggested_works(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, f"logger.wandb.name={place}")
    suggested = shlex.split(err.rpartition(" write " if " write " in err else " a text ")[2].rstrip(")\n"))
    (job,) = plan(suggested, False, None).jobs
    assert job.config["logger"]["wandb"]["name"] == place
    tags = refused(capsys, "logger.wandb.tags=[a b,c=d]").rpartition(" write ")[2]
    assert plan(shlex.split(tags), False, None).jobs[0].config["logger"]["wandb"]["tags"] == ["a b", "c=d"]


def test_home_folders_are_read_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And recorded as they are read."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("IWAE_DATA_DIR", "~/data")
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\ninit_from: ~/run\n")
    overrides = ["output_dir=~/out", "experiment=mine", "data=omniglot", 'data.path="~/x.mat"', "seed=0,1"]
    for job in plan(overrides, True, "~/own").jobs:
        config = job.config
        found = [config["output_dir"], config["data_dir"], config["init_from"], config["data"]["path"]]
        assert found == [str(tmp_path / name) for name in ("out", "data", "run", "x.mat")]
        assert f"output_dir='{tmp_path}/out'" in job.overrides


def test_values_of_the_environment_are_never_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A logger's are not recorded either; those of other keys are, since they decide the numbers."""
    monkeypatch.setenv("TOKEN", "hunter2")
    monkeypatch.setenv("NUMBER", "-12345678")
    monkeypatch.setenv("LISTED", "[hunter2, {hunter3: hunter4}]")
    monkeypatch.setenv("ODD", "é \"'\n hunter2 {")
    monkeypatch.setenv("LONG", "hunter2" * 99)
    for text in (
        *(
            "seed=${oc.env:'TOKEN'}",
            "seed=${variable:TOKEN,x}",
            "seed=${ oc.env : TOKEN }",
            "init_from=${oc.env:TOKEN}",
        ),
        *("objective.gradient=x${oc.env:TOKEN}", "on_error=${oc.env:TOKEN}", "seed=${oc.env:${oc.env:TOKEN}}"),
        *("optimizer._target_=torch.optim.${oc.env:TOKEN}", "'seed=${oc.decode:${oc.env:NUMBER}}'"),
        *("seed='${oc.decode:${oc.env:NUMBER}}'", "seed='${oc.decode:${oc.env:LISTED}}'"),
        "model.latent_sizes='${oc.decode:${oc.env:LISTED}}'",
        *("seed=${oc.env:ODD}", "seed=[1,${oc.env:ODD}]", "evaluation.splits=[${oc.env:ODD}]"),
        *("seed=${oc.env:LONG}", "seed=[1,${oc.env:LONG}]", "evaluation.splits=[${oc.env:LONG}]"),
    ):
        err = refused(capsys, text)
        assert "hunter" not in err and "12345678" not in err.replace(",", "")
        assert "oc.env" in err or "ODD" in text or "LONG" in text, err
    for text, value in (
        ("logger.wandb.name='x${oc.env:TOKEN}'", "TOKEN"),
        ("logger.wandb.name=${oc.env:'TOKEN'}", "TOKEN"),
        ("logger.wandb.name=${variable:TOKEN,x}", "TOKEN"),
        ("seed='${oc.decode:${oc.env:NUMBER}}'", "NUMBER"),
    ):
        assert train(["--cfg", "all", "--resolve", text]) == 0
        out, _ = capsys.readouterr()
        assert "hunter" not in out and "12345678" not in out and f"${{oc.env:{value}}}" in out
    monkeypatch.setenv("SEED", "7")
    for name in ("${oc.env:TOKEN}", "${oc.env:'TOKEN'}", "${variable:TOKEN,x}"):
        overrides = [f"logger.wandb.name={name}", "seed='${oc.decode:${oc.env:SEED}}'"]
        job = plan(overrides, False, None).jobs[0]
        experiment = job.experiment()
        assert experiment.loggers[0].name == "hunter2"  # type: ignore[attr-defined]
        assert "hunter2" not in str((experiment.config, experiment.overrides, job.sent()))
        assert experiment.config["seed"] == 7


def test_paths_that_no_file_can_have(capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("x" * 5000, "/".join(["x" * 100] * 50)):
        for option in ("output_dir=", "init_from=", "data_dir=", "--config-dir="):
            assert "File name too long" in refused(capsys, f"{option}{path}")
        assert command([path]) == 2 and len(capsys.readouterr().err) <= 301
    assert "output_dir" in refused(capsys, "output_dir=a\0b")


def test_hydras_own_options_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "output_dir" in refused(capsys, "--cfg", "hydra", "--resolve")
    assert "bash, zsh, fish" in refused(capsys, "-sc", "install=x")
    for arguments in (["--hydra-help"], ["--cfg", "job", "--resolve"], ["--cfg", "job", f"output_dir={'x' * 5000}"]):
        assert train(arguments) == 0


def test_python_is_not_answered_by_options_of_the_command_line() -> None:
    for override, way in {"seed=1,2": "call iwae_cli.train once for each", "-m": "options are for the command"}.items():
        with pytest.raises(UserError, match=way) as refusal:
            iwae_cli.train(override)
        assert "add -m" not in str(refusal.value)


def test_windows_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(SystemExit, match="Linux and macOS") as end:
        importlib.reload(importlib.import_module("iwae_cli.cli"))
    assert "\n" not in str(end.value)


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "device=cuda" in refused(capsys, "device=cuda")


def test_one_id_of_wandb_is_not_for_several_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "x")
    assert "WANDB_RUN_ID" in refused(capsys, "-m", "seed=0,1")


def test_wandb_mode_must_be_valid(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    assert "WANDB_MODE" in (err := refused(capsys)) and "offline?" in err


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a mark when it is imported, and a config folder beside it that names it."""
    mark = tmp_path / "sprung"
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "trap.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Trap: pass\n")
    monkeypatch.syspath_prepend(str(folder))
    config = tmp_path / "conf"
    for name, text in {
        "objective/trap.yaml": "_target_: trap.Trap\n",
        "objective/hidden.yaml": "_target_: ${oc.env:TRAP}\n",
        "logger/trap.yaml": "mine: {_target_: trap.Trap}\n",
        "logger/nameless.yaml": "_target_: trap.Trap\n",
        "experiment/callback.yaml": "# @package _global_\nhydra: {callbacks: {x: {_target_: trap.Trap}}}\n",
        "experiment/logging.yaml": "# @package _global_\nhydra: {job_logging: {root: {}, x: {(): trap.Trap}}}\n",
        "experiment/launcher.yaml": "# @package _global_\nhydra: {launcher: {_target_: trap.Trap}}\n",
        "experiment/sweeper.yaml": "# @package _global_\nhydra: {sweeper: {params: {x: {_target_: trap.Trap}}}}\n",
        "experiment/environment.yaml": "# @package _global_\nhydra: {job: {env_set: {IWAE_ALLOW_TARGETS: trap}}}\n",
        "experiment/folder.yaml": "# @package _global_\nhydra: {run: {dir: elsewhere}}\n",
        "experiment/nothing.yaml": "# @package _global_\nhydra: null\n",
        "data/broken.yaml": "defaults: [nowhere]\n",
        "optimizer/sparse.yaml": "{_target_: torch.optim.SparseAdam, lr: 0.01}\n",
    }.items():
        (config / name).parent.mkdir(parents=True, exist_ok=True)
        (config / name).write_text(text)
    monkeypatch.setenv("TRAP", "trap.Trap")
    return config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective=trap", "objective._target_ must name a class of iwae_cli or torch.optim derived from Objective"),
        ("objective=hidden", "got ${oc.env:TRAP}"),
        ("logger=trap", "logger.mine._target_ must name a class"),
        ("logger=nameless", "logger: a yaml of this group holds a name, and below it _target_ and its keys"),
        ("data=broken", "nowhere"),
        ("experiment=callback", "hydra.callbacks cannot be changed"),
        ("experiment=logging", "hydra.job_logging cannot be changed"),
        ("experiment=launcher", "hydra.launcher._target_ must name a class"),
        ("experiment=sweeper", "hydra.sweeper.params.x._target_ must name a class"),
        ("experiment=environment", "hydra.job"),
        ("experiment=folder", "hydra.run"),
        ("experiment=nothing", "experiment=nothing cannot be composed: "),
        ("optimizer=sparse", "optimizer is refused by SparseAdam: SparseAdam does not support dense gradients"),
    ],
)
def test_a_config_folder_cannot_run_foreign_code(trap, override, message, capsys) -> None:
    assert message in refused(capsys, "--config-dir", str(trap), override)
    assert not (trap.parent / "sprung").exists()


def test_the_trap_works(trap: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Allowed by the environment it is imported, and refused for its class: the test above can see it spring.
    monkeypatch.setenv("IWAE_ALLOW_TARGETS", "other, trap")
    before = sorted(os.listdir())
    assert train(["--config-dir", str(trap), "objective=trap"]) == 2
    assert "derived from Objective, got trap.Trap" in capsys.readouterr().err
    assert sorted(os.listdir()) == sorted([*before, "sprung"])


def test_files_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "own" / "objective"
    folder.mkdir(parents=True)
    (folder / "broken.yaml").write_text("_target_: [\n")
    assert "broken.yaml" in refused(capsys, "--config-dir", "own", "objective=broken")
    (folder / "latin.yaml").write_bytes("_target_: é".encode("latin-1"))
    assert "utf-8" in refused(capsys, "--config-dir", "own", "objective=latin")


def test_a_choice_with_the_name_of_a_shipped_one_is_refused(tmp_path: Path, capsys) -> None:
    ours = conf_folder() / "model" / "one_layer.yaml"
    own = tmp_path / "own" / "model" / "one_layer.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(ours.read_text().replace("[50]", "[7]"))
    assert "own/model/one_layer.yaml has the name of a choice that" in refused(capsys, "--config-dir", "own")
    own.write_text(ours.read_text())
    recorded = {"config_dir": str(tmp_path / "own")}
    assert plan([], False, "own").jobs[0].config == plan([], False, None).jobs[0].config | recorded


def test_only_the_groups_of_a_config_folder_are_read(tmp_path: Path) -> None:
    for folder in ("model", "elsewhere/model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "mine.yaml").write_text("")
    assert config_files(tmp_path) == [tmp_path / "model" / "mine.yaml"]


def test_what_only_cuda_can_do_is_refused_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("optimizer.fused=false", "+optimizer.capturable=true", "init_from=nowhere")
    assert "optimizer.capturable=true is refused by Adam" in refused(capsys, *asked, "device=cpu")
    monkeypatch.setattr("iwae_cli.core.device.Device.resolve", lambda self: torch.device(self.kind))
    assert "nowhere is not a run folder" in refused(capsys, *asked, "device=cuda"), "checked after the optimizer"
