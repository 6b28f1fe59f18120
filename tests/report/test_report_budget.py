"""Runs at equal training budgets, by curves whose values are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import Command, change, config, values, write

PASSES = 10


def trained(place: Path, objective: str, draws: int | None, gain: float, seed: int = 0, **options: Any) -> Path:
    """Write a run whose bound on every second pass is -100 + ``gain`` * pass, in nats."""
    folder = write(
        place, config(objective=objective, seed=seed, **options), values(85.0), names=("one_layer", objective)
    )
    change(
        folder / "result.json",
        epochs=PASSES,
        steps=PASSES * 2980,
        draws=draws,
        seconds={"train": 40.0, "evaluate": 1.0},
    )
    rows = [{"step": n, "pass": n, "train/bound": -100.0} for n in range(1, PASSES + 1)]
    rows = [{**row, "validation/bound": -100 + gain * row["pass"]} if row["pass"] % 2 == 0 else row for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """An objective at 1,000 draws a pass beside one at 4,000, of two seeds."""
    place = tmp_path / "outputs"
    for seed in range(2):
        trained(place, "elbo", 10_000, 1.0 + seed / 10, seed)
    trained(place, "iwae", 40_000, 2.0)
    return place


def test_bounds_at_equal_evaluations_lie_on_the_curves(runs: Path, command: Command) -> None:
    (table,) = json.loads(command(runs, "--budget", "evaluations", "--format", "json")[1])["tables"]
    elbo, iwae = ({level["draws"]: level for level in cell["at_budgets"]} for cell in table["cells"])
    assert list(elbo) == list(iwae) == [2500, 5000, 10_000]
    # 1,250 draws are pass 1.25, before the first validation of any run; two slopes, of 1 and 1.1 nats.
    bounds = [pytest.approx(-100 + 1.05 * n) for n in (2.5, 5, 10)]
    assert [level["bound"] for level in elbo.values()] == bounds
    assert elbo[10_000]["stderr_seeds"] == pytest.approx(0.5) and elbo[2500]["stderr_seeds"] == pytest.approx(0.125)
    assert [level["bound"] for level in iwae.values()] == [None, None, pytest.approx(-95)]
    out = command(runs, "--rows", "objective", "--columns=", "--budget", "evaluations")[1]
    line = next(line for line in out.splitlines() if line.strip().startswith("elbo"))
    assert "at 0.00125M" not in out and "better, at a quarter, half and all of the training of the run with" in out
    assert "-97.38 ± 0.12" in line and "-89.50 ± 0.50" in line and "0.01 " in line and " 40 " in line


def test_bounds_at_equal_seconds(runs: Path, command: Command) -> None:
    (table,) = json.loads(command(runs, "--budget", "seconds", "--format", "json")[1])["tables"]
    iwae = table["cells"][1]["at_budgets"]
    assert [(level["seconds"], level["bound"]) for level in iwae] == [
        *((10.0, pytest.approx(-95)), (20.0, pytest.approx(-90)), (40.0, pytest.approx(-80)))
    ]
    assert {cell["seconds"] for cell in table["cells"]} == {40.0}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"draws": None}, "draws are not recorded of 1 of 4 runs"),
        ({"draws": 40_000, "validation__k": 500}, "validation.k is 50 or 500"),
    ],
)
def test_what_cannot_be_compared_at_equal_budgets_is_said(
    runs: Path, command: Command, other: dict[str, Any], words: str
) -> None:
    trained(runs, "vr", gain=1.0, **other)
    code, out, err = command(runs, "--budget", "evaluations")
    assert (code, err) == (0, "") and f"not compared at equal evaluations: {words}" in out and "L_50 at" not in out


@pytest.mark.parametrize("form", ["terminal", "markdown", "csv", "latex"])
def test_every_format_has_the_bounds_at_equal_budgets(runs: Path, command: Command, form: str) -> None:
    out = command(runs, "--rows", "objective", "--columns=", "--budget", "evaluations", "--format", form)[1]
    assert "-97.375" in out if form == "csv" else "-97.38" in out


def test_a_curve_that_cannot_be_read_costs_the_comparison_alone(runs: Path, command: Command) -> None:
    broken = trained(runs, "vr", 40_000, 1.0)
    (broken / "metrics.jsonl").write_text('{"step": 1, "pass": "x"}\n')
    code, out, err = command(runs, "--budget", "evaluations")
    assert (code, err) == (0, "") and "not compared at equal evaluations: " in out and "line 1" in out and "vr" in out
    change(broken / "result.json", epochs=0, steps=0)
    assert "not recorded of 1 of 4 runs" in command(runs, "--budget", "evaluations")[1]


def test_a_validation_at_the_budget_itself_is_reached(tmp_path: Path, command: Command) -> None:
    """48 passes in 911.2748 s, validated every 6: an eighth of the product is below the sixth of its parts."""
    folder = trained(tmp_path, "iwae", 10_000, 1.0)
    change(folder / "result.json", epochs=48, steps=48 * 2980, seconds={"train": 911.2748, "evaluate": 1.0})
    rows = [{"step": n, "pass": n, "validation/bound": -100.0 + n} for n in range(6, 49, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (table,) = json.loads(command(tmp_path, "--budget", "seconds", "--format", "json")[1])["tables"]
    bounds = [level["bound"] for level in table["cells"][0]["at_budgets"]]
    assert bounds == [pytest.approx(-100 + n) for n in (6, 12, 24, 48)]


def test_unequal_backward_passes_are_said(runs: Path, command: Command) -> None:
    assert "second backward pass" not in command(runs, "--budget", "evaluations")[1]
    trained(runs, "iwae", 40_000, 1.0, objective__gradient="dreg")
    assert "second backward pass for every draw: dreg" in command(runs, "--budget", "evaluations")[1]


def test_what_draws_and_seconds_count_is_said(runs: Path, command: Command) -> None:
    trained(runs, "iwae", 10_000, 1.0, objective__gradient="stl", model__prior="vamp")
    draws, seconds = (command(runs, "--budget", unit)[1] for unit in ("evaluations", "seconds"))
    assert "caution: objective.gradient=stl scores every draw under q a second time" in draws
    assert "caution: model.prior=vamp passes its images through q in every step, which draws do not count" in draws
    assert "caution: seconds of training include its validations" in seconds and "include" not in draws
    assert all("caution: bounds of one seed have no error" in text for text in (draws, seconds))


def test_an_earlier_validation_is_advised_where_there_is_one(tmp_path: Path, command: Command) -> None:
    for every, advice in ((5, "; validation.every=1 is earliest"), (1, "")):
        folder = trained(tmp_path / str(every), "elbo", 1_000, 1.0, validation__every=every)
        rows = (folder / "metrics.jsonl").read_text().splitlines()[2:]
        (folder / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
        assert f"ends before the first validation of a run{advice}\n" in command(folder, "--budget", "evaluations")[1]
