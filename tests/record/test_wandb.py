"""Real runs of wandb's, written offline and read back by wandb's own reader."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import yaml
from small_runs import TINY, finished, read_json, run_folders, snapshot, wandb_records
from wandb_server import Server, wandb_server

from iwae_cli.record.figures import plot_samples
from iwae_cli.record.loggers import RunInfo
from iwae_cli.record.wandb import WandbLogger, left_to_upload

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
    assert left_to_upload(tmp_path / "run", "") == {}
    with caplog.at_level(logging.WARNING, "iwae_cli"):
        run.open(info(tmp_path / "run", group="sweep", overrides=["data=digits", "objective.k=50"]), [])
        run.log(10, {"train/bound": -90.5, "validation/bound": None})
        run.log(20, {"train/bound": -80.25, "validation/bound": -82.0})
        run.image(20, "samples", picture)
        run.histogram(20, "log_w", [-2.0, -1.0, 0.0, float("-inf")])
        run.table(20, "bounds", ["split", "k", "bound"], [("test", 1, -90.0), ("test", 50, -81.5)])
        run.summary({"test": {"nll": 81.5, "bounds": {"1": -90.0, "50": -81.5}, "khat": None}, "active_units": [20, 5]})
        run.close("finished")
    assert not ours(caplog)

    [folder] = offline_folders(tmp_path / "run")
    command = left_to_upload(tmp_path / "run", "")["upload"]
    assert shlex.split(command) == ["wandb", "sync", f"run/wandb/{folder.name}"]
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
    metrics = {metric.get("name", metric.get("glob_name")): metric for metric in of_type(folder, "metric")}
    assert metrics["*"]["step_metric"] == "step"
    assert [name for name, metric in metrics.items() if metric["options"].get("hidden")] == ["step", "pass"]

    assert rows[2]["step"] == 20
    assert (folder / "files" / rows[2]["samples.path"]).read_bytes() == picture.read_bytes()
    assert rows[3]["log_w._type"] == "histogram"
    assert sum(rows[3]["log_w.values"]) == 3, "the finite values, each once"
    assert rows[3]["log_w.bins"][0] == -2
    assert rows[3]["log_w.bins"][-1] == 0
    table = json.loads((folder / "files" / rows[4]["bounds.path"]).read_text())
    assert (table["columns"], table["data"]) == (["split", "k", "bound"], [["test", 1, -90], ["test", 50, -81.5]])

    final = {"test/nll": 81.5, "test/bounds/50": -81.5, "test/khat": None, "active_units": [20, 5]}
    assert summary(folder).items() >= final.items()
    assert [end.get("exit_code", 0) for end in of_type(folder, "exit")] == [0]


def test_after_a_resume_the_newest_file_alone_is_complete(tmp_path: Path) -> None:
    first = wandb_logger()
    first.open(info(tmp_path / "run"), [])
    for step in (1, 2, 3):
        first.log(step, {"a": step / 7})
    first.close("interrupted")
    # At once: within the second that names the folder.
    second = wandb_logger(group="mine")
    second.open(info(tmp_path / "run", group="sweep"), [(1, {"a": 1 / 7}), (2, {"a": 2 / 7})])
    second.log(3, {"a": 3 / 7})
    second.close("finished")

    old, new = sorted(offline_folders(tmp_path / "run"), key=lambda folder: folder.stat().st_ctime_ns)
    assert new.name in left_to_upload(tmp_path / "run", "")["upload"]
    assert history(new) == [{"step": step, "a": pytest.approx(step / 7, rel=1e-15)} for step in (1, 2, 3)]
    assert of_type(old, "run")[0]["run_id"] == of_type(new, "run")[0]["run_id"]
    assert of_type(new, "run")[0]["run_group"] == "mine", "what was typed, not the sweep"
    assert [end["exit_code"] for end in of_type(old, "exit")] == [1], "interrupted"


ONLINE = """
import logging, sys
from pathlib import Path
logging.basicConfig(format="%(message)s", stream=sys.stdout)
from iwae_cli.record.loggers import RunInfo
from iwae_cli.record.wandb import WandbLogger, left_to_upload
folder = Path(sys.argv[1])
folder.mkdir()
run = WandbLogger(mode="online", project="iwae-test", entity=None, group=None, tags=[], name=None)
info = RunInfo(folder=folder, identity="x", config={"k": 5})
run.open(info, [])
run.log(1, {"a": 1})
run.close("finished")
print(*left_to_upload(folder, "").values(), run.recorded(info))
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
    assert command.endswith(f"{offline.name} True"), "and the same command would not wait again"
    assert history(offline) == [{"step": 1, "a": 1}]
    assert not list((folder / "wandb").glob("run-*")), "what the attempt left behind is gone"


def test_ids_follow_the_run_folder_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a restart, not a colleague: other ids. A record of an earlier version keeps the id in its folder's name."""
    former = tmp_path / "former"
    (former / "wandb" / "offline-run-20260101_000000-0a1b2c3d").mkdir(parents=True)
    assert wandb_logger().recorded(info(former))
    assert "offline-run-20260101_000000-0a1b2c3d" in left_to_upload(former, "any")["upload"]
    monkeypatch.setenv("WANDB_DIR", "records")
    ids = []
    for folder in (former, tmp_path / "mine", tmp_path / "colleague"):
        logger = wandb_logger()
        logger.open(info(folder), [])
        logger.close("finished")
        known = read_json(folder / "wandb.json")
        ids.append(known["id"])
        (record,) = Path("records").glob(f"wandb/offline-run-*-{ids[-1]}")
        assert Path(known["folder"]) == record.resolve() and [r["run_id"] for r in of_type(record, "run")] == ids[-1:]
        assert left_to_upload(folder, "") == {"upload": f"wandb sync {record}"}
        assert logger.recorded(info(folder)) and not wandb_logger(project="other").recorded(info(folder))
        assert not logger.recorded(info(folder, evaluation="another")), "what W&B has is another result"
        assert not wandb_logger("online").recorded(info(folder))
        next(record.glob("*.wandb")).with_suffix(".wandb.synced").touch()
        assert wandb_logger("online").recorded(info(folder)) and left_to_upload(folder, "") == {}
    assert ids[0] == "0a1b2c3d" and len(set(ids)) == 3
    (former / "wandb.json").write_text("[]")
    assert wandb_logger().recorded(info(former)), "damaged: as if it were not there"


def test_a_long_identity_is_cut_to_what_wandb_takes(tmp_path: Path) -> None:
    logger, identity = wandb_logger(), f"{'data' * 15}-{'model' * 12}-{'objective' * 6}-k50-seed0-0a1b2c3d"
    logger.open(info(tmp_path / "run", identity=identity), [])
    logger.close("finished")
    (record,) = offline_folders(tmp_path / "run")
    (run,) = of_type(record, "run")
    assert len(run["display_name"]) == 128 < len(identity) and identity.endswith(run["display_name"])


def git(*arguments: str) -> str:
    environment = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return subprocess.run(
        ["git", *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_finished_run_is_recorded_as_it_would_have_been(tmp_path: Path) -> None:
    """Without training or evaluating; compared with a run that was recorded while it trained."""
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message=x")
    live = finished(tmp_path / "live", *TINY, "logger=offline")
    later = finished(tmp_path / "later", *TINY)
    before = snapshot(later)
    git("commit", "--quiet", "--allow-empty", "--message=y")
    code, out, err = small_runs.run(*TINY, "logger=offline", f"output_dir={later.parent}")
    assert code == 0 and "wandb sync" in out and "recorded" in err and "training" not in err
    after = snapshot(later)
    assert {name for name in before if before[name] != after[name]} <= {"train.log"}

    [expected], [found] = offline_folders(live), offline_folders(later)
    rows = [
        [{k: v for k, v in row.items() if not k.endswith(".path")} for row in history(f)] for f in (expected, found)
    ]
    [histogram] = [row for row in rows[0] if "log_w minus its mean._type" in row]
    assert [row for row in rows[0] if row is not histogram] == rows[1]
    assert {key for row in rows[1] for key in row if key.endswith("._type")} == {
        *("bounds._type", "figures/training._type", "figures/bound_vs_k._type"),
        *("figures/samples._type", "figures/reconstructions._type", "figures/ess._type", "figures/kl_per_unit._type"),
    }
    finals = [{k: v for k, v in summary(f).items() if k.startswith(("test/", "active"))} for f in (expected, found)]
    result = read_json(later / "result.json")
    assert finals[0] == finals[1] and finals[1]["test/nll"] == result["test"]["nll"]
    for folder in (expected, found):
        [begun] = of_type(folder, "run")
        config = begun["config"]["update"]
        assert [config[key]["name"] for key in ("data", "model", "objective")] == ["digits", "one_layer", "iwae"]
        assert begun["tags"] == ["digits", "one_layer", "iwae"]
        # Of the training, not of the moment it is recorded.
        assert (config["parameters"], config["commit"]) == (result["parameters"], git("rev-parse", "HEAD~"))
        assert config["version"] == result["versions"]["iwae-cli"]

    assert small_runs.run(*TINY, "logger=offline", f"output_dir={later.parent}")[2] == "", "once"
    assert len(offline_folders(later)) == 1


def test_a_record_of_another_evaluation_is_not_offered_for_upload(tmp_path: Path) -> None:
    folder = finished(tmp_path / "out", *TINY, "logger=offline")
    held = read_json(folder / "result.json")["evaluation"]["name"]
    other = (*TINY, "evaluation.k=30", "logger=disabled", f"output_dir={folder.parent}")
    _, one, _ = small_runs.run(*other)
    _, sweep, _ = small_runs.run("-m", "seed=0,1", *other)
    for out, of in ((one, ""), (sweep, "1 of 2 jobs; of the first ")):
        assert "NLL_30" in out and "wandb sync" not in out
        assert f"\nnot uploaded  {of}the W&B record holds {held}; logger=offline records this evaluation\n" in out
    _, recorded, _ = small_runs.run(*other, "logger=offline")
    assert "\nupload        wandb sync " in recorded and "not uploaded" not in recorded


@pytest.fixture
def server() -> Iterator[Server]:
    with wandb_server() as server:
        yield server


def command(server: Server, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        env={**os.environ, **server.environment(), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


THREE_TIMES = """
import json, sys
from small_runs import run
line = sys.argv[1:]
print(json.dumps([run(*line), run(*line), run(*line, "logger.wandb.project=other")]))
"""


def test_online_a_finished_run_is_uploaded_and_the_id_of_a_deleted_one_is_replaced(
    tmp_path: Path, server: Server
) -> None:
    folder = finished(tmp_path / "out", *TINY)
    server.forgetful = True
    done = command(
        *(server, sys.executable, "-c", THREE_TIMES, *TINY, "logger=online", "output_dir=out"),
        PYTHONPATH=os.pathsep.join((str(ROOT / "tests" / "support"), os.environ["PYTHONPATH"])),
        WANDB_INIT_TIMEOUT="4",
    )
    online, again, replaced = json.loads(done.stdout)
    (first, second), nll = server.runs, read_json(folder / "result.json")["test"]["nll"]
    assert online[0] == 0 and "wandb sync" not in online[1] and server.runs[first]["exitcode"] == 0
    assert [server.summary(run_id)["test/nll"] for run_id in server.runs] == [nll, nll]
    assert again[::2] == [0, ""], "uploaded once"
    [warning] = [line for line in replaced[2].splitlines() if "refuses" in line]
    assert first in warning and second in warning and "deleted" in warning and len(warning) <= 300
    assert server.runs[second]["sent"]["project"] == "other" and read_json(folder / "wandb.json")["id"] == second


FAST = ("model.hidden_sizes=[[8]]", "evaluation.k=50", "evaluation.refine=0")


def test_the_sweep_of_the_page_under_an_agent(tmp_path: Path, server: Server) -> None:
    """By the functions with which ``wandb agent`` makes the command; the second time there is nothing to train."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
    from wandb.sdk.lib.config_util import save_config_file_from_dict

    page = (ROOT / "docs" / "sweeps.md").read_text()
    sweep = yaml.safe_load(page.partition("```yaml\n# sweep.yaml\n")[2].partition("```")[0])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "iwae-train").write_text(f'#!/bin/sh\nexec {sys.executable} -m iwae_cli "$@"\n')
    (tmp_path / "bin" / "iwae-train").chmod(0o700)
    chosen = {"objective": {"value": sweep["parameters"]["objective"]["values"][0]}, "optimizer.lr": {"value": 0.0025}}
    parts = {**create_sweep_command_args({"args": chosen}), "env": ["/usr/bin/env"], "program": [sweep["program"]]}
    line = [
        word
        for part in create_sweep_command(list(sweep["command"]))
        for word in (parts[part[2:-1]] if part.startswith("${") else [part])
    ]
    save_config_file_from_dict("wandb/sweep-s1/config.yaml", chosen)
    errors = []
    for run_id in ("first", "second"):
        of_agent = {"SWEEP_ID": "s1", "RUN_ID": run_id, "PROJECT": "sweeps", "ENTITY": "me"}
        of_agent |= {"SWEEP_PARAM_PATH": "wandb/sweep-s1/config.yaml"}
        path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        done = command(server, *line, *FAST, **{f"WANDB_{key}": value for key, value in of_agent.items()}, **path)
        errors.append(done.stderr)
        sent = server.runs[run_id]["sent"]
        config = {key: node["value"] for key, node in json.loads(sent["config"]).items()}
        assert (sent["sweep"], sent["project"], server.runs[run_id]["exitcode"]) == ("s1", "sweeps", 0)
        # The key of the sweep holds what the agent chose, and what that choice consists of is beside it.
        assert (config["objective"], config["objective.k"], config["optimizer"]["lr"]) == ("elbo", 1, 0.0025)
    (folder,) = run_folders(tmp_path / "outputs")
    result = read_json(folder / "result.json")
    assert "training" in errors[0] and "training" not in errors[1] and "Ignoring" not in "".join(errors)
    assert set(server.runs) == {"first", "second"}
    for run_id in server.runs:
        split, metric = sweep["metric"]["name"].split("/")
        assert server.summary(run_id)[sweep["metric"]["name"]] == result[split][metric]
