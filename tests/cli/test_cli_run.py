"""Composition, one run, a sweep, and what is shown: exit codes, and what is left behind."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from iwae_cli.cli.compose import plan
from iwae_cli.cli.help import choices, conf_folder, summary
from iwae_cli.cli.train import train
from iwae_cli.config.build import BASES, construct
from iwae_cli.core.errors import Interrupted, RunFailed, RunLocked, UserError
from iwae_cli.runs.experiment import Experiment

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


@pytest.mark.parametrize("group", sorted(BASES.keys() - {"data", "model", "objective", "optimizer", "schedule"}))
def test_every_choice_constructs(group: str) -> None:
    """Those of the other groups take a step in test_configs.py."""
    names = choices([conf_folder()])[group]
    assert names
    for name, composed in zip(names, jobs(f"{group}={','.join(names)}"), strict=True):
        assert composed.names[group] == name
        assert construct(composed.config, [group])[group] is not None


def test_presets_leave_other_groups_alone_and_give_way_to_the_command_line() -> None:
    found, plain = choices([conf_folder()]), job()
    for row in range(3):
        chosen = {group: found[group][row % len(found[group])] for group in ("data", "model", "objective", "device")}
        overrides = [f"{group}={name}" for group, name in chosen.items()]
        asked = job(*overrides).config
        for preset in jobs(*overrides, PRESETS):
            assert preset.config.items() >= {group: asked[group] for group in chosen}.items()
    groups = ("schedule", "optimizer", "evaluation")
    presets = jobs(PRESETS)
    assert all({preset.names[group] for preset in presets} - {plain.names[group]} for group in groups)
    overrides = [f"{group}={found[group][0]}" for group in groups]
    asked = job(*overrides).config
    for preset in jobs(*overrides, PRESETS):
        assert all(preset.config[group] == asked[group] for group in groups)


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
    ("environment", "overrides", "expected"),
    [
        ("", [], {"mode": "offline", "project": "iwae-cli", "tags": [], "entity": None, "name": None, "group": None}),
        ("MODE=online", [], {"mode": "online"}),
        ("MODE=disabled", [], {"mode": "disabled"}),
        ("MODE=disabled", ["logger=online"], {"mode": "online"}),
        ("MODE=disabled", ["logger.wandb.mode=online"], {"mode": "online"}),
        ("MODE=disabled", ["logger.wandb.project=x"], {"mode": "disabled", "project": "x"}),
        ("MODE=nonsense", ["logger=offline"], {"mode": "offline"}),
        ("SWEEP_ID=s", [], {"mode": "online"}),
        ("SWEEP_ID=s MODE=offline", [], {"mode": "offline"}),
        ("SWEEP_ID=s", ["logger=offline"], {"mode": "offline"}),
        ("PROJECT=1 ENTITY=null NAME=c TAGS=d,e RUN_GROUP=f", ["logger=online"],
         {"project": "1", "entity": "null", "name": "c", "tags": ["d", "e"], "group": "f"}),
        ("PROJECT= ENTITY= TAGS= NAME=", [], {"project": "iwae-cli", "entity": None, "tags": [], "name": None}),
        ("PROJECT=a TAGS=b NAME=c", ["logger.wandb.project=x", "logger.wandb.tags=[y]", "logger.wandb.name=null"],
         {"project": "x", "tags": ["y"], "name": None}),
    ],
)  # fmt: skip
def test_variables_of_wandb_count_where_nothing_was_typed(monkeypatch, environment, overrides, expected) -> None:
    for name, value in (item.split("=") for item in environment.split()):
        monkeypatch.setenv(f"WANDB_{name}", value)
    node = job(*overrides).config["logger"]["wandb"]
    assert {key: node[key] for key in expected} == expected


# One run.


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("a\nb"), 2),
        (RunLocked("a"), 3),
        (RunFailed("a"), 1),
        (Interrupted(15), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(runs, capsys, error, code) -> None:
    runs[1][0] = error
    assert train([]) == code
    assert capsys.readouterr().err.count("\n") == (code != 130) and os.listdir() == []
    runs[1][0] = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
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


# A sweep.


def test_the_same_sweep_has_the_same_name() -> None:
    first, again, other, restarted = (
        plan(line.split(), True, None).name
        for line in ("seed=0,1", "seed=0,1", "seed=0,2", "seed=0,1 restart=true on_error=stop")
    )
    assert first == again == restarted != other


def test_a_preset_can_hold_a_sweep(runs, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "seeds.yaml").write_text(
        "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '4,5'}}}\n"
    )
    assert train(["--config-dir", "conf", "experiment=seeds", "objective.k=1,2"]) == 0
    assert [(e.seed, e.objective.num_samples) for e in runs[0]] == [(4, 1), (4, 2), (5, 1), (5, 2)]


# What is shown.


def test_help_names_every_choice(tmp_path: Path, capsys) -> None:
    (tmp_path / "own" / "objective").mkdir(parents=True)
    (tmp_path / "own" / "objective" / "mine.yaml").write_text("")
    assert train(["--help", "--config-dir", "own"]) == 0
    shown = {words[0]: words[1:] for line in capsys.readouterr().out.splitlines() if (words := line.split())}
    found = choices([conf_folder(), Path("own")])
    assert {*BASES, "experiment"} <= {*found} and "mine" in found["objective"]
    for group in {*BASES, "experiment"}:
        assert [word.strip("[]") for word in shown[f"{group}="]] == " ".join(summary(found[group])).split()
    assert "[digits]" in shown["data="] and "[iwae]" in shown["objective="]


def test_help_says_what_the_choices_of_a_group_are(tmp_path: Path, capsys) -> None:
    (tmp_path / "own" / "objective").mkdir(parents=True)
    (tmp_path / "own" / "objective" / "mine.yaml").write_text(
        "# @package _global_\n# Half of\n# the ELBO.\n_target_: a.B\n"
    )
    for group, names in choices([conf_folder(), Path("own")]).items():
        assert train(["--help", group, "--config-dir", "own"]) == 0
        out = capsys.readouterr().out
        heads = [line for line in out.splitlines() if line[:1].strip()][: len(names)]
        assert [line.split()[0] for line in heads] == names and max(map(len, out.splitlines())) <= 120
        assert all(len(line.split()) > 2 for line in heads)
        assert group != "objective" or "mine       Half of the ELBO." in heads
        for name in names:
            file = conf_folder() / group / f"{name}.yaml"
            text = file.read_text() if file.is_file() and group != "experiment" else ""
            words = " ".join(line for line in text.splitlines() if "_target_" not in line and line != "{}")
            assert " ".join(words.replace("#", " ").split()) in " ".join(out.replace("#", " ").split()), name
    for wrong, words in (("objectives", "did you mean objective?"), ("iwae", "it is a choice: --help objective")):
        assert train(["--help", wrong]) == 2 and words in capsys.readouterr().err


def test_the_examples_of_the_help_are_right(capsys) -> None:
    train(["--help"])
    examples = [
        shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("  iwae-train")
    ]
    assert len(examples) >= 5
    for argv in examples:
        assert plan([word for word in argv if word != "-m"], "-m" in argv, None).jobs


def test_cfg_shows_the_config(capsys) -> None:
    assert train(["--cfg", "job", "objective.k=9", "data=mnist"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["objective"]["k"], shown["data"]["data_dir"]) == (9, "${data_dir}")
    assert train(["-c", "job", "-p", "objective", "--resolve"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["k"] == 5


def test_answers_need_no_torch_and_a_wrong_value_is_one_line(tmp_path: Path) -> None:
    """As a command: one process for all, in which torch cannot be imported until the last."""
    code = """
import sys
from iwae_cli.cli.train import train
sys.modules.update(dict.fromkeys(["torch", "wandb", "numpy"]))
for argv in (["--help"], ["--cfg", "job"], ["-sc", "query=bash"]):
    assert train(argv) == 0
for name in ("torch", "wandb", "numpy"):
    del sys.modules[name]
sys.exit(train(["objective.k=0"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "COMP_LINE": "iwae-train objective=iw"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("iwae-train: ") and done.stderr.count("\n") == 1
    assert done.stdout.endswith("objective=iwae\n") and os.listdir() == []
