from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_runs import change, config, values, write

from iwae_cli.core.errors import UserError
from iwae_cli.report.paired import compare
from iwae_cli.report.reader import read


def states(*paths: Path) -> dict[str, tuple[str, str]]:
    return {left.path.name: (left.state, left.why) for left in read(paths).left_out}


def unfinished(folder: Path, **status: object) -> Path:
    (folder / "result.json").unlink()
    change(folder / "status.json", **status)
    return folder


def test_what_is_not_finished_is_listed_with_the_reason(tmp_path: Path) -> None:
    folders = [write(tmp_path, config(seed=s), values(85.0)) for s in range(6)]
    here = socket.gethostname()
    unfinished(folders[0], status="interrupted", step=7, error="interrupted by signal 15")
    unfinished(folders[1], status="failed", step=9, error="RunFailed: diverged")
    unfinished(folders[2], status="running", host=here, pid=os.getpid())
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    unfinished(folders[3], status="running", host=here, pid=int(gone.stdout))
    for name in ("result.json", "status.json", "config.yaml"):
        (folders[4] / name).unlink()
    found = states(tmp_path)
    expected = ["interrupted", "failed", "running", "killed", "not begun"]
    assert [found[folder.name][0] for folder in folders[:5]] == expected
    assert "signal 15" in found[folders[0].name][1] and "RunFailed: diverged" in found[folders[1].name][1]
    assert [run.identity for run in read([tmp_path]).runs] == [folders[5].name]


DAMAGES: dict[str, Any] = {
    "cut": lambda result: json.dumps(result)[:200],
    "empty": lambda result: "",
    "a list": lambda result: "[]",
    "bytes": lambda result: "\udcff",
    "another k": lambda result: json.dumps(result | {"test": result["test"] | {"k": 3}}),
}


def test_damaged_files_are_reported_and_the_others_are_read(tmp_path: Path) -> None:
    good = write(tmp_path, config(), values(85.0))
    for seed, damage in enumerate(DAMAGES.values(), 1):
        path = write(tmp_path, config(seed=seed), values(85.0)) / "result.json"
        path.write_bytes(damage(json.loads(path.read_text())).encode(errors="surrogateescape"))
    for seed, text in enumerate(("a: [", "- 1", "", "seed: 0", "\udcff"), 100):
        path = write(tmp_path, config(seed=seed), values(85.0)) / "config.yaml"
        path.write_bytes(text.encode(errors="surrogateescape"))
    write(tmp_path, config(seed=200), values(85.0)).joinpath("config.yaml").unlink()
    found = read([tmp_path])
    assert [run.path for run in found.runs] == [good]
    assert [left.state for left in found.left_out] == ["damaged"] * (len(DAMAGES) + 6)
    assert not [left.why for left in found.left_out if len(left.why) < 10 or "\n" in left.why]


def test_old_and_copied_runs_do_not_count_twice(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", config(), values(85.0))
    shutil.copytree(folder, tmp_path / "b" / folder.name)
    shutil.copytree(folder, folder.with_name(f"{folder.name}.old-1"))
    found = read([tmp_path])
    assert len(found.runs) == 1
    assert sorted(left.state for left in found.left_out) == ["copy", "set aside"]
    named_by_an_older_version = tmp_path / "c" / folder.name.replace("one_layer", "one_layer_50")
    shutil.copytree(folder, named_by_an_older_version)
    change(named_by_an_older_version / "result.json", identity=named_by_an_older_version.name)
    assert len(read([tmp_path]).runs) == 1
    (run,), (same,) = (read([path]).runs for path in (folder, named_by_an_older_version))
    with pytest.raises(UserError, match="both hold"):
        compare("a", [run], "b", [same], "test")
    # Named twice is no copy.
    assert not read([folder, tmp_path / "a" / "." / folder.name]).left_out


def test_a_finished_run_counts_while_it_is_evaluated_again(tmp_path: Path) -> None:
    folder = write(tmp_path, config(), values(85.0))
    change(folder / "status.json", status="running")
    found = read([tmp_path])
    assert len(found.runs) == 1 and "evaluated again" in found.notes[0]


def test_a_sweep_is_its_jobs(tmp_path: Path) -> None:
    one, other = (write(tmp_path, config(seed=s), values(85.0)) for s in range(2))
    sweep = tmp_path / "sweeps" / "seed-1234"
    sweep.mkdir(parents=True)
    jobs = [
        {"identity": one.name, "folder": os.path.relpath(one, sweep), "status": "finished", "overrides": ["seed=0"]},
        {"identity": "never", "folder": "../../never", "status": "pending", "error": None, "overrides": ["seed=7"]},
        {"identity": "gone", "folder": "../../gone", "status": "finished", "error": None, "overrides": ["seed=8"]},
        {"overrides": ["seed=9"], "status": "failed", "error": "no space"},
    ]
    (sweep / "sweep.json").write_text(json.dumps({"command": "iwae-train -m", "jobs": jobs}))
    (sweep / ".lock").touch()
    found = read([sweep])
    assert [run.identity for run in found.runs] == [one.name]
    assert [(left.path.name, left.state) for left in found.left_out] == [
        ("never", "pending"), ("gone", "gone"), (sweep.name, "failed"),
    ]  # fmt: skip
    assert "seed=9" in found.left_out[2].why and "no space" in found.left_out[2].why
    assert {run.identity for run in read([tmp_path]).runs} == {one.name, other.name}, "each once"


def test_no_run_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path, "no run in"),
        (tmp_path / "nowhere", "is not there"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(UserError, match=words):
            read([path])
