"""Wrong input: one line that names the override, exit code 2, nothing done and nothing left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from iwae_cli.cli.compose import plan
from iwae_cli.cli.help import conf_folder, config_files
from iwae_cli.cli.train import train

WRONG = {
    # Groups and choices.
    "objektive=elbo": "objektive is unknown; did you mean objective?",
    "+objektive=elbo": "objektive is unknown; did you mean objective?",
    "objective=iwea": ", got iwea; did you mean ",
    "experiment=smok": ", got smok; did you mean smoke?",
    "experiment=": "experiment must be one of ",
    "+experiment=null": "write experiment=null without +",
    "experiment=burda/swap_vae_to_iwae": "the finished run folder of experiment=burda/mnist_1l_vae_k1",
    "experiment=burda/swap_iwae_to_vae": "the finished run folder of experiment=burda/mnist_1l_iwae_k50",
    "experiment=burda/mnist_1l_iwae_k6": "did you mean burda/mnist_1l_iwae_k",
    "objective=null": "objective must be one of ",
    "objective={k: 3}": "objective must be one of ",
    "+objective=elbo": "write objective=elbo without +",
    "objective@mine=elbo": "packages cannot be changed",
    "~objective": "~objective: nothing can be taken away",
    # Keys.
    "objective.kk=3": "objective.kk is unknown; did you mean objective.k? (objective has k, gradient)",
    "+objective.kk=3": "objective.kk is unknown; did you mean objective.k? (objective has k, gradient)",
    "++objective.kk=3": "objective.kk is unknown; did you mean objective.k? (objective has k, gradient)",
    "sead=3": "sead is unknown; did you mean seed?",
    "+foo=1": "init_from, with_optimizer, train, training, restart, on_error, experiment)",
    "+foo.bar=1": "foo.bar is unknown (there are ",
    "+seed=3": "write seed=... without +",
    "seed.x=3": "seed.x is unknown",
    "model.latent_sizes.0=3": "model.latent_sizes.0 is unknown",
    "~objective.k": "~objective.k: nothing can be taken away",
    # Types.
    "seed=x": "seed must be an integer, got x",
    "seed='3'": "seed must be an integer, got 3 as a text: write seed=3 without quotes",
    "model.latent_sizes='[3]'": "write model.latent_sizes=[3] without quotes",
    "restart='true'": "write restart=true without quotes",
    "seed=${oc.env:HOME}": "seed must be an integer, got /",
    "seed=true": "seed must be an integer, got true",
    "seed=": "seed must be an integer, got ''",
    "restart=1": "restart must be true or false, got 1",
    "output_dir=5": "output_dir must be text, got 5",
    "objective.k=2.5": "objective.k must be an integer, got 2.5",
    "objective.k=null": "objective.k must be an integer, got null",
    "objective.k={a: 1}": "objective.k must be an integer, got {a: 1}",
    "objective.gradient=slt": "objective.gradient must be one of total, stl, dreg, got slt; did you mean stl?",
    "logger.mode=ofline": "logger.mode must be one of online, offline, disabled, got ofline; did you mean offline?",
    "model.latent_sizes=5": "model.latent_sizes must be a list of integers, got 5",
    "model.latent_sizes=[a]": "model.latent_sizes[0] must be an integer, got a",
    "evaluation.splits=[tset]": "evaluation.splits[0] must be one of train, validation, test, got tset",
    "evaluation.workers=x": "evaluation.workers must be an integer, got x",
    "optimizer.betas=[0.9,0.99,0.999]": "optimizer.betas must be a list of 2: a number, a number",
    # Ranges.
    "objective.k=0": "objective.k must be >= 1, got 0",
    "batch_size=-1": "batch_size must be >= 1, got -1",
    "seed=-1": "seed must be >= 0, got -1",
    "model.latent_sizes=[]": "model.latent_sizes must ",
    "schedule.passes=0": "schedule.passes must be >= 1, got 0",
    "device.threads=0": "device.threads must be >= 1, got 0",
    "evaluation.k=0": "evaluation.k must be >= 1, got 0",
    "optimizer.lr=nan": "optimizer.lr must be finite, got NaN",
    "optimizer.lr=inf": "optimizer.lr must be finite, got Infinity",
    "optimizer.lr=-1": "optimizer.lr=-1.0 is refused by Adam: Invalid learning rate",
    "optimizer.eps=-1": "optimizer.eps=-1.0 is refused by Adam: Invalid epsilon",
    f"seed={'9' * 5000}": "cannot read 'seed=9999",
    f"seed={2**63}": f"seed must be at most {2**63 - 1} in size, got a number of 19 digits",
    f"optimizer.lr={'9' * 400}": "got a number of 400 digits",
    f"model.latent_sizes=[{'9' * 30}]": "model.latent_sizes[0] must be at most",
    "optimizer.lr=1e400": "optimizer.lr must be finite, got Infinity",
    "device.threads=1000000000": "device.threads must be <= 1024, got 1000000000",
    "model.latent_sizes=[1000000000]": "model.latent_sizes must hold sizes <= 32,768, got 1,000,000,000",
    "objective.k=1000000000": "batch_size=20 with 1,000,000,000 draws for each image (objective.k) is more than",
    "batch_size=10000000": "batch_size=10,000,000 with 5 draws",
    "evaluation.k=1000000000000": "evaluation.k must be <= 100,000,000, got 1,000,000,000,000",
    "validation.k=1000000000000": "validation.k must be <= 100,000,000",
    "evaluation.rows=1000000000000": "evaluation.rows must be <= 10,000,000",
    "evaluation.workers=100000": "evaluation.workers must be <= 1,024",
    "optimizer.betas=[0.9,1.5]": "optimizer.betas=[0.9, 1.5] is refused by Adam",
    # Combinations.
    "model=linear_gaussian": "with this data use model=one_layer",
    # Grammar, interpolations, missing values.
    "objective.k=[": "cannot read 'objective.k=['",
    "objective": "did you mean objective=...?",
    "=3": "cannot read '=3': write key=value",
    "''": "write key=value, quote special characters\n",
    "output_dir=zwölf": "did you mean 'output_dir='\"'\"'zwölf'\"'\"''?",
    "seed=${nowhere}": "seed: ",
    "seed=${oc.env:NOT_SET_ANYWHERE}": "seed: Environment variable 'NOT_SET_ANYWHERE' not found",
    "seed=???": "seed has no value: write seed=...",
    "objective.k=1,5": "add -m",
    "objective=elbo,iwae": "add -m",
    # Targets.
    "optimizer._target_=os.system": "optimizer._target_ must name a class of iwae_cli or torch.optim",
    "optimizer._target_=torch.optim.sgd.torch.hub.os.getcwd": "optimizer._target_=torch.optim.sgd.torch.hub.os.getcwd",
    "optimizer._target_=torch.optim.adam.cast": "optimizer._target_ must name a class",
    "optimizer._target_=torch.optim.adam.Tensor": "optimizer._target_ must name a class",
    "optimizer._target_=iwae_cli.objectives.iwae.IWAE": "optimizer._target_ must name a class",
    "objective._target_=iwae_cli.objectives.iwae.IWEA": "did you mean IWAE?",
    "objective._target_=iwae_cli.objectives.base.Objective": "objective._target_ must name a class",
    "objective._target_=iwae_cli.nowhere.X": "objective._target_=iwae_cli.nowhere.X cannot be imported",
    "objective._target_=${oc.env:HOME}": "objective._target_ must name a class",
    "objective.k={_target_: os.system}": "objective.k must be an integer",
    "+model.extra={_target_: os.system}": "model.extra is unknown",
    # Hydra's own node.
    "+hydra.callbacks.x._target_=os.system": "hydra.callbacks.x._target_ cannot be changed",
    "+hydra.launcher.x._target_=os.system": "hydra.launcher.x._target_ must name a class of hydra",
    "hydra.launcher._target_=os.system": "hydra.launcher._target_ must name a class of hydra",
    "hydra.run.dir=elsewhere": "hydra.run.dir cannot be changed; runs go to output_dir=...",
    "hydra={run: {dir: elsewhere}}": "hydra cannot be changed",
    "hydra.mode=MULTIRUN": "hydra.mode cannot be changed; runs go to output_dir=..., several runs are asked for by -m",
    "hydra/launcher=[basic]": "hydra/launcher must be one of basic",
    "hydra.verbose={_target_: x}": "hydra.verbose cannot be changed",
    "hydra.launcher.n_jobs=2": "Key 'n_jobs' not in 'BasicLauncherConf'",
    "hydra.output_subdir=x": "hydra.output_subdir cannot be changed",
    "hydra/job_logging=default": "hydra/job_logging",
    "hydra/launcher=nowhere": "hydra/launcher must be one of basic",
    "hydra.job.env_set={IWAE_ALLOW_TARGETS: os}": "hydra.job.env_set cannot be changed",
    "hydra.searchpath=[pkg://antigravity]": "hydra.searchpath must be a list of folders",
    "hydra.searchpath=[file:///nowhere/at/all]": "hydra.searchpath must be a folder that exists",
    # Options.
    "--config-dir=nowhere": "--config-dir must be a folder that exists, got nowhere",
    "--config-dir=": "--config-dir must be a folder that exists, got nothing",
    "-sc": "-sc wants install=SHELL or uninstall=SHELL, SHELL one of bash, zsh, fish",
    "--objective=elbo": "did you mean objective=elbo?",
    "--multirnu": "unknown option --multirnu; did you mean --multirun?",
    "--config-name=other": "unknown option --config-name=other",
    "--experimental-rerun=x.pickle": "unknown option --experimental-rerun=x.pickle",
    "--resolve": "--package and --resolve go with --cfg",
}

WRONG_LINES = {
    "seed=1 seed=2": "seed=1 and seed=2 contradict each other: write one of them",
    "output_dir=a output_dir=b": "output_dir=a and output_dir=b contradict each other",
    "objective=elbo objective=iwae": "objective=elbo and objective=iwae contradict each other",
    "data=linear_gaussian model=linear_gaussian data.noise_std=1e-300": "data.noise_std must be between 0.0001 and 1",
    "data=linear_gaussian model=linear_gaussian data.noise_std=1e300": "data.noise_std must be between",
    "data=linear_gaussian model=linear_gaussian data.pixels=1000000": "data.pixels must be <= 10,000, got 1,000,000",
    "data=linear_gaussian model=linear_gaussian data.n_train=100000000": "data.n_train must be <= 10,000,000",
    "model=conv model.hidden_size=1000000000": "model.hidden_size must be <= 32,768",
    "model=categorical objective=vimco model.categories=1000000000": "model.categories must be <= 32,768",
    "optimizer.fused=false +optimizer.capturable=true device=cpu": "optimizer.capturable=true is refused by Adam: If",
    "-sc install=foo": "-sc wants install=SHELL",
    "-sc install=bash install=zsh": "-sc wants install=SHELL",
    "--info foo": "invalid choice: 'foo' (choose from 'all', 'config'",
    "--cfg foo": "invalid choice: 'foo' (choose from 'job'",
    "-m seed=range(3),5": "seed=range(3),5: ",
    "-m hydra.sweeper.max_batch_size=0": "hydra.sweeper.max_batch_size must be >= 1 or null, got 0",
    "-m hydra/launcher=joblib hydra.launcher.n_jobs=0": "hydra.launcher.n_jobs must be 1 to 1024, or -1",
    "-m hydra/launcher=joblib hydra.launcher.n_jobs=1000000000": "hydra.launcher.n_jobs must be 1 to 1024",
    "-m on_error=stop,continue": "on_error is of the whole sweep: write one of continue, stop",
    "--cfg job --resolve data_dir=${nope}": "data_dir: Interpolation key 'nope' not found",
    "-m seed=range(0)": "seed=range(0) gives no job",
    "-m seed=range(9,3)": "seed=range(9,3) gives no job",
    "-m objective=glob(x*)": "objective=glob(x*) gives no job",
    "-m seed=range(0,9,0)": "seed=range(0,9,0): range() arg 3 must not be zero",
    "-m seed=range(0,nan)": "seed=range(0,nan): ",
    "-m seed=range(1000000000)": "a sweep may have 10,000 jobs, and this one has more",
    "-m seed=range(0,1e9,0.001)": "a sweep may have 10,000 jobs, and this one has more",
    "-m seed=range(0,101) batch_size=range(1,101)": "a sweep may have 10,000 jobs, and this one has more",
    "-m seed=1,2 seed=3": "seed=1,2 and seed=3 contradict each other",
    "seed=1 seed=true": "seed=1 and seed=true contradict each other",
    "seed=1 ~seed": "seed=1 and ~seed contradict each other",
    "+hydra.sweeper.params.x=1": "Hydra's own node cannot be so (open are hydra.launcher and hydra.sweeper): ",
}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that refuses ``argv``."""
    before = sorted(os.listdir())
    code = train(argv)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("iwae-train: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert sorted(os.listdir()) == before
    assert not GlobalHydra.instance().is_initialized()
    return err


@pytest.mark.parametrize("override", WRONG)
def test_wrong_input_is_one_line(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert WRONG[override] in refused(capsys, override)


@pytest.mark.parametrize("line", WRONG_LINES)
def test_wrong_lines_are_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert WRONG_LINES[line] in refused(capsys, *line.split())


@pytest.mark.parametrize("override", ["objective.kk=3", "objective=iwea", "seed=${nowhere", "~objective", "+foo=1"])
def test_displays_refuse_too(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "--cfg", "job", override)


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "device=cuda is not there; this machine has " in refused(capsys, "device=cuda")


def test_a_sweep_is_checked_to_its_last_run_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert "objective.k must be >= 1, got 0" in refused(capsys, "-m", "objective.k=1,2,0")
    assert "got iwea" in refused(capsys, "-m", "objective=iwae,iwea")
    assert "with this data use" in refused(capsys, "-m", "model=one_layer,linear_gaussian")
    assert "does not support sweep type" in refused(capsys, "-m", "optimizer.lr=interval(0,1)")


def test_wandb_mode_must_be_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    assert "WANDB_MODE must be one of online, offline, disabled, got ofline; did you mean offline?" in refused(capsys)


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
        "objective/broken.yaml": "_target_: [\n",
        "objective/hidden.yaml": "_target_: ${oc.env:TRAP}\n",
        "experiment/callback.yaml": "# @package _global_\nhydra: {callbacks: {x: {_target_: trap.Trap}}}\n",
        "experiment/logging.yaml": "# @package _global_\nhydra: {job_logging: {root: {}, x: {(): trap.Trap}}}\n",
        "experiment/launcher.yaml": "# @package _global_\nhydra: {launcher: {_target_: trap.Trap}}\n",
        "experiment/sweeper.yaml": "# @package _global_\nhydra: {sweeper: {params: {x: {_target_: trap.Trap}}}}\n",
        "experiment/environment.yaml": "# @package _global_\nhydra: {job: {env_set: {IWAE_ALLOW_TARGETS: trap}}}\n",
        "experiment/folder.yaml": "# @package _global_\nhydra: {run: {dir: elsewhere}}\n",
        "data/broken.yaml": "defaults: [nowhere]\n",
        "experiment/nothing.yaml": "# @package _global_\nhydra: null\n",
        "experiment/number.yaml": "# @package _global_\nhydra: 5\n",
        "experiment/mine.yaml": "# @package _global_\ndefaults: foo\n",
        "experiment/mine/null.yaml": "# @package _global_\nseed: -7\n",
        "optimizer/sparse.yaml": "{_target_: torch.optim.SparseAdam, lr: 0.01}\n",
    }.items():
        (config / name).parent.mkdir(parents=True, exist_ok=True)
        (config / name).write_text(text)
    (config / "objective" / "latin.yaml").write_bytes("_target_: é".encode("latin-1"))
    monkeypatch.setenv("TRAP", "trap.Trap")
    return config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective=trap", "objective._target_ must name a class of iwae_cli or torch.optim derived from Objective"),
        ("objective=hidden", "got trap.Trap"),
        ("objective=broken", "broken.yaml"),
        ("data=broken", "nowhere"),
        ("experiment=callback", "hydra.callbacks cannot be changed"),
        ("experiment=logging", "hydra.job_logging cannot be changed"),
        ("experiment=launcher", "hydra.launcher._target_ must name a class"),
        ("experiment=sweeper", "hydra.sweeper.params.x._target_ must name a class"),
        ("experiment=environment", "hydra.job cannot be changed"),
        ("experiment=folder", "hydra.run cannot be changed"),
        ("experiment=nothing", ": experiment=nothing cannot be composed: AttributeError: "),
        ("experiment=mine", ": experiment=mine cannot be composed: ValueError: Invalid defaults list in"),
        ("experiment=mine/null", "seed must be >= 0, got -7"),
        ("experiment=number", "experiment/number"),
        ("objective=latin", "conf/objective/latin.yaml cannot be read: 'utf-8' codec"),
        ("optimizer=sparse", "optimizer is refused by SparseAdam: SparseAdam does not support dense gradients"),
    ],
)
@pytest.mark.parametrize(("by", "multirun"), [("option", False), ("searchpath", True)])
def test_a_config_folder_cannot_run_what_it_likes(trap, override, said, by, multirun, capsys) -> None:
    where = ["--config-dir", str(trap)] if by == "option" else [f"hydra.searchpath=[file://{trap}]"]
    assert said in refused(capsys, *where, override, *(["-m"] if multirun else []))
    assert not (trap.parent / "sprung").exists()


def test_the_trap_works(trap: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Allowed by the environment it is imported, and refused for what it is: the test above can see it spring.
    monkeypatch.setenv("IWAE_ALLOW_TARGETS", "other, trap")
    before = sorted(os.listdir())
    assert train(["--config-dir", str(trap), "objective=trap"]) == 2
    assert "derived from Objective, got trap.Trap" in capsys.readouterr().err
    assert sorted(os.listdir()) == sorted([*before, "sprung"])


def test_a_choice_that_would_never_be_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = conf_folder() / "model" / "one_layer.yaml"
    own = tmp_path / "own" / "model" / "one_layer.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(ours.read_text().replace("[50]", "[7]"))
    for where in (["--config-dir", "own"], [f"hydra.searchpath=[{tmp_path / 'own'}]"]):
        assert "own/model/one_layer.yaml has the name of a choice that comes with" in refused(capsys, *where)
    own.write_text(ours.read_text())
    assert plan([], False, "own").jobs[0].config == plan([], False, None).jobs[0].config


def test_only_the_groups_of_a_config_folder_are_looked_at(tmp_path: Path) -> None:
    for folder in ("model", "elsewhere/model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "mine.yaml").write_text("")
    assert config_files(tmp_path) == [tmp_path / "model" / "mine.yaml"]


def test_no_preset_at_all() -> None:
    assert plan(["experiment=null"], False, None).jobs[0].config == plan([], False, None).jobs[0].config
    swept = plan(["experiment=null,smoke", "seed=3"], True, None)
    assert [job.config["evaluation"]["k"] for job in swept.jobs] == [5000, 500]
    assert swept.arguments == ["experiment=[],smoke", "seed=3"], "what Hydra is given, which knows no null there"


def test_a_folder_that_torch_cannot_make(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no room in /tmp: torch makes it when the first optimizer is made."""

    def refuse(*_: object, **__: object) -> None:
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", "/dev/null/x")

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", refuse)
    err = refused(capsys)
    assert "cannot make the folder /dev/null/x " in err and "(Not a directory): set TORCHINDUCTOR_CACHE_DIR" in err


def test_what_is_near_the_bounds_is_allowed() -> None:
    assert plan([f"seed={2**63 - 1}", "device.threads=1024"], False, None).jobs[0].config["seed"] == 2**63 - 1
    assert len(plan(["seed=range(10)", "batch_size=range(1,3)"], True, None).jobs) == 20


@pytest.mark.parametrize(
    "twice",
    ["seed=1 seed=1", "optimizer.lr=1e-3 optimizer.lr=0.001", "data_dir=a data_dir='a'", "-m seed=1,2 seed=1,2"],
)
def test_twice_the_same_is_no_contradiction(twice: str) -> None:
    overrides = [override for override in twice.split() if override != "-m"]
    jobs = plan(overrides, "-m" in twice, None).jobs
    assert [job.config for job in jobs] == [job.config for job in plan(overrides[:1], "-m" in twice, None).jobs]


def test_what_cuda_alone_can_do_is_refused_elsewhere_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("optimizer.fused=false", "+optimizer.capturable=true", "init_from=nowhere")
    assert "optimizer.capturable=true is refused by Adam" in refused(capsys, *asked, "device=cpu")
    monkeypatch.setattr("iwae_cli.core.device.Device.resolve", lambda self: torch.device(self.kind))
    assert "nowhere is not a run folder" in refused(capsys, *asked, "device=cuda"), "what is looked at after it"
