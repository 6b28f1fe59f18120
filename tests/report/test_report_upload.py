"""To W&B: written offline and read back by wandb's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_runs import config, values, write

from iwae_cli.cli.report import report

WANDB = Path(sys.executable).with_name("wandb")

if not WANDB.exists():
    pytest.skip(f"the reader of W&B's files, {WANDB}, is not there", allow_module_level=True)


def records(folder: Path) -> list[dict[str, Any]]:
    read = subprocess.run(
        [WANDB, "leet", "inspect", "--json", folder],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in read.stdout.splitlines()]


def test_one_summary_run_in_the_group_of_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "outputs"
    jobs = []
    for k in (1, 50):
        for seed in range(2):
            settings = config(k=k, seed=seed, logger__project="thesis")
            folder = write(place, settings, values(85.0 - k / 100 + seed), units=[20])
            jobs.append({"identity": folder.name, "status": "finished"})
    sweep = place / "sweeps" / "objective.k-1234"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    for _ in range(2):
        assert report([str(sweep), "--wandb"]) == 0
    err = capsys.readouterr().err
    folders = sorted((sweep / "reports" / sweep.name / "wandb").glob("offline-run-*"))
    assert "W&B:" not in err, err
    assert f"wandb sync {folders[-1].relative_to(tmp_path)}" in err

    read = records(folders[-1])
    (begun,) = [record["run"] for record in read if record["type"] == "run"]
    assert (begun["project"], begun["run_group"], begun["job_type"]) == ("thesis", sweep.name, "report")
    (again,) = [record["run"] for record in records(folders[0]) if record["type"] == "run"]
    assert again["run_id"] == begun["run_id"], "the same report is the same run"
    logged: dict[str, Any] = {}
    for record in read:
        if record["type"] == "history":
            logged |= record["history"]["item"]
    files = folders[-1] / "files"
    table = json.loads((files / logged["table.path"]).read_text())
    assert len(table["data"]) == 2
    assert table["data"][0][table["columns"].index("nll")] == pytest.approx(85.49)
    for name in ("bound_vs_k", "validation_mnist_L50", "active_units"):
        assert (files / logged[f"mnist/{name}.path"]).read_bytes().startswith(b"\x89PNG")
    assert "<!DOCTYPE html>" in (files / logged["page.path"]).read_text()[:200]
    summary: dict[str, Any] = {}
    for record in read:
        if record["type"] == "summary":
            summary.update(record["summary"]["update"])
    assert summary["mnist/iwae one_layer 50/nll"] == pytest.approx(85.0)
    assert report([str(place)]) == 0, "what it wrote is no run"
    assert "not in a table" not in capsys.readouterr().out
