"""What happens after the checks: one run, a sweep, an evaluation; exit codes, and what is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from iwae_cli import __version__
from iwae_cli.cli.compose import plan
from iwae_cli.cli.evaluate import evaluate
from iwae_cli.cli.help import choices, conf_folder, summary
from iwae_cli.cli.train import train
from iwae_cli.config.build import BASES, construct
from iwae_cli.core.errors import Interrupted, RunFailed, RunLocked, UserError
from iwae_cli.runs.experiment import Experiment

QUICK = ["experiment=smoke", "schedule.passes=1", "evaluation.k=5", "logger=disabled"]
PRESETS = "experiment=smoke,burda"
"""Those that go with every data set, model and objective."""


def job(*overrides: str):
    """The one run that ``overrides`` ask for, as composed."""
    return plan(overrides, False, None).jobs[0]


def jobs(*overrides: str):
    """The runs of a sweep, as composed."""
    return plan(overrides, True, None).jobs


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch):
    """Runs that only note that they happened, or raise what is put under their seed."""
    seen: list[Experiment] = []
    raising: dict[int, BaseException] = {}

    def run(self: Experiment) -> dict[str, int]:
        seen.append(self)
        if self.seed in raising:
            raise raising[self.seed]
        return {"seed": self.seed}

    monkeypatch.setattr("iwae_cli.runs.runner.run", run)
    return seen, raising


# Composition.


@pytest.mark.parametrize("group", sorted(BASES))
def test_every_choice_constructs(group: str) -> None:
    names = choices([conf_folder()])[group]
    assert names
    for name, composed in zip(names, jobs(f"{group}={','.join(names)}"), strict=True):
        assert composed.names[group] == name
        assert construct(composed.config, [group])[group] is not None


def test_presets_leave_the_other_groups_alone() -> None:
    found = choices([conf_folder()])
    groups = ["data", "model", "objective", "device", "logger"]
    for row in range(3):
        chosen = [f"{group}={found[group][row % len(found[group])]}" for group in groups]
        without = job(*chosen)
        for preset in jobs(*chosen, PRESETS):
            assert {group: preset.config[group] for group in groups} == {g: without.config[g] for g in groups}


def test_presets_give_way_to_the_command_line() -> None:
    found, without = choices([conf_folder()]), job()
    for group in ["schedule", "optimizer", "evaluation"]:
        assert {preset.names[group] for preset in jobs(PRESETS)} - {without.names[group]}
        name = found[group][0]
        asked = job(f"{group}={name}")
        for preset in jobs(f"{group}={name}", PRESETS):
            assert (preset.names[group], preset.config[group]) == (name, asked.config[group])


def test_the_papers_protocol() -> None:
    composed = job("experiment=burda", "schedule.stages=3")
    objects = construct(composed.config)
    assert (objects["schedule"].passes, composed.config["batch_size"]) == (13, 20)
    assert objects["optimizer"].keywords == {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-4,
        "weight_decay": 0.0,
        "fused": True,
    }
    assert (composed.config["evaluation"]["k"], composed.config["evaluation"]["weights"]) == (5000, "last")


def test_the_config_is_plain_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IWAE_DATA_DIR", "/somewhere")
    composed = job("data=mnist", "seed=3", "optimizer.lr=1e-4")
    assert json.loads(json.dumps(composed.config)) == composed.config
    assert "hydra" not in composed.config
    assert composed.config["data_dir"] == composed.config["data"]["data_dir"] == "/somewhere"
    assert (composed.config["seed"], composed.config["optimizer"]["lr"]) == (3, 1e-4)
    assert composed.overrides == ["data=mnist", "seed=3", "optimizer.lr=1e-4"]


@pytest.mark.parametrize(
    ("variable", "overrides", "mode"),
    [
        (None, [], "offline"),
        ("online", [], "online"),
        ("disabled", [], "disabled"),
        ("disabled", ["logger=online"], "online"),
        ("disabled", ["logger.wandb.mode=online"], "online"),
        ("disabled", ["logger.wandb.project=x"], "disabled"),
        ("nonsense", ["logger=offline"], "offline"),
    ],
)
def test_the_command_line_beats_wandb_mode(monkeypatch, variable, overrides, mode) -> None:
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert job(*overrides).config["logger"]["wandb"]["mode"] == mode


# One run.


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("data is\nnot there"), 2, "iwae-train: data is not there\n"),
        (RunLocked("process 7 has it"), 3, "iwae-train: process 7 has it\n"),
        (RunFailed("it diverged"), 1, "iwae-train: it diverged\n"),
        (Interrupted(15), 143, "iwae-train: interrupted by signal 15\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(runs, capsys, error, code, message) -> None:
    runs[1][0] = error
    assert train([]) == code
    assert capsys.readouterr().err == message
    assert os.listdir() == []


def test_a_bug_shows_itself(runs) -> None:
    runs[1][0] = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        train([])


def test_a_run_gets_what_was_asked_for(runs) -> None:
    seen, _ = runs
    assert train(["seed=3", "objective=elbo", "objective.k=7", "output_dir=there"]) == 0
    (experiment,) = seen
    assert (experiment.seed, experiment.objective.num_samples, experiment.group) == (3, 7, None)
    assert experiment.overrides == ["seed=3", "objective=elbo", "objective.k=7", "output_dir=there"]
    assert experiment.names["objective"] == "elbo"
    here = {"data_dir": str(Path("data").absolute()), "output_dir": str(Path("there").absolute())}
    assert experiment.config == job(*experiment.overrides).config | here
    assert os.listdir() == []


def test_a_class_of_ones_own(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "objective").mkdir(parents=True)
    (tmp_path / "conf" / "objective" / "mine.yaml").write_text("_target_: my_objectives.Mine\nk: 3\n")
    (tmp_path / "my_objectives.py").write_text(
        "from iwae_cli.objectives.iwae import IWAE\nclass Mine(IWAE):\n    '''One's own.'''\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert train(["--config-dir", "conf", "objective=mine"]) == 2
    monkeypatch.setenv("IWAE_ALLOW_TARGETS", "my_objectives")
    assert train(["--config-dir", "conf", "objective=mine", "objective.k=4"]) == 0
    (experiment,) = runs[0]
    assert (type(experiment.objective).__name__, experiment.objective.num_samples) == ("Mine", 4)


# A sweep.


def test_a_sweep_runs_every_combination(runs, capsys) -> None:
    assert train(["-m", "seed=0,1", "objective=elbo,iwae", "objective.k=2", "output_dir=there"]) == 0
    assert [(e.seed, e.names["objective"], e.objective.num_samples) for e in runs[0]] == [
        (0, "elbo", 2),
        (0, "iwae", 2),
        (1, "elbo", 2),
        (1, "iwae", 2),
    ]
    assert runs[0][2].overrides == ["seed=1", "objective=elbo", "objective.k=2", "output_dir=there"]
    (group,) = {e.group for e in runs[0]}
    assert group.startswith("seed+objective-")
    assert {p.parts[:3] for p in Path().rglob("*") if p.is_file()} == {("there", "sweeps", group)}
    assert {"multirun.yaml", "sweep.json"} <= {p.name for p in Path("there", "sweeps", group).iterdir()}
    out, err = capsys.readouterr()
    assert "4 finished" in out and err == ""


def test_the_same_sweep_has_the_same_name() -> None:
    first, again, other, restarted = (
        plan(line.split(), True, None).name
        for line in ("seed=0,1", "seed=0,1", "seed=0,2", "seed=0,1 restart=true on_error=stop")
    )
    assert first == again == restarted != other


def test_a_failure_is_told_at_once_and_the_others_go_on(runs, capsys) -> None:
    seen, raising = runs
    raising[1] = RunFailed("it diverged")
    raising[2] = ZeroDivisionError("a bug")
    assert train(["-m", "seed=0,1,2,3"]) == 1
    assert [e.seed for e in seen] == [0, 1, 2, 3]
    err = capsys.readouterr().err
    assert f"iwae-train: job 1 (seed=1) failed: it diverged ({seen[1].folder().path.relative_to(Path.cwd())})\n" in err
    assert "iwae-train: job 2 (seed=2) failed: a bug (" in err
    assert err.count("Traceback") == 1 and "ZeroDivisionError: a bug" in err


def test_a_signal_ends_the_whole_sweep(runs, capsys) -> None:
    seen, raising = runs
    raising[1] = Interrupted(2)
    assert train(["-m", "seed=0,1,2"]) == 130
    assert [e.seed for e in seen] == [0, 1]
    assert "1 finished, 1 interrupted, 1 pending" in capsys.readouterr().out


def test_a_preset_can_hold_a_sweep(runs, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "seeds.yaml").write_text(
        "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '4,5'}}}\n"
    )
    assert train(["--config-dir", "conf", "experiment=seeds", "objective.k=1,2"]) == 0
    assert [(e.seed, e.objective.num_samples) for e in runs[0]] == [(4, 1), (4, 2), (5, 1), (5, 2)]


# What is shown.


def command(module: str, *argv: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", module]
    return subprocess.run([sys.executable, *start, *argv], capture_output=True, text=True, timeout=300)


def test_help_names_every_choice(capsys) -> None:
    assert train(["data=mnist", "--help"]) == 0
    out = capsys.readouterr().out
    found = choices([conf_folder()])
    defaults = yaml.safe_load((conf_folder() / "config.yaml").read_text())["defaults"]
    groups = [group for default in defaults if isinstance(default, dict) for group in default if group in found]
    assert {*BASES, "experiment"} <= set(groups)
    for group in groups:
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [f"{group}="]]
        shown = line.split(maxsplit=1)[1].replace("[", "").replace("]", "")
        assert shown == " ".join(summary(found[group]))
    assert "[digits]" in out and "[iwae]" in out
    assert out.count("\n  iwae-train") >= 5


def test_help_lists_choices_of_ones_own_and_the_rest_of_the_program(tmp_path: Path, capsys) -> None:
    (tmp_path / "own" / "objective").mkdir(parents=True)
    (tmp_path / "own" / "objective" / "mine.yaml").write_text("")
    assert train(["--help", "--config-dir", "own"]) == 0
    out = capsys.readouterr().out
    assert " [iwae] jvi mine " in out
    for shown in (
        "on_error=",
        "outputs/sweeps/",
        "torchrun ",
        "iwae-report ",
        "estimator=ais or gradient_snr",
        "range(",
    ):
        assert shown in out
    assert len(out.splitlines()) < 60 and train(["--config-dir", "nowhere", "--help"]) == 2


def test_the_examples_of_the_help_are_right(capsys) -> None:
    train(["--help"])
    examples = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("  iwae-train")]
    assert len(examples) >= 5
    for argv in examples:
        assert plan([word for word in argv if word != "-m"], "-m" in argv, None).jobs


def test_cfg_shows_the_config(capsys) -> None:
    assert train(["--cfg", "job", "objective.k=9", "data=mnist"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["objective"]["k"], shown["data"]["data_dir"]) == (9, "${data_dir}")
    assert train(["-c", "job", "-p", "objective", "--resolve"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["k"] == 5


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["--cfg", "job"], ["objective=iwea"], ["-sc", "query=bash"]]
)
def test_answers_need_no_torch(argv: list[str]) -> None:
    code = """
import sys
from iwae_cli.cli.train import train
try:
    train()
finally:
    print(*{"torch", "wandb", "numpy"} & set(sys.modules), file=sys.stderr)
"""
    os.environ["COMP_LINE"] = "iwae-train objective="
    done = command("", *argv, code=code)
    assert done.stderr.splitlines()[-1:] == [""], done.stderr


def test_completion(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COMP_LINE", "iwae-train objective=iw")
    assert train(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == ["objective=iwae"]


def test_as_a_command() -> None:
    done = command("iwae_cli", "--version")
    assert (done.returncode, done.stdout) == (0, f"iwae-train {__version__}\n")
    wrong = command("iwae_cli", "objective.k=0")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "iwae-train: objective.k must be >= 1, got 0\n"
    assert os.listdir() == []


def test_a_reader_that_has_left() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "iwae_cli", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (141, b"")


# Evaluating again.


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert train([*QUICK, f"output_dir={folder}"]) == 0
    (run,) = folder.glob("digits-*")
    return run


def test_evaluating_again_keeps_both_and_knows_a_run_by_another_path(run_folder: Path, tmp_path: Path, capsys) -> None:
    result = (run_folder / "result.json").read_bytes()
    latest = tmp_path / "latest"
    latest.symlink_to(run_folder)
    assert evaluate([str(latest), "evaluation.k=7", "evaluation.splits=[test]", "device=cpu"]) == 0
    assert "NLL_7" in capsys.readouterr().out
    assert (run_folder / "result.json").read_bytes() == result
    (first, again) = sorted((run_folder / "evaluations").glob("*/result.json"), key=lambda path: "k7-" in str(path))
    assert json.loads(again.read_bytes())["identity"] == json.loads(result)["identity"] == run_folder.name
    assert json.loads(first.read_bytes())["identity"] == run_folder.name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.k=3", "objective.k cannot be changed after training (allowed are evaluation, device, data_dir"),
        ("evalaution.k=3", "evalaution.k cannot be changed after training; did you mean evaluation?"),
        ("evaluation.kk=3", "evaluation.kk is unknown; did you mean evaluation.k?"),
        ("+evaluation.kk=3", "evaluation.kk is unknown; did you mean evaluation.k?"),
        ("evaluation.k=x", "evaluation.k must be an integer, got x"),
        ("evaluation.k=0", "evaluation.k must be >= 1, got 0"),
        ("evaluation.k=1,5", "evaluation.k=1,5: iwae-eval does one evaluation"),
        ("device=cup", "device must be one of auto, cpu, cuda, mps, got cup; did you mean cpu?"),
        ("evaluation._target_=os.system", "evaluation._target_ must name a class"),
        ("data_dir=5", "data_dir must be text, got 5"),
        ("~evaluation", "~evaluation: nothing can be taken away"),
        ("--foo", "unknown option --foo"),
    ],
)
def test_wrong_evaluations(run_folder: Path, capsys, override: str, message: str) -> None:
    before = sorted(run_folder.rglob("*"))
    assert evaluate([str(run_folder), override]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"iwae-eval: {message}")
    assert sorted(run_folder.rglob("*")) == before


def test_what_is_no_run_folder(tmp_path: Path, capsys) -> None:
    for content, message in {None: "is no run folder", "[": "is damaged", "a: 1": "is damaged"}.items():
        if content:
            (tmp_path / "config.yaml").write_text(content)
        assert evaluate([str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    assert evaluate(["nowhere"]) == evaluate([]) == 2
