"""The benchmark runs, writes a table, and detects a program that does other work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as bench
from benchmarks.cases import BIAS_IMAGES, CASES, TINY, Job
from benchmarks.reach import Estimate, Ladder, Reference, climb
from benchmarks.table import markdown, one_line
from iwae_cli.evaluation.proposals import GROUP


def test_it_measures_ours_and_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without MNIST and with a peer that is not installed; the table says both."""
    absent = bench.Contender("absent", "absent", requires=("no_such_package",))
    ours = replace(bench.CONTENDERS[0], options=("device.compile=off",))
    monkeypatch.setattr(bench, "CONTENDERS", (ours, absent))
    monkeypatch.setattr(bench, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(bench, "TINY_SECONDS", 0.5)
    train, evaluate, reach = TINY
    assert bench.main(["--cases", ",".join(case.name for case in TINY), "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "results.json").read_text())
    for case in (train, evaluate):
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
    measured = record["reach"][reach.name]
    (result,) = measured["results"].values()
    above, error = result["top"]
    assert measured["reference"]["error"] < 0.01 and above < 5 * error
    assert result["check"]["same"] and len(result["rungs"][0]["ms"]) >= 2 and "| ours | refined, k = " in table


class Methods:
    """Methods of known bias, nats by effort, with normal noise; an estimate costs a millisecond an image and effort."""

    def __init__(self, biases: dict[str, Callable[[int], float]], noise: float, seed: int = 0) -> None:
        self.biases, self.noise = biases, noise
        self.random = np.random.default_rng(seed)
        self.truth = self.random.normal(-90, 10, 20)
        self.reference = Reference(self.truth, 0.001)

    def ask(self, label: str, effort: int, seed: int) -> Estimate | None:
        if label == "broken":
            return None
        log_px = self.truth + self.biases[label](effort) + self.noise * self.random.normal(size=20)
        return Estimate([*log_px], 20 * effort / 1000, 20 * effort / 1000)

    def climb(self, first: int, factor: int, limit: float) -> dict[str, Any]:
        return climb(self.ask, dict.fromkeys(self.biases, Ladder(first, factor)), self.reference, limit)


def test_a_method_climbs_to_the_first_effort_that_is_right() -> None:
    """Biases 0.2, 0.04, 0.008, 0.0016 at efforts 10, 50, 250, 1250; one of 0.5 stays, and its time ends."""
    methods = {"good": lambda effort: -2 / effort, "bad": lambda effort: -0.5, "broken": lambda effort: 0.0}
    found = Methods(methods, noise=0.02).climb(10, 5, limit=200)
    good, bad = found["good"], found["bad"]
    assert good["reached"] and good["shown"] == "k = 250" and good["ms"][0] == pytest.approx(250)
    assert abs(good["bias"] + 0.008) < 4 * good["error"] < 0.02
    assert [rung["effort"] for rung in good["rungs"]] == [10, 50, 250, 1250]
    assert not bad["reached"] and [rung["effort"] for rung in bad["rungs"]] == [10, 50, 250, 1250]
    assert bad["bias"] == pytest.approx(-0.5, abs=0.03)
    assert found["broken"] == {}


def test_noise_lets_no_method_pass() -> None:
    """A bias of 0.03 with noise of 0.02, where single estimates look right; and one right at a single effort."""
    methods = {"noisy": lambda effort: -0.03, "once": lambda effort: 0.0 if effort == 10 else -0.05}
    for seed in range(100):
        found = Methods(methods, noise=0.1, seed=seed).climb(10, 2, limit=60)
        assert not found["noisy"]["reached"] and not found["once"]["reached"]
    # An error of 0.22 for one estimate, 0.04 for thirty: nothing can be shown, and no time is spent on it.
    blurred = Methods({"blurred": lambda effort: 0.0}, noise=1.0).climb(10, 2, limit=60)["blurred"]
    assert not blurred["reached"] and {len(rung["ms"]) for rung in blurred["rungs"]} == {2}


def result(ms: float, **more: Any) -> dict[str, Any]:
    numbers = {"settings": "", "set_up": 3.0, "peak_mb": 300.0, "beyond_mb": 20.0}
    return {**numbers, "ms": [ms, 9 * ms, ms / 9], "cpu_ms": [ms, 9 * ms, ms / 9], **more}


def record(**results: Any) -> dict[str, Any]:
    machine = {"date": "", "processor": "", "cores": 2, "commit": None, "versions": {}}
    facts = {"command": "", "machine": machine, "data": "", "rounds": 3, "round_seconds": 1, "load_before": [0.0]}
    return {**facts, "rows": [*results], "missing": {}, "cases": {"20x5": results}, "reach": {}, "whole": None}


def test_medians_are_divided_by_ours_and_a_busy_machine_is_mentioned() -> None:
    table = markdown(record(ours=result(4.0), peer=result(10.0), broken={"failed": "why"}))
    assert "| ours | 4.00 (1.00) |" in table and "| peer | 10.0 (2.50) |" in table and "| broken | failed |" in table
    assert "the machine was busy" not in table
    assert "the machine was busy" in markdown(record(ours=result(4.0), peer=result(10.0, cpu_ms=[5.0])))


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


def test_the_images_of_the_bias_are_fitted_together() -> None:
    assert BIAS_IMAGES == GROUP


def test_the_table_says_what_was_not_reached() -> None:
    """By hand: 80 ms reached; 2000 ms not."""
    shown = {"ms": [80.0, 70.0, 90.0], "cpu_ms": [70.0], "shown": "refined, k = 200", "reached": True}
    ours = {**shown, "bias": -0.004, "error": 0.003, "check": {"above": 0.001, "error": 0.003, "same": True}}
    q = {**ours, "ms": [2000.0], "cpu_ms": [1400.0], "shown": "k = 320,000", "reached": False, "bias": -0.2}
    high = {**ours, "check": {"above": 0.1, "error": 0.003, "same": False}}
    reference = {"k": 50_000, "log_px": -90.0, "error": 0.0012}
    results = {"ours": ours, "q": q, "high": high, "broken": {"failed": "why"}}
    whole = {
        **record(),
        "cases": {},
        "reach": {"NLL to 0.02": {"reference": reference, "limit": 60, "results": results}},
    }
    table = markdown(whole)
    assert "| ours | refined, k = 200 | 80.0 (1.00) | 70.0 (1.00) | -0.004 ± 0.003 |" in table
    assert "| q | k = 320,000 | more than 2000 (25.00) | more than 1400 (20.00) | -0.200 ± 0.003 |" in table
    assert "| broken | failed |" in table and "-90.000 ± 0.001 nats" in table and "60 processor seconds" in table
    assert "q +0.001 ± 0.003, high **other work**: +0.100 ± 0.003" in table
