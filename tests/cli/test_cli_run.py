"""Composition, exit codes, and what is shown."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml

from iwae_cli.cli.compose import plan
from iwae_cli.cli.help import choices, conf_folder, summary
from iwae_cli.cli.train import train
from iwae_cli.core.errors import Interrupted, RunFailed, RunLocked, UserError
from iwae_cli.runs.experiment import Experiment


def job(*overrides: str):
    """The one run that ``overrides`` ask for, as composed."""
    return plan(overrides, False, None).jobs[0]


# Composition.


def test_a_preset_leaves_other_groups_alone_and_gives_way_to_the_command_line() -> None:
    chosen = {"data": "omniglot", "model": "two_layer", "objective": "vimco", "device": "cpu"}
    overrides = [f"{group}={name}" for group, name in chosen.items()]
    plain = job(*overrides)
    for preset in ("experiment=smoke", "experiment=burda"):
        found, typed = job(*overrides, preset), job(preset, "schedule=cosine", "evaluation.k=7")
        assert {group: found.config[group] for group in chosen} == {group: plain.config[group] for group in chosen}
        assert found.names["schedule"] != plain.names["schedule"]
        assert (typed.names["schedule"], typed.config["evaluation"]["k"]) == ("cosine", 7)


def test_a_preset_can_hold_a_sweep_and_a_sweep_presets() -> None:
    grid = plan(["experiment=sweeps/table1", "seed=0,1"], False, None).jobs
    found = [
        (*(one.names[key] for key in ("model", "objective")), one.config["objective"]["k"], one.config["seed"])
        for one in grid
    ]
    assert sorted(found) == [*product(("one_layer", "two_layer"), ("elbo", "iwae"), (1, 5, 50), (0, 1))]
    one, other = (
        plan(["experiment=sweeps/bounds", *typed], False, None) for typed in ((), ("seed=7", "objective.k=1,2"))
    )
    assert {job.config["seed"] for job in one.jobs} == {0, 1, 2}
    assert {(job.config["seed"], job.config["objective"]["k"]) for job in other.jobs} == {(7, 1), (7, 2)}
    assert other.varied == ["objective", "objective.k"]
    swept = plan(["experiment=[],smoke"], True, None).jobs
    assert [one.config["evaluation"]["k"] for one in swept] == [5000, 500]


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
def test_exit_codes(monkeypatch, capsys, error, code) -> None:
    def run(_: Experiment) -> None:
        raise error

    monkeypatch.setattr("iwae_cli.runs.runner.run", run)
    assert train([]) == code
    assert capsys.readouterr().err.count("\n") == (code != 130) and os.listdir() == []
    error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        train([])


def test_the_same_sweep_has_the_same_name() -> None:
    first, again, other, restarted = (
        plan(line.split(), True, None).name
        for line in ("seed=0,1", "seed=0,1", "seed=0,2", "seed=0,1 restart=true on_error=stop")
    )
    assert first == again == restarted != other


# What is shown.


def test_help_names_every_choice_and_says_what_it_is(tmp_path: Path, capsys) -> None:
    (tmp_path / "own" / "objective").mkdir(parents=True)
    (tmp_path / "own" / "objective" / "mine.yaml").write_text(
        "# @package _global_\n# Half of\n# the ELBO.\n_target_: a.B\n"
    )
    assert train(["--help", "--config-dir", "own"]) == 0
    shown = {words[0]: words[1:] for line in capsys.readouterr().out.splitlines() if (words := line.split())}
    assert "[digits]" in shown["data="] and "[iwae]" in shown["objective="]
    for group, names in choices([conf_folder(), Path("own")]).items():
        assert group == "estimator" or [w.strip("[]") for w in shown[f"{group}="]] == " ".join(summary(names)).split()
        assert train(["--help", group, "--config-dir", "own"]) == 0
        out = capsys.readouterr().out
        heads = [line for line in out.splitlines() if line[:1].strip()][: len(names)]
        assert [line.split()[0] for line in heads] == names and max(map(len, out.splitlines())) <= 120
        assert all(len(line.split()) > 2 for line in heads)
        assert group != "objective" or "mine       Half of the ELBO." in heads
        for name in names:
            file = conf_folder() / group / f"{name}.yaml"
            text = file.read_text() if file.is_file() else ""
            assert {line.strip() for line in out.splitlines()} >= set(re.findall("(?m)^#   (.+)", text))
            shown_whole = " ".join(out.replace("#", " ").split())
            for line in text.splitlines() if group != "experiment" else []:
                left_out = re.match(r".*_target_|[{]}$|defaults:$|  - ", line)
                assert left_out or " ".join(line.replace("#", " ").split()) in shown_whole, (name, line)
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
