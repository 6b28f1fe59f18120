"""Real runs of wandb's, written offline and read back by wandb's own reader."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import wandb_records

from iwae_cli.record.figures import plot_samples
from iwae_cli.record.loggers import FanOut, RunInfo
from iwae_cli.record.wandb import WandbLogger

ROOT = Path(__file__).resolve().parents[2]


def wandb_logger(mode: str = "offline", **changed: Any) -> WandbLogger:
    arguments = {"project": "iwae-test", "entity": None, "group": None, "tags": [], "name": None, **changed}
    return WandbLogger(mode=mode, **arguments)


def info(folder: Path, **changed: Any) -> RunInfo:
    folder.mkdir(exist_ok=True)
    config = {"objective": {"_target_": "iwae_cli.objectives.iwae.IWAE", "k": 50}, "sizes": [200, 200], "none": None}
    return RunInfo(**{"folder": folder, "identity": "digits-one_layer-k50-0a1b2c3d", "config": config, **changed})


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "iwae_cli"]


def offline_folders(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def of_type(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in wandb_records(folder) if record["type"] == kind]


def history(folder: Path) -> list[dict[str, Any]]:
    """Rows as they were logged, without W&B's own columns."""
    rows = [record["item"] for record in of_type(folder, "history")]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for record in of_type(folder, "summary"):
        values.update(record["update"])
    return values


def test_a_run_is_recorded_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = tmp_path / "samples.png"
    plot_samples(picture, np.eye(4)[None])
    run = wandb_logger(tags=["paper"], name="my run")
    assert run.sync_command() is None
    with caplog.at_level(logging.WARNING, "iwae_cli"):
        run.open(info(tmp_path / "run", group="sweep", overrides=["data=digits", "objective.k=50"]), [])
        run.log(10, {"train/bound": -90.5, "validation/bound": None})
        run.log(20, {"train/bound": -80.25, "validation/bound": -82.0})
        run.image(20, "samples", picture)
        run.histogram(20, "log_w", [-2.0, -1.0, 0.0, float("-inf")])
        run.summary({"test": {"nll": 81.5, "bounds": {"1": -90.0, "50": -81.5}, "khat": None}, "active_units": [20, 5]})
        run.close("finished")
    assert not ours(caplog)

    [folder] = offline_folders(tmp_path / "run")
    command = run.sync_command()
    assert command is not None and shlex.split(command) == ["wandb", "sync", f"run/wandb/{folder.name}"]
    [begun] = of_type(folder, "run")
    config = {name: value for name, value in begun["config"]["update"].items() if name != "_wandb"}
    assert config == info(tmp_path / "run").config
    expected = {"project": "iwae-test", "run_group": "sweep", "job_type": "train", "tags": ["paper"]}
    expected |= {"display_name": "my run", "notes": "data=digits objective.k=50"}
    assert begun.items() >= expected.items()

    rows = history(folder)
    assert rows[:2] == [
        {"step": 10, "train/bound": -90.5},
        {"step": 20, "train/bound": -80.25, "validation/bound": -82},
    ]
    assert {metric.get("glob_name"): metric.get("step_metric") for metric in of_type(folder, "metric")}["*"] == "step"

    assert rows[2]["step"] == 20
    assert (folder / "files" / rows[2]["samples.path"]).read_bytes() == picture.read_bytes()
    assert rows[3]["log_w._type"] == "histogram"
    assert sum(rows[3]["log_w.values"]) == 3, "the finite values, each once"
    assert rows[3]["log_w.bins"][0] == -2
    assert rows[3]["log_w.bins"][-1] == 0

    final = {"test/nll": 81.5, "test/bounds/50": -81.5, "test/khat": None, "active_units": [20, 5]}
    assert summary(folder).items() >= final.items()
    assert [end.get("exit_code", 0) for end in of_type(folder, "exit")] == [0]


def test_failed_and_interrupted_runs_are_marked_and_two_runs_of_one_process_stay_apart(tmp_path: Path) -> None:
    open_together = wandb_logger(), wandb_logger(group="mine")
    statuses = "failed", "interrupted"
    for i, run in enumerate(open_together):
        run.open(info(tmp_path / f"run{i}", identity=f"run{i}", group="sweep"), [])
    for i, run in enumerate(open_together):
        run.log(1, {"a": i})
    for run, status in zip(open_together, statuses, strict=True):
        run.close(status)
    begun = []
    for i in range(2):
        [folder] = offline_folders(tmp_path / f"run{i}")
        assert history(folder) == [{"step": 1, "a": i}]
        assert [end["exit_code"] for end in of_type(folder, "exit")] == [1]
        begun += of_type(folder, "run")
    assert begun[0]["run_id"] != begun[1]["run_id"]
    assert [(run["run_group"], run["display_name"]) for run in begun] == [("sweep", "run0"), ("mine", "run1")]


def test_after_a_resume_the_newest_file_alone_is_complete(tmp_path: Path) -> None:
    first = wandb_logger()
    first.open(info(tmp_path / "run"), [])
    for step in (1, 2, 3):
        first.log(step, {"a": step / 7})
    first.close("interrupted")
    # At once: within the second that names the folder.
    second = wandb_logger()
    second.open(info(tmp_path / "run"), [(1, {"a": 1 / 7}), (2, {"a": 2 / 7})])
    second.log(3, {"a": 3 / 7})
    second.close("finished")

    old, new = sorted(offline_folders(tmp_path / "run"), key=lambda folder: folder.stat().st_ctime_ns)
    assert new.name in (second.sync_command() or "")
    assert history(new) == [{"step": step, "a": pytest.approx(step / 7, rel=1e-15)} for step in (1, 2, 3)]
    assert of_type(old, "run")[0]["run_id"] == of_type(new, "run")[0]["run_id"]


def test_an_error_of_wandb_is_one_warning_and_the_run_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = FanOut([wandb_logger()])
    with caplog.at_level(logging.WARNING, "iwae_cli"):
        run.open(info(tmp_path / "run"), [])
        run.log(1, {"a": 1})
        run.image(1, "samples", tmp_path / "missing.png")
        run.log(2, {"a": 2})
        run.summary({"a": 1})
        run.close("failed")
    [warning] = ours(caplog)
    assert warning.startswith("WandbLogger failed") and "\n" not in warning
    [folder] = offline_folders(tmp_path / "run")
    assert history(folder) == [{"step": 1, "a": 1}]
    assert [end["exit_code"] for end in of_type(folder, "exit")] == [1]


ONLINE = """
import logging, sys
from pathlib import Path
logging.basicConfig(format="%(message)s", stream=sys.stdout)
from iwae_cli.record.loggers import RunInfo
from iwae_cli.record.wandb import WandbLogger
folder = Path(sys.argv[1])
folder.mkdir()
run = WandbLogger(mode="online", project="iwae-test", entity=None, group=None, tags=[], name=None)
run.open(RunInfo(folder=folder, identity="x", config={"k": 5}), [])
run.log(1, {"a": 1})
run.close("finished")
print(run.sync_command())
"""


@pytest.mark.parametrize(
    "environment",
    # A port of this machine that nothing listens on: no network, in a moment and without one.
    [{}, {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}],
    ids=["no key and no terminal", "no network"],
)
def test_online_falls_back_to_offline_within_a_bounded_time(tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "run"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ONLINE, folder],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert time.monotonic() - began < 30
    warning, command = done.stdout.splitlines()
    assert "offline" in warning
    assert done.stderr == ""
    [offline] = offline_folders(folder)
    assert command.endswith(offline.name)
    assert history(offline) == [{"step": 1, "a": 1}]
    assert not list((folder / "wandb").glob("run-*")), "what the attempt left behind is gone"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"project": "a/b"}, "project must have"),
        ({"group": "g" * 129}, "group must have"),
        ({"tags": ["ok", ""]}, "tags must have"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        wandb_logger(**changed)
