"""The benchmark runs, writes a table, and detects a program that does other work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as bench
from benchmarks.cases import CASES, TINY, Job
from benchmarks.table import markdown, one_line


def test_it_measures_ours_and_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without MNIST and with a peer that is not installed; the table says both."""
    absent = bench.Contender("absent", "absent", requires=("no_such_package",))
    ours = replace(bench.CONTENDERS[0], options=("device.compile=off",))
    monkeypatch.setattr(bench, "CONTENDERS", (ours, absent))
    train, evaluate = TINY
    assert bench.main(["--cases", f"{train.name},{evaluate.name}", "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "results.json").read_text())
    for case in TINY:
        ours = record["cases"][case.name]["ours"]
        assert len(ours["ms"]) >= 5 and all(0 < ms < 10_000 for ms in ours["ms"])
        assert 100 < ours["peak_mb"] < 3000 and ours["beyond_mb"] < ours["peak_mb"]
    table = (folder / "table.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert f"|  | {train.name} | {evaluate.name} |" in table
    assert (
        "| ours | " in table and "no MNIST" in table and "absent is missing: not installed (no_such_package)" in table
    )
    assert not (folder / "files").exists()


def result(ms: float, **more: Any) -> dict[str, Any]:
    numbers = {"settings": "", "set_up": 3.0, "peak_mb": 300.0, "beyond_mb": 20.0}
    return {**numbers, "ms": [ms, 9 * ms, ms / 9], "cpu_ms": [ms, 9 * ms, ms / 9], **more}


def record(**results: Any) -> dict[str, Any]:
    machine = {"date": "", "processor": "", "cores": 2, "commit": None, "versions": {}}
    facts = {"command": "", "machine": machine, "data": "", "rounds": 3, "round_seconds": 1, "load_before": [0.0]}
    return {**facts, "rows": [*results], "missing": {}, "cases": {"20x5": results}, "whole": None}


def test_medians_are_divided_by_ours() -> None:
    table = markdown(record(ours=result(4.0), peer=result(10.0), broken={"failed": "why"}))
    assert "| ours | 4.00 (1.00) |" in table and "| peer | 10.0 (2.50) |" in table and "| broken | failed |" in table
    assert "the machine was busy" not in table


def test_a_busy_machine_is_mentioned() -> None:
    table = markdown(record(ours=result(4.0), peer=result(10.0, cpu_ms=[5.0])))
    assert "the machine was busy" in table
    assert "| peer | 10.0 (2.50) |" in table and "| peer | 5.00 (1.25) |" in table


@pytest.mark.parametrize(("factor", "same"), [(1.0, True), (1.001, True), (1.1, False)])
def test_another_step_is_seen(factor: float, same: bool, tmp_path: Path) -> None:
    """Steps of another length than ours."""
    np.savez(tmp_path / "weights_tiny.npz", w=np.zeros(3))
    np.savez(tmp_path / "ours.npz", w=np.ones(3))
    np.savez(tmp_path / "peer.npz", w=factor * np.ones(3))
    job, results = Job(TINY[0], tmp_path), {"ours": result(1), "peer": result(1)}
    checks = {label: {"bounds": [-1.0], "weights": str(tmp_path / f"{label}.npz")} for label in ("ours", "peer")}
    bench._compare(job, checks, results)
    assert results["peer"]["check"]["update"] == pytest.approx(factor - 1)
    assert results["peer"]["check"]["same"] is same
    assert ("other work" in markdown(record(**results))) is not same


def test_the_quick_selection_measures_the_ratios_of_the_speed_table() -> None:
    quick = {
        case.name: [c.label for c in bench.CONTENDERS if c.is_in(case, quick=True)] for case in CASES if case.quick
    }
    assert {"ours", "JAX", "Pythae"} <= {*quick["20x1"]} & {*quick["20x5"]} and "ours" in quick["NLL_5000"]
    assert one_line("20x5", {"ours": result(4.0), "JAX": result(3.0)}) == "20x5: ours 4.00 (1.00), JAX 3.00 (0.75) ms"


def test_cases_have_distinct_names() -> None:
    names = [case.name for case in (*CASES, *TINY)]
    assert len(set(names)) == len(names) and not any("," in name for name in names)
    assert {"20x1", "20x50 two_layer", "NLL_5000", "NLL_5000 2 cores"} <= set(names)
