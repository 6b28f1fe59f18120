"""Overrides that nobody should write, drawn with a seed: each ends in one line without a traceback or a secret."""

from __future__ import annotations

import random

import pytest

from iwae_cli.cli.help import choices, conf_folder
from iwae_cli.cli.train import train

GROUPS = choices([conf_folder()])
KEYS = (
    *("seed", "batch_size", "data_dir", "output_dir", "init_from", "train", "restart", "training.tau", "on_error"),
    *("model.latent_sizes", "model.likelihood", "objective.k", "objective.gradient", "optimizer.lr", "optimizer.betas"),
    *("optimizer._target_", "schedule.passes", "validation.every", "evaluation.k", "evaluation.splits", "device.kind"),
    *("logger.wandb.tags", "logger.wandb.name", "logger.wandb.mode", "hydra.launcher.n_jobs", "hydra.run.dir", "x.y"),
    *(group for group in GROUPS if group != "estimator"),
)
VALUES = (
    *("-1", "1e309", "nan", "inf", "null", "''", "[]", "{}", "[[]]", "{_target_: os.system}", "[1,2", "}", "(", "???"),
    *("1,2", "range(3)", "range(1,0)", "choice()", "interval(0,1)", "glob(*)", "tag(a,interval(0,1))", "int(3.5)"),
    *("${oc.env:SECRET}", "x${oc.env:SECRET}", "[${oc.env:NUMBER}]", "'${oc.decode:${oc.env:NUMBER}}'"),
    *("${oc.env:${oc.env:SECRET}}", "'${oc.decode:${oc.env:LISTED}}'", "torch.optim.${oc.env:SECRET}"),
    *("${oc.env:LONG}", "[1,${oc.env:ODD}]", "{a: ${oc.env:LONG}}"),
    *("${", "${.}", "${nowhere}", "${x:}", "${hydra:job.num}", "${now:%Y}", "${seed}", "${model}", "~nobody77/x", "~"),
    *(
        "a b",
        "a=b",
        "\\",
        "'",
        '"',
        "é",
        "\u202eabc",
        "\x00",
        "\x1b[31mred",
        "a\r\nb",
        "\ud800",
        "os.system",
        "../../x",
    ),
    *("%s%n{0}", "9" * 5000, "x" * 5000, "[" * 300, "{a:" * 200, "/".join(["d"] * 3000), str(2**63)),
)
FREE = (
    *("", "=", "=3", "seed", "help", "~seed", "seed@x=3", "+x.y.z=3", "--seed", "--data=mnist", "-1", "--", "\x00"),
    *("--config-dir=/proc", "--config-name=x", "--cfg", "--info=x", "-sc", "\ud800=1", "${oc.env:SECRET}", "x" * 5000),
)


def drawn(rng: random.Random) -> str:
    if rng.random() < 0.15:
        return rng.choice(FREE)
    value = "".join(rng.choices(VALUES, k=rng.choice([1, 1, 1, 2])))
    return f"{rng.choice(['', '', '', '', '+', '++'])}{rng.choice(KEYS)}{rng.choice(['', '', '', '', '.x'])}={value}"


def test_hostile_overrides(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iwae_cli.runs.runner.run", lambda experiment: experiment.check())
    monkeypatch.setattr("iwae_cli.sweeps.jobs.run_sweep", lambda plan, *_: [job.experiment() for job in plan.jobs])
    secrets = {"SECRET": "hunter2", "NUMBER": "12345678", "LISTED": "[hunter2, {hunter3: hunter4}]"}
    for name, value in {**secrets, "LONG": "hunter2" * 99, "ODD": "é \"'\n hunter2 {"}.items():
        monkeypatch.setenv(name, value)
    rng = random.Random(0)
    refused = 0
    for _ in range(80):
        arguments = [*rng.choice([[], [], ["-m"]]), *(drawn(rng) for _ in range(rng.choice([1, 1, 2])))]
        code = train(arguments)
        err = capsys.readouterr().err
        refused += code == 2
        assert code in (0, 2) and err.count("\n") == (code == 2), (arguments, err)
        assert len(err) <= 301 and err.rstrip("\n").isprintable(), (arguments, err)
        assert "hunter" not in err and "12345678" not in err.replace(",", ""), (arguments, err)
    assert refused > 50
